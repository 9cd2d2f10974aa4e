"""One lock for a folder that one process at a time may write: a workdir.

The operating system holds it, so that it ends with the process that took it,
however that ends. Where the file system has no such locks, as some mounts of
Lustre and NFS, a file with the number of the process stands in for it; one that
a killed process left on this machine is noticed and taken over.
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
PATIENCE = 5.0  # seconds: a process that was killed takes a while to end


@contextlib.contextmanager
def locked(folder: Path, *, enabled: bool = True) -> Iterator[None]:
  """Makes a folder, and keeps other processes out of it for a while.

  What is made here, folders included, is gone at the end if nothing else has
  been put there.

  Args:
    folder: such as a workdir.
    enabled: False on all but one of the processes that share the folder, which
      then only make it.

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
    with contextlib.suppress(OSError):  # something is in it: it stays
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
    # Before it is released: whoever waits for this very file notices that it is
    # no longer in the folder, and takes the lock of the next one.
    if lock is not None and lock.is_locked:
      if path.name == NAME:
        path.unlink(missing_ok=True)
      lock.release()


def _soft(path: Path, folder: Path) -> filelock.BaseFileLock | None:
  """Takes the file that stands in for a lock; None where that fails too."""
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
