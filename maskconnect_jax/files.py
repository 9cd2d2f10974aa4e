"""Files that are either there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from maskconnect_jax.errors import InputError

_MAX_JSON = 2**26  # bytes; a topology of 1,000 blocks that take all has 2**24

# After these it is not the path that is wrong.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: Path) -> None:
  """Raises InputError if a file cannot be written, before there is work done.

  Missing folders are no fault: they are made when the file is written.
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
    remove(temporary)  # what a killed run may have left
    try:
      yield temporary
      if temporary.is_dir():  # a folder can only be renamed to a free name
        _swap(temporary, path, old)
      else:
        os.replace(temporary, path)
    finally:
      remove(temporary)
  except OSError as error:
    raise unwritten(path, error, size) from error


def temporary_of(path: Path) -> Path:
  """Returns what `replacing` yields: the same for every process."""
  return path.with_name(f'.{path.name}.tmp')


def write_text(path: Path, text: str) -> None:
  """Writes a text file atomically; a name that is no UTF-8 is escaped.

  Raises InputError as `replacing`.
  """
  content = text.encode('utf-8', 'backslashreplace')
  with replacing(path, len(content)) as temporary:
    temporary.write_bytes(content)


def set_aside(path: Path) -> Path:
  """Gives what is damaged another name, and returns that; keeps the newest."""
  kept = path.with_name(f'{path.name}.damaged')
  remove(kept)
  os.replace(path, kept)
  return kept


def write_json(path: Path, record: Any) -> None:
  """Writes readable JSON atomically; a NaN or infinity is an error."""
  write_text(path, json.dumps(record, indent=2, allow_nan=False) + '\n')


def read_json(path: Path, kind: Any = Any, *, remedy: str) -> Any:
  """Reads a JSON file; whatever is wrong with it is one line.

  Refused beside what is no JSON: NaN and infinities, a name that stands twice
  in an object, and anything but a regular file of at most 64 MiB.

  Args:
    path: of the file.
    kind: the schema, a type as `msgspec.convert` takes them; Any: whatever it
      is.
    remedy: the end of the message, such as 'give another --workdir'.

  Returns:
    What the file holds, as `kind`.

  Raises:
    InputError: it cannot be read, or is not of this kind; names the file and
      what is wrong in it.
  """
  try:
    if not path.is_file():  # to read a pipe could take for ever
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
  """Returns what JSON holds as a type, checked against it.

  Args:
    record: of dicts, lists and so on, as `json.loads` gives it.
    kind: a type as `msgspec.convert` takes them.

  Raises:
    InputError: the record is not of this kind; says where and why.
  """
  try:
    return msgspec.convert(record, kind)
  except msgspec.ValidationError as error:
    what, _, where = str(error).replace('`', '').partition(' - at $')
    message = what[:1].lower() + what[1:]
    where = where.lstrip('.')
    raise InputError(f'{where}: {message}' if where else message) from error
  except UnicodeEncodeError as error:  # a lone surrogate where a name belongs
    raise InputError(f'a name holds {error.object[:40]!a}') from error


def finite(record: Any) -> Any:
  """Returns a JSON record with None for each NaN and infinity in it."""
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
  """Removes a file or a folder, if it is there; of a link, the link."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
