"""A trace of some training steps, for TensorBoard or Perfetto."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

WARM = 3  # steps before the trace: the first ones allocate


@dataclasses.dataclass
class Profile:
  """Traces steps after the first ones of a run; one process writes it.

  Attributes:
    folder: where the trace goes.
    steps: how many steps are traced; 0: none.
    first: the step that this start of the run begins with.
    running: whether a trace is under way.
  """

  folder: Path
  steps: int
  first: int
  running: bool = False

  def before(self, step: int) -> None:
    """Begins the trace if it begins with `step`, counted from 0."""
    if self.steps and step == self.first + WARM:
      jax.profiler.start_trace(self.folder)
      self.running = True

  def after(self, done: int, state: Any) -> str:
    """Ends the trace if `done` is its last step.

    Args:
      done: steps done.
      state: the state after the step; the trace ends when it is computed.

    Returns:
      A line that names the folder; '' while nothing ends.
    """
    if not self.running or done < self.first + WARM + self.steps:
      return ''
    return self.close(state)

  def close(self, state: Any) -> str:
    """Ends a trace that is under way, as at the end of the run."""
    if not self.running:
      return ''
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    self.running = False
    return f'traced {self.steps} steps: tensorboard --logdir={self.folder}'
