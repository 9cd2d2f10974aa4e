"""The run: data, step, evaluate, save, log; then freeze, fine-tune, prune.

What a workdir starts from, first that applies:
  1. its own newest whole checkpoint, if config.json says the same config;
  2. the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from maskconnect_jax import (
  checkpoint,
  connectivity,
  datasets,
  distributed,
  files,
  inference,
  metrics,
  models,
  optimizer,
  plots,
  steps,
)
from maskconnect_jax import config as config_lib
from maskconnect_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config's durations, in steps."""

  total: int
  freeze: int  # the connectivity phase is [0, freeze); 0 for a fixed rule
  log_every: int
  evaluate_every: int
  checkpoint_every: int
  per_epoch: int

  def phase(self, step: int) -> str:
    """The phase that `step`, counted from 0, belongs to."""
    if not self.freeze:
      return 'train'
    return 'connectivity' if step < self.freeze else 'fine-tune'


def make_plan(config: ml_collections.ConfigDict, num_examples: int) -> Plan:
  """Turns the durations of a config into steps.

  Raises:
    InputError: the batch is larger than the training set, or there are no
      steps to take.
  """
  if config.batch_size > num_examples:
    raise InputError(
      f'config.batch_size={config.batch_size} is larger than the'
      f' {num_examples} training images'
    )
  to_steps = functools.partial(
    config_lib.to_steps, batch_size=config.batch_size, num_examples=num_examples
  )
  total = to_steps(config.duration, name='config.duration')
  if total < 1:
    raise InputError(f'config.duration={config.duration!r} is not one step')

  def steps_of(text: str, name: str) -> int:
    return to_steps(text, total=total, name=f'config.{name}')

  freeze = steps_of(config.connectivity.phase, 'connectivity.phase')
  if freeze > total:
    raise InputError(
      f'config.connectivity.phase={config.connectivity.phase!r}'
      f' is longer than the run, {total} steps'
    )
  return Plan(
    total=total,
    freeze=freeze if config.connectivity.rule == 'learned' else 0,
    log_every=max(1, steps_of(config.log_every, 'log_every')),
    evaluate_every=max(1, steps_of(config.evaluate_every, 'evaluate_every')),
    checkpoint_every=max(
      1, steps_of(config.checkpoint_every, 'checkpoint_every')
    ),
    per_epoch=num_examples // config.batch_size,
  )


def architecture(
  config: ml_collections.ConfigDict, dataset: datasets.Dataset
) -> dict[str, Any]:
  """Returns the arguments of `create_model`, plain enough for JSON."""
  own = config.connectivity
  return {
    'name': config.model.name,
    'num_classes': len(dataset.classes),
    'in_channels': dataset.image_shape[-1],
    'width': config.model.width,
    'dtype': config.model.dtype,
    'fan_in': own.fan_in,
    'rule': own.rule,
    'stem_source': own.stem_source,
    'adapter': own.adapter,
    'scale': own.scale,
    'gradient': own.gradient,
    'initial': own.initial,
    'initial_spread': own.initial_spread,
    'seed': config.seed,
  }


def make_schedules(
  config: ml_collections.ConfigDict, plan: Plan
) -> tuple[Any, Any]:
  """Returns the learning rates of the weights and of the masks, by step."""

  def steps_of(text: str, name: str) -> int:
    return config_lib.to_steps(
      text,
      batch_size=config.batch_size,
      num_examples=plan.per_epoch * config.batch_size,
      total=plan.total,
      name=f'config.optimizer.{name}',
    )

  own = config.optimizer
  drops = [steps_of(at, 'steps_at') for at in own.steps_at]
  weights = optimizer.schedule(
    own.schedule,
    own.learning_rate,
    plan.total,
    steps_at=drops,
    warmup_steps=steps_of(own.warmup, 'warmup'),
  )
  masks = optimizer.schedule(
    config.masks.schedule,
    config.masks.learning_rate,
    plan.freeze,
    steps_at=[round(drop * plan.freeze / plan.total) for drop in drops],
  )
  return weights, optimizer.until(masks, plan.freeze)


