"""The run: data, step, evaluate, save, log; then freeze, fine-tune, prune.

What a workdir starts from, the first that applies:
  1. its own newest whole checkpoint, if config.json says the same config and
     inputs.json the same images;
  2. the seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from maskconnect_jax import config as config_lib
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import wiring
from maskconnect_jax.run import batches as batches_lib
from maskconnect_jax.run import (
  checkpoint,
  distributed,
  evaluation,
  experiment,
  finish,
  locks,
  metrics,
  steps,
  workdirs,
)


@dataclasses.dataclass
class Result:
  """What a run leaves in memory, for a notebook to go on with.

  Attributes:
    summary: the content of summary.json; empty if the run was interrupted.
    state: after the last step.
    model: frozen, fine-tuned and pruned; None if the run was interrupted.
    interrupted: the signal that stopped the run, which the same call goes on
      with, such as SIGTERM; else 0.
  """

  summary: dict[str, Any]
  state: steps.TrainState
  model: Any
  interrupted: int = 0


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> Result:
  """Trains, freezes, fine-tunes, prunes and evaluates; goes on if it was cut.

  Args:
    config: see `maskconnect_jax/config.py`.
    workdir: where everything is written; README, "The workdir".

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
  primary = jax.process_index() == 0
  with locks.locked(workdir, enabled=primary):
    # Once more: a run that had the lock until now may have left something.
    workdirs.check(config, workdir)
    return _train(config, workdir, primary)


