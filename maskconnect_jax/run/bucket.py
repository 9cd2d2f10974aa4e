"""Workdirs in a bucket, such as gs://bucket/run or s3://bucket/run.

A run works in a local folder. It is fetched from the bucket at the start, and
whatever has changed in it goes to the bucket every few seconds and at the end.
Once all is there, the local folder is removed, so the bucket alone says where a
run goes on, on any machine. A folder that stayed holds what a cut run did not
send; the next start on this machine sends it first. Of several processes each
fetches a folder of its own; the first one writes, and sends what it wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import jax
from absl import logging

from maskconnect_jax import files
from maskconnect_jax.config import given_path
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import compilation_cache, distributed, locks, workdirs
from maskconnect_jax.run.mirror import (
  Mirror,
  whole_checkpoints,
  whole_files,
  without_cut_checkpoints,
)

KEPT_DAYS = 30  # for which what cannot be sent any more is kept


def is_address(path: str | os.PathLike[str]) -> bool:
  """Whether a workdir is a folder in a bucket."""
  return isinstance(path, str) and bool(re.match(r'(gs|s3)://', path))


@contextlib.contextmanager
def mirrored(workdir: str | Path) -> Iterator[Path]:
  """Yields the local folder of a workdir, kept in step with its bucket.

  Args:
    workdir: an address, or a path, which is yielded as it is.

  Raises:
    InputError: a package is missing, or the bucket cannot be read or written;
      then nothing was written. Or another process of this machine uses the
      address. Or the last files could not be sent; the message names the local
      folder, which then stays. An InputError raised inside names the address
      instead of the local folder.
  """
  if not is_address(workdir):
    yield given_path(workdir, '--workdir')
    return
  mirror = Mirror(str(workdir))
  name = hashlib.sha256(mirror.address.encode()).hexdigest()[:16]
  if number := jax.process_index():  # it may share the machine with the first
    name += f'-{number}'
  home = _folder_of_copies() / name
  folder = home / mirror.address.rpartition('/')[2]
  places = {folder: mirror.address, home: mirror.address}
  with contextlib.ExitStack() as stack:
    stack.callback(_remove_if_empty, home)
    with _named(places):
      stack.enter_context(locks.locked(home))
      if number:
        stack.callback(files.remove, folder)
      else:
        mirror.check_writable()
        _remove_expired(home.parent)
        _send_what_is_left(mirror.address, folder)
      files.remove(folder)
      distributed.meet('sent')  # before the others fetch
      with files.replacing(folder) as fresh, _named({fresh: mirror.address}):
        fresh.mkdir()
        mirror.fetch(fresh)
      distributed.meet('fetched')  # before the first one sends anything
    if not number:
      stack.enter_context(mirror.following(folder))
    with _named(places):
      yield folder


def _send_what_is_left(address: str, folder: Path) -> None:
  """Sends what a run that was cut on this machine did not send.

  That is done if its newest checkpoint is newer than that in the bucket, or its
  results are missing there. If the bucket has another run by now, or none, the
  folder is renamed, since its checkpoints may be the only ones.

  Args:
    address: of the run.
    folder: the local folder that the run left; may be missing.

  Raises:
    InputError: the bucket cannot be read or written; the folder stays.
  """
  left = whole_files(folder)
  if not (steps := whole_checkpoints(left)):
    return
  mirror = Mirror(address)
  there = mirror.names()
  with reading(address, ('config.json', 'inputs.json')) as theirs:
    same = workdirs.are_of_one_run(folder, theirs)
  if same and _reached(left) > _reached(there):
    logging.warning(
      '%s: the last run on this machine was cut before all was sent; sending it'
      ' now, up to the checkpoint of step %d',
      address,
      steps[-1],
    )
    mirror.add(folder, there)
  elif not same:
    kept = folder.parents[1] / (
      f'{folder.name}.unsent-{time.strftime("%Y%m%d-%H%M%S")}-{os.getpid()}'
    )
    folder.rename(kept)
    os.utime(kept)
    logging.warning(
      '%s does not hold the run that was cut on this machine after step %d; its'
      ' files are kept in %s, which is a workdir, for %d days',
      address,
      steps[-1],
      kept,
      KEPT_DAYS,
    )


def _reached(names: Collection[str]) -> tuple[int, bool]:
  """Returns how far a run with these files is; more is greater."""
  return max(whole_checkpoints(names), default=0), 'summary.json' in names


def _remove_expired(folder: Path) -> None:
  """Removes what was kept and not touched for KEPT_DAYS."""
  for path in folder.glob('*.unsent-*-*-*'):
    # Somebody may have gone on in it since.
    with contextlib.suppress(OSError):  # another process is faster
      touched = max(p.lstat().st_mtime for p in (path, *path.rglob('*')))
      if time.time() - touched > KEPT_DAYS * 86_400:
        logging.warning('removing %s, kept for %d days', path, KEPT_DAYS)
        shutil.rmtree(path)


def _remove_if_empty(folder: Path) -> None:
  with contextlib.suppress(OSError):  # it holds what was not sent
    folder.rmdir()


@contextlib.contextmanager
def reading(
  workdir: str | Path,
  names: Collection[str],
  *,
  more: Callable[[Path, list[int]], Iterable[str]] | None = None,
  flag: str = '--workdir',
) -> Iterator[Path]:
  """Yields a local folder with the named files of a workdir, to be read.

  Args:
    workdir: an address, or a path, which is yielded as it is.
    names: names of files and folders, at any depth; the others are left out.
    more: for an address. It is given the local folder with these files, and the
      steps of the whole checkpoints in the bucket, in rising order. It returns
      the folders to fetch as well, such as 'checkpoints/24'.
    flag: for the message of a path that no file can have.

  Raises:
    InputError: a package is missing, or the bucket cannot be read. An
      InputError raised inside names the address instead of the local folder.
  """
  if not is_address(workdir):
    yield given_path(workdir, flag)
    return
  mirror = Mirror(str(workdir))
  with tempfile.TemporaryDirectory(prefix='maskconnect-') as temporary:
    # The end of the address, because reports name runs by it.
    folder = Path(temporary, *mirror.address.partition('://')[2].split('/'))
    with _named({folder: mirror.address}):
      folder.mkdir(parents=True)
      there = without_cut_checkpoints(mirror.names())
      mirror.copy(folder, (n for n in there if {*n.split('/')} & {*names}))
      for part in more(folder, whole_checkpoints(there)) if more else ():
        mirror.copy(folder, (n for n in there if n.startswith(f'{part}/')))
      yield folder


def _folder_of_copies() -> Path:
  """Makes and returns a folder, closed to other users, for local folders.

  Raises:
    InputError: none can be made.
  """
  for folder in compilation_cache.user_folders():
    if not (problem := compilation_cache.private(folder / 'buckets')):
      return folder / 'buckets'
  raise InputError(
    f'a workdir in a bucket needs a local folder: {problem}; XDG_CACHE_HOME'
    ' names another'
  )


def named(text: str, places: dict[Path, str]) -> str:
  """Returns the text with addresses instead of their local folders."""
  for folder, address in places.items():
    text = text.replace(str(folder), address)
  return text


@contextlib.contextmanager
def _named(places: dict[Path, str]) -> Iterator[None]:
  try:
    yield
  except InputError as error:
    raise InputError(named(str(error), places)) from error
