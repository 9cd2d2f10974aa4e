"""Compiled programs kept on disk, in a folder that can be used, or not at all.

Whoever writes into the folder has this user's processes run their programs. So
one that this module chooses is this user's own and closed to others.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import platformdirs

_FOLDER = 'jax_compilation_cache_dir'
# Building a network compiles many programs of less than JAX's 1 second.
_SECONDS = 'jax_persistent_cache_min_compile_time_secs'
_TROUBLE = re.compile(
  r"Error (reading|writing) persistent compilation cache entry for '([^']+)'"
)


def use() -> None:
  """Keeps compiled programs, so that the same run starts faster next time.

  The folder is that of JAX_COMPILATION_CACHE_DIR, else in the user's cache,
  else, without a home, in the temporary folder. Where none can be written the
  cache is off, which a line on stderr says. An entry that cannot be read is
  replaced.
  """
  if _SECONDS.upper() not in os.environ:
    jax.config.update(_SECONDS, 0.0)
  if _FOLDER.upper() in os.environ:
    given = os.environ[_FOLDER.upper()]
    if not given or '://' in given:  # none, or not a file system's
      return
    problem = _problem(Path(given))
    folder = Path(given)
  else:
    for folder in _candidates():
      problem = _private(folder)
      if not problem:
        break
  if problem:
    print(f'the compilation cache is off: {problem}', file=sys.stderr)
    jax.config.update(_FOLDER, None)
    return
  jax.config.update(_FOLDER, str(folder))
  _replace_what_is_broken(folder)


def _user() -> int:
  """Returns the owner of what this process makes; on Windows all say 0."""
  return os.getuid() if hasattr(os, 'getuid') else 0


def _candidates() -> list[Path]:
  user = _user()
  temporary = Path(tempfile.gettempdir()) / f'maskconnect_jax-{user}'
  try:
    own = platformdirs.user_cache_path('maskconnect_jax')
  except (RuntimeError, KeyError, OSError):  # no home is known
    return [temporary]
  # Without a home the path begins with a ~ that nobody expands.
  return [own / 'xla', temporary] if own.is_absolute() else [temporary]


def _private(folder: Path) -> str:
  """Makes the folder for this user alone; returns what is in the way, or ''."""
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # A link to another place is fine, if it is this user's as well.
    if {folder.lstat().st_uid, folder.stat().st_uid} != {_user()}:
      return f"{folder} is another user's"
    folder.chmod(0o700)
  except OSError as error:
    return f'{folder} cannot be made ({error.strerror})'
  return _problem(folder)


def _problem(folder: Path) -> str:
  """Returns why no file can be written in the folder, or ''."""
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(bytes(4096))
  except OSError as error:
    return f'{folder} cannot be written ({error.strerror})'
  return ''


def _replace_what_is_broken(folder: Path) -> None:
  """Has JAX's warning of a broken entry remove it, before it is written anew.

  JAX writes no entry over another, names the program but not the entry, and
  warns of each. So all entries of the program go, and one line tells of all.
  A disk that is full leaves such entries as well.
  """
  told: set[str] = set()
  show = warnings.showwarning

  def showwarning(message: Warning | str, *rest: Any, **more: Any) -> None:
    trouble = _TROUBLE.match(str(message))
    if not trouble:
      show(message, *rest, **more)
      return
    kind, program = trouble.groups()
    for path in folder.glob(f'{glob.escape(program)}-*'):
      with contextlib.suppress(OSError):
        path.unlink()
    if kind not in told:
      told.add(kind)
      print(
        f'the compilation cache {folder} holds broken entries; they are'
        ' compiled anew and replaced'
        if kind == 'reading'
        else f'the compilation cache {folder} takes no more entries'
        f' ({str(message).rpartition(": ")[2]}); going on without',
        file=sys.stderr,
      )

  warnings.filterwarnings('always', _TROUBLE.pattern)
  warnings.showwarning = showwarning
