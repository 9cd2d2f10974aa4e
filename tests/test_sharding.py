"""A ResNeXt's compiled step stays sharded, which no result would show."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

import maskconnect_jax
from maskconnect_jax import convolution
from maskconnect_jax.run import distributed, optimizer, steps

BATCH = 256  # enough for the batch to outweigh the small kernels


def mesh_of(devices):
  return Mesh(
    np.array(jax.devices()[:devices]), ('data',), axis_types=(AxisType.Auto,)
  )


def compiled_step(level, devices):
  model = maskconnect_jax.create_model(
    'resnext20_8x4d',
    num_classes=10,
    fan_in=4,
    level=level,
    width=16,
    learner='draws',
  )
  transform = optimizer.partitioned(
    optax.sgd(0.1),
    optimizer.masks_transform(lambda step: 0.1, model.stack.valid),
  )
  mesh = mesh_of(devices)
  recipe = steps.Recipe(
    temperature=lambda _: 1.0,
    network=steps.split(model)[0],
    optimizer=transform,
    seed=0,
    pad=0,
    flip=False,
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    mixup=0.0,
    label_smoothing=0.0,
    average=0.0,
    batch_sharding=distributed.sharded(mesh),
  )

  def abstract(tree, sharding):
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
    )

  state = abstract(
    steps.init_state(model, recipe), distributed.replicated(mesh)
  )
  batch = abstract(
    (
      np.zeros((BATCH, 32, 32, 3), np.uint8),
      np.zeros(BATCH, np.int32),
    ),
    recipe.batch_sharding,
  )
  step = jax.jit(steps.train_step, static_argnums=0)
  return step.lower(recipe, state, *batch).compile()


@pytest.mark.parametrize(
  ('level', 'native'),
  [
    ('block', True),
    ('branch', False),
    pytest.param('block', False, marks=pytest.mark.slow),
    pytest.param('branch', True, marks=pytest.mark.slow),
  ],
)
def test_step_has_no_all_gather_and_an_eighth_of_the_flops(
  level, native, monkeypatch
):
  if native:  # what GPUs and TPUs run
    monkeypatch.setattr(convolution, 'on_a_cpu', convolution.by_library)
  one, eight = compiled_step(level, 1), compiled_step(level, 8)
  gathers = eight.as_text().count('all-gather')
  ratio = eight.cost_analysis()['flops'] / one.cost_analysis()['flops']
  print(f'{level}: {gathers} all-gathers, {ratio:.4f} of the FLOPs')
  assert gathers == 0
  assert ratio == pytest.approx(1 / 8, rel=0.02)
