"""The network in a checkpoint: of an interrupted run, or of any kept step.

inputs.json describes a run's network from its start on. So a checkpoint can be
loaded without the run's data, config and training stack. Nothing is written,
and a run that is under way is not disturbed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from maskconnect_jax import files
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import topology, wiring
from maskconnect_jax.method.wiring import RealMask
from maskconnect_jax.networks import models
from maskconnect_jax.run import checkpoint, model_record, stored

# Names of the files and folders with the accuracies of checkpoints. Earlier
# versions kept each in a folder in its checkpoint.
MEASURED = (checkpoint.ACCURACIES, 'metrics')


def description(
  model: Any,
  *,
  architecture: dict[str, Any],
  classes: Sequence[str],
  image_shape: Sequence[int],
  resize: int,
  mean: Sequence[float],
  std: Sequence[float],
  max_pixels: int,
  multi_label: bool = False,
) -> dict[str, Any]:
  """Returns what model.json and inputs.json say of a network.

  Args:
    model: has spec, version and, once it is known, the topology.
    architecture: see `inference.save`, like the other arguments.
    classes: see there.
    image_shape: see there.
    resize: see there.
    mean: see there.
    std: see there.
    max_pixels: see there.
    multi_label: see there.

  Returns:
    The content of model.json without its digest; the topology is None while the
    wiring is learned.
  """
  height, width, channels = image_shape
  kind: dict[str, Any] = {'schema': model_record.SCHEMA}
  if multi_label:
    kind = {'schema': model_record.MULTI_LABEL_SCHEMA, 'multi_label': True}
  return {
    **kind,
    'architecture': (
      {'version': model.version} | architecture | model.stack.spec.to_dict()
    ),
    'topology': model.topology and model.topology.to_dict(),
    'classes': list(classes),
    'preprocessing': {
      'height': height,
      'width': width,
      'channels': channels,
      'resize': resize,
      'mean': list(mean),
      'std': list(std),
      'max_pixels': max_pixels,
    },
  }


def read(
  workdir: Path, step: int | str | None
) -> tuple[Any, Any, dict[str, Any]]:
  """Reads the network in a checkpoint, wired as it is evaluated there.

  Args:
    workdir: the workdir of a run.
    step: the step of the checkpoint; 'best': the one with the best accuracy on
      the images that the run was evaluated on; None: the newest whole one.

  Returns:
    The pruned network's graph, its arrays, and its record, as in model.json.

  Raises:
    InputError: the workdir has no such checkpoint, or it is damaged.
  """
  record = _record_of(workdir)
  folder = workdir / 'checkpoints'
  steps = [
    int(path.name) for path in folder.glob('[0-9]*') if path.name.isdigit()
  ]
  chosen = choose(folder, steps, step)
  for number in chosen:
    try:
      return _network_in(folder / str(number), record)
    except InputError as error:
      if number == chosen[-1]:
        raise
      logging.warning('%s; trying the one before', error)
  raise AssertionError


def choose(
  folder: Path, steps: Iterable[int], step: int | str | None
) -> list[int]:
  """Returns the steps whose checkpoints to try, the first one first.

  Args:
    folder: the folder of the checkpoints; for 'best' it holds at least what
      MEASURED names.
    steps: those that have a checkpoint.
    step: see `read`.

  Raises:
    InputError: there is no such checkpoint.
  """
  known = stored.accuracies(folder / checkpoint.ACCURACIES)
  accuracies = {n: known.get(n, _accuracy(folder / str(n))) for n in steps}
  if step is None:
    chosen = sorted(accuracies, reverse=True)
  elif step == 'best':
    measured = {n: a for n, a in accuracies.items() if a is not None}
    chosen = sorted(measured, key=lambda n: (measured[n], n))[-1:]
  else:
    chosen = [n for n in accuracies if n == step]
  if not chosen:
    which = 'a measured accuracy' if step == 'best' else f'step {step}'
    there = ', '.join(map(str, sorted(accuracies))) or 'none'
    raise InputError(
      f'{folder} has no checkpoint of {which}; those there: {there}'
    )
  return chosen


def _record_of(workdir: Path) -> dict[str, Any]:
  path = workdir / 'inputs.json'
  inputs = files.read_json(
    path, dict[str, Any], remedy='--mode=train writes it again'
  )
  record = inputs.get('model')
  if not isinstance(record, dict):
    raise InputError(
      f'{path} does not describe the network: an earlier version wrote it;'
      ' --mode=train goes on with the run and writes it again'
    )
  try:
    model_record.checked(
      record | {'topology': record['topology'] or {}, 'digest': 0}
    )
  except (InputError, KeyError) as error:
    raise InputError(
      f'{path} is damaged: {error}; --mode=train writes it again'
    ) from error
  return record


def _accuracy(folder: Path) -> float | None:
  """Returns the accuracy that earlier versions kept in a checkpoint."""
  try:
    content = json.loads((folder / 'metrics' / 'metrics').read_bytes())
    return float(content['accuracy'])
  except (OSError, ValueError, TypeError, KeyError):
    return None


def _network_in(
  folder: Path, record: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
  state = checkpoint.read_state(folder)
  given = record['topology']
  model = nnx.eval_shape(
    lambda: models.create_model(
      **record['architecture'],
      topology=given and topology.from_dict(given),
    )
  )
  graph, *parts = nnx.split(model, nnx.Param, RealMask, nnx.BatchStat)
  own = state | state['average']  # averages, where the run takes some
  arrays = [own[name] for name in ('weights', 'masks', 'statistics')]
  for part, found in zip(parts, arrays, strict=True):
    expected = nnx.to_pure_dict(part)
    if jax.tree.map(jnp.shape, expected) != jax.tree.map(jnp.shape, found):
      raise InputError(f'{folder} is of another network than inputs.json says')
  model = nnx.merge(graph, *arrays)
  if model.topology is None:
    stack = model.stack
    mask = np.asarray(stack.mask())
    if (
      stack.spec.start == 'previous' and (mask == np.asarray(stack.valid)).all()
    ):
      raise InputError(
        f'{folder} is from before the wiring first narrowed. It has no topology'
        " yet: with start='previous' its sources still fade in"
      )
    model = wiring.freeze(model, topology.from_mask(mask))
  pruned = wiring.prune(model)
  network, left = nnx.split(pruned)
  frozen = {'topology': pruned.topology.to_dict()}
  return network, left, record | frozen
