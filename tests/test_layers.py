"""Convolution, BatchNorm and adapters against NumPy and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx

from maskconnect_jax import layers

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


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_relu_is_the_maximum_to_the_bit(dtype):
  x = np.array(
    [-3e38, -1.5, -1e-30, -0.0, 0.0, 1e-30, 0.1, 3e38, np.inf, np.nan],
    jnp.dtype(dtype),
  )
  y = layers.relu(jnp.asarray(x))
  assert y.dtype == x.dtype
  y, x = (np.asarray(array, np.float64) for array in (y, x))
  np.testing.assert_array_equal(y, np.maximum(x, 0))


def test_relu_passes_on_the_gradient_of_what_is_above_zero():
  x = jnp.array([-2.0, -0.0, 0.0, 1e-30, 5.0])
  _, pull = jax.vjp(jax.jit(layers.relu), x)
  np.testing.assert_array_equal(pull(jnp.arange(1.0, 6.0))[0], [0, 0, 0, 4, 5])


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('size', [(8, 8), (7, 5)])
def test_convolution_is_scipys(stride, kernel_size, size):
  module = layers.conv(
    2, 3, kernel_size, stride=stride, dtype=jnp.float32, rngs=nnx.Rngs(0)
  )
  assert module.bias is None
  kernel = np.asarray(module.kernel[...], np.float64)
  x = RNG.normal(size=(2, *size, 2))
  pad = kernel_size // 2
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  expected = np.stack(
    [
      [
        sum(
          scipy.signal.correlate2d(
            image[..., i], kernel[..., i, o], mode='valid'
          )
          for i in range(2)
        )[::stride, ::stride]
        for o in range(3)
      ]
      for image in padded
    ]
  ).transpose(0, 2, 3, 1)
  actual = module(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_kernels_start_he_normal_by_fan_out():
  module = layers.conv(64, 32, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
  kernel = np.asarray(module.kernel[...])
  expected = 2 / (9 * 32)
  # The variance of n normal numbers has the relative deviation sqrt(2/n).
  tolerance = 5 * np.sqrt(2 / kernel.size)
  assert kernel.var() == pytest.approx(expected, rel=tolerance)
  assert abs(kernel.mean()) < 5 * np.sqrt(expected / kernel.size)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_batch_norm_is_numpys_and_keeps_float32_averages(dtype):
  module = layers.BatchNorm(3, dtype=dtype)
  scale, bias = RNG.normal(size=(2, 3))
  module.scale[...] = jnp.asarray(scale, jnp.float32)
  module.bias[...] = jnp.asarray(bias, jnp.float32)
  x = np.asarray(
    jnp.asarray(RNG.normal(2, 3, size=(4, 5, 6, 3)), dtype), np.float64
  )
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  tolerance = 1e-4 if dtype == jnp.float32 else 0.05

  def check(actual, mean, var):
    assert actual.dtype == dtype
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(
      np.asarray(actual, np.float64), expected, atol=tolerance
    )

  inputs = jnp.asarray(x, dtype)
  check(module(inputs, use_running_average=False), mean, var)
  mean, var = 0.1 * mean, 0.9 + 0.1 * var
  for statistic, expected in ((module.mean, mean), (module.var, var)):
    assert statistic[...].dtype == jnp.float32
    np.testing.assert_allclose(statistic[...], expected, rtol=1e-4)
  check(module(inputs, use_running_average=True), mean, var)
  np.testing.assert_allclose(module.mean[...], mean, rtol=1e-4)


def test_batch_norms_gradients_are_those_of_flax():
  with jax.enable_x64(True):
    x, weighting = RNG.normal(2, 3, size=(2, 4, 5, 6, 3))
    scale, bias = RNG.normal(size=(2, 3))

    def outcome(make, x, scale, bias):
      module = make()
      module.scale.set_value(scale)
      module.bias.set_value(bias)
      module.mean.set_value(jnp.zeros(3, jnp.float64))
      module.var.set_value(jnp.ones(3, jnp.float64))
      y = module(x, use_running_average=False)
      return jnp.sum(y * weighting), (module.mean[...], module.var[...])

    def ours():
      return layers.BatchNorm(3, dtype=jnp.float64)

    def flax():
      return nnx.BatchNorm(3, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))

    actual, expected = (
      jax.value_and_grad(
        functools.partial(outcome, make), argnums=(0, 1, 2), has_aux=True
      )(x, scale, bias)
      for make in (ours, flax)
    )
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9),
      actual,
      expected,
    )


def test_batch_norms_gradient_takes_two_sums():
  """Of dy and of x dy; with the mean and the mean square they are four."""

  def loss(x):
    norm = layers.BatchNorm(3, dtype=jnp.bfloat16)
    return jnp.sum(norm(x, use_running_average=False) ** 2)

  program = jax.make_jaxpr(jax.grad(loss))(jnp.ones((4, 5, 6, 3), 'f'))
  sums = [
    equation
    for equation in program.eqns
    if equation.primitive.name == 'reduce_sum'
    and equation.invars[0].aval.shape == (4, 5, 6, 3)
    and equation.outvars[0].aval.shape == (3,)
  ]
  assert len(sums) == 4, program


@pytest.mark.parametrize(
  'widen', [layers.zero_pad_channels, layers.append_zero_channels]
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
  ('platform', 'products'), [('cpu', 1), ('cuda', 0), ('tpu', 0)]
)
def test_only_a_cpu_appends_zero_channels_by_a_product(platform, products):
  function = jax.jit(lambda x: layers.append_zero_channels(x, 8))
  program = function.trace(jnp.zeros((2, 3, 4, 5)))
  text = program.lower(lowering_platforms=(platform,)).as_text()
  assert text.count('dot_general') == products
  assert text.count('stablehlo.pad') == 1 - products


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
  actual = layers.average_pool_to(jnp.asarray(x, jnp.float32), *to)
  np.testing.assert_allclose(actual, pooled(x, *to), rtol=1e-4, atol=1e-5)


def test_average_pool_meets_the_strided_blocks_size_for_every_input():
  for size in range(8, 70):
    stage = size
    for _ in range(2):
      stage = len(range(0, stage, 2))  # every second pixel
      shape = jax.eval_shape(
        lambda x, to=stage: layers.average_pool_to(x, to, to),
        jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32),
      ).shape
      assert shape == (1, stage, stage, 1)


def test_an_array_of_the_right_size_is_not_pooled():
  x = jnp.ones((1, 4, 4, 2))
  assert layers.average_pool_to(x, 4, 4) is x


def test_pool_adapter_pools_and_leaves_the_channels():
  x = RNG.normal(size=(2, 9, 9, 3))
  actual = layers.PoolAdapter()(jnp.asarray(x, jnp.float32), (2, 5, 5, 6), 1)
  np.testing.assert_allclose(actual, pooled(x, 5, 5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('height', 'between', 'to', 'chained'),
  [(16, 8, 4, True), (12, 4, 2, True), (12, 6, 4, False), (7, 4, 2, False)],
)
def test_pool_adapter_pools_on_where_means_of_means_are_the_means(
  height, between, to, chained
):
  adapt = layers.PoolAdapter()
  x = RNG.normal(size=(2, height, 8, 3))
  half = adapt(jnp.asarray(x, jnp.float32), (2, between, 4, 3), 1)
  for shift in (0, 100):  # shows which of the two was read
    actual = adapt(
      jnp.asarray(x, jnp.float32), (2, to, 2, 6), 1, [half + shift]
    )
    np.testing.assert_allclose(
      actual, pooled(x, to, 2) + shift * chained, rtol=1e-4, atol=1e-5
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


@pytest.fixture
def projection():
  return layers.ProjectionAdapter(FEATURES, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_there_is_a_projection_for_each_source_and_wider_shape(projection):
  assert set(projection.projections) == PROJECTIONS
  # The last block's output is read by no block.
  narrow = layers.ProjectionAdapter(
    [4, 4, 8], dtype=jnp.float32, rngs=nnx.Rngs(0)
  )
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


@pytest.mark.parametrize('count', [256, 65_536])
@pytest.mark.parametrize('ratio', [0, 1, 10, 100, 1000])
def test_error_of_the_variance_is_what_the_docstring_says(count, ratio):
  """Means that are `ratio` standard deviations from 0, against float64."""
  x = np.random.default_rng(0).normal(size=(count, 1, 1, 16)) + ratio
  x = x.astype(np.float32)
  layer = layers.BatchNorm(16, dtype=jnp.float32)
  layer.var.set_value(jnp.zeros(16))
  layer(jnp.asarray(x), use_running_average=False)
  found = np.asarray(layer.var[...], np.float64) / (1 - layers.MOMENTUM)
  wide = x.astype(np.float64)
  variance = wide.var((0, 1, 2))  # over n, not n - 1
  error = abs(found / variance - 1).max()
  bound = 2**-20 * (1 + wide.mean((0, 1, 2)) ** 2 / variance).max()
  assert error < bound
  assert ratio < 100 or error > bound / 100  # it is no better than it says