def make_recipe(
  config: ml_collections.ConfigDict,
  dataset: datasets.Dataset,
  plan: Plan,
  model: models.ResNet,
  mesh: jax.sharding.Mesh,
) -> steps.Recipe:
  """Puts together what the steps are compiled for."""
  own = config.optimizer
  rate, mask_rate = make_schedules(config, plan)
  mean, std = tuple(config.data.mean), tuple(config.data.std)
  if not mean or not std:
    mean, std = (tuple(map(float, x)) for x in dataset.mean_and_std())
  if not len(mean) == len(std) == dataset.image_shape[-1]:
    raise InputError(
      f'config.data.mean and .std need one number for each of'
      f' the {dataset.image_shape[-1]} channels'
    )
  return steps.Recipe(
    network=steps.split(model)[0],
    optimizer=optimizer.partitioned(
      optimizer.weights_transform(
        rate,
        momentum=own.momentum,
        nesterov=own.nesterov,
        weight_decay=own.weight_decay,
        decay_all=own.decay_all,
      ),
      optimizer.masks_transform(
        mask_rate, model.stack.valid, momentum=config.masks.momentum
      ),
    ),
    seed=config.seed,
    batch_size=config.batch_size,
    pad=config.data.pad,
    flip=config.data.flip,
    mean=mean,
    std=std,
    label_smoothing=own.label_smoothing,
    batch_sharding=distributed.sharded(mesh),
  )


