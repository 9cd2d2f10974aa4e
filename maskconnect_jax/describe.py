"""What a config would train, without training it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu import parameter_overview
from flax import nnx

from maskconnect_jax import (
  connectivity,
  experiment,
  models,
  steps,
)


def describe(config: ml_collections.ConfigDict) -> str:
  """Returns the network layer by layer, and what one training step costs.

  FLOPs, bytes and memory are XLA's own count of the compiled training step of
  the first phase, per device.

  Raises:
    InputError: the config or its data cannot be used.
  """
  job = experiment.build(config)
  dataset, plan, model, recipe = job.dataset, job.plan, job.model, job.recipe
  state = jax.eval_shape(
    lambda: steps.init_state(model, recipe.optimizer, len(dataset.train))
  )
  images = jax.ShapeDtypeStruct(dataset.train.images.shape, jnp.uint8)
  labels = jax.ShapeDtypeStruct(dataset.train.labels.shape, jnp.int32)
  compiled = (
    jax.jit(steps.train_step, static_argnums=0, donate_argnums=1)
    .lower(recipe, state, images, labels)
    .compile()
  )
  cost: Any = compiled.cost_analysis()
  memory: Any = compiled.memory_analysis()

  own, wiring = config.connectivity, model.stack
  num_valid = int(np.sum(wiring.valid))
  links = (
    model.topology.num_links
    if model.topology
    else int(connectivity.fan_in_of(wiring.valid, own.fan_in).sum())
  )
  note = experiment.note_on_fan_in(job)
  weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  return '\n'.join(
    [
      parameter_overview.get_parameter_overview(weights, include_stats=False),
      '',
      f'network      {config.model.name}, {len(wiring.blocks)} blocks,'
      f' {models.count_parameters(model):,} parameters',
      f'input        {" x ".join(map(str, dataset.image_shape))},'
      f' {len(dataset.classes)} classes',
      f'wiring       {own.rule}, {own.level}-level, {links:,} edges of'
      f' {num_valid:,} valid, fan-in {own.fan_in}'
      + (f'; {note}' if note else ''),
      f'data         {len(dataset.train):,} training,'
      f' {len(dataset.validation) if dataset.validation else 0:,} validation,'
      f' {len(dataset.test):,} test images',
      f'run          {plan.total:,} steps of {config.batch_size} images,'
      f' {plan.per_epoch:,} per epoch; masks move for the first'
      f' {plan.freeze:,}',
      f'a step       {cost["flops"] / 1e6:,.1f} MFLOP,'
      f' {cost["bytes accessed"] / 1e6:,.1f} MB accessed,'
      f' {memory.temp_size_in_bytes / 1e6:,.1f} MB temporary'
      f' (XLA, {jax.default_backend()}, per device)',
    ]
  )
