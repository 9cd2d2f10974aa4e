"""Stops a run at a signal, after the step under way is saved."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType

import jax
from absl import logging
from jax.experimental import multihost_utils

from maskconnect_jax import signals


class Preemption:
  """Notices that a run is to stop: SIGTERM of a machine, or Ctrl-C.

  It is a context manager around the loop. `requested(step)` tells all processes
  at the same step that it is time to save and stop. A second Ctrl-C stops the
  process at once; in a run of several processes the first Ctrl-C does.

  Until the first step is done there is nothing to save, and compiling takes
  minutes. Until then signals go to the handlers that were there before.
  """

  def __init__(self) -> None:
    self._signalled = 0
    self._told = False
    self._handlers = contextlib.ExitStack()
    self._begun = False

  def __enter__(self) -> Preemption:
    # With jax.distributed its own service owns the signal and agrees on a step.
    self._coordinated = jax.process_count() > 1
    return self

  def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
    self._handlers.close()
    if self._signalled and not self._told and kind is None:
      # It came too late for a step: the handlers of before take it.
      signal.raise_signal(self._signalled)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    if number == signal.SIGINT and self._signalled:
      raise KeyboardInterrupt
    self._signalled = number
    with contextlib.suppress(RuntimeError):  # amid another line to stderr
      logging.warning(
        '%s: saving after the step under way, then stopping%s',
        signal.Signals(number).name,
        '; once more stops at once' * (number == signal.SIGINT),
      )

  def noticed(self) -> bool:
    """Whether a signal has come; in a run of several processes always False."""
    return self._signalled != 0

  def requested(self, step: int) -> int:
    """Returns the signal for which to save and stop after `step`, else 0."""
    if self._coordinated:
      reached = multihost_utils.reached_preemption_sync_point(step)
      return signal.SIGTERM if reached else 0
    if not self._begun:
      self._begun = True
      self._handlers.enter_context(signals.caught(self._on_signal))
    number = self._signalled
    self._told = number != 0
    return number
