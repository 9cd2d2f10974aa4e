"""Checkpoints of a run and arrays of a model: the only file that knows Orbax.

`Checkpoints` keeps the newest N states of a run and the best one, saves in the
background, and when the newest is damaged falls back to the one before.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from maskconnect_jax.config import InputError

_policies = ocp.training.preservation_policies


def _metric(metrics: Any) -> float:
  return float(metrics['accuracy']) if metrics else float('-inf')


class Checkpoints:
  """The checkpoints of one run, in one folder, one subfolder per step."""

  def __init__(self, folder: Path, *, keep: int) -> None:
    """Opens the folder, or makes it.

    Args:
      folder: `workdir/checkpoints`.
      keep: the newest so many are kept, and the most accurate one.
    """
    self.folder = folder
    # Without LatestN, keeping the best would evict the newest.
    self._checkpointer = ocp.training.Checkpointer(
      folder.absolute(),
      preservation_policy=_policies.AnyPreservationPolicy(
        [
          _policies.LatestN(keep),
          _policies.BestN(
            n=1, get_metric_fn=_metric, keep_checkpoints_without_metrics=False
          ),
        ]
      ),
      cleanup_tmp_directories=True,
    )

  def steps(self) -> list[int]:
    """Returns the steps that have a finished checkpoint, in rising order."""
    return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

  def save(
    self,
    step: int,
    state: Any,
    progress: dict[str, Any],
    accuracy: float | None,
  ) -> None:
    """Saves in the background; an unfinished save is never seen as one.

    Args:
      step: steps done.
      state: a pytree of arrays; may be donated once this returns.
      progress: JSON kept beside it.
      accuracy: what "best" compares; None if not measured at this step.
    """
    self._checkpointer.save_async(
      step,
      _as_dict(state),
      force=True,
      overwrite=True,
      metrics=None if accuracy is None else {'accuracy': accuracy},
      custom_metadata=progress,
    )

  def load_newest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """Returns the newest whole state and its progress, or None without any.

    Args:
      like: a state, for its structure, shapes, dtypes and shardings.

    Raises:
      InputError: there are checkpoints, and all are damaged.
    """
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _as_dict(like),
    )
    steps = self.steps()
    for step in reversed(steps):
      try:
        loaded = self._checkpointer.load(step, abstract)
        progress = self._checkpointer.metadata(step).custom_metadata
        if progress is None:
          raise ValueError('its metadata is missing')
      except Exception as error:  # whatever a broken file makes Orbax raise
        logging.warning(
          'checkpoint %s is damaged (%s); trying the one before',
          self.folder / str(step),
          _first_line(error),
        )
        continue
      return type(like)(**loaded), dict(progress)
    if steps:
      raise InputError(
        f'no checkpoint in {self.folder} can be read; all are damaged. Give'
        ' another --workdir, or remove that folder to start anew'
      )
    return None

  def close(self) -> None:
    """Waits, then releases Orbax's threads."""
    self._checkpointer.close()


def has_checkpoint(folder: Path) -> bool:
  """Whether the folder holds a finished checkpoint, told by its name alone."""
  return folder.is_dir() and any(
    re.fullmatch(r'\d+', child.name) for child in folder.iterdir()
  )


def save_arrays(folder: Path, arrays: dict[str, jax.Array]) -> None:
  """Writes named arrays into a new folder, and waits for it."""
  ocp.save(folder.absolute(), arrays)


def load_arrays(
  folder: Path, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Reads what `save_arrays` wrote, onto this machine's first device.

  Raises:
    InputError: the folder is missing or damaged, or holds other arrays.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  try:
    return ocp.load(
      folder.absolute(),
      {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in abstract.items()
      },
    )
  except Exception as error:  # whatever a broken file makes Orbax raise
    raise InputError(
      f'{folder} is no whole set of arrays ({_first_line(error)}); write it'
      ' again with --mode=train'
    ) from error


def _as_dict(state: Any) -> dict[str, Any]:
  # Plain names on disk, whatever class holds them in the program.
  return dict(vars(state))


def _first_line(error: Exception) -> str:
  text = (str(error) or type(error).__name__).splitlines()[0]
  return text if len(text) < 120 else text[:117] + '...'
