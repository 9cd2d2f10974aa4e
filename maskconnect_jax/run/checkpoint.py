"""Checkpoints of a run, written and read by Orbax.

`Checkpoints` keeps the newest N states of a run and the best one. It saves in
the background. When the newest checkpoint is damaged, it loads the one before.

Of several processes the first one writes, and each reads for itself. So they
need not see one folder: in the end a folder of the first one holds all.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from maskconnect_jax import files
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import model_arrays, storage, stored

P = TypeVar('P')

_policies = ocp.training.preservation_policies
# Errors of the system after which the files may still be whole.
_NO_DAMAGE = (
  errno.EACCES,
  errno.EPERM,
  errno.EMFILE,
  errno.ENFILE,
  errno.ENOMEM,
  errno.ESTALE,
)


# Checkpoints without a schema are of this one.
SCHEMA = 'maskconnect_jax.checkpoint/1'
ACCURACIES = 'accuracies.json'


class _Best:
  """Orbax keeps the checkpoint of the highest accuracy that is known.

  Attributes:
    accuracies: by step. Those of earlier versions are in Orbax's metrics.
  """

  def __init__(self, accuracies: dict[int, float]) -> None:
    self.accuracies = accuracies

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    del context
    known = {
      each.step: self.accuracies.get(
        each.step, each.metrics and each.metrics['accuracy']
      )
      for each in checkpoints
    }
    ranked = [(own, step) for step, own in known.items() if own is not None]
    best = max(ranked)[1] if ranked else None
    return [each.step == best for each in checkpoints]


class Checkpoints:
  """The checkpoints of one run, in one folder, one subfolder per step."""

  def __init__(self, folder: Path, *, keep: int) -> None:
    """Opens the folder, or makes it.

    Args:
      folder: `workdir/checkpoints`.
      keep: N; the newest N checkpoints and the most accurate one are kept.

    Raises:
      InputError: the path is no folder, or the folder cannot be made, read or
        written.
    """
    self.folder = folder
    self._writes = jax.process_index() == 0
    self._written_by_the_first: list[int] = []
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
      stored.set_aside_damaged(folder)
    except OSError as error:
      raise stored.unreadable(
        error.filename or folder, error.strerror
      ) from error
    self._best = _Best(stored.accuracies(folder / ACCURACIES))
    self._session = storage.Session(folder)
    failure = ''
    with storage.quiet() as settle:
      try:
        # Without LatestN, the best one alone would stay.
        self._checkpointer = self._session.call(
          ocp.training.Checkpointer,
          self._session.path,
          preservation_policy=_policies.AnyPreservationPolicy(
            [
              _policies.LatestN(keep),
              self._best,
            ]
          ),
          cleanup_tmp_directories=self._writes,
        )
      except Exception as error:  # a broken file makes Orbax raise anything
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
    found = {each.step for each in self._checkpointer.checkpoints}
    return sorted(found.union(self._written_by_the_first))

  def save(
    self,
    step: int,
    state: Any,
    progress: dict[str, Any],
    accuracy: float | None = None,
  ) -> None:
    """Saves in the background; an unfinished save never counts as a checkpoint.

    Waits for the previous save first. The next call raises an error of this
    save in the background. All processes call it together.

    Args:
      step: number of steps done.
      state: a dataclass of pytrees of arrays; may be donated once this returns.
      progress: JSON kept beside the state.
      accuracy: decides the best checkpoint; None if not measured so far.

    Raises:
      InputError: this checkpoint or the previous one cannot be written, as on a
        full disk; finished checkpoints stay.
    """
    self.wait()
    arrays = jax.tree.map(model_arrays.whole, _as_dict(state))
    if not self._writes:
      self._written_by_the_first.append(step)
      return
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
      # A copy: Orbax writes it later, while the caller changes its own.
      custom_metadata={
        'schema': SCHEMA,
        'progress': dict(progress),
        'digest': model_arrays.digest(arrays),
      },
    )
    self._saving = step, size, response

  def measured(self, step: int, accuracy: float) -> None:
    """Tells the accuracy of a step that was saved before it was measured.

    Args:
      step: of the last save.
      accuracy: decides the best checkpoint.

    Raises:
      InputError: the file of the accuracies cannot be written.
    """
    known = self._best.accuracies
    known[step] = accuracy
    for old in known.keys() - {*self.steps(), step}:
      del known[old]
    if self._writes:
      files.write_json(
        self.folder / ACCURACIES, {str(n): known[n] for n in sorted(known)}
      )

  def wait(self) -> None:
    """Waits until the last save is finished.

    Raises:
      InputError: the checkpoint cannot be written, as on a full disk.
    """
    if self._saving is None:
      return
    (step, size, response), self._saving = self._saving, None
    # Only this call ends the response's thread and event loop.
    self._write(step, size, response.result)

  def load_newest(
    self, like: Any, parse: Callable[[Any], P]
  ) -> tuple[Any, P] | None:
    """Returns the newest whole state and its progress; None without any.

    Args:
      like: a state that gives structure, shapes, dtypes and shardings.
      parse: turns the JSON kept beside a state into progress; raises ValueError
        where the JSON is damaged.

    Raises:
      InputError: there are checkpoints, and each is damaged, of another network
        or of another precision; or the system refuses to read one.
    """
    self.wait()
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        sharding=x.sharding
        if x.is_fully_addressable
        else model_arrays.first_device(),
      ),
      _as_dict(like),
    )
    steps, refusal = self.steps(), ''
    for step in reversed(steps):
      folder = self.folder / str(step)
      stored.check_permissions(folder)
      damage = other = version = ''
      no_damage = None
      with storage.quiet() as settle:
        try:
          loaded, saved = self._session.call(self._load, step, abstract)
          progress = parse(saved)
        except (MemoryError, jax.errors.JaxRuntimeError):
          raise
        except Exception as error:  # a broken file makes Orbax raise anything
          damage = storage.first_line(error)
          no_damage = storage.os_error(error)
          settle()
      if no_damage and no_damage.errno in _NO_DAMAGE:
        raise stored.unreadable(folder, no_damage.strerror)
      if not damage:
        placed = jax.tree.map(_placed, loaded, _as_dict(like))
        return type(like)(**placed), progress
      with storage.quiet() as settle:
        try:
          about = self._session.call(self._checkpointer.metadata, step)
          version = stored.of_another_version(
            about.custom_metadata, about.metadata, SCHEMA
          )
          other = version or stored.difference(about.metadata, abstract)
        except Exception:  # a broken file, as above
          settle()
      if other:
        refusal = refusal or f'checkpoint {folder} {other}'
        # This one is whole, and those before are of the same kind.
        if version or stored.X64 in other:
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
    """Waits for the last save, then releases Orbax's threads.

    Raises:
      InputError: the checkpoint cannot be written, as on a full disk.
    """
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
            # Orbax raises the error of a save once more here.
            if storage.os_error(error) is None:
              raise
            settle()
      finally:
        self._session.close()

  def _load(self, step: int, abstract: Any) -> tuple[Any, Any]:
    loaded = self._checkpointer.load(step, abstract)
    metadata = self._checkpointer.metadata(step).custom_metadata or {}
    if stored.of_another_version(metadata, {}, SCHEMA):
      raise ValueError('its schema is another one')
    if 'progress' not in metadata:
      raise ValueError('its metadata is missing or damaged')
    # Orbax does not notice a changed byte in an array.
    if model_arrays.digest(loaded) != metadata.get('digest'):
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
    unwritten = files.unwritten(self.folder / str(step), failure, size)
    with storage.quiet() as settle:
      settle()
    for half in self.folder.glob(f'{step}.*tmp*'):
      shutil.rmtree(half, ignore_errors=True)
    raise unwritten


def _placed(array: jax.Array, like: jax.Array) -> jax.Array:
  """Returns an array that this process has whole on the devices of another."""
  if like.is_fully_addressable:
    return array
  whole = np.asarray(array)
  return jax.make_array_from_callback(
    like.shape, like.sharding, lambda index: whole[index]
  )


def read_state(folder: Path) -> dict[str, Any]:
  """Reads one checkpoint of `Checkpoints`, and leaves the others alone.

  Args:
    folder: the checkpoint's own folder, such as checkpoints/24.

  Returns:
    The parts of the state as nested dicts of arrays on the first device. Keys
    that are numbers are ints, as in a network's pure state.

  Raises:
    InputError: the checkpoint is missing or damaged, or cannot be read.
  """
  sharding = model_arrays.first_device()
  stored.check_permissions(folder)
  with storage.Session(folder) as session, storage.quiet() as settle:
    try:
      found: Any = session.call(ocp.metadata, session.path).metadata
      own = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
          tuple(leaf.shape), leaf.dtype, sharding=sharding
        ),
        found,
      )
      loaded = _numbered(session.call(ocp.load, session.path, own))
      if model_arrays.digest(loaded) != stored.digest_of(folder):
        raise ValueError('its arrays are not those that were saved')
      return loaded
    except Exception as error:  # a broken file makes Orbax raise anything
      damage = storage.first_line(error)
      settle()
  raise InputError(f'checkpoint {folder} is damaged ({damage})')


def _numbered(tree: Any) -> Any:
  """Turns keys such as '10' into numbers, which sort as those of the state."""
  if isinstance(tree, dict):
    return {
      int(key) if str(key).isdigit() else key: _numbered(value)
      for key, value in tree.items()
    }
  return list(map(_numbered, tree)) if isinstance(tree, list | tuple) else tree


def _as_dict(state: Any) -> dict[str, Any]:
  # The names on disk do not depend on the class that holds the arrays.
  return dict(vars(state))
