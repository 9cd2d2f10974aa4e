"""Handlers of the signals that ask a process to stop.

A signal that is ignored stays ignored: SIGHUP under nohup, and SIGINT in a
background process of a shell without job control. Windows has neither SIGHUP,
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
  """From this call on, a signal n ends the process with status 128 + n.

  The process prints one line and ends at once, even while the main thread
  compiles or imports. There Python would not run a handler, or would lose the
  exception that a handler raised. Nothing is cleaned up, as after SIGKILL: all
  files are written so that they survive a kill. `caught` replaces this handler
  for a while.
  """
  reader, writer = os.pipe()
  if hasattr(os, 'set_blocking'):  # on Windows from Python 3.12 on
    os.set_blocking(writer, False)
  _install(_end)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(reader,), daemon=True).start()
  # A forked child shares the pipe, so its signals would end its parent.
  if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def caught(
  handler: Callable[[int, FrameType | None], Any],
) -> Iterator[None]:
  """Within the context, signals call `handler(number, frame)`.

  Python calls the handler in the main thread. Afterwards the handlers from
  before are in place again.

  Args:
    handler: takes the signal's number and the current stack frame.
  """
  previous = _install(handler)
  try:
    yield
  finally:
    for number, before in previous.items():
      # Python does not know a handler that it did not install, so it cannot put
      # that one back.
      signal.signal(number, signal.SIG_DFL if before is None else before)


def _install(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
  previous: dict[int, Any] = {}
  for number in STOPPING:
    if signal.getsignal(number) == signal.SIG_IGN:
      continue
    with contextlib.suppress(ValueError):  # not the main thread
      previous[number] = signal.signal(number, handler)
  return previous


def _watch(reader: int) -> None:
  # Each signal's number arrives as a byte, even while the main thread is busy.
  while received := os.read(reader, 1):
    handler: Any = signal.getsignal(received[0])
    if handler is _end:
      _end(received[0])


def _end(number: int, frame: FrameType | None = None) -> None:
  del frame
  if not _ending.acquire(blocking=False):
    return  # the other thread ends the process
  line = (
    f'{signal.Signals(number).name}: stopped; a run goes on from its newest'
    ' checkpoint\n'
  )
  with contextlib.suppress(OSError):
    # Waits at most 1 s for a full pipe.
    if os.name == 'nt' or select.select([], [2], [], 1)[1]:
      os.write(2, line.encode())
  os._exit(128 + number)


def _forget() -> None:
  signal.set_wakeup_fd(-1)
  for number in STOPPING:
    handler: Any = signal.getsignal(number)
    if handler is _end:
      signal.signal(number, signal.SIG_DFL)
