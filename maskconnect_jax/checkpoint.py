"""Checkpoints of a run and arrays of a model: the only file that knows Orbax.

`Checkpoints` keeps the newest N states of a run and the best one, saves in the
background, and when the newest is damaged falls back to the one before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging as standard_logging
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from maskconnect_jax.config import InputError

# After a failed read the others that it had begun end, each with a complaint.
_SETTLE_SECONDS = 0.3

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
    _drop_damaged_metrics(folder)
    # Without LatestN, keeping the best would evict the newest.
    with _quiet():
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
      # A copy: it is written later, and the caller's goes on changing.
      custom_metadata={
        'progress': dict(progress),
        'digest': digest(_as_dict(state)),
      },
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
      damage = ''
      with _quiet():
        try:
          loaded = self._checkpointer.load(step, abstract)
          metadata = self._checkpointer.metadata(step).custom_metadata or {}
          if 'progress' not in metadata:
            raise ValueError('its metadata is missing')
          # Orbax does not notice a changed byte in an array.
          if digest(loaded) != metadata.get('digest'):
            raise ValueError('its arrays are not those that were saved')
        except Exception as error:  # whatever a broken file makes Orbax raise
          damage = _first_line(error)
          time.sleep(_SETTLE_SECONDS)
      if not damage:
        return type(like)(**loaded), dict(metadata['progress'])
      logging.warning(
        'checkpoint %s is damaged (%s); trying the one before',
        self.folder / str(step),
        damage,
      )
    if steps:
      raise InputError(
        f'no checkpoint in {self.folder} can be read; all are damaged. Give'
        ' another --workdir, or remove that folder to start anew'
      )
    return None

  def close(self) -> None:
    """Waits, then releases Orbax's threads."""
    self._checkpointer.close()


def digest(arrays: Any) -> int:
  """Returns a CRC-32 over the bytes of all arrays of a pytree."""
  crc = 0
  for leaf in jax.tree.leaves(arrays):
    crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
  return crc


def save_arrays(folder: Path, arrays: dict[str, jax.Array]) -> None:
  """Writes named arrays into a new folder, and waits for it.

  Called by all processes together, of which the first one writes.
  """
  ocp.save(folder.absolute(), arrays)


def stored_arrays(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and dtype of what `save_arrays` wrote; reads no array.

  Raises:
    InputError: the folder is missing or damaged.
  """
  with _quiet():
    try:
      found: Any = ocp.metadata(folder.absolute()).metadata
      return {
        str(name): jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
        for name, leaf in found.items()
      }
    except Exception as error:  # whatever a broken file makes Orbax raise
      damage = _first_line(error)
      time.sleep(_SETTLE_SECONDS)
  raise InputError(
    f'{folder} is no whole set of arrays ({damage}); write it again with'
    ' --mode=train'
  )


def load_arrays(
  folder: Path, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Reads what `save_arrays` wrote, onto this machine's first device.

  Raises:
    InputError: the folder is missing or damaged, or holds other arrays.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with _quiet():
    try:
      return ocp.load(
        folder.absolute(),
        {
          name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
          for name, leaf in abstract.items()
        },
      )
    except Exception as error:  # whatever a broken file makes Orbax raise
      damage = _first_line(error)
      time.sleep(_SETTLE_SECONDS)
  raise InputError(
    f'{folder} is no whole set of arrays ({damage}); write it again with'
    ' --mode=train'
  )


def _as_dict(state: Any) -> dict[str, Any]:
  # Plain names on disk, whatever class holds them in the program.
  return dict(vars(state))


def _drop_damaged_metrics(folder: Path) -> None:
  # Orbax reads all of them when it opens the folder, and fails at such a one.
  # Without it, the checkpoint is one whose accuracy was not measured.
  for path in folder.glob('*/metrics/metrics'):
    try:
      float(json.loads(path.read_text(encoding='utf-8'))['accuracy'])
    except (ValueError, TypeError, KeyError):
      logging.warning('%s is damaged; removing it', path)
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps what Orbax tells of a broken file in the background off the terminal.

  To be caught inside: what an exception refers to is collected at the end,
  and complains once more as it goes.
  """
  disabled = standard_logging.root.manager.disable
  hooks = sys.excepthook, sys.unraisablehook
  standard_logging.disable(standard_logging.CRITICAL)
  sys.excepthook = lambda *_: None
  sys.unraisablehook = lambda _: None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      try:
        yield
      finally:
        gc.collect()
  finally:
    standard_logging.disable(disabled)
    sys.excepthook, sys.unraisablehook = hooks


def _first_line(error: Exception) -> str:
  while cause := error.__cause__ or error.__context__:
    if not isinstance(cause, Exception):
      break
    error = cause
  text = (str(error) or type(error).__name__).splitlines()[0]
  return text if len(text) < 120 else text[:117] + '...'
