"""A lock for a workdir, which one process at a time may write.

The operating system holds the lock and releases it when the process ends, also
when the process is killed. Some mounts of Lustre and NFS have no locks of the
operating system. There a file with the number of the process replaces the lock.
If a killed process left the file on this machine, the next process takes it
over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock
from absl import logging

from maskconnect_jax.errors import InputError

NAME = '.lock'
SOFT_NAME = '.lock.process'
PATIENCE = 5.0  # seconds to wait: a killed process takes a while to end


@contextlib.contextmanager
def locked(folder: Path, *, enabled: bool = True) -> Iterator[None]:
  """Makes a folder, and keeps other processes out of it inside the context.

  The lock's file is removed at the end. A folder made here is removed too, if
  it is empty then.

  Args:
    folder: the folder to lock, such as a workdir.
    enabled: whether to take the lock. Of the processes of one run, all but one
      pass False; they only make the folder.

  Raises:
    InputError: another process has the lock, or the folder cannot be made or
      written.
  """
  try:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      f'{folder} cannot be made ({error.strerror}); give another --workdir'
    ) from error
  try:
    with _held(folder) if enabled else contextlib.nullcontext():
      yield
  finally:
    with contextlib.suppress(OSError):  # a folder that is not empty stays
      for path in missing:
        path.rmdir()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
  path = folder / NAME
  try:
    path.open('ab').close()
  except OSError as error:
    raise InputError(
      f'{folder} cannot be written ({error.strerror}); give another --workdir'
    ) from error
  hard = filelock.FileLock(path, timeout=PATIENCE, fallback_to_soft=False)
  lock: filelock.BaseFileLock | None = hard
  try:
    try:
      _take(hard, folder)
    except OSError as error:
      logging.warning(
        '%s: this file system has no locks (%s); a file, %s, keeps other runs'
        ' of this machine out',
        folder,
        error.strerror or error,
        SOFT_NAME,
      )
      path.unlink(missing_ok=True)
      path = folder / SOFT_NAME
      lock = _soft(path, folder)
    yield
  finally:
    # The file is removed before the lock is released. So a process that waits
    # for the lock notices that the file is gone, and locks a new one.
    if lock is not None and lock.is_locked:
      if path.name == NAME:
        path.unlink(missing_ok=True)
      lock.release()


def _soft(path: Path, folder: Path) -> filelock.BaseFileLock | None:
  """Takes the file that replaces the lock; returns None if that fails too."""
  lock = filelock.SoftFileLock(path, timeout=PATIENCE)
  try:
    _take(lock, folder, f', or remove {path} if no process has')
  except OSError as error:
    logging.warning('%s: going on without a lock (%s)', folder, error)
    return None
  return lock


def _take(lock: filelock.BaseFileLock, folder: Path, remedy: str = '') -> None:
  try:
    lock.acquire()
  except filelock.Timeout as error:  # an OSError, too
    raise InputError(
      f'{folder} is being trained by another process already; wait for it, or'
      f' end it{remedy}'
    ) from error
