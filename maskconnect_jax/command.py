"""How every command of this package begins and ends.

Imports the standard library alone: `begin` is to run before the seconds that
importing JAX takes.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from maskconnect_jax import signals


class OutputError(OSError):
  """Standard output takes no more: a closed pipe, a full disk."""


def begin() -> None:
  """Makes the standard streams safe to use, and signals end in one line.

  Characters that an encoding lacks are written as escapes. What standard error
  does not take is dropped. What standard output does not take is an
  `OutputError`, once.
  """
  # Else the next file that is opened takes the number, and with it the output.
  # For reading only: what was asked for is not lost without a word.
  for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, mode)  # the lowest free number is this one
  sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, closefd=False))
  sys.stdout = _stream(_Output(1, 'wb', closefd=False), sys.stdout)
  sys.stderr = _stream(_Messages(2, 'wb', closefd=False), sys.stderr)
  signals.end_the_process()


@contextlib.contextmanager
def results() -> Iterator[None]:
  """Around what prints results: if they cannot be written, the status tells.

  A reader that has gone, as `head` does, is no error to speak of: the status is
  that of SIGPIPE, as of other programs.
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
  """Prints what files say too: a closed standard output is no failure."""
  with contextlib.suppress(OutputError):
    print(text, flush=True)


class _Output(io.FileIO):
  _failed = False

  def write(self, data: Any) -> int:
    if self._failed:  # what was buffered is flushed once more at the exit
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
