"""The plan of a run: its durations in steps, and plan.json in the workdir.

A config gives durations in steps, epochs, images or shares of the run. Turning
them into steps takes the number of training images, which the config does not
hold. So a run writes its plan down for those who read the workdir later.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
from absl import logging

from maskconnect_jax import fields, files
from maskconnect_jax.errors import InputError
from maskconnect_jax.method.spec import NARROWING

SCHEMA = 'maskconnect_jax.plan/1'
NAME = 'plan.json'
# A connectivity phase below this gets a remark. The digits' demo has 82 steps
# and needs most of them.
FEW_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Plan:
  """The durations of a run, in steps.

  Attributes:
    total: the length of the run.
    freeze: the connectivity phase is [0, freeze); 0 for a fixed rule.
    log_every: steps between two lines of the log.
    evaluate_every: steps between two evaluations.
    checkpoint_every: steps between two checkpoints.
    per_epoch: whole batches in one pass through the training images.
    moments: N, how often a wiring narrows; 0 if it does not.
    measuring: a narrowing wiring may be measured with as much arithmetic as so
      many training steps take.
  """

  total: int
  freeze: int
  log_every: int
  evaluate_every: int
  checkpoint_every: int
  per_epoch: int
  moments: int = 0
  measuring: int = 0

  def phase(self, step: int) -> str:
    """Returns the phase that `step`, counted from 0, belongs to."""
    if not self.freeze:
      return 'train'
    return 'connectivity' if step < self.freeze else 'fine-tune'

  def share(self, step: Any) -> Any:
    """Returns the share of the connectivity phase done before `step`.

    Args:
      step: an integer, or a NumPy or JAX array of integers.

    Returns:
      A float, or floats of the shape of `step`; above 1 in fine-tuning.
    """
    return step / max(1, self.freeze)

  def newcomers(self, step: Any) -> Any:
    """Returns the weight w of `narrowing.fading_in` at `step`.

    It rises from 0 to 1 at the first moment.

    Args:
      step: as of `share`.
    """
    return jnp.minimum(1.0, self.share(step) * self.moments)

  def freezes(self, step: int) -> bool:
    """Whether the topology is frozen just before `step`."""
    return 0 < self.freeze == step

  def moment(self, done: int) -> int:
    """Returns n if the wiring narrows for the n-th time after `done` steps.

    The n-th of N moments comes after n/N of the connectivity phase. So the last
    one is the freeze. If several fall on one step, n is the last of them.

    Returns:
      n, from 1 to N; or 0.
    """
    if not 0 < done <= self.freeze:
      return 0
    number = done * self.moments // self.freeze
    return number if number > (done - 1) * self.moments // self.freeze else 0

  def saves(self, done: int) -> bool:
    """Whether a checkpoint is due after `done` steps."""
    return done == self.total or done % self.checkpoint_every == 0

  def evaluates(self, done: int) -> bool:
    """Whether an evaluation is due after `done` steps."""
    return done == self.total or done % self.evaluate_every == 0

  def records(self, done: int) -> bool:
    """Whether a line of the log is due after `done` steps.

    A line goes with every checkpoint, every evaluation, the freeze and every
    moment at which the wiring narrows.
    """
    return (
      self.saves(done)
      or self.evaluates(done)
      or done % self.log_every == 0
      or done == self.freeze
      or self.moment(done) > 0
    )

  def in_words(self, batch_size: int) -> str:
    """Returns a line on the length of the run and of its connectivity phase.

    Args:
      batch_size: images in a step.
    """
    text = (
      f'{self.total / self.per_epoch:,.4g} epochs, {self.total:,} steps of'
      f' {batch_size} images, {self.per_epoch:,} per epoch'
    )
    if not self.freeze:
      return text
    text += f'; masks move for the first {self.freeze:,}'
    if self.freeze < FEW_STEPS:
      text += (
        ', which is little to learn a wiring from: a smaller config.batch_size'
        ' or a longer config.duration gives them more'
      )
    return text


def make(config: ml_collections.ConfigDict, num_examples: int) -> Plan:
  """Turns the durations of a config into steps.

  Args:
    config: see `maskconnect_jax/config.py`.
    num_examples: number of training images.

  Raises:
    InputError: the batch is larger than the training set; the run has no step
      or too many; or the connectivity phase has no step or more than the run.
  """
  if config.batch_size > num_examples:
    raise InputError(
      f'config.batch_size={config.batch_size} is larger than the'
      f' {num_examples} training images'
    )
  in_steps = functools.partial(
    to_steps, batch_size=config.batch_size, num_examples=num_examples
  )
  total = in_steps(config.duration, name='config.duration')
  if total < 1:
    raise InputError(f'config.duration={config.duration!r} is not one step')
  if total >= fields.MOST:
    raise InputError(
      f'config.duration={config.duration!r} is too long; a run has fewer than'
      f' {fields.MOST:,} steps'
    )

  def steps_of(text: str, name: str) -> int:
    return in_steps(text, total=total, name=f'config.{name}')

  learned = config.connectivity.rule == 'learned'
  freeze = steps_of(config.connectivity.phase, 'connectivity.phase')
  if learned and not 1 <= freeze <= total:
    raise InputError(
      f'config.connectivity.phase={config.connectivity.phase!r} is {freeze}'
      f' steps; it must be between 1 and the {total} of the run'
    )
  narrows = learned and config.connectivity.learner in NARROWING
  measuring = steps_of(config.connectivity.measuring, 'connectivity.measuring')
  return Plan(
    total=total,
    freeze=freeze if learned else 0,
    log_every=max(1, steps_of(config.log_every, 'log_every')),
    evaluate_every=max(1, steps_of(config.evaluate_every, 'evaluate_every')),
    checkpoint_every=max(
      1, steps_of(config.checkpoint_every, 'checkpoint_every')
    ),
    per_epoch=num_examples // config.batch_size,
    moments=config.connectivity.moments if narrows else 0,
    measuring=(
      measuring if narrows and config.connectivity.learner != 'random' else 0
    ),
  )


def write(plan: Plan, workdir: Path) -> None:
  """Writes plan.json.

  Raises:
    InputError: the file cannot be written.
  """
  files.write_json(
    workdir / NAME, {'schema': SCHEMA} | dataclasses.asdict(plan)
  )


def read(workdir: Path) -> Plan | None:
  """Returns the plan of a run, or None if the workdir has no plan.json.

  Runs of earlier versions wrote no plan.json. For a damaged one a warning names
  the file, and the result is None.
  """
  path = workdir / NAME
  try:
    record = json.loads(path.read_bytes())
    if record.pop('schema') != SCHEMA:
      raise ValueError('another schema')
    plan = Plan(**record)
    values = dataclasses.astuple(plan)
    if {*map(type, values)} != {int} or not 0 <= plan.freeze <= plan.total:
      raise ValueError('its durations are no whole numbers')
    if min(plan.total, *values[2:6]) < 1 or min(values[6:]) < 0:
      raise ValueError('a duration is below one step')
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, KeyError, AttributeError,
          RecursionError) as error:  # fmt: skip
    logging.warning('%s is damaged (%s)', path, error)
    return None
  return plan


def to_steps(
  text: str,
  *,
  batch_size: int,
  num_examples: int,
  total: int | None = None,
  name: str = 'duration',
) -> int:
  """Returns a duration in training steps.

  Args:
    text: '60 epochs', '400 steps', '1e6 examples', or '50%' of `total`.
    batch_size: examples in a step.
    num_examples: examples in the training set; an epoch is
      `num_examples // batch_size` steps, which drops the remainder.
    total: steps of the whole run, needed for '%'.
    name: the config field, for the message of an error.

  Returns:
    The number of steps, at most 2**31 - 1; every run is shorter.

  Raises:
    InputError: `text` is no duration, or a per cent without a `total`.
  """
  if fault := fields.Duration().wrong(text):
    raise InputError(f'{name}={fields.shown(text)} {fault}')
  amount, unit = fields.parse_duration(text) or (0.0, '')
  if unit == '%':
    if total is None:
      raise InputError(f'{name}={text!r} cannot be a per cent')
    steps = amount / 100 * total
  elif unit == 'epochs':
    steps = amount * (num_examples // batch_size)
  elif unit == 'examples':
    steps = math.ceil(amount / batch_size)
  else:
    steps = amount
  return round(min(steps, fields.MOST))
