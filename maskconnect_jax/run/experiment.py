"""From a config to an experiment: data, plan, network, schedules, recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from maskconnect_jax import config as config_lib
from maskconnect_jax import names
from maskconnect_jax.data import arrays, datasets
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import topology
from maskconnect_jax.networks import architectures, models
from maskconnect_jax.run import (
  batches,
  distributed,
  native,
  optimizer,
  train_state,
)
from maskconnect_jax.run import plan as plan_lib


def make_schedules(
  config: ml_collections.ConfigDict, plan: plan_lib.Plan
) -> tuple[optax.Schedule, optax.Schedule]:
  """Returns the learning rates of the weights and of the masks, by step.

  The masks' rate is 0 from the freeze on. The authors give the masks the rate
  of the weights.

  Args:
    config: see `maskconnect_jax/config.py`.
    plan: the durations in steps.

  Raises:
    InputError: a duration in the config cannot be used.
  """

  def steps_of(text: str, name: str) -> int:
    return plan_lib.to_steps(
      text,
      batch_size=config.batch_size,
      num_examples=plan.per_epoch * config.batch_size,
      total=plan.total,
      name=f'config.{name}',
    )

  own = config.optimizer
  drops = [steps_of(at, 'optimizer.steps_at') for at in own.steps_at]
  weights = optimizer.schedule(
    own.schedule,
    own.learning_rate,
    plan.total,
    steps_at=drops,
    warmup_steps=steps_of(own.warmup, 'optimizer.warmup'),
  )
  masks = optimizer.schedule(
    config.masks.schedule,
    config.masks.learning_rate,
    plan.freeze,
    steps_at=[round(drop * plan.freeze / plan.total) for drop in drops],
  )
  if config.connectivity.learner == 'as_published':
    masks = weights
  return weights, optimizer.until(masks, plan.freeze)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config and everything built from it before training.

  Attributes:
    config: see `maskconnect_jax/config.py`.
    dataset: in host memory, or decoded while training.
    plan: the durations in steps.
    architecture: the arguments of `create_model`, without spec and topology;
      can be written as JSON.
    model: the network before training.
    mesh: all devices.
    rates: the learning rates of the weights and of the masks, by step, each one
      program.
    recipe: the recipe of the first phase.
  """

  config: ml_collections.ConfigDict
  dataset: datasets.Dataset
  plan: plan_lib.Plan
  architecture: dict[str, Any]
  model: models.Network
  mesh: jax.sharding.Mesh
  rates: tuple[optax.Schedule, optax.Schedule]
  recipe: train_state.Recipe


def build(
  config: ml_collections.ConfigDict, data: Sequence[Any] | None = None
) -> Experiment:
  """Reads the data and builds the network; writes nothing.

  Args:
    config: see `maskconnect_jax/config.py`.
    data: images, labels, test images and test labels, see `arrays.of`; they go
      with config.data.source='arrays'.

  Raises:
    InputError: the config or its data cannot be used.
  """
  config_lib.check(config)
  architectures.architecture_of(config.model.name)  # before any image is read
  distributed.check_batch_size(config.batch_size)
  parts = config.optimizer.accumulate_steps
  if config.batch_size % (parts * jax.device_count()):
    raise InputError(
      f'config.optimizer.accumulate_steps={parts} must divide the'
      f' {config.batch_size // jax.device_count()} images of'
      ' config.batch_size on each device'
    )
  if (data is not None) != (config.data.source == 'arrays'):
    raise InputError(
      "config.data.source='arrays' and train(..., data=(images, labels,"
      ' test_images, test_labels)) go together'
    )
  dataset = datasets.load(
    config.data,
    None
    if data is None
    else arrays.of(data, multi_label=config.data.multi_label),
  )
  plan = plan_lib.make(config, len(dataset.train))
  architecture = architecture_of(
    config, len(dataset.classes), dataset.image_shape[-1]
  )
  spec = config_lib.wiring_spec(config)
  model = models.create_model(
    **architecture, spec=spec, topology=given_topology(config)
  )
  optimizer.check_parts(config.optimizer.frozen, train_state.split(model)[1])
  mean, std = tuple(config.data.mean), tuple(config.data.std)
  if not (mean and std):
    measured = [tuple(map(float, v)) for v in dataset.mean_and_std()]
    mean, std = mean or measured[0], std or measured[1]
  if not len(mean) == len(std) == dataset.image_shape[-1]:
    raise InputError(
      'config.data.mean and .std need one number for each of'
      f' the {dataset.image_shape[-1]} channels'
    )
  mesh = distributed.make_mesh()
  rates = make_schedules(config, plan)
  recipe = train_state.Recipe(
    network=train_state.split(model)[0],
    optimizer=optimizer.partitioned(
      weights_transform(config, rates[0]),
      optimizer.masks_transform(
        rates[1],
        model.stack.valid,
        learner=spec.learner,
        name=config.masks.optimizer,
        momentum=config.masks.momentum,
      ),
    ),
    seed=config.seed,
    temperature=lambda step: spec.temperature_at(plan.share(step)),
    newcomers=plan.newcomers,
    pad=config.data.pad if config.data.crop == 'pad' else 0,
    flip=config.data.flip,
    mean=mean,
    std=std,
    mixup=config.data.mixup,
    label_smoothing=config.optimizer.label_smoothing,
    average=config.optimizer.average,
    parts=config.optimizer.accumulate_steps,
    cutmix=config.data.cutmix,
    erasing=config.data.erasing,
    drop_path=config.model.drop_path,
    class_weights=class_weights(config, dataset),
    multi_label=config.data.multi_label,
    shard=config.optimizer.shard,
    own_statistics=config.model.batchnorm == 'device',
    batch_sharding=distributed.sharded(mesh),
  )
  native.wait()  # before anything is traced
  return Experiment(
    config,
    dataset,
    plan,
    architecture,
    model,
    mesh,
    rates=(jax.jit(rates[0]), jax.jit(rates[1])),
    recipe=recipe,
  )


