"""Files that are either there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskconnect_jax.config import InputError


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
def replacing(path: Path) -> Iterator[Path]:
  """Yields a temporary path beside `path`, which takes its place at the end.

  What is written there, a file or a folder, appears under `path` in one step,
  or, if the block raises, not at all. An OSError of it names `path`.
  """
  temporary = temporary_of(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)  # what a killed run may have left
    try:
      yield temporary
      if temporary.is_dir():  # a folder can only be renamed to a free name
        _remove(path)
      os.replace(temporary, path)
    finally:
      _remove(temporary)
  except OSError as error:
    # A write to a full disk names no file; the others name the temporary one.
    if error.filename is None or os.fspath(error.filename) == str(temporary):
      error.filename, error.filename2 = str(path), None
    raise


def temporary_of(path: Path) -> Path:
  """Returns what `replacing` yields: the same for every process."""
  return path.with_name(f'.{path.name}.tmp')


def write_text(path: Path, text: str) -> None:
  """Writes a text file atomically."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_json(path: Path, record: Any) -> None:
  """Writes readable JSON atomically; a NaN or infinity is an error."""
  write_text(path, json.dumps(record, indent=2, allow_nan=False) + '\n')


def _remove(path: Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
