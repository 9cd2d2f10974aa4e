"""The run: data, step, evaluate, save, log; then freeze, fine-tune, prune.

What a workdir starts from, the first that applies:
  1. its own newest whole checkpoint, if config.json says the same config and
     inputs.json the same images;
  2. the seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from maskconnect_jax import config as config_lib
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import (
  checkpoint,
  distributed,
  evaluation,
  experiment,
  finish,
  freeze,
  locks,
  metrics,
  steps,
  workdirs,
)
from maskconnect_jax.run import plan as plan_lib
from maskconnect_jax.run.preemption import Preemption
from maskconnect_jax.run.progress import Progress, Run


@dataclasses.dataclass
class Result:
  """The outcome of a run, which a notebook goes on with.

  Attributes:
    summary: the content of summary.json; empty if the run was interrupted.
    state: after the last step.
    model: frozen, fine-tuned and pruned; None if the run was interrupted.
    interrupted: the signal that stopped the run, such as SIGTERM, else 0. The
      same call goes on from there.
  """

  summary: dict[str, Any]
  state: steps.TrainState
  model: Any
  interrupted: int = 0


class NotFinite(Exception):
  """A loss or an update is NaN or infinite; the text names it and the step."""


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> Result:
  """Trains, freezes, fine-tunes, prunes and evaluates; goes on if it was cut.

  Args:
    config: see `maskconnect_jax/config.py`.
    workdir: where everything is written; docs/running.md, "The workdir".

  Raises:
    InputError: something given cannot be used, raised before anything is
      written; or the loss stopped being finite.
  """
  workdir = config_lib.given_path(workdir, '--workdir')
  config_lib.check(config)
  config_lib.check_is_one_run(config)
  config = config.copy_and_resolve_references()
  workdirs.keep_version(config, workdir)
  workdirs.check(config, workdir)
  with locks.locked(workdir, enabled=jax.process_index() == 0):
    # Once more: a run that had the lock until now may have left something.
    workdirs.check(config, workdir)
    run = start(experiment.build(config), workdir)
    plan = run.job.plan
    if interrupted := loop(run):
      run.bar.say(
        f'stopped after step {int(run.state.step)} of {plan.total}; the same'
        ' command goes on from there'
      )
      return Result({}, run.state, None, interrupted)
    if plan.freeze == plan.total:
      freeze.freeze(run)
    summary, model = finish.finish(run)
    return Result(summary, run.state, model)


def start(job: experiment.Experiment, workdir: Path) -> Run:
  """Loads the newest checkpoint, or starts from the seed; opens the log.

  Args:
    job: the run.
    workdir: of the run, and locked.

  Raises:
    InputError: the workdir is of other images, or cannot be used.
  """
  config, plan = job.config, job.plan
  primary = jax.process_index() == 0
  given = config.connectivity.rule == 'fixed_given'
  inputs = workdirs.checked_inputs(
    workdir, job.dataset.identity, job.model.topology if given else None
  )
  if primary:
    workdirs.remove_leftovers(workdir)
    if not (workdir / 'config.json').exists():
      # First of all files: by it the folder is known as a run's.
      workdirs.write_config(config, workdir)

  state = distributed.to_global(
    steps.init_state(job.model, job.recipe), distributed.replicated(job.mesh)
  )
  checkpoints = checkpoint.Checkpoints(
    workdir / 'checkpoints', keep=config.keep_checkpoints
  )
  loaded = checkpoints.load_newest(state, Progress.from_json)
  state, progress = loaded or (state, Progress())
  step = int(state.step)
  if primary:
    workdirs.write_config(config, workdir)
    workdirs.write_inputs(inputs, workdir)
    plan_lib.write(plan, workdir)

  shapes = [leaf.shape for leaf in jax.tree.leaves(state.masks)]
  preemption = Preemption()
  run = Run(
    workdir=workdir,
    job=job,
    recipe=job.recipe,
    state=state,
    progress=progress,
    batches=experiment.training_batches(job),
    evaluate=evaluation.Evaluator(
      job.recipe,
      config.eval_batch_size,
      job.mesh,
      threads=config.data.threads,
      stopping=preemption.noticed,
    ),
    preemption=preemption,
    checkpoints=checkpoints,
    writer=metrics.MetricsWriter(workdir, step, enabled=primary),
    history=metrics.MaskHistory(workdir, step, *shapes, enabled=primary),
    bar=metrics.ProgressBar(plan.total, step, enabled=primary),
  )
  if plan.freeze and step > plan.freeze:
    run.recipe = freeze.frozen_recipe(job.recipe, state)
  run.bar.say(plan.in_words(config.batch_size))
  if note := experiment.note_on_fan_in(job):
    run.bar.say(note)
  if loaded:
    run.bar.say(f'going on from step {step} of {plan.total} in {workdir}')
  return run


def loop(run: Run) -> int:
  """Takes all steps that are left, and closes the log and the checkpoints.

  A stop leaves no trace in the log: the checkpoint then keeps the steps since
  the last record. Where the last step's own record is left out, because its
  evaluation was stopped, the next start begins with that record.

  Args:
    run: as `start` returns it; moved on to the last step.

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
              save(run, step, None)
            return interrupted
          run.bar.say(finish.at_freeze(run))
          train_step = None
        train_step = take_step(run, upcoming, train_step)
      interrupted = run.preemption.requested(done)
      if not (interrupted or plan.records(done)):
        continue
      means = mean_of_steps(run.progress.pending, done)
      rate = run.progress.clock.stop(run.timed * run.job.config.batch_size)
      run.timed = 0
      accuracy: float | None = None
      if plan.records(done):
        try:
          accuracy = record(run, done, means, rate)
        except evaluation.Stopped:
          interrupted = run.preemption.requested(done)
      if interrupted or plan.saves(done):
        save(run, done, accuracy)
      if interrupted:
        return interrupted
  return 0


