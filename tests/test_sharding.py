"""A ResNeXt's compiled step stays sharded, which no result would show."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

import maskconnect_jax
from maskconnect_jax.networks import layers
from maskconnect_jax.run import distributed, optimizer, steps

BATCH = 256  # enough for the batch to outweigh the small kernels


def mesh_of(devices):
  return Mesh(
    np.array(jax.devices()[:devices]), ('data',), axis_types=(AxisType.Auto,)
  )


def compiled_step(level, devices):
  model = maskconnect_jax.create_model(
    'resnext20_8x4d', num_classes=10, fan_in=4, level=level, width=16
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
    monkeypatch.setattr(
      layers, 'bundled_grouped_conv', layers.sharded_grouped_conv
    )
  one, eight = compiled_step(level, 1), compiled_step(level, 8)
  gathers = eight.as_text().count('all-gather')
  ratio = eight.cost_analysis()['flops'] / one.cost_analysis()['flops']
  print(f'{level}: {gathers} all-gathers, {ratio:.4f} of the FLOPs')
  assert gathers == 0
  assert ratio == pytest.approx(1 / 8, rel=0.02)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('groups', 'width'), [(8, 4), (32, 4), (3, 40)])
def test_formulations_of_the_grouped_convolution_agree(groups, width, stride):
  rng = np.random.default_rng(0)
  features = groups * width
  x = rng.normal(size=(2, 5, 5, features))
  kernel = rng.normal(size=(3, 3, width, features))
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  size = -(-5 // stride)
  expected = np.zeros((2, size, size, features))
  for row in range(size):
    for column in range(size):
      top, left = row * stride, column * stride
      patch = padded[:, top : top + 3, left : left + 3].reshape(
        2, 3, 3, groups, width
      )
      expected[:, row, column] = np.einsum(
        'nhwgi,hwigo->ngo', patch, kernel.reshape(3, 3, width, groups, width)
      ).reshape(2, features)
  with jax.enable_x64():
    for formulation in (
      layers.bundled_grouped_conv,
      layers.sharded_grouped_conv,
    ):
      actual = formulation(jnp.asarray(x), jnp.asarray(kernel), groups, stride)
      np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(('platform', 'groups'), [('cpu', 1), ('cuda', 8)])
def test_a_grouped_convolution_suits_the_platform(platform, groups):
  layer = layers.GroupedConv(32, groups=8, dtype=jnp.float32, rngs=nnx.Rngs(0))
  traced = jax.jit(layer).trace(jnp.zeros((1, 4, 4, 32)))
  program = traced.lower(lowering_platforms=(platform,)).as_text()
  assert f'feature_group_count = {groups} ' in program
  assert program.count('stablehlo.convolution') == 1


def test_a_grouped_convolution_keeps_to_its_group():
  layer = layers.GroupedConv(32, groups=8, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jnp.zeros((1, 4, 4, 32)).at[..., 4:8].set(1.0)
  touched = np.asarray(jnp.abs(layer(x)).sum((0, 1, 2)) > 0)
  assert touched[4:8].all()
  assert touched.sum() == 4
