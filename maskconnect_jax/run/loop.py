"""The steps of a run: batch, step, narrow, record, save; and the freeze.

A stop leaves no trace in the log, and each file is written when it is due. So a
run that was cut ends with the same bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from maskconnect_jax.errors import InputError
from maskconnect_jax.run import (
  batches,
  checkpoint,
  cores,
  distributed,
  evaluation,
  experiment,
  finish,
  freeze,
  metrics,
  narrow,
  profile,
  steps,
  train_state,
)
from maskconnect_jax.run.progress import Run


class NotFinite(Exception):
  """A loss or an update is NaN or infinite; the text names it and the step."""


def loop(run: Run, traced: profile.Profile) -> int:
  """Takes all remaining steps, then closes the log and the checkpoints.

  A stop leaves no trace in the log: the checkpoint keeps the values of the
  steps since the last record. Where a checkpoint and an evaluation are due, the
  checkpoint comes first, so that no kill in an evaluation costs the steps. A
  run that goes on from it begins with the evaluation and the record.

  Args:
    run: as `start` returns it; its state moves on to the last step.
    traced: begins and ends the trace of some steps.

  Returns:
    The signal that stopped the run, else 0.

  Raises:
    InputError: the loss stopped being finite, or a file cannot be written.
  """
  plan, first = run.job.plan, int(run.state.step)
  owed = bool(run.progress.pending) and plan.records(first)
  upcoming = run.batches.starting_at(first)
  train_step: Any = None
  with (
    run.preemption,
    contextlib.closing(run.checkpoints),
    contextlib.closing(run.writer),
    contextlib.closing(run.bar),
    distributed.failing_together(),
    naming_the_last_checkpoint(run.checkpoints),
  ):
    for step in range(first - owed, plan.total):
      done = step + 1
      if done > first:
        if plan.freezes(step):
          try:
            freeze.freeze(run)
          except evaluation.Stopped:
            interrupted = run.preemption.requested(step)
            if step > first and not plan.saves(step):
              save(run, step)
            return interrupted
          run.bar.say(finish.at_freeze(run))
          train_step = None
        traced.before(step)
        train_step = take_step(run, upcoming, train_step)
        if line := traced.after(done, run.state):
          run.bar.say(line)
      saved = done <= first
      if number := plan.moment(done):
        run.stop_clock()
        if jax.process_count() > 1 and not saved:
          save(run, done)  # several processes see no signal in a moment
          saved = True
        try:
          if line := narrow.narrow(run, number):
            run.bar.say(line)
        except evaluation.Stopped:
          save(run, done)
          return run.preemption.requested(done)
      interrupted = run.preemption.requested(done)
      if not (interrupted or plan.records(done)):
        continue
      interrupted = log(run, done, interrupted, saved=saved)
      if interrupted:
        return interrupted
  return 0


def log(run: Run, done: int, interrupted: int, *, saved: bool) -> int:
  """Writes the record and the checkpoint that are due after `done` steps.

  Args:
    run: with the values of the steps since the last record.
    done: steps done.
    interrupted: the signal that asks to stop, else 0.
    saved: whether this step's checkpoint is there already.

  Returns:
    The signal that asks to stop, which may have come meanwhile, else 0.

  Raises:
    NotFinite: a loss or the state is not finite.
    InputError: a file cannot be written.
  """
  plan = run.job.plan
  means = mean_of_steps(run.progress.pending, done)
  before = run.progress.clock.seconds
  rate = run.stop_clock()
  if (
    isinstance(run.batches, batches.Decoded)
    and jax.default_backend() != 'cpu'  # which needs all cores itself
    and (line := run.batches.advice(run.progress.clock.seconds - before))
  ):
    run.bar.say(line)
  if not saved and plan.saves(done) and plan.evaluates(done):
    save(run, done)
    saved = True
  accuracy: float | None = None
  if plan.records(done):
    try:
      accuracy = record(run, done, means, rate)
    except evaluation.Stopped:
      interrupted = run.preemption.requested(done)
  if not saved and (interrupted or plan.saves(done)):
    save(run, done, accuracy)
  elif saved and accuracy is not None:
    run.checkpoints.measured(done, accuracy)
  return interrupted


def take_step(run: Run, upcoming: Iterator[Any], train_step: Any) -> Any:
  """Takes one step, and returns the compiled program for the next one.

  Args:
    run: its state moves on by a step, whose values become pending.
    upcoming: yields the batch of the step.
    train_step: the compiled program; None compiles one for the run's phase.
  """
  clock = run.progress.clock
  if not run.timed:
    clock.start()
  batch = next(upcoming)
  if train_step is None:
    clock.stop(0)
    train_step = compile_step(run.recipe, run.state, batch, run.bar)
    clock.start()
  run.state, values = train_step(run.state, *batch)
  run.progress.pending.append(values)
  run.timed += 1
  return train_step


def record(
  run: Run, done: int, means: dict[str, float], rate: float
) -> float | None:
  """Writes the line of the log that is due after `done` steps.

  Args:
    run: afterwards no values are pending.
    done: steps done.
    means: loss and accuracy of the pending steps.
    rate: images per second in the pending steps; 0 if none was timed.

  Returns:
    The accuracy, or the mAP of several labels, on the held out images, or on
    the test images if no images are held out; None if no evaluation is due.

  Raises:
    Stopped: a signal came during the evaluation; nothing is written.
    InputError: a file cannot be written.
  """
  job, step = run.job, done - 1
  phase, accuracy = job.plan.phase(step), None
  line: dict[str, Any] = {
    'epoch': done / job.plan.per_epoch,
    **means,
    'learning_rate': float(job.rates[0](step)),
    'mask_learning_rate': float(job.rates[1](step)),
    'images_per_second': rate or run.progress.clock.images_per_second,
  }
  if job.plan.evaluates(done):
    watched, split = experiment.held_out(job)
    # The mask of the training step, where sources fade in.
    fading = job.model.stack.spec.start == 'previous'
    scores = run.evaluate(
      run.recipe.network,
      run.state.variables(),
      split,
      draw_at=done if fading else None,
    )
    line |= scores.named(watched)
    accuracy = scores.headline
  run.progress.pending = []
  if phase == 'connectivity':
    mask = run.history.add(done, run.state.masks)
    run.writer.write_mask(done, mask, job.model.stack.valid)
  run.writer.write(done, phase, line)
  run.bar.update(done, phase, line)
  return accuracy


def save(run: Run, done: int, accuracy: float | None = None) -> None:
  """Saves a checkpoint after `done` steps.

  Args:
    run: holds the state to save.
    done: steps done.
    accuracy: see `Checkpoints.save`.

  Raises:
    NotFinite: the state is not finite; nothing is saved.
    InputError: the checkpoint cannot be written, for example on a full disk.
  """
  check_finite(run.state, done)
  # A process knows of those that it decoded; the first one writes all.
  run.progress.damaged = distributed.union(
    run.progress.damaged | run.batches.damaged
  )
  run.history.save()
  run.checkpoints.save(done, run.state, run.progress.to_json(), accuracy)


def compile_step(
  recipe: train_state.Recipe,
  state: train_state.TrainState,
  batch: tuple[jax.Array, jax.Array],
  bar: metrics.ProgressBar,
) -> Any:
  """Compiles the training step before its first call.

  So no measured time includes compiling.

  Args:
    recipe: the recipe of the phase.
    state: the state before the step.
    batch: images and labels, see `steps.train_step`.
    bar: tells the user.

  Returns:
    The compiled `train_step`, called with (state, images, labels); it reuses
    the memory of the state.
  """
  bar.say('compiling the training step')
  jitted = jax.jit(steps.train_step, static_argnums=0, donate_argnums=1)
  with bar.pause():
    compiled = jitted.lower(recipe, state, *batch).compile()
  if jax.default_backend() == 'cpu' and (memory := compiled.memory_analysis()):
    cores.give_back_memory(
      memory.temp_size_in_bytes * recipe.batch_sharding.mesh.size
    )
  return compiled


def mean_of_steps(pending: list[dict[str, Any]], done: int) -> dict[str, float]:
  """Returns the mean loss and accuracy of the last steps.

  Args:
    pending: {'loss', 'accuracy'}, float32 [], of each of these steps.
    done: the number of the last of them, counted from 1.

  Raises:
    NotFinite: a loss is not finite; the text names the first step with one.
  """
  values = jax.device_get(pending)
  for step, value in enumerate(values, start=done - len(values) + 1):
    if not math.isfinite(value['loss']):
      raise NotFinite(f'the loss is not finite at step {step}')
  return {
    name: float(np.mean([value[name] for value in values]))
    for name in ('loss', 'accuracy')
  }


def check_finite(state: train_state.TrainState, done: int) -> None:
  """Checks that the state after step `done` is finite.

  Raises:
    NotFinite: a weight, mask, statistic or average is NaN or infinite.
  """
  leaves = jax.tree.leaves(
    (state.weights, state.masks, state.statistics, state.average)
  )
  # By NumPy, as JAX would compile a program for each shape. Of an array that is
  # split over processes, each one checks its own part.
  parts = [
    shard.data
    for leaf in leaves
    for shard in leaf.addressable_shards[
      : 1 if leaf.is_fully_replicated else None
    ]
  ]
  if not all(np.isfinite(part).all() for part in jax.device_get(parts)):
    raise NotFinite(f'the update is not finite at step {done}')


@contextlib.contextmanager
def naming_the_last_checkpoint(
  checkpoints: checkpoint.Checkpoints,
) -> Iterator[None]:
  """Turns NotFinite into an InputError that names the last good checkpoint."""
  try:
    yield
  except NotFinite as error:
    checkpoints.wait()
    kept = checkpoints.steps()
    last = (
      f'the last good checkpoint is {checkpoints.folder / str(kept[-1])}'
      if kept
      else 'there is no checkpoint yet'
    )
    raise InputError(
      f'{error}; {last}. Try a lower config.optimizer.learning_rate or a longer'
      ' config.optimizer.warmup'
    ) from error