def weights_transform(
  config: ml_collections.ConfigDict, rate: optax.Schedule
) -> optax.GradientTransformation:
  """Returns the optimizer of the weights.

  Args:
    config: `config.optimizer` is used.
    rate: learning rate by step.
  """
  own = config.optimizer
  return optimizer.for_parts(
    optimizer.weights_transform(
      rate,
      name=own.name,
      momentum=own.momentum,
      nesterov=own.nesterov,
      weight_decay=own.weight_decay,
      decay_all=own.decay_all,
      clip_norm=own.clip_norm,
    ),
    frozen=own.frozen,
    body_rate=own.body_rate,
  )


def class_weights(
  config: ml_collections.ConfigDict, dataset: datasets.Dataset
) -> tuple[float, ...]:
  """Returns the weight of each class in the loss; (): 1 each.

  A balanced class c has the weight N / (num_classes * N_c), of N training
  images; so the weights of all images have the mean 1.

  Raises:
    InputError: a class has no training image.
  """
  if config.data.class_weights == 'none':
    return ()
  counts = np.bincount(
    dataset.train.read_labels(), minlength=len(dataset.classes)
  )
  if not counts.all():
    name = dataset.classes[int(counts.argmin())]
    raise InputError(
      f"config.data.class_weights='balanced' needs images of each class to"
      f' train on; {names.distinct(name)} has none'
    )
  return tuple((counts.sum() / (len(counts) * counts)).tolist())


def architecture_of(
  config: ml_collections.ConfigDict, num_classes: int, in_channels: int
) -> dict[str, Any]:
  """Returns the arguments of `create_model`, without spec and topology.

  Args:
    config: see `maskconnect_jax/config.py`.
    num_classes: number of outputs.
    in_channels: channels of an image.
  """
  own, model = config.connectivity, config.model
  architecture = {
    'name': model.name,
    'num_classes': num_classes,
    'in_channels': in_channels,
    'width': model.width or None,
    'dtype': model.dtype,
    'seed': config.seed,
    'version': model.version,
    'matmul_precision': model.matmul_precision,
    'head_norm': model.head_norm,
  }
  if own.level == 'block':
    architecture |= {
      'stem_source': own.stem_source,
      'adapter': own.adapter,
      'remat': model.remat,
    }
  return architecture


def served_as(job: Experiment) -> dict[str, Any]:
  """Returns the arguments of `inference.save` that a run has from its start."""
  return {
    'architecture': job.architecture,
    'classes': job.dataset.classes,
    'image_shape': job.dataset.image_shape,
    'resize': job.config.data.eval_resize,
    'mean': job.recipe.mean,
    'std': job.recipe.std,
    'max_pixels': job.config.data.max_pixels,
    'multi_label': job.config.data.multi_label,
  }


def held_out(
  job: Experiment,
) -> tuple[str, datasets.Split | datasets.LazySplit]:
  """Returns name and images of the split that training is evaluated on.

  The split is the validation set if there is one, else the test set. With a
  validation set, the test set is not evaluated before the last step.
  """
  if job.dataset.validation:
    return 'validation', job.dataset.validation
  return 'test', job.dataset.test


def given_topology(
  config: ml_collections.ConfigDict,
) -> topology.Topology | topology.BranchTopology | None:
  """Returns the topology of `config.connectivity.topology`.

  With `config.connectivity.shuffled` the rows come in a random order.

  Returns:
    None unless the rule is 'fixed_given'.

  Raises:
    InputError: the file is missing, damaged, or of another network.
  """
  own = config.connectivity
  if own.rule != 'fixed_given':
    return None
  path = config_lib.given_path(own.topology, 'config.connectivity.topology')
  given = topology.read(
    path,
    remedy='config.connectivity.topology takes the topology.json of a finished'
    ' run',
  )
  valid = architectures.architecture_of(config.model.name).valid_sources(
    own.level, stem_source=own.stem_source, adapter=own.adapter
  )
  try:
    given.check(valid)
  except InputError as error:
    raise InputError(
      f'{path} is not of {config.model.name}: {error}'
    ) from error
  if own.shuffled:
    given = given.shuffled(np.random.default_rng(config.seed), valid)
  return given


def training_batches(job: Experiment) -> batches.Batches:
  """Returns the training batches of a run."""
  train, size, data = job.dataset.train, job.config.batch_size, job.config.data
  seed, sharding = job.config.seed, job.recipe.batch_sharding
  if isinstance(train, datasets.Split):
    return batches.Resident(train, size, seed=seed, sharding=sharding)
  return batches.Decoded(
    train,
    size,
    seed=seed,
    sharding=sharding,
    threads=data.threads,
    workers=data.workers,
  )


def note_on_fan_in(job: Experiment) -> str:
  """Returns a remark if no block or branch can have the fan-in, else ''."""
  own = job.config.connectivity
  most = int(np.sum(job.model.stack.valid, -1).max())
  if own.fan_in <= most or own.rule not in ('learned', 'fixed_random'):
    return ''
  return (
    f'no {own.level} has more than {most} sources, so with'
    f' fan_in={own.fan_in} each takes all it has'
  )
