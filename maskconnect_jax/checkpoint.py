"""Checkpoints of a run and arrays of a model: the only file that calls Orbax.

`Checkpoints` keeps the newest N states of a run and the best one, saves in the
background, and when the newest is damaged falls back to the one before.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from maskconnect_jax import files, storage
from maskconnect_jax.config import InputError

_policies = ocp.training.preservation_policies
_X64 = 'JAX_ENABLE_X64'
_Kind: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]

_METADATA = '_CHECKPOINT_METADATA'
# What Orbax writes there, and insists on when it opens the folder.
_KINDS: dict[str, tuple[type, ...]] = {
  'item_handlers': (dict, str),
  'metrics': (dict,),
  'performance_metrics': (dict,),
  'init_timestamp_nsecs': (int, type(None)),
  'commit_timestamp_nsecs': (int, type(None)),
  'custom_metadata': (dict, type(None)),
}


def _metric(metrics: Any) -> float:
  return float(metrics['accuracy']) if metrics else float('-inf')


class Checkpoints:
  """The checkpoints of one run, in one folder, one subfolder per step."""

  def __init__(self, folder: Path, *, keep: int) -> None:
    """Opens the folder, or makes it.

    Args:
      folder: `workdir/checkpoints`.
      keep: the newest so many are kept, and the most accurate one.

    Raises:
      InputError: it is no folder, or cannot be made, read or written.
    """
    self.folder = folder
    self._saving: tuple[int, int, Any] | None = None
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
      raise InputError(
        f'{folder} is a file, not a folder; move it away, or give another'
        ' --workdir'
      ) from error
    except OSError as error:
      raise files.unwritten(folder, error) from error
    try:
      _set_aside_damaged(folder)
    except OSError as error:
      raise InputError(
        f'{error.filename or folder} cannot be read ({error.strerror}); allow'
        ' it, or give another --workdir'
      ) from error
    self._session = storage.Session(folder)
    failure = ''
    with storage.quiet() as settle:
      try:
        # Without LatestN, keeping the best would evict the newest.
        self._checkpointer = self._session.call(
          ocp.training.Checkpointer,
          self._session.path,
          preservation_policy=_policies.AnyPreservationPolicy(
            [
              _policies.LatestN(keep),
              _policies.BestN(
                n=1,
                get_metric_fn=_metric,
                keep_checkpoints_without_metrics=False,
              ),
            ]
          ),
          cleanup_tmp_directories=True,
        )
      except Exception as error:  # whatever a broken file makes Orbax raise
        failure = storage.first_line(error)
        settle()
    if failure:
      self._session.close()
      raise InputError(
        f'{folder} cannot be opened ({failure}); remove what is damaged there,'
        ' or give another --workdir'
      )
    self._closed = False

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

    Waits for the save before. An error in the background is raised by the
    next call.

    Args:
      step: steps done.
      state: a pytree of arrays; may be donated once this returns.
      progress: JSON kept beside it.
      accuracy: what "best" compares; None if not measured at this step.

    Raises:
      InputError: this one or the one before cannot be written, as on a full
        disk; those that are finished stay.
    """
    self.wait()
    arrays = _as_dict(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    response = self._write(
      step,
      size,
      self._checkpointer.save_async,
      step,
      arrays,
      force=True,
      overwrite=True,
      metrics=None if accuracy is None else {'accuracy': accuracy},
      # A copy: it is written later, and the caller's goes on changing.
      custom_metadata={'progress': dict(progress), 'digest': digest(arrays)},
    )
    self._saving = step, size, response

  def wait(self) -> None:
    """Waits until the last save is finished. Raises InputError as `save`."""
    if self._saving is None:
      return
    (step, size, response), self._saving = self._saving, None
    # The response's thread and event loop end with this call, and not before.
    self._write(step, size, response.result)

  def load_newest(
    self, like: Any, progress: Mapping[str, Any] | None = None
  ) -> tuple[Any, dict[str, Any]] | None:
    """Returns the newest whole state and its progress, or None without any.

    Args:
      like: a state, for its structure, shapes, dtypes and shardings.
      progress: what that of the checkpoint holds at least, for its kinds.

    Raises:
      InputError: there are checkpoints, and all are damaged, of another
        network or of another precision; or one may not be read.
    """
    self.wait()
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _as_dict(like),
    )
    steps, refusal = self.steps(), ''
    for step in reversed(steps):
      folder = self.folder / str(step)
      _check_permissions(folder)
      damage = other = ''
      with storage.quiet() as settle:
        try:
          loaded, saved = self._session.call(self._load, step, abstract)
          _check_progress(saved, progress or {})
        except Exception as error:  # whatever a broken file makes Orbax raise
          damage = storage.first_line(error)
          settle()
      if not damage:
        return type(like)(**loaded), saved
      with storage.quiet() as settle:
        try:
          found = self._session.call(self._checkpointer.metadata, step).metadata
          other = _difference(found, abstract)
        except Exception:  # as above
          settle()
      if other:
        refusal = refusal or f'checkpoint {folder} {other}'
        # It is whole, and the ones before are as it is.
        if _X64 in other:
          break
      logging.warning(
        'checkpoint %s %s trying the one before',
        folder,
        other or f'is damaged ({damage});',
      )
    if refusal:
      raise InputError(f'{refusal} give another --workdir')
    if steps:
      raise InputError(
        f'no checkpoint in {self.folder} can be read; all are damaged. Give'
        ' another --workdir, or remove that folder to start anew'
      )
    return None

  def close(self) -> None:
    """Waits, then releases Orbax's threads. Raises InputError as `save`."""
    if self._closed:
      return
    self._closed = True
    try:
      self.wait()
    finally:
      try:
        with storage.quiet() as settle:
          try:
            self._session.call(self._checkpointer.close)
          except Exception as error:
            # That of a save is raised once more.
            if storage.os_error(error) is None:
              raise
            settle()
      finally:
        self._session.close()

  def _load(self, step: int, abstract: Any) -> tuple[Any, Any]:
    loaded = self._checkpointer.load(step, abstract)
    metadata = self._checkpointer.metadata(step).custom_metadata or {}
    if 'progress' not in metadata:
      raise ValueError('its metadata is missing or damaged')
    # Orbax does not notice a changed byte in an array.
    if digest(loaded) != metadata.get('digest'):
      raise ValueError('its arrays are not those that were saved')
    return loaded, metadata['progress']

  def _write(
    self, step: int, size: int, function: Any, *args: Any, **kwargs: Any
  ) -> Any:
    failure = None
    try:
      return self._session.call(function, *args, **kwargs)
    except Exception as error:
      failure = storage.os_error(error)
      if failure is None:
        raise
    with storage.quiet() as settle:
      settle()
    if jax.process_index() == 0:
      for half in self.folder.glob(f'{step}.*tmp*'):
        shutil.rmtree(half, ignore_errors=True)
    raise files.unwritten(self.folder / str(step), failure, size)


