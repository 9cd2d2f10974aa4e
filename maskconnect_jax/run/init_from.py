"""Begins a run with the arrays of another network: `config.init_from`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from maskconnect_jax.errors import InputError
from maskconnect_jax.method.wiring import RealMask
from maskconnect_jax.networks import published
from maskconnect_jax.run import inference


def filled(model: Any, folder: Path) -> tuple[Any, str]:
  """Returns a model with the arrays of another one, and a line about them.

  An array is taken if there is one of the same name and shape. All others keep
  their values: a head for other classes, the blocks that were pruned, and the
  real mask, which is always begun anew.

  Args:
    model: the network of the new run.
    folder: a model folder, or the workdir of a finished run; or a file of
      published weights, see `published`.

  Raises:
    InputError: there is no whole model, or no array that fits.
  """
  unknown: list[str] = []
  there: Any
  if folder.suffix in published.SUFFIXES and folder.is_file():
    there, unknown = published.renamed(published.read(folder), model.stages)
  else:
    there = inference.load(folder).arrays
  graph, state = nnx.split(model)
  taken, own, kept = [], [], []
  for path, leaf in nnx.to_flat_state(state):
    name = '/'.join(map(str, path))
    found = there.get(name)
    if not isinstance(leaf, RealMask):
      if found is not None and found.shape == leaf.shape:
        taken.append(name)
        leaf = leaf.replace(jnp.asarray(found, leaf.dtype))
      else:
        shape = 'is missing' if found is None else f'is {list(found.shape)}'
        kept.append(f'{name} {list(leaf.shape)} ({shape} there)')
    own.append((path, leaf))
  if not taken:
    raise InputError(
      f'config.init_from={folder} has no array that fits this network:'
      f' {kept[0]}'
    )
  names = {'/'.join(map(str, path)) for path, _ in own}
  unknown += sorted(there.keys() - names)
  line = f'{len(taken)} of {len(taken) + len(kept)} arrays begin as in {folder}'
  if kept:
    line += f'; the seed begins {", ".join(kept)}'
  if unknown:
    line += f'; not used: {", ".join(unknown)}'
  return nnx.merge(graph, nnx.from_flat_state(own)), line
