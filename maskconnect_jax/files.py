"""Writes files that exist completely or not at all, and reads JSON files."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from maskconnect_jax.errors import InputError

_MAX_JSON = 2**26  # bytes; 1,000 blocks with every source need 2**24

# Errors that mean a full disk or quota, not a wrong path.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A temporary name: that of the file, then the machine, the process and the
# number of the write. Earlier versions wrote .NAME.tmp in every process.
_TEMPORARY = re.compile(
  r'\.(?P<name>.+?)'
  r'(\.(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})-\d+)?\.tmp',
  re.DOTALL,
)
# After this a file of another machine's process counts as left behind.
_PATIENCE = 86_400.0  # seconds
_numbers = itertools.count()
_being_written: set[str] = set()  # temporary names of this process


def check_output(path: Path) -> None:
  """Raises InputError if a file cannot be written, before any work is done.

  Missing folders are no error: writing the file makes them.
  """
  if path.is_dir():
    raise InputError(f'{path} is a folder; give the name of a file')
  there = path.parent
  while not there.exists() and there != there.parent:
    there = there.parent
  if not there.is_dir():
    raise InputError(
      f'{path} cannot be written: {there} is not a folder; give another name'
    )
  if not os.access(there, os.W_OK | os.X_OK):
    raise InputError(
      f'{path} cannot be written: no permission to write into {there}'
    )


@contextlib.contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[Path]:
  """Yields a temporary path, whose file replaces `path` at the end.

  The block writes a file or a folder at the temporary path. It then appears as
  `path` in one step. If the block raises, the old `path` stays unchanged.

  Several processes and threads may replace a file at once: each has a temporary
  path of its own, and the last one wins. Only one at a time may replace a
  folder. What killed processes left of this path is removed first.

  Args:
    path: of the file or folder.
    size: bytes that the block writes; the message names them if the disk is
      full.

  Yields:
    The temporary path, beside `path`.

  Raises:
    InputError: the file cannot be written, because of a full or read-only disk,
      a missing permission, or a folder in the place of a file.
  """
  own = f'{_machine()}-{os.getpid()}-{next(_numbers)}'
  temporary = path.with_name(f'.{path.name}.{own}.tmp')
  old = path.with_name(f'.{path.name}.old')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, lambda name: name == path.name)
    _being_written.add(temporary.name)
    try:
      yield temporary
      if temporary.is_dir():  # a folder can only be renamed to a free name
        _swap(temporary, path, old)
      else:
        os.replace(temporary, path)
    finally:
      remove(temporary)
      _being_written.discard(temporary.name)
  except OSError as error:
    raise unwritten(path, error, size) from error


def remove_leftovers(folder: Path, written: Callable[[str], Any]) -> None:
  """Removes what killed processes left half written; living ones keep theirs.

  Whether a process of another machine lives is not known. What it left is
  removed when it was not touched for a day.

  Args:
    folder: the folder of the files; may be missing.
    written: whether a file or folder of this name is one that `replacing`
      writes there. Others keep their temporary files.

  Raises:
    OSError: a leftover cannot be removed.
  """
  for path in folder.glob('.*.tmp'):
    found = _TEMPORARY.fullmatch(path.name)
    if found and written(found['name']) and not _is_being_written(path, found):
      with contextlib.suppress(FileNotFoundError):  # another was faster
        remove(path)


def _is_being_written(path: Path, found: re.Match[str]) -> bool:
  if found['process'] is None:
    return False
  if found['machine'] != _machine() or os.name != 'posix':
    try:
      return time.time() - path.lstat().st_mtime < _PATIENCE
    except FileNotFoundError:
      return True  # it took its place just now
  process = int(found['process'])
  if process == os.getpid():  # an earlier one may have had the same number
    return path.name in _being_written
  try:
    os.kill(process, 0)  # asks only whether it lives
  except ProcessLookupError:
    return False
  except PermissionError:  # it is another user's
    return True
  return True


@functools.cache
def _machine() -> str:
  """Returns eight digits for where the numbers of processes hold.

  Containers of one host name may each count their processes for themselves.
  """
  space = ''
  with contextlib.suppress(OSError):  # not on Linux
    space = os.readlink('/proc/self/ns/pid')
  name = f'{socket.gethostname()} {space}'.encode('utf-8', 'replace')
  return hashlib.sha256(name).hexdigest()[:8]


def write_text(path: Path, text: str) -> None:
  """Writes a text file atomically; bytes that are no UTF-8 are escaped.

  Raises:
    InputError: see `replacing`.
  """
  content = text.encode('utf-8', 'backslashreplace')
  with replacing(path, len(content)) as temporary:
    temporary.write_bytes(content)


def set_aside(path: Path) -> Path:
  """Renames a damaged file or folder to NAME.damaged, and returns that path.

  An older NAME.damaged is removed.
  """
  kept = path.with_name(f'{path.name}.damaged')
  remove(kept)
  os.replace(path, kept)
  return kept


def write_json(path: Path, record: Any) -> None:
  """Writes indented JSON atomically.

  Raises:
    InputError: see `replacing`.
    ValueError: the record holds a NaN or an infinity.
  """
  write_text(path, json.dumps(record, indent=2, allow_nan=False) + '\n')


def read_json(path: Path, kind: Any = Any, *, remedy: str) -> Any:
  """Reads a JSON file and checks its type.

  These are refused as well: NaN and infinities, a name that occurs twice in an
  object, a file of more than 64 MiB, and a path that is no regular file.

  Args:
    path: of the file.
    kind: the schema, a type that `msgspec.convert` accepts; Any accepts all.
    remedy: the end of the message, such as 'give another --workdir'.

  Returns:
    The content of the file, as `kind`.

  Raises:
    InputError: the file cannot be read, or its content is not of this kind. The
      message is one line that names the file and the fault.
  """
  try:
    if not path.is_file():  # reading a pipe could wait for ever
      why = 'is no file' if path.exists() else 'is not there'
      raise InputError(f'{path} {why}; {remedy}')
    with path.open('rb') as file:
      content = file.read(_MAX_JSON + 1)
  except OSError as error:
    raise InputError(
      f'{path} cannot be read ({error.strerror}); {remedy}'
    ) from error
  try:
    if len(content) > _MAX_JSON:
      raise ValueError(f'more than {_MAX_JSON >> 20} MiB')
    if not content.strip():
      raise ValueError('empty')
    record = json.loads(
      content.decode('utf-8'),
      parse_float=_finite_float,
      parse_constant=_no_number,
      object_pairs_hook=_without_twins,
    )
    return of_kind(record, kind)
  except RecursionError as error:
    why = 'nested too deep'
    raise InputError(f'{path} is damaged: {why}; {remedy}') from error
  except ValueError as error:
    raise InputError(f'{path} is damaged: {error}; {remedy}') from error


def of_kind(record: Any, kind: Any) -> Any:
  """Checks a JSON record against a type, and returns it as that type.

  Args:
    record: dicts, lists and values, as `json.loads` returns them.
    kind: a type that `msgspec.convert` accepts.

  Returns:
    The record as `kind`.

  Raises:
    InputError: the record is not of this kind. The message says where and why.
  """
  try:
    return msgspec.convert(record, kind)
  except msgspec.ValidationError as error:
    what, _, where = str(error).replace('`', '').partition(' - at $')
    message = what[:1].lower() + what[1:]
    where = where.lstrip('.')
    raise InputError(f'{where}: {message}' if where else message) from error
  except UnicodeEncodeError as error:  # a name holds a lone surrogate
    raise InputError(f'a name holds {error.object[:40]!a}') from error


def finite(record: Any) -> Any:
  """Returns a copy of a JSON record with None for each NaN and infinity."""
  if isinstance(record, dict):
    return {name: finite(value) for name, value in record.items()}
  if isinstance(record, list | tuple):
    return [finite(value) for value in record]
  if isinstance(record, float) and not math.isfinite(record):
    return None
  return record


def _finite_float(text: str) -> float:
  number = float(text)
  return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> NoReturn:
  raise ValueError(f'{text[:20]} is no finite number')


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  record = dict(pairs)
  if len(record) < len(pairs):
    seen: set[str] = set()
    for name, _ in pairs:
      if name in seen:
        raise ValueError(f'{name[:40]!a} stands twice in one object')
      seen.add(name)
  return record


def unwritten(
  path: Path, error: OSError, size: int | None = None
) -> InputError:
  """Returns the error, of one line, that says why `path` cannot be written.

  Args:
    path: the file or folder that could not be written.
    error: the operating system's error.
    size: bytes that were to be written; None: unknown.
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
  """Replaces the folder `path` by `temporary`; if that fails, keeps `path`.

  Args:
    temporary: the new folder.
    path: the folder to replace, which need not exist.
    old: a free place for `path` meanwhile.
  """
  remove(old)
  try:
    if os.path.lexists(path):
      os.rename(path, old)
    os.rename(temporary, path)
  except BaseException:
    if os.path.lexists(old) and not os.path.lexists(path):
      os.rename(old, path)
    raise
  remove(old)


def remove(path: Path) -> None:
  """Removes a file, folder or link if it exists; a link's target stays."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