def digest(arrays: Any) -> int:
  """Returns a CRC-32 over the bytes of all arrays of a pytree."""
  crc = 0
  for leaf in jax.tree.leaves(arrays):
    crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
  return crc


def save_arrays(folder: Path, arrays: dict[str, jax.Array]) -> None:
  """Writes named arrays into a new folder, and waits for it.

  Called by all processes together, of which the first one writes. Ctrl-C is
  raised when they are written.

  Raises:
    OSError: they cannot be written, as on a full disk.
    InputError: Orbax cannot take the path.
  """
  failure = None
  with storage.Session(folder) as session:
    try:
      session.call(ocp.save, session.path, arrays)
    except Exception as error:
      failure = storage.os_error(error)
      if failure is None:
        raise
    if failure:
      with storage.quiet() as settle:
        settle()
  if failure:
    raise failure


def load_arrays(
  folder: Path, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Reads what `save_arrays` wrote, onto this machine's first device.

  Raises:
    InputError: the folder is missing or damaged, or holds other arrays.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  own = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    for name, leaf in abstract.items()
  }
  other = ''
  with storage.Session(folder) as session, storage.quiet() as settle:
    try:
      found = session.call(ocp.metadata, session.path).metadata
      other = _difference(found, own)
      if not other:
        return session.call(ocp.load, session.path, own)
    except Exception as error:  # whatever a broken file makes Orbax raise
      damage = storage.first_line(error)
      settle()
  if other:
    raise InputError(f'{folder} {other} write it again with --mode=train')
  raise InputError(
    f'{folder} is no whole set of arrays ({damage}); write it again with'
    ' --mode=train'
  )


