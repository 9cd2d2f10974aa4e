"""Signals that ask a process to stop, and who answers them.

A signal that is ignored stays so: SIGHUP under nohup, and SIGINT in what a
shell without job control runs in the background. Windows has neither SIGHUP,
nor forks, nor pipes that `select` can wait for.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPING = tuple(
  getattr(signal, name)
  for name in ('SIGHUP', 'SIGINT', 'SIGTERM')
  if hasattr(signal, name)
)

_ending = threading.Lock()


def end_the_process() -> None:
  """From here on a signal ends the process: one line, and status 128 + n.

  It does so at once, also while the main thread compiles or imports, where
  Python would run no handler, or lose an exception that one raised. Nothing is
  cleaned up, as at a kill: what is written is written so that it bears one.
  `caught` takes the signals over for a while.
  """
  reader, writer = os.pipe()
  if hasattr(os, 'set_blocking'):  # on Windows from Python 3.12 on
    os.set_blocking(writer, False)
  _install(_end)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(reader,), daemon=True).start()
  # A forked child shares the pipe, and would end its parent through it.
  if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def caught(
  handler: Callable[[int, FrameType | None], Any],
) -> Iterator[None]:
  """Has `handler(number, frame)` called, in the main thread, for a while."""
  previous = _install(handler)
  try:
    yield
  finally:
    for number, before in previous.items():
      # One that was not Python's is not known, and cannot be put back.
      signal.signal(number, signal.SIG_DFL if before is None else before)


def _install(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
  previous: dict[int, Any] = {}
  for number in STOPPING:
    if signal.getsignal(number) == signal.SIG_IGN:
      continue
    with contextlib.suppress(ValueError):  # in a thread, as some notebooks
      previous[number] = signal.signal(number, handler)
  return previous


def _watch(reader: int) -> None:
  # Each signal's number comes as a byte, whatever the main thread does.
  while received := os.read(reader, 1):
    handler: Any = signal.getsignal(received[0])
    if handler is _end:
      _end(received[0])


def _end(number: int, frame: FrameType | None = None) -> None:
  del frame
  if not _ending.acquire(blocking=False):
    return  # the other thread is at it
  line = (
    f'{signal.Signals(number).name}: stopped; a run goes on from its newest'
    ' checkpoint\n'
  )
  with contextlib.suppress(OSError):
    # A full pipe holds nobody up.
    if os.name == 'nt' or select.select([], [2], [], 1)[1]:
      os.write(2, line.encode())
  os._exit(128 + number)


def _forget() -> None:
  signal.set_wakeup_fd(-1)
  for number in STOPPING:
    handler: Any = signal.getsignal(number)
    if handler is _end:
      signal.signal(number, signal.SIG_DFL)
