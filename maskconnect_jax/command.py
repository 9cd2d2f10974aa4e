"""The beginning and the end of every command of this package.

This module imports the standard library alone, because `begin` must run before
JAX is imported, which takes seconds.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from maskconnect_jax import signals


class OutputError(OSError):
  """Standard output cannot be written, as on a closed pipe or a full disk."""


def begin() -> None:
  """Makes stdin, stdout and stderr safe to use; signals end in one line.

  A character that the encoding lacks is written as an escape. Text that
  standard error cannot take is dropped. The first failed write to standard
  output raises `OutputError`; later ones are dropped.

  Python's collector rests until `enter`: nearly all objects of an import stay,
  and to look through them takes an eighth of its time.
  """
  gc.disable()
  # The next opened file would take a closed standard number, and the output
  # would go into that file. Standard output is opened for reading, so that
  # writing results fails, and no result is lost in silence.
  for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, mode)  # the lowest free number is this one
  sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, closefd=False))
  sys.stdout = _stream(_Output(1, 'wb', closefd=False), sys.stdout)
  sys.stderr = _stream(_Messages(2, 'wb', closefd=False), sys.stderr)
  signals.end_the_process()


def enter() -> None:
  """Lets the collector work again, on what is made from now on.

  Otherwise its search through the objects of imports would take a fifth of the
  time that tracing a step takes.
  """
  gc.freeze()
  gc.enable()


@contextlib.contextmanager
def results() -> Iterator[None]:
  """Returns a context for printing results; exits if they cannot be written.

  If the reader has closed the pipe, as `head` does, nothing is printed and the
  status is that of SIGPIPE, as of other programs. Any other failure is one line
  on stderr and status 2.

  Raises:
    SystemExit: standard output cannot be written.
  """
  try:
    try:
      yield
    finally:
      sys.stdout.flush()
  except OutputError as error:
    if error.errno == errno.EPIPE:
      sys.exit(128 + getattr(signal, 'SIGPIPE', 13))  # Windows has none
    print(
      f'error: the output cannot be written ({error.strerror})',
      file=sys.stderr,
    )
    sys.exit(2)


def tell(text: str) -> None:
  """Prints text that files hold as well, so a failed output is no error."""
  with contextlib.suppress(OutputError):
    print(text, flush=True)


class _Output(io.FileIO):
  _failed = False

  def write(self, data: Any) -> int:
    if self._failed:  # at exit Python flushes the buffer once more
      return len(data)
    try:
      return super().write(data)
    except OSError as error:
      self._failed = True
      raise OutputError(error.errno, error.strerror) from error


class _Messages(io.FileIO):
  def write(self, data: Any) -> int:
    with contextlib.suppress(OSError):
      return super().write(data)
    return len(data)


def _stream(raw: io.FileIO, before: Any) -> io.TextIOWrapper:
  return io.TextIOWrapper(
    io.BufferedWriter(raw),
    encoding=before.encoding if before else 'utf-8',
    errors='backslashreplace',
    line_buffering=raw.fileno() == 2 or raw.isatty(),
  )
