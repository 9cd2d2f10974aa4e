"""Calls of Orbax that bear odd paths, Ctrl-C and a full disk.

Orbax searches below a folder with a pattern that has the folder's own path in
it, writes from event loops that leave tracebacks behind when Ctrl-C cuts them,
and logs each error of the background once per thread and level of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import logging as standard_logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
from absl import logging

from maskconnect_jax.errors import InputError

# After a failed call the others that it had begun end, each with a complaint.
_SETTLE_SECONDS = 0.3

P = ParamSpec('P')
T = TypeVar('T')


class Session:
  """Calls one after the other, in one thread, with the folder under `path`.

  Ctrl-C interrupts whoever waits for a call, and not the call, which `close`
  waits for. Meanwhile Orbax's own log is off: its errors are raised as well.

  Attributes:
    path: of the folder, as to be given to Orbax.
  """

  def __init__(self, folder: Path) -> None:
    """Makes a link for Orbax, if it would read the path as something else.

    Args:
      folder: what is there, or will be made by the first call.

    Raises:
      InputError: Orbax cannot take the path, and no link can be made.
    """
    self._open = contextlib.ExitStack()
    try:
      self.path = self._open.enter_context(_plain_path(folder))
      self._open.enter_context(_without_log_of_orbax())
    except BaseException:
      self._open.close()
      raise
    self._thread = self._open.enter_context(
      concurrent.futures.ThreadPoolExecutor(1, 'orbax')
    )

  def __enter__(self) -> Session:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def call(
    self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
  ) -> T:
    """Returns what the function returns, or raises what it raises."""
    return self._thread.submit(function, *args, **kwargs).result()

  def close(self) -> None:
    """Waits for a call that still runs; removes the link."""
    self._open.close()


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], None]]:
  """Keeps what Orbax tells of an error in the background off the terminal.

  An error is to be caught inside, and there the function called that this
  yields. It waits until the other calls that Orbax had begun have ended. What
  the error refers to is collected at the end, and complains once more as it
  goes.
  """
  disabled = standard_logging.root.manager.disable
  hooks = sys.excepthook, sys.unraisablehook
  standard_logging.disable(standard_logging.CRITICAL)
  sys.excepthook = lambda *_: None
  sys.unraisablehook = lambda _: None
  failed = False

  def settle() -> None:
    nonlocal failed
    failed = True
    time.sleep(_SETTLE_SECONDS)

  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      try:
        yield settle
      finally:
        if failed:
          gc.collect()
  finally:
    standard_logging.disable(disabled)
    sys.excepthook, sys.unraisablehook = hooks


def os_error(error: BaseException) -> OSError | None:
  """Returns what the operating system said, if that is what went wrong.

  TensorStore raises ValueError with the number in its text.
  """
  found: BaseException | None = error
  while found is not None:
    if isinstance(found, OSError) and found.errno is not None:
      return found
    if code := re.search(r"os_error_code='(\d+)'", str(found)):
      return OSError(int(code[1]), os.strerror(int(code[1])))
    found = found.__cause__
  return None


def first_line(error: BaseException) -> str:
  """Returns the first line of what an error was first raised for, shortened."""
  while cause := error.__cause__ or error.__context__:
    if not isinstance(cause, Exception):
      break
    error = cause
  text = (str(error) or type(error).__name__).splitlines()[0]
  return text if len(text) < 120 else text[:117] + '...'


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
  """Yields a path of the folder that holds no character with a meaning.

  Orbax reads a star, question mark or brackets as a pattern, a backslash as a
  slash and "gs:" as a bucket; TensorStore takes no path that is no UTF-8.
  """
  path = folder.absolute()
  if _is_plain(path):
    yield path
    return
  wrong = f'Orbax, which writes the checkpoints, cannot take the path {folder}'
  if jax.process_count() > 1:  # Orbax compares the paths of all processes
    raise InputError(
      f'{wrong} in several processes; give one of letters, digits, "-", "_"'
      ' and "."'
    )
  # Of a folder that is there itself: its own name may be odd, too.
  name = '' if path.is_dir() else path.name
  try:
    with tempfile.TemporaryDirectory(prefix='maskconnect-') as temporary:
      link = Path(temporary, 'link')
      if not _is_plain(link / name):
        raise InputError(
          f'{wrong}, nor a link to it at {link / name}; give one of letters,'
          ' digits, "-", "_" and "."'
        )
      link.symlink_to(path.parent if name else path, target_is_directory=True)
      yield link / name
  except OSError as error:
    raise InputError(
      f'{wrong}, and no link to it can be made in {tempfile.gettempdir()}'
      f' ({error.strerror}); give one of letters, digits, "-", "_" and "."'
    ) from error


def _is_plain(path: Path) -> bool:
  return all(c.isalnum() or c in '/._-+=,@~ ' for c in str(path))


@contextlib.contextmanager
def _without_log_of_orbax() -> Iterator[None]:
  def is_of_another(record: Any) -> bool:
    return f'{os.sep}orbax{os.sep}' not in record.pathname

  logger = logging.get_absl_logger()
  logger.addFilter(is_of_another)
  try:
    yield
  finally:
    logger.removeFilter(is_of_another)
