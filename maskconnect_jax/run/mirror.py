"""A folder in a bucket, and a local folder that is kept in step with it.

Objects of a bucket are whole or not there, but a checkpoint is many objects.
So the object without which a checkpoint does not count goes up last and is
deleted first. Logs go up before checkpoints, so the log in the bucket reaches
as far as each checkpoint there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

from maskconnect_jax import files
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import storage

SECONDS = 15.0  # between looks at what has changed in the local folder

# Scheme -> (the module that fsspec needs for it, the extra that installs it).
_SCHEMES = {'gs': ('gcsfs', 'gcs'), 's3': ('s3fs', 's3')}
_COUNTS = '_CHECKPOINT_METADATA'  # without it a checkpoint does not count
_NOT_FETCHED = ('tensorboard', 'profile')  # a run only adds files there


class Mirror:
  """A folder in a bucket, and which of its objects a local folder has.

  Attributes:
    address: without a slash at its end.
  """

  def __init__(self, address: str) -> None:
    """Opens the file system; neither reads nor writes.

    Args:
      address: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.

    Raises:
      InputError: the address names no folder, or a package is missing.
    """
    self.address = address.rstrip('/')
    scheme, _, path = self.address.partition('://')
    bucket, _, name = path.partition('/')
    if not (bucket and name) or {'', '.', '..'} & {*path.split('/')}:
      raise InputError(
        f'{address!r} names no folder in a bucket; give one such as'
        f' {scheme}://{bucket or "bucket"}/run'
      )
    module, extra = _SCHEMES[scheme]
    if importlib.util.find_spec(module) is None:
      raise InputError(
        f'{self.address} needs the package {module}: pip install'
        f" 'maskconnect_jax[{extra}]'"
      )
    import fsspec

    with self._failing('opened'):
      self._system: Any = fsspec.filesystem(scheme, use_listings_cache=False)
    self._root = path
    # Name of each object that the local folder has, or that is to be deleted ->
    # the state of the local file when it was equal to the object.
    self._known: dict[str, tuple[int, ...]] = {}

  def check_writable(self) -> None:
    """Writes and deletes an empty object.

    Raises:
      InputError: the bucket is not there, or refuses it.
    """
    probe = f'{self._root}/.writable'
    with self._failing('written'):
      self._system.pipe_file(probe, b'')
      self._system.rm_file(probe)

  def names(self) -> list[str]:
    """Returns the names of the objects, in order.

    Raises:
      InputError: the bucket cannot be read.
    """
    with self._failing('read'):
      self._system.invalidate_cache()
      found = [
        path.removeprefix(f'{self._root}/')
        for path in self._system.find(self._root)
      ]
    # Objects may have any name; one with a dot is another process's probe.
    return sorted(
      name
      for name in found
      if all(part and part[0] != '.' for part in name.split('/'))
    )

  def fetch(self, folder: Path) -> None:
    """Copies all that a run needs to go on into a new folder.

    Checkpoints that are not whole are left out, and the next `push` deletes
    them.

    Args:
      folder: an empty folder.

    Raises:
      InputError: the bucket cannot be read, or the folder cannot be written.
    """
    there = [
      name
      for name in self.names()
      if name.partition('/')[0] not in _NOT_FETCHED
    ]
    wanted = without_cut_checkpoints(there)
    self._known = dict.fromkeys(there, ())
    self.copy(folder, wanted)
    self._known |= {name: _state(folder / name) for name in wanted}

  def copy(self, folder: Path, names: Iterable[str]) -> None:
    """Copies objects into a folder.

    Raises:
      InputError: the bucket cannot be read, or the folder cannot be written.
    """
    wanted = [*names]
    try:
      for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise files.unwritten(folder, error) from error
    with self._failing('read'):
      self._system.get(
        [f'{self._root}/{name}' for name in wanted],
        [str(folder / name) for name in wanted],
      )

  @contextlib.contextmanager
  def following(self, folder: Path) -> Iterator[None]:
    """Sends what changes in a folder, every few seconds and at the end.

    What cannot be sent is told of once, and tried again later. Once all is
    sent, at the end, the folder is removed.

    Args:
      folder: as `fetch` left it.

    Raises:
      InputError: at the end, the bucket does not take the last files. They stay
        in the folder, which the message names.
    """
    over, failed = threading.Event(), False

    def follow() -> None:
      nonlocal failed
      while not over.wait(SECONDS):
        try:
          self.push(folder)
        except InputError as error:
          if not failed:
            logging.warning('%s; trying again', error)
          failed = True
        else:
          failed = False

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    clean = False
    try:
      yield
      clean = True
    finally:
      try:
        over.set()
        thread.join()
        self.push(folder)
      except BaseException as error:  # Ctrl-C, too
        refused = isinstance(error, InputError)
        message = (
          f'{error if refused else f"{self.address} lacks the last files"}; all'
          f' files are in {folder}, which is a workdir. The same command on'
          ' this machine sends them first'
        )
        if refused and clean:
          raise InputError(message) from error
        logging.warning('%s', message)
        if not refused:
          raise  # else the error inside says what ended it
      else:
        files.remove(folder)

  def add(self, folder: Path, there: Collection[str]) -> None:
    """Sends a folder, and deletes nothing.

    Whole checkpoints stay as they are: those of a step are equal, but the names
    of their files differ.

    Args:
      folder: the folder of the same run.
      there: the names of the objects in the bucket.

    Raises:
      InputError: the bucket cannot be written.
    """
    whole = {f'checkpoints/{step}' for step in whole_checkpoints(there)}
    here = whole_files(folder)
    self._known = {n: here[n] for n in here if _checkpoint_of(n) in whole}
    self.push(folder)

  def push(self, folder: Path) -> None:
    """Sends the files that have changed, then deletes those that are gone.

    Raises:
      InputError: the bucket cannot be written.
    """
    here = whole_files(folder)
    vanished: set[str] = set()
    with self._failing('written'):
      for name in sorted(here, key=_turn):
        group = _checkpoint_of(name)
        if here[name] == self._known.get(name) or group in vanished:
          continue
        try:
          self._system.put_file(str(folder / name), f'{self._root}/{name}')
        except FileNotFoundError:
          if (folder / name).exists():  # no: the bucket is gone
            raise
          vanished.add(group)  # the run deletes its older checkpoints
        else:
          self._known[name] = here[name]
      gone = self._known.keys() - here.keys()
      for name in sorted(gone, key=_turn, reverse=True):
        with contextlib.suppress(FileNotFoundError):
          self._system.rm_file(f'{self._root}/{name}')
        del self._known[name]

  @contextlib.contextmanager
  def _failing(self, done: str) -> Iterator[None]:
    """Turns any error into an InputError; each file system has its own."""
    try:
      yield
    except Exception as error:
      raise InputError(
        f'{self.address} cannot be {done} ({storage.first_line(error)}); check'
        ' the address, and the credentials of this machine'
      ) from error


def without_cut_checkpoints(names: Collection[str]) -> list[str]:
  """Leaves out what was sent of a checkpoint before its sending was cut."""
  there = {*names}
  return [
    name
    for name in names
    if (group := _checkpoint_of(name)) == name or f'{group}/{_COUNTS}' in there
  ]


def whole_checkpoints(names: Collection[str]) -> list[int]:
  """Returns the steps of the whole checkpoints among names, in rising order."""
  parts = [name.split('/') for name in names if name.endswith(f'/{_COUNTS}')]
  return sorted(
    int(step)
    for first, step, *rest in parts
    if first == 'checkpoints' and step.isdigit() and rest == [_COUNTS]
  )


def whole_files(folder: Path) -> dict[str, tuple[int, ...]]:
  """Returns the files that are not being written, and the state of each."""
  found = {}
  for path, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if _is_whole(name)]
    for name in filter(_is_whole, names):
      file = Path(path, name)
      if state := _state(file):
        found[file.relative_to(folder).as_posix()] = state
  return found


def _is_whole(name: str) -> bool:
  # Those of `files.replacing` and `locks`, and Orbax's unfinished checkpoints.
  return name[0] != '.' and '.orbax-checkpoint-tmp' not in name


def _state(file: Path) -> tuple[int, ...]:
  """Returns what changes with a file's content; () if it is gone."""
  try:
    now = file.stat()
  except FileNotFoundError:
    return ()
  return now.st_ino, now.st_mtime_ns, now.st_size


def _checkpoint_of(name: str) -> str:
  parts = name.split('/')
  return '/'.join(parts[:2]) if parts[0] == 'checkpoints' else name


def _turn(name: str) -> tuple[int, int, bool, str]:
  """Sorts names by when they go up; they are deleted in the reverse order.

  Older checkpoints go up first, and their accuracies before them. So the newest
  one in the bucket says that those before it are there.
  """
  first, *rest = name.split('/')
  order = ('config.json', '', 'checkpoints', 'model', 'summary.json')
  place = order.index(first) if first in order else 1
  last = bool(rest) and rest[-1] in (_COUNTS, 'model.json')
  step = -1
  if place == 2 and len(rest) > 1:
    step = int(rest[0]) if rest[0].isdigit() else 0
  return place, step, last, name