def take_step(run: Run, upcoming: Iterator[Any], train_step: Any) -> Any:
  """Takes one step, and returns the compiled program for the next one.

  Args:
    run: its state moves on, and the step becomes a pending one.
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
    run: no step is pending afterwards.
    done: steps taken.
    means: loss and accuracy of the pending steps.
    rate: images per second in the pending steps; 0 if none was timed.

  Returns:
    The accuracy on the images that the run is watched on; None where no
    evaluation is due.

  Raises:
    Stopped: a signal came in the evaluation; nothing is written.
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
    scores = run.evaluate(run.recipe.network, run.state.variables(), split)
    line |= scores.named(watched)
    accuracy = scores.accuracy
  run.progress.pending = []
  if phase == 'connectivity':
    run.history.add(done, run.state.masks)
  run.writer.write(done, phase, line)
  run.bar.update(done, phase, line)
  return accuracy


def save(run: Run, done: int, accuracy: float | None) -> None:
  """Saves a checkpoint after `done` steps.

  Args:
    run: with the state to save.
    done: steps taken.
    accuracy: see `Checkpoints.save`.

  Raises:
    NotFinite: the last update broke the state; nothing is saved.
    InputError: the checkpoint cannot be written, as on a full disk.
  """
  check_finite(run.state, done)
  run.progress.damaged |= run.batches.damaged
  run.history.save()
  run.checkpoints.save(done, run.state, run.progress.to_json(), accuracy)


def compile_step(
  recipe: steps.Recipe,
  state: steps.TrainState,
  batch: tuple[jax.Array, jax.Array],
  bar: metrics.ProgressBar,
) -> Any:
  """Compiles ahead of the first call, so that no timing includes it."""
  bar.say('compiling the training step')
  jitted = jax.jit(steps.train_step, static_argnums=0, donate_argnums=1)
  return jitted.lower(recipe, state, *batch).compile()


def mean_of_steps(pending: list[dict[str, Any]], done: int) -> dict[str, float]:
  """Returns the mean loss and accuracy of the last steps.

  Args:
    pending: {'loss', 'accuracy'}, float32 [], of each of these steps.
    done: the number of the last one, counted from 1.

  Raises:
    NotFinite: a loss is not finite; names the first such step.
  """
  values = jax.device_get(pending)
  for step, value in enumerate(values, start=done - len(values) + 1):
    if not math.isfinite(value['loss']):
      raise NotFinite(f'the loss is not finite at step {step}')
  return {
    name: float(np.mean([value[name] for value in values]))
    for name in ('loss', 'accuracy')
  }


def check_finite(state: steps.TrainState, done: int) -> None:
  """Raises NotFinite if the update of step `done` broke the state."""
  leaves = jax.tree.leaves(
    (state.weights, state.masks, state.statistics, state.average)
  )
  if not all(bool(jnp.isfinite(leaf).all()) for leaf in leaves):
    raise NotFinite(f'the update is not finite at step {done}')


@contextlib.contextmanager
def naming_the_last_checkpoint(
  checkpoints: checkpoint.Checkpoints,
) -> Iterator[None]:
  """Makes NotFinite an InputError that names the last good checkpoint."""
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
