"""Calls Orbax so that odd paths, Ctrl-C and a full disk do no harm.

Orbax has four habits that this module works around. It searches a folder with
a pattern that contains the folder's path. It writes from event loops that print
tracebacks when Ctrl-C stops them. It logs an error of a background thread once
per thread and per level of its own calls. In a run of several processes it
waits for all of them in each call, and all must see one folder.
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
from unittest import mock

import jax
from absl import logging
from orbax.checkpoint import checkpoint_manager
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1._src.saving import execution

from maskconnect_jax.errors import InputError

# A failed call leaves other calls running. Each prints an error as it ends.
_SETTLE_SECONDS = 0.3

P = ParamSpec('P')
T = TypeVar('T')


class Session:
  """Runs calls of Orbax on one folder one after the other, in one thread.

  Ctrl-C interrupts the caller that waits for a call. The call itself goes on,
  and `close` waits for it. Orbax's log is off until `close`, because Orbax also
  raises the errors that it logs.

  Attributes:
    path: the path of the folder that Orbax must be given.
  """

  def __init__(self, folder: Path) -> None:
    """Makes a link to the folder if Orbax would misread the folder's path.

    Args:
      folder: a folder that exists, or that the first call makes.

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
    """Calls the function in the session's thread.

    Returns:
      The function's result. Exceptions of the function are raised here.
    """

    def alone() -> T:
      with _without_other_processes():
        return function(*args, **kwargs)

    return self._thread.submit(alone).result()

  def close(self) -> None:
    """Waits for a running call; then removes the link."""
    self._open.close()


@contextlib.contextmanager
def _without_other_processes() -> Iterator[None]:
  """Makes Orbax act as in a run of one process."""
  if jax.process_count() == 1:
    yield
    return
  own = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=own,
    active_processes={own},
    barrier_sync_key_prefix=f'process{own}',
  )
  with (
    ocp.Context(multiprocessing_options=options),
    # Two steps of Orbax 0.12 ask all processes all the same: to make a folder,
    # which is there already, and to compare the names of their folders.
    mock.patch.object(checkpoint_manager, '_create_root_directory'),
    mock.patch.object(execution, '_check_directory_consistency'),
  ):
    yield


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], None]]:
  """Keeps the messages of Orbax's background threads off the terminal.

  Catch an error inside this context, and call the yielded function in the
  handler. The function waits until the other calls that Orbax began have ended.
  On exit the garbage collector then frees the objects that the error refers to,
  because they print messages as they are freed.
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
  """Returns the OSError behind an error, or None if there is none.

  TensorStore raises a ValueError with the error number in its text. That number
  becomes an OSError.
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
  """Returns the first line of an error's first cause, of at most 120 letters.

  The search for the cause ends at an exception such as KeyboardInterrupt, which
  is no `Exception`.
  """
  while cause := error.__cause__ or error.__context__:
    if not isinstance(cause, Exception):
      break
    error = cause
  text = (str(error) or type(error).__name__).splitlines()[0]
  return text if len(text) < 120 else text[:117] + '...'


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
  """Yields a path to the folder without any character that Orbax interprets.

  Orbax reads a star, question mark or brackets as a pattern, a backslash as a
  slash, and "gs:" as a bucket. TensorStore takes only paths in UTF-8.
  """
  path = folder.absolute()
  if _is_plain(path):
    yield path
    return
  wrong = f'Orbax, which writes the checkpoints, cannot take the path {folder}'
  # The link is to the folder itself if it exists, because the folder's own name
  # may be odd too. Otherwise the link is to its parent.
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
