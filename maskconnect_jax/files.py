"""Files that are either there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskconnect_jax.config import InputError

# After these it is not the path that is wrong.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[Path]:
  """Yields a temporary path beside `path`, which takes its place at the end.

  What is written there, a file or a folder, appears under `path` in one step,
  or, if the block raises, not at all; what was there before then stays.

  Args:
    path: of the file or folder.
    size: bytes that the block writes, told if there is no room for them.

  Raises:
    InputError: it cannot be written: a full or read-only disk, no permission,
      a folder where a file belongs.
  """
  temporary, old = temporary_of(path), path.with_name(f'.{path.name}.old')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)  # what a killed run may have left
    try:
      yield temporary
      if temporary.is_dir():  # a folder can only be renamed to a free name
        _swap(temporary, path, old)
      else:
        os.replace(temporary, path)
    finally:
      _remove(temporary)
  except OSError as error:
    raise unwritten(path, error, size) from error


def temporary_of(path: Path) -> Path:
  """Returns what `replacing` yields: the same for every process."""
  return path.with_name(f'.{path.name}.tmp')


def write_text(path: Path, text: str) -> None:
  """Writes a text file atomically. Raises InputError as `replacing`."""
  content = text.encode('utf-8')
  with replacing(path, len(content)) as temporary:
    temporary.write_bytes(content)


def write_json(path: Path, record: Any) -> None:
  """Writes readable JSON atomically; a NaN or infinity is an error."""
  write_text(path, json.dumps(record, indent=2, allow_nan=False) + '\n')


def unwritten(
  path: Path, error: OSError, size: int | None = None
) -> InputError:
  """Returns the one line that tells why `path` could not be written.

  Args:
    path: what was to be written.
    error: what the operating system said.
    size: bytes that were to be written, if known.
  """
  why = error.strerror or str(error) or type(error).__name__
  for parent in path.parents:
    if os.path.lexists(parent) and not parent.is_dir():
      why = f'{parent} is a file, not a folder'
  if error.errno not in _NO_ROOM:
    return InputError(f'{path} cannot be written: {why}')
  room = f'; {size:,} bytes are needed' if size is not None else ''
  with contextlib.suppress(OSError):
    existing = next(p for p in path.absolute().parents if p.exists())
    room += f', {shutil.disk_usage(existing).free:,} are free there'
  return InputError(
    f'{path} cannot be written: {why}{room}. Make room, and give the same'
    ' command again'
  )


def _swap(temporary: Path, path: Path, old: Path) -> None:
  """Puts one folder in the place of another, which stays unless it succeeds."""
  _remove(old)
  try:
    if os.path.lexists(path):
      os.rename(path, old)
    os.rename(temporary, path)
  except BaseException:
    if os.path.lexists(old) and not os.path.lexists(path):
      os.rename(old, path)
    raise
  _remove(old)


def _remove(path: Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
