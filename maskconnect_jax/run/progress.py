"""A run in memory, and its counters that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maskconnect_jax.method import narrowing
from maskconnect_jax.run import batches as batches_lib
from maskconnect_jax.run import (
  checkpoint,
  evaluation,
  experiment,
  metrics,
  train_state,
)
from maskconnect_jax.run.preemption import Preemption


@dataclasses.dataclass
class Progress:
  """The counters of a run, which a checkpoint keeps beside the state.

  Attributes:
    clock: counts the images trained on and the seconds of training.
    damaged: numbers of the training records that were found damaged.
    accuracies: or mAP, measured at the freeze, by their names in summary.json.
    pending: {'loss', 'accuracy'}, float32 [], of each step since the last line
      of the log. A run that is stopped between two lines resumes with these
      values, so its log equals that of an uninterrupted run.
    margins: how clear the choice of the wiring was: the fields of
      `narrowing.Margins` of a measured wiring, or 'choices' and 'margin' of a
      drawn one; {} before it is known.
  """

  clock: metrics.Throughput = dataclasses.field(
    default_factory=metrics.Throughput
  )
  damaged: set[int] = dataclasses.field(default_factory=set)
  accuracies: dict[str, float | None] = dataclasses.field(default_factory=dict)
  pending: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  margins: dict[str, float] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Returns the progress as JSON keeps it; no float32 changes its value."""
    record: dict[str, Any] = {
      'images': self.clock.images,
      'train_seconds': self.clock.seconds,
      'damaged': sorted(self.damaged),
      **self.accuracies,
    }
    if self.margins:
      record['margins'] = self.margins
    if self.pending:
      record['unlogged'] = [
        {name: float(value) for name, value in values.items()}
        for values in jax.device_get(self.pending)
      ]
    return record

  @classmethod
  def from_json(cls, record: Any) -> Progress:
    """Returns the progress from a record that `to_json` gave.

    Args:
      record: from this or an earlier version.

    Raises:
      ValueError: a field is missing or of another type; or a count, the
        seconds or an accuracy is negative or not finite.
    """
    if not isinstance(record, dict):
      raise ValueError('its progress is no object')
    accuracies = {
      name: value
      for name, value in record.items()
      if name.endswith(('_drawn', '_at_freeze'))
    }
    counts = {name: record.get(name) for name in ('images', 'train_seconds')}
    counts |= {
      name: value for name, value in accuracies.items() if value is not None
    }
    damaged, unlogged = record.get('damaged'), record.get('unlogged', [])
    for name, fits in {
      'damaged': isinstance(damaged, list) and all(map(_is_count, damaged)),
      'unlogged': isinstance(unlogged, list) and all(map(_is_step, unlogged)),
      'margins': _is_margins(record.get('margins', {})),
      **{name: _is_count(value) for name, value in counts.items()},
    }.items():
      if not fits:
        raise ValueError(f'its progress has no {name!r} that can be used')
    return cls(
      metrics.Throughput(record['images'], record['train_seconds']),
      set(record['damaged']),
      accuracies,
      [
        {name: np.float32(value) for name, value in values.items()}
        for values in unlogged
      ],
      record.get('margins', {}),
    )


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def _is_count(value: Any) -> bool:
  return _is_number(value) and value >= 0


def _is_margins(values: Any) -> bool:
  names = {field.name for field in dataclasses.fields(narrowing.Margins)}
  return values == {} or (
    isinstance(values, dict)
    and values.keys() <= names
    and all(map(_is_number, values.values()))  # a margin may be below 0
  )


def _is_step(values: Any) -> bool:
  """Whether these are one step's values; `mean_of_steps` reports a NaN."""
  return (
    isinstance(values, dict)
    and values.keys() == {'loss', 'accuracy'}
    and all(type(value) in (int, float) for value in values.values())
  )


@dataclasses.dataclass
class Run:
  """A run in memory: `train.start` makes it, `loop.loop` takes its steps.

  Attributes:
    workdir: the folder that everything is written to.
    job: the config, and everything built from it.
    recipe: the recipe of the current phase.
    state: the state after the last step.
    progress: see `Progress`.
    batches: batches of training images.
    evaluate: scores a network; a signal stops it.
    preemption: notices a signal that asks to stop.
    checkpoints: saves and loads the state.
    writer: writes the log.
    history: keeps the real mask of each logged step.
    bar: shows the progress to the user.
    timed: steps since the clock was started.
  """

  workdir: Path
  job: experiment.Experiment
  recipe: train_state.Recipe
  state: train_state.TrainState
  progress: Progress
  batches: batches_lib.Batches
  evaluate: evaluation.Evaluator
  preemption: Preemption
  checkpoints: checkpoint.Checkpoints
  writer: metrics.MetricsWriter
  history: metrics.MaskHistory
  bar: metrics.ProgressBar
  timed: int = 0

  def compile(self, program: Any, *arguments: Any) -> None:
    """Compiles a jitted function before its first call; JAX keeps it for that.

    The time left does not count it.
    """
    with self.bar.pause():
      program.lower(*arguments).compile()

  def stop_clock(self) -> float:
    """Counts the steps since the clock was started, once they are done.

    Returns:
      Images per second in them; 0 if there are none.
    """
    images, self.timed = self.timed * self.job.config.batch_size, 0
    return self.progress.clock.stop(images, self.state)
