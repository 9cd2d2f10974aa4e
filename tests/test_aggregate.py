"""The masked sums and their gradients against NumPy in float64 and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax.aggregate import (
  batched_products,
  masked_sum,
  noted,
  pairwise_products,
  static_sum,
  tapes,
)
from maskconnect_jax.config import InputError

SHAPE = (4, 5, 2)  # of an image


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def chain(add, weights, first, factors):
  """y_t+1 = tanh(factor_t * x_t), x_t = sum_i w[t, i] y_i; returns all y."""
  sources = [first]
  for t, factor in enumerate(factors):
    sources.append(jnp.tanh(factor * add(t, weights[t, : t + 1], sources)))
  return sources


def triangle(count):
  return tuple(map(tuple, np.tri(count, dtype=bool).tolist()))


def taped_loss(weights, first, factors, direction):
  of_sums, of_sources = tapes(weights, triangle(len(weights)), 1, first)
  sources = []

  def add(t, row, ys):
    sources.append(noted(ys[t], of_sources[t]))
    return masked_sum(row, tuple(sources), of_sums[t])

  rows = jax.lax.stop_gradient(weights)
  return jnp.sum(direction * chain(add, rows, first, factors)[-1])


def plain_loss(weights, first, factors, direction):
  def add(t, row, ys):
    return sum(w * y for w, y in zip(row, ys, strict=True))

  return jnp.sum(direction * chain(add, weights, first, factors)[-1])


def numbers(count, batch):
  """Weights with zeros among them, a source, factors and a direction."""
  rng = np.random.default_rng(count)
  weights = rng.normal(size=(count, count))
  weights *= np.tri(count) * (rng.uniform(size=weights.shape) < 0.6)
  return (
    weights,
    rng.normal(size=(batch, *SHAPE)),
    rng.normal(size=(count, batch, *SHAPE)),
    rng.normal(size=(batch, *SHAPE)),
  )


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(('count', 'batch'), [(1, 4), (2, 3), (7, 4)])
def test_gradients_are_those_of_autodiff(count, batch):
  arguments = numbers(count, batch)
  value, gradients = jax.value_and_grad(taped_loss, (0, 1, 2))(*arguments)
  plain, expected = jax.value_and_grad(plain_loss, (0, 1, 2))(*arguments)
  assert value == pytest.approx(float(plain), abs=1e-10)
  for actual, by_autodiff in zip(gradients, expected, strict=True):
    assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, by_autodiff, rtol=0, atol=1e-10)
  assert np.any(gradients[0][arguments[0] == 0])  # also where the weight is 0


@pytest.mark.usefixtures('x64')
def test_a_gradient_from_every_third_image():
  weights, rng = np.ones((1, 2)), np.random.default_rng(0)
  sources, gradient = rng.normal(size=(2, 9, 4)), rng.normal(size=(9, 4))

  def total(weights):
    (of_sum,), of_sources = tapes(
      weights, ((True,) * 2,), 3, jnp.asarray(sources[0])
    )
    ys = tuple(map(noted, jnp.asarray(sources), of_sources))
    return masked_sum(jax.lax.stop_gradient(weights)[0], ys, of_sum)

  value, backward = jax.vjp(total, weights)
  expected = 3 * np.einsum('bc,nbc->n', gradient[::3], sources[:, ::3])
  (actual,) = backward(jnp.asarray(gradient))
  np.testing.assert_allclose(actual, [expected], rtol=0, atol=1e-10)
  np.testing.assert_allclose(value, sources.sum(0), rtol=0, atol=1e-10)
  with pytest.raises(InputError, match='gradient_every=4 .* batch of 9'):
    tapes(weights, ((True,) * 2,), 4, jnp.asarray(sources[0]))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('shape', [(3,), (3, *SHAPE)])
def test_both_forms_of_the_products_are_numpys(shape):
  rng = np.random.default_rng(0)
  gradients, sources = (
    rng.normal(size=(2, *shape)),
    rng.normal(size=(4, *shape)),
  )
  wanted = np.array([[True, False, True, True], [False, True, True, False]])
  expected = gradients.reshape(2, -1) @ sources.reshape(4, -1).T
  arrays = tuple(gradients), tuple(sources)
  np.testing.assert_allclose(
    batched_products(*arrays), expected, rtol=0, atol=1e-12
  )
  np.testing.assert_allclose(
    pairwise_products(*arrays, wanted), expected * wanted, rtol=0, atol=1e-12
  )


@pytest.mark.parametrize(('platform', 'products'), [('tpu', 0), ('cuda', 1)])
def test_a_tpu_gets_reductions_and_a_gpu_a_product(platform, products):
  def total(weights, y):
    (of_sum,), (of_source,) = tapes(weights, ((True,),), 1, y)
    return masked_sum(weights[0], (noted(y, of_source),), of_sum).sum()

  traced = jax.jit(jax.grad(total)).trace(jnp.ones((1, 1)), jnp.ones((2, 3)))
  program = traced.lower(lowering_platforms=(platform,)).as_text()
  assert program.count('stablehlo.dot_general') == products


def test_sums_and_sources_that_are_not_used():
  def loss(weights):
    of_sums, of_sources = tapes(weights, ((True,) * 3,) * 3, 1, jnp.zeros(2))
    y = noted(jnp.array([3.0, 4.0]), of_sources[1])
    row = jax.lax.stop_gradient(weights)[2, 1:2]
    return jnp.sum(masked_sum(row, (y,), of_sums[2]))

  expected = np.zeros((3, 2))
  expected[2, 1] = 7
  np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((3, 2))), expected)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('count', [1, 3])
def test_one_sum_and_its_gradients_are_numpys(count):
  rng = np.random.default_rng(count)
  weights = rng.normal(size=(1, count))
  shape = (3, *SHAPE)
  sources, gradient = rng.normal(size=(count, *shape)), rng.normal(size=shape)

  def total(weights, sources):
    (of_sum,), of_sources = tapes(weights, ((True,) * count,), 1, sources[0])
    ys = tuple(map(noted, sources, of_sources))
    return masked_sum(jax.lax.stop_gradient(weights)[0], ys, of_sum)

  value, backward = jax.vjp(total, weights, tuple(sources))
  for_weights, for_sources = backward(jnp.asarray(gradient))
  for actual, expected in (
    (value, np.einsum('n,nbhwc->bhwc', weights[0], sources)),
    (for_weights[0], np.einsum('bhwc,nbhwc->n', gradient, sources)),
    (for_sources, np.einsum('n,bhwc->nbhwc', weights[0], gradient)),
  ):
    np.testing.assert_allclose(np.array(actual), expected, rtol=0, atol=1e-10)


def test_the_bfloat16_sum_is_accumulated_in_float32():
  # In bfloat16, 256 + 1 is 256.
  sources = tuple(jnp.full((2, 3), v, jnp.bfloat16) for v in (256, 1, 1))
  total = masked_sum(jnp.ones(3), sources, jnp.zeros((2, 3), jnp.bfloat16))
  assert total.dtype == jnp.float32
  np.testing.assert_array_equal(total, 258)
  total = static_sum(sources, 1.0)
  assert total.dtype == jnp.bfloat16
  np.testing.assert_array_equal(total.astype(jnp.float32), 258)


def test_the_bfloat16_weights_gradient_is_accumulated_in_float32():
  # Products of (1 + 2^-7)^2 and -(1 + 2^-6): each pair adds 2^-14, which is 0
  # once the products are bfloat16.
  pairs = 256
  source = np.tile([1 + 2**-7, -(1 + 2**-6)], pairs)
  gradient = np.tile([1 + 2**-7, 1], pairs)
  long = np.ones(10_001)  # bfloat16 counts to 256, float32 to all of it
  for y, g, expected in (
    (source, gradient, pairs * 2**-14),
    (long, long, 10_001),
  ):

    def total(weights, y):
      (of_sum,), (of_source,) = tapes(weights, ((True,),), 1, y)
      return masked_sum(weights[0], (noted(y, of_source),), of_sum)

    value, backward = jax.vjp(
      total, jnp.ones((1, 1)), jnp.asarray(y, jnp.bfloat16)
    )
    for_weights, for_source = backward(jnp.asarray(g, value.dtype))
    assert for_weights.dtype == jnp.float32
    assert for_source.dtype == jnp.bfloat16
    np.testing.assert_array_equal(for_weights, [[expected]])


@pytest.mark.parametrize(('count', 'scale'), [(1, 0.5), (3, 1), (3, 1 / 3)])
def test_static_sum_is_the_scaled_sum(count, scale):
  sources = np.random.default_rng(0).normal(size=(count, 2, 5))
  total = static_sum(list(jnp.asarray(sources, jnp.float32)), scale)
  np.testing.assert_allclose(total, sources.sum(0) * scale, atol=1e-6)


def test_one_source_of_scale_1_is_returned_untouched():
  source = jnp.ones((2, 3))
  assert static_sum([source], 1.0) is source