def _as_dict(state: Any) -> dict[str, Any]:
  # Plain names on disk, whatever class holds them in the program.
  return dict(vars(state))


def _set_aside_damaged(folder: Path) -> None:
  """Renames what Orbax, which reads all of it on opening, would fail at.

  Without its metrics, a checkpoint is one whose accuracy was not measured.
  Without its metadata, it is one that is damaged.
  """
  for path in folder.glob('*/metrics/metrics'):
    if not _is_json(path, lambda content: float(content['accuracy'])):
      logging.warning('%s is damaged; going on without it', path)
      _set_aside(path)
  for path in folder.glob(f'*/{_METADATA}'):
    if not _is_json(path, _check_metadata):
      _set_aside(path)


def _is_json(path: Path, check: Any) -> bool:
  try:
    check(json.loads(path.read_bytes()))
  except (ValueError, TypeError, KeyError, RecursionError, IsADirectoryError):
    return False
  except FileNotFoundError:  # another process was faster
    return True
  return True


def _check_metadata(content: Any) -> None:
  if not isinstance(content, dict):
    raise TypeError('no object')
  for name, kinds in _KINDS.items():
    if name in content and not isinstance(content[name], kinds):
      raise TypeError(name)


def _set_aside(path: Path) -> None:
  with contextlib.suppress(FileNotFoundError):  # another process was faster
    path.rename(path.with_name(f'{path.name}.damaged'))


def _check_permissions(folder: Path) -> None:
  """Raises InputError where the user may not read: that is no damage."""
  for path in (folder, *folder.rglob('*')):
    needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    if not os.access(path, needed, effective_ids=True):
      raise InputError(
        f'{path} cannot be read (no permission); allow it, or give another'
        ' --workdir'
      )


def _check_progress(found: Any, least: Mapping[str, Any]) -> None:
  """Raises ValueError unless it has what `least` has, and numbers beside.

  None is negative: they are of images, seconds, records and accuracies.
  """
  if not isinstance(found, dict):
    raise ValueError('its progress is no object')
  for name in [*least, *found]:
    value, default = found.get(name), least.get(name)
    if isinstance(default, list):
      fits = isinstance(value, list) and all(map(_is_count, value))
    elif name in least:
      fits = _is_count(value)
    else:
      fits = value is None or _is_count(value)
    if not fits:
      raise ValueError(f'its progress has no {name!r} that can be used')


def _is_count(value: Any) -> bool:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and 0 <= value < math.inf


def _difference(found: Any, own: Any) -> str:
  """Returns how the arrays that are stored differ from ours, '' if not at all.

  Half a sentence, which a remedy ends. Named is the first one that differs in
  its name, shape or dtype. Nothing stored at all is damage, and no difference.
  """
  there, here = dict(_described(found)), dict(_described(own))
  differing = {
    name: (there.get(name), here.get(name))
    for name in (*here, *there)
    if there and there.get(name) != here.get(name)
  }
  if not differing:
    return ''
  name = next(iter(differing))
  was, now = map(_in_words, differing[name])
  told = f'array {name} is {was} there, and {now} now'
  wide = {_is_wide(*pair) for pair in differing.values()}
  if wide == {True}:
    return f'was written with {_X64}=1 ({told}); set it, or'
  if wide == {False}:
    return f'was written without {_X64} ({told}); unset it, or'
  return f'is of another network ({told});'


def _is_wide(there: _Kind | None, here: _Kind | None) -> bool | None:
  """Whether an array differs in having 64 bits, or in having 32; else None."""
  if there is None or here is None:
    return None
  (shape, kind), (own_shape, own_kind) = there, here
  sizes = kind.itemsize, own_kind.itemsize
  if (shape, kind.kind, {*sizes}) != (own_shape, own_kind.kind, {4, 8}):
    return None
  return sizes == (8, 4)


def _described(tree: Any) -> Iterator[tuple[str, _Kind]]:
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if hasattr(leaf, 'shape'):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      yield name, (tuple(leaf.shape), np.dtype(leaf.dtype))


def _in_words(kind: _Kind | None) -> str:
  return 'missing' if kind is None else f'{kind[1]} {list(kind[0])}'