def check_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Raises InputError if another config wrote this workdir."""
  path = workdir / 'config.json'
  if not path.exists():
    return
  theirs = config_lib.flat(
    ml_collections.ConfigDict(json.loads(path.read_text(encoding='utf-8')))
  )
  ours = config_lib.flat(
    ml_collections.ConfigDict(json.loads(config.to_json()))
  )
  differing = [
    f'{name} ({theirs.get(name)!r} there, {ours.get(name)!r} now)'
    for name in sorted(theirs | ours)
    if theirs.get(name) != ours.get(name)
  ]
  if differing:
    raise InputError(
      f'{workdir} was written by another config: '
      + ', '.join(differing)
      + '; give another --workdir'
    )


class Evaluator:
  """Accuracy on a split, every example counted once."""

  def __init__(
    self, recipe: steps.Recipe, batch_size: int, mesh: jax.sharding.Mesh
  ) -> None:
    self._recipe = recipe
    self._batch_size = batch_size
    self._sharding = distributed.sharded(mesh)
    self._step = jax.jit(steps.eval_step, static_argnums=0)

  def __call__(
    self,
    network: Any,
    variables: Any,
    split: datasets.Split,
    *,
    draw_masks: bool = False,
  ) -> float:
    """Returns the accuracy in [0, 1].

    Args:
      network: the graph that `variables` belong to.
      variables: weights, masks and statistics.
      split: images and labels; the last batch is padded, the padding not
        counted.
      draw_masks: whether each batch draws a mask from r, as in training,
        instead of taking the topology or the top-K.
    """
    recipe = dataclasses.replace(self._recipe, network=network)
    size, correct = self._batch_size, 0
    for start in range(0, len(split), size):
      images = split.images[start : start + size]
      missing = size - len(images)
      labels = np.pad(split.labels[start : start + size], (0, missing))
      images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
      counted = np.arange(size) < size - missing
      batch = distributed.to_global((images, labels, counted), self._sharding)
      key = recipe.key(steps.EVALUATION_MASK, start) if draw_masks else None
      correct += int(self._step(recipe, variables, *batch, key)['correct'])
    return correct / len(split)


@dataclasses.dataclass
class Result:
  """What a run leaves in memory, for a notebook to go on with.

  Attributes:
    summary: the content of summary.json.
    state: after the last step.
    model: frozen, fine-tuned and pruned.
    interrupted: the run was preempted, saved, and is not at its end.
  """

  summary: dict[str, Any]
  state: steps.TrainState
  model: Any
  interrupted: bool = False


def train(config: ml_collections.ConfigDict, workdir: Path) -> Result:
  """Trains, freezes, fine-tunes, prunes and evaluates; goes on if it was cut.

  Args:
    config: see `maskconnect_jax/config.py`.
    workdir: where everything is written; README, "The workdir".

  Raises:
    InputError: something given cannot be used, raised before anything is
      written; or the loss stopped being finite.
  """
  # Everything that can be wrong with the input is found before the first write.
  config_lib.check(config)
  check_workdir(config, workdir)
  distributed.check_batch_size('batch_size', config.batch_size)
  distributed.check_batch_size('eval_batch_size', config.eval_batch_size)
  dataset = datasets.load(config.data)
  plan = make_plan(config, len(dataset.train))
  own_architecture = architecture(config, dataset)
  model = models.create_model(**own_architecture)
  mesh = distributed.make_mesh()
  recipe = make_recipe(config, dataset, plan, model, mesh)
  state = distributed.to_global(
    steps.init_state(model, recipe.optimizer, len(dataset.train)),
    distributed.replicated(mesh),
  )

  primary = jax.process_index() == 0
  if primary:
    files.write_text(workdir / 'config.json', config.to_json(indent=2) + '\n')
  checkpoints = checkpoint.Checkpoints(
    workdir / 'checkpoints', keep=config.keep_checkpoints
  )
  progress: dict[str, Any] = {'train_seconds': 0.0, 'images': 0}
  loaded = checkpoints.load_newest(
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
    )
  )
  if loaded:
    state, progress = loaded
  start = int(state.step)

  writer = metrics.MetricsWriter(workdir, start) if primary else None
  bar = metrics.Progress(plan.total, start)
  if loaded:
    bar.say(f'going on from step {start} of {plan.total} in {workdir}')
  history = MaskHistory(workdir, start)
  evaluate = Evaluator(recipe, config.eval_batch_size, mesh)
  measured_on = 'validation' if dataset.validation else 'test'
  measured = dataset.validation or dataset.test
  images, labels = distributed.to_global(
    (dataset.train.images, dataset.train.labels), distributed.replicated(mesh)
  )
  rates = make_schedules(config, plan)
  compile_step = functools.partial(_compile_step, bar, images, labels)
  finite = jax.jit(_all_finite)
  clock = metrics.Throughput()
  clock.images, clock.seconds = progress['images'], progress['train_seconds']
  pending: list[dict[str, jax.Array]] = []
  interrupted = False

  if plan.freeze and start > plan.freeze:
    recipe = freeze(recipe, state)
  compiled = compile_step(recipe, state) if start < plan.total else None

  with distributed.Preemption() as preemption:
    for step in range(start, plan.total):
      if plan.freeze and step == plan.freeze:
        recipe, state = freeze_and_report(
          config,
          recipe,
          state,
          images,
          labels,
          evaluate,
          dataset,
          progress,
          bar,
        )
        compiled = compile_step(recipe, state)
      if not pending:
        clock.start()
      assert compiled is not None
      state, values = compiled(state, images, labels)
      pending.append(values)
      done = step + 1

      interrupted = preemption.requested(done)
      saving = (
        done % plan.checkpoint_every == 0 or done == plan.total or interrupted
      )
      evaluating = done % plan.evaluate_every == 0 or done == plan.total
      if not (saving or evaluating or done % plan.log_every == 0):
        continue

      record = _average(pending, done, checkpoints)
      rate = clock.stop(len(pending) * config.batch_size)
      pending = []
      record = {
        'epoch': done / plan.per_epoch,
        **record,
        'learning_rate': float(rates[0](step)),
        'mask_learning_rate': float(rates[1](step)),
        'images_per_second': rate,
      }
      accuracy = None
      if evaluating:
        accuracy = evaluate(recipe.network, state.variables(), measured)
        record[f'{measured_on}_accuracy'] = accuracy
      if plan.phase(step) == 'connectivity':
        history.add(done, state)
      if writer:
        writer.write(done, plan.phase(step), record)
      bar.update(done, plan.phase(step), record)
      if saving:
        if not finite((state.weights, state.masks)):
          raise _diverged(done, checkpoints)
        progress |= {'images': clock.images, 'train_seconds': clock.seconds}
        if primary:
          history.save()
        checkpoints.save(done, state, progress, accuracy)
      if interrupted:
        break

  checkpoints.wait()
  if interrupted:
    bar.close()
    checkpoints.close()
    bar.say(
      f'stopped after step {int(state.step)} of {plan.total}; the same'
      ' command goes on from there'
    )
    return Result({}, state, None, interrupted=True)

  if plan.freeze == plan.total and start <= plan.total:
    recipe, state = freeze_and_report(
      config, recipe, state, images, labels, evaluate, dataset, progress, bar
    )
  frozen = nnx.merge(recipe.network, *state.variables())
  pruned = models.prune(frozen)
  pruned_network, *pruned_variables = steps.split(pruned)
  summary = {
    'config': config.model.name,
    'rule': config.connectivity.rule,
    'fan_in': config.connectivity.fan_in,
    'seed': config.seed,
    'steps': plan.total,
    'test_accuracy_drawn': progress.get('test_accuracy_drawn'),
    'test_accuracy_at_freeze': progress.get('test_accuracy_at_freeze'),
    'test_accuracy': evaluate(recipe.network, state.variables(), dataset.test),
    'test_accuracy_pruned': evaluate(
      pruned_network, tuple(pruned_variables), dataset.test
    ),
    'num_test_examples': len(dataset.test),
    'num_train_examples': len(dataset.train),
    'parameters': models.count_parameters(frozen),
    'parameters_pruned': models.count_parameters(pruned),
    'blocks': len(frozen.topology.live),
    'blocks_pruned': sum(frozen.topology.live),
    'images_per_second': clock.images_per_second,
    'train_seconds': clock.seconds,
    'device': jax.devices()[0].device_kind,
    'num_devices': jax.device_count(),
  }
  if primary:
    files.write_json(workdir / 'topology.json', frozen.topology.to_dict())
    inference.save(
      workdir / 'model',
      pruned,
      architecture=own_architecture,
      classes=dataset.classes,
      image_shape=dataset.image_shape,
      mean=recipe.mean,
      std=recipe.std,
    )
    history.save()
    draw_figures(workdir, config, frozen, history)
    files.write_json(workdir / 'summary.json', summary)
  if writer:
    writer.close()
  bar.close()
  checkpoints.close()
  return Result(summary, state, pruned)


def _compile_step(
  bar: metrics.Progress,
  images: jax.Array,
  labels: jax.Array,
  recipe: steps.Recipe,
  state: steps.TrainState,
) -> Any:
  """Compiles ahead of the first call, so that no timing includes it."""
  bar.say('compiling the training step')
  jitted = jax.jit(steps.train_step, static_argnums=0, donate_argnums=1)
  return jitted.lower(recipe, state, images, labels).compile()


def freeze(recipe: steps.Recipe, state: steps.TrainState) -> steps.Recipe:
  """Returns the recipe with the wiring fixed to the top-K of the real mask."""
  model = nnx.merge(recipe.network, *state.variables())
  return dataclasses.replace(
    recipe, network=steps.split(models.freeze(model))[0]
  )


def freeze_and_report(
  config: ml_collections.ConfigDict,
  recipe: steps.Recipe,
  state: steps.TrainState,
  images: jax.Array,
  labels: jax.Array,
  evaluate: Evaluator,
  dataset: datasets.Dataset,
  progress: dict[str, Any],
  bar: metrics.Progress,
) -> tuple[steps.Recipe, steps.TrainState]:
  """Freezes, recomputes BatchNorm, and measures before and after.

  A function of the state alone: a run resumed just before it repeats it.
  """
  progress['test_accuracy_drawn'] = evaluate(
    recipe.network, state.variables(), dataset.test, draw_masks=True
  )
  recipe = freeze(recipe, state)
  batches = config.connectivity.batchnorm_batches
  if batches:
    measure = jax.jit(steps.batch_statistics, static_argnums=0)
    total = jax.tree.map(jnp.zeros_like, state.statistics)
    for index in range(batches):
      total = jax.tree.map(
        jnp.add, total, measure(recipe, state, images, labels, index)
      )
    state = dataclasses.replace(
      state, statistics=jax.tree.map(lambda s: s / batches, total)
    )
  progress['test_accuracy_at_freeze'] = evaluate(
    recipe.network, state.variables(), dataset.test
  )
  bar.say(
    f'froze the topology at step {int(state.step)}: test accuracy'
    f' {progress["test_accuracy_drawn"]:.2%} with drawn masks,'
    f' {progress["test_accuracy_at_freeze"]:.2%} with the frozen one'
  )
  return recipe, state


def _average(
  pending: list[dict[str, jax.Array]],
  done: int,
  checkpoints: checkpoint.Checkpoints,
) -> dict[str, float]:
  """Returns the mean loss and accuracy of the last steps, all finite."""
  values = jax.device_get(pending)
  for back, value in enumerate(values):
    if not math.isfinite(value['loss']):
      raise _diverged(done - len(values) + back + 1, checkpoints)
  return {
    name: float(np.mean([value[name] for value in values]))
    for name in values[0]
  }


def _diverged(step: int, checkpoints: checkpoint.Checkpoints) -> InputError:
  checkpoints.wait()
  kept = checkpoints.steps()
  last = (
    f'the last good checkpoint is {checkpoints.folder / str(kept[-1])}'
    if kept
    else 'there is no checkpoint yet'
  )
  return InputError(
    f'the loss is not finite at step {step}; {last}. Try a lower'
    ' config.optimizer.learning_rate or a warm-up'
  )


def _all_finite(tree: Any) -> jax.Array:
  return jnp.all(
    jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
  )


class MaskHistory:
  """The real mask at every logged step, in real_masks.npz."""

  def __init__(self, workdir: Path, start: int) -> None:
    """Reads what a cut run recorded up to `start`."""
    self._path = workdir / 'real_masks.npz'
    self._records: list[tuple[int, np.ndarray]] = []
    if start and self._path.exists():
      with np.load(self._path) as file:
        self._records = [
          (int(step), mask)
          for step, mask in zip(file['steps'], file['masks'], strict=True)
          if step <= start
        ]

  def add(self, step: int, state: steps.TrainState) -> None:
    """Records r [L, L] after `step`."""
    (mask,) = jax.tree.leaves(jax.device_get(state.masks))
    self._records.append((step, mask))

  @property
  def steps(self) -> np.ndarray:
    """int64 [T]."""
    return np.array([step for step, _ in self._records])

  @property
  def masks(self) -> np.ndarray:
    """float32 [T, L, L]."""
    return np.stack([mask for _, mask in self._records])

  def __len__(self) -> int:
    return len(self._records)

  def save(self) -> None:
    """Writes the file, if there is something to write."""
    if self._records:
      with (
        files.replacing(self._path) as temporary,
        temporary.open('wb') as file,
      ):
        np.savez_compressed(file, steps=self.steps, masks=self.masks)


def draw_figures(
  workdir: Path,
  config: ml_collections.ConfigDict,
  frozen: Any,
  history: MaskHistory,
) -> None:
  """Draws the topology, and where it was learned the real mask behind it."""
  topology: connectivity.Topology = frozen.topology
  own = config.connectivity
  title = f'{config.model.name}, {own.rule.replace("_", "-")}'
  if own.rule in ('learned', 'fixed_random'):
    title += f', fan-in {own.fan_in}'
  folder = workdir / 'figures'
  plots.save(
    plots.topology_figure(
      topology.sources, stages=frozen.stages, live=topology.live, title=title
    ),
    folder / 'topology',
  )
  if own.rule != 'learned':
    return
  plots.save(
    plots.mask_figure(
      np.asarray(frozen.stack.real_mask[...]),
      topology.sources,
      stages=frozen.stages,
      title=title,
    ),
    folder / 'real_mask',
  )
  if len(history) > 1:
    plots.save(
      plots.history_figure(
        history.steps,
        history.masks,
        topology.sources,
        stages=frozen.stages,
        title=title,
      ),
      folder / 'real_mask_history',
    )
