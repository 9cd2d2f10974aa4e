"""Adapters against plain loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskconnect_jax import backend
from maskconnect_jax.method import adapters
from maskconnect_jax.networks import layers

RNG = np.random.default_rng(0)


def pooled(x, height, width):
  """Mean over the pixels of each window, in plain loops."""
  window = (-(-x.shape[1] // height), -(-x.shape[2] // width))
  # The windows hang over the border by so much, the smaller half before it.
  over = (height * window[0] - x.shape[1], width * window[1] - x.shape[2])
  result = np.zeros((x.shape[0], height, width, x.shape[3]))
  for i in range(height):
    for j in range(width):
      top = i * window[0] - over[0] // 2
      left = j * window[1] - over[1] // 2
      pixels = x[
        :,
        max(top, 0) : top + window[0],
        max(left, 0) : left + window[1],
      ]
      result[:, i, j] = pixels.mean((1, 2))
  return result


@pytest.mark.parametrize(
  'widen', [adapters.zero_pad_channels, backend.with_channels]
)
def test_channels_are_padded_with_zeros_behind(widen):
  x = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
  padded, pull = jax.vjp(lambda x: widen(x, 8), jnp.asarray(x))
  np.testing.assert_array_equal(padded[..., :5], x)
  np.testing.assert_array_equal(padded[..., 5:], np.zeros((2, 3, 4, 3)))
  gradient = RNG.normal(size=(2, 3, 4, 8)).astype(np.float32)
  np.testing.assert_array_equal(pull(gradient)[0], gradient[..., :5])
  same = jnp.asarray(x)
  assert widen(same, 5) is same


@pytest.mark.parametrize(
  ('size', 'to'),
  [
    ((8, 8), (4, 4)),
    ((8, 8), (2, 2)),
    ((25, 25), (13, 13)),
    ((25, 25), (7, 7)),
    ((28, 9), (7, 3)),
    ((8, 25), (2, 7)),
  ],
)
def test_average_pool_is_the_mean_of_the_pixels_there_are(size, to):
  x = RNG.normal(size=(2, *size, 3))
  actual = adapters.average_pool_to(jnp.asarray(x, jnp.float32), *to)
  np.testing.assert_allclose(actual, pooled(x, *to), rtol=1e-4, atol=1e-5)


def test_average_pool_meets_the_strided_blocks_size_for_every_input():
  for size in range(8, 70):
    stage = size
    for _ in range(2):
      stage = len(range(0, stage, 2))  # every second pixel
      shape = jax.eval_shape(
        lambda x, to=stage: adapters.average_pool_to(x, to, to),
        jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32),
      ).shape
      assert shape == (1, stage, stage, 1)


def test_an_array_of_the_right_size_is_not_pooled():
  x = jnp.ones((1, 4, 4, 2))
  assert adapters.average_pool_to(x, 4, 4) is x


def test_pool_adapter_pools_and_leaves_the_channels():
  x = RNG.normal(size=(2, 9, 9, 3))
  actual = adapters.PoolAdapter()(jnp.asarray(x, jnp.float32), (2, 5, 5, 6), 1)
  np.testing.assert_allclose(actual, pooled(x, 5, 5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('height', 'between', 'to', 'chained'),
  [(16, 8, 4, True), (12, 4, 2, True), (12, 6, 4, False), (7, 4, 2, False)],
)
def test_a_form_is_pooled_on_where_means_of_means_are_the_means(
  height, between, to, chained
):
  adapt = adapters.PoolAdapter()
  x = jnp.asarray(RNG.normal(size=(2, height, 8, 3)), jnp.float32)
  half = adapt(x, (2, between, 4, 3), 1)
  shape = (2, to, 2, 6)
  found = adapters.pooled_furthest([x, half], shape)
  assert found is (half if chained else x)
  np.testing.assert_allclose(
    adapt(found, shape, 1), pooled(np.asarray(x), to, 2), rtol=1e-4, atol=1e-5
  )


# Sources 0..4 have these channels. Blocks 1..5 get inputs as wide as 0..4.
FEATURES = [4, 4, 8, 8, 16, 16]
PROJECTIONS = {
  'source0_to8',
  'source0_to16',
  'source1_to8',
  'source1_to16',
  'source2_to16',
  'source3_to16',
}


def projections_of(features):
  rngs = nnx.Rngs(0)
  return adapters.ProjectionAdapter(
    features,
    lambda narrow, wide: layers.Conv(
      narrow, wide, 1, dtype=jnp.float32, rngs=rngs
    ),
  )


@pytest.fixture
def projection():
  return projections_of(FEATURES)


def test_there_is_a_projection_for_each_source_and_wider_shape(projection):
  assert set(projection.projections) == PROJECTIONS
  # The last block's output is read by no block.
  narrow = projections_of([4, 4, 8])
  assert set(narrow.projections) == set()


def test_projection_pools_and_mixes_channels(projection):
  x = RNG.normal(size=(2, 9, 9, 4))
  kernel = np.asarray(projection.projections['source1_to16'].kernel[...])
  assert kernel.shape == (1, 1, 4, 16)
  actual = projection(jnp.asarray(x, jnp.float32), (2, 3, 3, 16), 1)
  expected = pooled(x, 3, 3) @ kernel[0, 0].astype(np.float64)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
  same = jnp.ones((2, 9, 9, 4))
  assert projection(same, (2, 9, 9, 4), 1) is same


def test_projections_that_no_edge_uses_are_dropped(projection):
  # Target 4 (block 5) has an input as wide as source 4: 16 channels.
  projection.prune({(0, 0), (0, 2), (1, 4), (2, 3)})
  assert set(projection.projections) == {'source0_to8', 'source1_to16'}