def _train(
  config: ml_collections.ConfigDict, workdir: Path, primary: bool
) -> Result:
  job = experiment.build(config)
  given = config.connectivity.rule == 'fixed_given'
  inputs = workdirs.checked_inputs(
    workdir, job.dataset.identity, job.model.topology if given else None
  )
  if primary:
    workdirs.remove_leftovers(workdir)
    if not (workdir / 'config.json').exists():
      workdirs.write_config(config, workdir)  # says whose the folder is
  plan, recipe = job.plan, job.recipe
  everywhere = distributed.replicated(job.mesh)

  # Start: the newest checkpoint, or the seed.
  state = distributed.to_global(steps.init_state(job.model, recipe), everywhere)
  checkpoints = checkpoint.Checkpoints(
    workdir / 'checkpoints', keep=config.keep_checkpoints
  )
  progress: dict[str, Any] = {'images': 0, 'train_seconds': 0.0, 'damaged': []}
  if loaded := checkpoints.load_newest(state, progress):
    state, progress = loaded
  start = int(state.step)
  if primary:
    workdirs.write_config(config, workdir)
    workdirs.write_inputs(inputs, workdir)
  writer = metrics.MetricsWriter(workdir, start, enabled=primary)
  shapes = [leaf.shape for leaf in jax.tree.leaves(state.masks)]
  history = metrics.MaskHistory(workdir, start, *shapes, enabled=primary)
  bar = metrics.Progress(plan.total, start, enabled=primary)
  bar.say(experiment.duration_in_words(job))
  if note := experiment.note_on_fan_in(job):
    bar.say(note)
  if loaded:
    bar.say(f'going on from step {start} of {plan.total} in {workdir}')

  batches = experiment.training_batches(job)
  damaged = set(progress['damaged'])
  preemption = distributed.Preemption()
  evaluate = evaluation.Evaluator(
    recipe,
    config.eval_batch_size,
    job.mesh,
    threads=config.data.threads,
    stopping=preemption.noticed,
  )
  watched, split = experiment.held_out(job)
  rates = experiment.make_schedules(config, plan)
  clock = metrics.Throughput(progress['images'], progress['train_seconds'])
  # What a stop left out of the log, so that it cannot be told from a run that
  # went through: the steps since a record, or also the last one's evaluation.
  pending: list[dict[str, Any]] = [
    {name: np.float32(number) for name, number in values.items()}
    for values in progress.pop('unlogged', [])
  ]
  owed = bool(pending) and plan.records(start)
  timed = 0  # of those pending, by the clock
  interrupted = 0
  if plan.freeze and start > plan.freeze:
    recipe = frozen_recipe(recipe, state)
  train_step: Any = None
  upcoming = batches.starting_at(start)

  def save(done: int, accuracy: float | None) -> None:
    check_finite(state, done, checkpoints)
    damaged.update(batches.damaged)
    progress.update(
      images=clock.images,
      train_seconds=clock.seconds,
      damaged=sorted(damaged),
    )
    if primary:
      history.save()
    unlogged = {'unlogged': in_numbers(pending)} if pending else {}
    checkpoints.save(done, state, progress | unlogged, accuracy)

  with (
    preemption,
    contextlib.closing(checkpoints),
    contextlib.closing(writer),
    contextlib.closing(bar),
    distributed.failing_together(),
  ):
    for step in range(start - owed, plan.total):
      done, phase = step + 1, plan.phase(step)
      if done > start:
        if plan.freeze and step == plan.freeze:
          try:
            recipe, state = freeze(job, state, batches, evaluate, progress)
          except evaluation.Stopped:
            interrupted = preemption.requested(step)
            if step > start and not plan.saves(step):
              save(step, None)
            break
          bar.say(finish.at_freeze(watched, progress, step))
          train_step = None
        if not timed:
          clock.start()
        batch = next(upcoming)
        if train_step is None:
          clock.stop(0)
          train_step = compile_step(recipe, state, batch, bar)
          clock.start()
        state, values = train_step(state, *batch)
        pending.append(values)
        timed += 1

      interrupted = preemption.requested(done)
      if not (interrupted or plan.records(done)):
        continue

      record: dict[str, Any] = {
        'epoch': done / plan.per_epoch,
        **average(pending, done, checkpoints),
        'learning_rate': float(rates[0](step)),
        'mask_learning_rate': float(rates[1](step)),
        'images_per_second': clock.stop(timed * config.batch_size)
        or clock.images_per_second,
      }
      timed = 0
      accuracy = None
      whole = plan.records(done)
      if whole and plan.evaluates(done):
        try:
          scores = evaluate(recipe.network, state.variables(), split)
        except evaluation.Stopped:
          interrupted, whole = preemption.requested(done), False
        else:
          record |= scores.named(watched)
          accuracy = scores.accuracy
      if whole:
        pending = []
        if phase == 'connectivity':
          history.add(done, state.masks)
        writer.write(done, phase, record)
        bar.update(done, phase, record)
      if interrupted or plan.saves(done):
        save(done, accuracy)
      if interrupted:
        break

  if interrupted:
    bar.say(
      f'stopped after step {int(state.step)} of {plan.total}; the same'
      ' command goes on from there'
    )
    return Result({}, state, None, interrupted)
  if plan.freeze == plan.total:
    recipe, state = freeze(job, state, batches, evaluate, progress)

  frozen = nnx.merge(recipe.network, *state.variables())
  pruned = wiring.prune(frozen)
  network, *variables = steps.split(pruned)
  test = job.dataset.test
  tested = evaluate(recipe.network, state.variables(), test)
  accuracies = {
    f'{watched}_accuracy_drawn': progress.get(f'{watched}_accuracy_drawn'),
    f'{watched}_accuracy_at_freeze': progress.get(
      f'{watched}_accuracy_at_freeze'
    ),
    **tested.named('test'),
    'test_accuracy_pruned': evaluate(network, tuple(variables), test).accuracy,
    'num_test_examples': tested.count,
  }
  if job.dataset.validation:
    accuracies |= evaluate(
      recipe.network, state.variables(), job.dataset.validation
    ).named('validation')
  if lost := [
    name
    for name, value in accuracies.items()
    if name.endswith('_loss') and value is None
  ]:
    bar.say(
      f'{", ".join(lost)} is not finite, and null in summary.json: the run'
      ' diverged. Try a lower config.optimizer.learning_rate or a longer'
      ' config.optimizer.warmup'
    )
  skipped = job.dataset.skipped + len(damaged) + len(test) - tested.count
  summary = finish.summarize(job, frozen, pruned, accuracies, skipped, clock)
  finish.write(workdir, job, frozen, pruned, summary, history)
  return Result(summary, state, pruned)


def compile_step(
  recipe: steps.Recipe,
  state: steps.TrainState,
  batch: tuple[jax.Array, jax.Array],
  bar: metrics.Progress,
) -> Any:
  """Compiles ahead of the first call, so that no timing includes it."""
  bar.say('compiling the training step')
  jitted = jax.jit(steps.train_step, static_argnums=0, donate_argnums=1)
  return jitted.lower(recipe, state, *batch).compile()


