"""Convolution and BatchNorm against NumPy and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx

from maskconnect_jax.networks import layers

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('size', [(8, 8), (7, 5)])
def test_convolution_is_scipys(stride, kernel_size, size):
  module = layers.Conv(
    2, 3, kernel_size, stride=stride, dtype=jnp.float32, rngs=nnx.Rngs(0)
  )
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
  module = layers.Conv(64, 32, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
  kernel = np.asarray(module.kernel[...])
  expected = 2 / (9 * 32)
  # The variance of n normal numbers has the relative deviation sqrt(2/n).
  tolerance = 5 * np.sqrt(2 / kernel.size)
  assert kernel.var() == pytest.approx(expected, rel=tolerance)
  assert abs(kernel.mean()) < 5 * np.sqrt(expected / kernel.size)


@pytest.mark.parametrize(
  'shape', [(3, 3, 3, 5), (7, 7, 3, 64), (64, 64), (3, 3, 24, 19), (17, 241)]
)
def test_kernels_are_those_of_jaxs_initializer(shape):
  """To the bit those of JAX 0.10: seeds of published runs draw what they drew.

  JAX 0.12 rounds the product otherwise.
  """
  key = jax.random.key(3)
  ours = np.asarray(layers.he_normal_by_fan_out(key, shape))
  theirs = jax.nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
  np.testing.assert_allclose(ours, theirs(key, shape, jnp.float32), rtol=2e-7)
  deviation = np.sqrt(np.float32(2 * shape[-2] / np.prod(shape)))
  drawn = np.asarray(jax.random.normal(key, shape)) * deviation
  np.testing.assert_array_equal(ours, drawn)


@pytest.mark.parametrize('shape', [(64, 10), (13, 3), (64, 100), (2048, 7)])
def test_a_heads_kernel_is_that_of_flax(shape):
  head = nnx.Linear(*shape, rngs=nnx.Rngs(params=jax.random.key(3)))
  key = nnx.Rngs(params=jax.random.key(3)).params()
  np.testing.assert_array_equal(head.kernel, layers.lecun_normal(key, shape))


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


def test_a_grouped_convolution_keeps_to_its_group():
  layer = layers.Conv(32, 32, 3, groups=8, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jnp.zeros((1, 4, 4, 32)).at[..., 4:8].set(1.0)
  touched = np.asarray(jnp.abs(layer(x)).sum((0, 1, 2)) > 0)
  assert touched[4:8].all()
  assert touched.sum() == 4
