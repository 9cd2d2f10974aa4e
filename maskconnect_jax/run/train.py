"""A run from its config to its model: start or go on, take all steps, finish.

A run starts from the newest whole checkpoint of its workdir. Its config must
equal config.json there, and its images those of inputs.json. Without a
checkpoint it starts from the model of config.init_from, and without that from
the seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from maskconnect_jax import config as config_lib
from maskconnect_jax.data import jpeg
from maskconnect_jax.run import (
  bucket,
  checkpoint,
  cores,
  distributed,
  evaluation,
  experiment,
  finish,
  freeze,
  init_from,
  locks,
  loop,
  metrics,
  narrow,
  profile,
  report,
  snapshot,
  train_state,
  workdirs,
)
from maskconnect_jax.run import plan as plan_lib
from maskconnect_jax.run.preemption import Preemption
from maskconnect_jax.run.progress import Progress, Run


@dataclasses.dataclass
class Result:
  """The outcome of a run, for use in a notebook.

  Attributes:
    summary: the content of summary.json; empty if the run was interrupted.
    state: the state after the last step.
    model: the frozen, fine-tuned and pruned model; None if the run was
      interrupted.
    interrupted: the signal that stopped the run, for example SIGTERM, else 0.
      The same call resumes the run.
  """

  summary: dict[str, Any]
  state: train_state.TrainState
  model: Any
  interrupted: int = 0

  def _repr_html_(self) -> str:
    """Shows the run in a notebook: its accuracies and its topology."""
    if self.interrupted:
      step = int(self.state.step)
      return f'<p>Stopped after step {step:,}; the same call goes on.</p>'
    return report.snippet(self.summary, self.model)


def train(
  config: ml_collections.ConfigDict,
  workdir: str | Path,
  *,
  data: Sequence[Any] | None = None,
  profile_steps: int = 0,
) -> Result:
  """Trains, freezes, fine-tunes, prunes and evaluates; resumes a cut run.

  Args:
    config: see `maskconnect_jax/config.py`.
    workdir: the folder to write to, or an address such as s3://bucket/run; see
      docs/running.md, "The workdir".
    data: images, labels, test images and test labels, arrays that go with
      config.data.source='arrays'; see `arrays.of`.
    profile_steps: how many steps to trace into workdir/profile; 0: none.

  Returns:
    See `Result`.

  Raises:
    InputError: the config, the data or the workdir cannot be used, raised
      before anything is written; or the loss stopped being finite; or a file
      cannot be written.
  """
  config_lib.check(config)
  config_lib.check_is_one_run(config)
  config = config.copy_and_resolve_references()
  cores.use(cores.for_batches(config.batch_size, config.data))
  distributed.check_platform()
  with bucket.mirrored(workdir) as folder:
    return _train(config, folder, data, profile_steps, str(workdir))


def _train(
  config: ml_collections.ConfigDict,
  workdir: Path,
  data: Sequence[Any] | None,
  profiled: int,
  name: str,
) -> Result:
  """Does what `train` does, in a local folder that messages call `name`."""
  workdirs.keep_version(config, workdir)
  workdirs.check(config, workdir)
  with locks.locked(workdir, enabled=jax.process_index() == 0):
    # Again, because a run that held the lock until now may have written here.
    workdirs.check(config, workdir)
    run = start(experiment.build(config, data), workdir, name)
    plan = run.job.plan
    traced = profile.Profile(workdir / 'profile', profiled, int(run.state.step))
    interrupted = loop.loop(run, traced)
    traced.close(run.state)
    if interrupted:
      run.bar.say(
        f'stopped after step {int(run.state.step)} of {plan.total}; the same'
        ' command goes on from there'
      )
      return Result({}, run.state, None, interrupted)
    if plan.freeze == plan.total:
      freeze.freeze(run)
    summary, model = finish.finish(run)
    return Result(summary, run.state, model)


def start(job: experiment.Experiment, workdir: Path, name: str) -> Run:
  """Loads the newest checkpoint, or starts from the seed; opens the log.

  Args:
    job: the config, and everything built from it.
    workdir: the folder of the run; the caller holds its lock.
    name: what the user calls the folder.

  Returns:
    The run, before its next step.

  Raises:
    InputError: the workdir belongs to other images or another topology, or
      cannot be used.
  """
  config, plan = job.config, job.plan
  primary = jax.process_index() == 0
  given = config.connectivity.rule == 'fixed_given'
  inputs = workdirs.checked_inputs(
    workdir,
    job.dataset.identity,
    job.model.topology if given else None,
    resizer=jpeg.chosen.name if config.data.crop == 'resized' else None,
  )
  inputs['model'] = snapshot.description(job.model, **experiment.served_as(job))
  if primary:
    workdirs.remove_leftovers(workdir)
    if not (workdir / 'config.json').exists():
      # The first file of all, because it marks the folder as a run's workdir.
      workdirs.write_config(config, workdir)

  state = train_state.on_devices(
    job.recipe, train_state.init_state(job.model, job.recipe)
  )
  checkpoints = checkpoint.Checkpoints(
    workdir / 'checkpoints', keep=config.keep_checkpoints
  )
  loaded = checkpoints.load_newest(state, Progress.from_json)
  distributed.meet('begun')  # before the first file of this start
  begun = ''
  if config.init_from and not loaded:
    folder = config_lib.given_path(config.init_from, 'config.init_from')
    model, begun = init_from.filled(job.model, folder)
    state = train_state.on_devices(
      job.recipe, train_state.init_state(model, job.recipe)
    )
  state, progress = loaded or (state, Progress())
  step = int(state.step)
  distributed.check_same(step, in_folder=name)
  # Saved before the record of its step was written; that may be there or not.
  logged = step - (bool(progress.pending) and plan.records(step))
  if primary:
    workdirs.write_config(config, workdir)
    workdirs.write_inputs(inputs, workdir)
    plan_lib.write(plan, workdir)

  shapes = [leaf.shape for leaf in jax.tree.leaves(state.masks)]
  preemption = Preemption()
  bar = metrics.ProgressBar(plan.total, step, enabled=primary)
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
      pause=bar.pause,
    ),
    preemption=preemption,
    checkpoints=checkpoints,
    writer=metrics.MetricsWriter(workdir, logged, enabled=primary),
    history=metrics.MaskHistory(workdir, logged, *shapes, enabled=primary),
    bar=bar,
  )
  if plan.freeze and step > plan.freeze:
    run.recipe = freeze.frozen_recipe(job.recipe, state)
  run.writer.write_fields(config_lib.flat(config))
  run.bar.say(plan.in_words(config.batch_size))
  if note := experiment.note_on_fan_in(job):
    run.bar.say(note)
  if cost := narrow.cost_in_words(job):
    run.bar.say(f'measuring: {cost}')
  if begun:
    run.bar.say(begun)
  if loaded:
    run.bar.say(f'going on from step {step} of {plan.total} in {name}')
  return run
