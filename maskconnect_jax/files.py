"""Files that are either there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Yields a temporary path beside `path`, which takes its place at the end.

  What is written there, a file or a folder, appears under `path` in one step,
  or, if the block raises, not at all.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = temporary_of(path)
  _remove(temporary)  # what a killed run may have left
  try:
    yield temporary
    if temporary.is_dir():  # a folder can only be renamed to a free name
      _remove(path)
    os.replace(temporary, path)
  finally:
    _remove(temporary)


def temporary_of(path: Path) -> Path:
  """Returns what `replacing` yields: the same for every process."""
  return path.with_name(f'.{path.name}.tmp')


def write_text(path: Path, text: str) -> None:
  """Writes a text file atomically; a name that is no UTF-8 is escaped."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding='utf-8', errors='backslashreplace')


def write_json(path: Path, record: Any) -> None:
  """Writes readable JSON atomically; a NaN or infinity is an error."""
  write_text(path, json.dumps(record, indent=2, allow_nan=False) + '\n')


def _remove(path: Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
