"""Compiled programs kept on disk, in a folder that can be used, or not at all.

JAX runs the programs that it finds in the folder. So a folder that this module
chooses belongs to this user and is closed to others.
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

  JAX_COMPILATION_CACHE_DIR names the folder. Without it, the folder is in the
  user's cache, or in the temporary folder if the user's cache cannot be used.
  If no folder can be written, the cache is off, and a line on stderr says why.
  An entry that cannot be read is replaced.
  """
  if _SECONDS.upper() not in os.environ:
    jax.config.update(_SECONDS, 0.0)
  if _FOLDER.upper() in os.environ:
    given = os.environ[_FOLDER.upper()]
    if not given or '://' in given:  # no cache, or no folder of a file system
      return
    problem = _problem(Path(given))
    folder = Path(given)
  else:
    *own, temporary = user_folders()
    for folder in (*(path / 'xla' for path in own), temporary):
      problem = private(folder)
      if not problem:
        break
  if problem:
    print(f'the compilation cache is off: {problem}', file=sys.stderr)
    jax.config.update(_FOLDER, None)
    return
  jax.config.update(_FOLDER, str(folder))
  _replace_what_is_broken(folder)


def _user() -> int:
  """Returns the user that owns new files; on Windows every owner is 0."""
  return os.getuid() if hasattr(os, 'getuid') else 0


def user_folders() -> list[Path]:
  """Returns where files of this user may be kept, the best place first."""
  temporary = Path(tempfile.gettempdir()) / f'maskconnect_jax-{_user()}'
  try:
    own = platformdirs.user_cache_path('maskconnect_jax')
  except (RuntimeError, KeyError, OSError):  # no home is known
    return [temporary]
  # Without a home the path begins with "~", unexpanded.
  return [own, temporary] if own.is_absolute() else [temporary]


def private(folder: Path) -> str:
  """Makes the folder for this user alone; returns why it cannot, or ''."""
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The folder may be a link if link and target are both this user's.
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
  """Makes JAX's warning of a broken entry remove it, so that JAX replaces it.

  JAX never overwrites an entry, so a broken one has to be removed first. The
  warning names the program but not the entry, so all entries of the program are
  removed. JAX warns of each entry; one line on stderr replaces these warnings.
  A full disk leaves broken entries as well.
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
