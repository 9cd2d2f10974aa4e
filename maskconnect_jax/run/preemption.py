"""Stops a run at a signal, after its current step is saved."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType

import jax
from absl import logging
from jax.experimental import multihost_utils

from maskconnect_jax import signals


class Preemption:
  """Notices a signal that asks a run to stop: SIGTERM or Ctrl-C.

  Use it as a context manager around the loop of steps. `requested(step)` tells
  all processes at the same step to save and stop. A second Ctrl-C stops the
  process at once. In a run of several processes the first Ctrl-C stops it at
  once.

  Before the first step is done there is nothing to save, and compiling takes
  minutes. Until then the previous handlers take the signals.
  """

  def __init__(self) -> None:
    self._signalled = 0
    self._told = False
    self._handlers = contextlib.ExitStack()
    self._begun = False

  def __enter__(self) -> Preemption:
    # In a run of several processes, the service of jax.distributed catches
    # SIGTERM and makes the processes agree on a step.
    self._coordinated = jax.process_count() > 1
    return self

  def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
    self._handlers.close()
    if self._signalled and not self._told and kind is None:
      # The signal came after the last step. The previous handlers take it.
      signal.raise_signal(self._signalled)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    if number == signal.SIGINT and self._signalled:
      raise KeyboardInterrupt
    self._signalled = number
    # stderr raises RuntimeError if the signal came while it was writing.
    with contextlib.suppress(RuntimeError):
      logging.warning(
        '%s: saving after the step under way, then stopping%s',
        signal.Signals(number).name,
        '; once more stops at once' * (number == signal.SIGINT),
      )

  def noticed(self) -> bool:
    """Whether a signal has come; in a run of several processes always False."""
    return self._signalled != 0

  def requested(self, step: int) -> int:
    """Returns the signal that asks to save and stop after `step`, else 0.

    Args:
      step: steps done. All processes call this at the same steps.
    """
    if self._coordinated:
      reached = multihost_utils.reached_preemption_sync_point(step)
      return signal.SIGTERM if reached else 0
    if not self._begun:
      self._begun = True
      self._handlers.enter_context(signals.caught(self._on_signal))
    number = self._signalled
    self._told = number != 0
    return number