def frozen_recipe(
  recipe: steps.Recipe, state: steps.TrainState
) -> steps.Recipe:
  """Returns the recipe with the wiring fixed to the top-K of the real mask."""
  model = nnx.merge(recipe.network, *state.variables())
  network, *_ = steps.split(wiring.freeze(model))
  return dataclasses.replace(recipe, network=network)


def freeze(
  job: experiment.Experiment,
  state: steps.TrainState,
  batches: batches_lib.Resident | batches_lib.Streamed,
  evaluate: evaluation.Evaluator,
  progress: dict[str, Any],
) -> tuple[steps.Recipe, steps.TrainState]:
  """Freezes the topology and recomputes BatchNorm; measures before and after.

  A function of the state alone: a run resumed just before it repeats it. The
  two accuracies go into `progress`, and so into every later checkpoint.
  """
  watched, split = experiment.held_out(job)
  progress[f'{watched}_accuracy_drawn'] = evaluate(
    job.recipe.network, state.variables(), split, draw_at=int(state.step)
  ).accuracy
  recipe = frozen_recipe(job.recipe, state)
  count = job.config.connectivity.batchnorm_batches
  if count:
    state = measured_anew(recipe, state, batches, count)
  progress[f'{watched}_accuracy_at_freeze'] = evaluate(
    recipe.network, state.variables(), split
  ).accuracy
  return recipe, state


def measured_anew(
  recipe: steps.Recipe,
  state: steps.TrainState,
  batches: batches_lib.Resident | batches_lib.Streamed,
  count: int,
) -> steps.TrainState:
  """Returns the state with BatchNorm's statistics over the next batches.

  Those of the averaged weights, where there are such, are measured too.
  """
  measure = jax.jit(steps.batch_statistics, static_argnums=0)
  both = {False: (state.weights, state.masks, state.statistics)}
  if state.average:
    both[True] = state.variables()
  totals = {
    kind: jax.tree.map(jnp.zeros_like, state.statistics) for kind in both
  }
  start = int(state.step)
  upcoming = itertools.islice(batches.starting_at(start), count)
  for step, (images, _) in enumerate(upcoming, start):
    for kind, variables in both.items():
      one = measure(recipe, variables, images, step)
      totals[kind] = jax.tree.map(jnp.add, totals[kind], one)
  means = jax.tree.map(lambda total: total / count, totals)
  average = state.average and state.average | {'statistics': means[True]}
  return dataclasses.replace(state, statistics=means[False], average=average)


def average(
  pending: list[dict[str, Any]],
  done: int,
  checkpoints: checkpoint.Checkpoints,
) -> dict[str, float]:
  """Returns mean loss and accuracy of the last steps; all must be finite."""
  values = jax.device_get(pending)
  for step, value in enumerate(values, start=done - len(values) + 1):
    if not math.isfinite(value['loss']):
      raise diverged('loss', step, checkpoints)
  return {
    name: float(np.mean([value[name] for value in values]))
    for name in ('loss', 'accuracy')
  }


def in_numbers(pending: list[dict[str, Any]]) -> list[dict[str, float]]:
  """Returns what steps gave as JSON keeps it; a float32 comes back the same."""
  return [
    {name: float(value) for name, value in values.items()}
    for values in jax.device_get(pending)
  ]


def check_finite(
  state: steps.TrainState, done: int, checkpoints: checkpoint.Checkpoints
) -> None:
  """Keeps a state that the last update broke out of the checkpoints."""
  leaves = jax.tree.leaves(
    (state.weights, state.masks, state.statistics, state.average)
  )
  if not all(bool(jnp.isfinite(leaf).all()) for leaf in leaves):
    raise diverged('update', done, checkpoints)


def diverged(
  what: str, step: int, checkpoints: checkpoint.Checkpoints
) -> InputError:
  """Returns the error that names the step and what is left to go on from."""
  checkpoints.close()
  kept = checkpoints.steps()
  last = (
    f'the last good checkpoint is {checkpoints.folder / str(kept[-1])}'
    if kept
    else 'there is no checkpoint yet'
  )
  return InputError(
    f'the {what} is not finite at step {step}; {last}. Try a lower'
    ' config.optimizer.learning_rate or a longer config.optimizer.warmup'
  )
