"""The masked sums and their gradients against NumPy in float64 and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax import backend
from maskconnect_jax.method.aggregate import fan_out, masked_sum, static_sum

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


def in_each_image(weights, batch):
  return jnp.broadcast_to(weights[:, None], (len(weights), batch))


def masked_loss(weights, first, factors, direction):
  batch, copies = len(first), []

  def add(t, row, ys):
    copies.append(fan_out(in_each_image(weights[t:, t], batch), ys[t]))
    taken = (own[t - i] for i, own in enumerate(copies))
    return masked_sum(in_each_image(row, batch), tuple(taken), SHAPE[-1])

  return jnp.sum(direction * chain(add, weights, first, factors)[-1])


def plain_loss(weights, first, factors, direction):
  def add(t, row, ys):
    return sum(w * y for w, y in zip(row, ys, strict=True))

  return jnp.sum(direction * chain(add, weights, first, factors)[-1])


def one_sum(weights, sources):
  """Of sources that nothing else reads."""
  rows = jnp.split(weights, len(weights))
  copies = [fan_out(row, y)[0] for row, y in zip(rows, sources, strict=True)]
  return masked_sum(weights, tuple(copies), max(y.shape[-1] for y in sources))


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
  value, gradients = jax.value_and_grad(masked_loss, (0, 1, 2))(*arguments)
  plain, expected = jax.value_and_grad(plain_loss, (0, 1, 2))(*arguments)
  assert value == pytest.approx(float(plain), abs=1e-10)
  for actual, by_autodiff in zip(gradients, expected, strict=True):
    assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, by_autodiff, rtol=0, atol=1e-10)
  assert np.any(gradients[0][arguments[0] == 0])  # also where the weight is 0


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  ('platform', 'products', 'reductions'),
  [('cpu', 3, 0), ('tpu', 3, 0), ('cuda', 0, 1), ('rocm', 0, 1)],
)
def test_products_follow_the_platform(platform, products, reductions):
  def total(weights):
    copies = fan_out(weights, jnp.ones((2, 3)))
    return sum(masked_sum(weights[:1], (own,), 3).sum() for own in copies)

  traced = jax.jit(jax.grad(total)).trace(jnp.ones((3, 2)))
  program = traced.lower(lowering_platforms=(platform,)).as_text()
  assert program.count('stablehlo.dot_general') == products
  assert program.count('stablehlo.reduce(') == reductions


def test_sums_that_are_alike_are_lowered_once():
  # 1 + 2 + ... + 18 products, but of 1 to 9 readers at once, twice.
  with backend.native(False):
    traced = jax.jit(jax.grad(masked_loss, (0, 1))).trace(*numbers(18, 2))
  program = traced.lower(lowering_platforms=('cpu',)).as_text()
  assert program.count('stablehlo.dot_general') == sum(range(10))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('count', [1, 3, 35])
def test_one_sum_and_its_gradients_are_numpys(count):
  rng = np.random.default_rng(count)
  weights, shape = rng.normal(size=(count, 3)), (3, *SHAPE)
  sources, gradient = rng.normal(size=(count, *shape)), rng.normal(size=shape)
  value, backward = jax.vjp(one_sum, jnp.asarray(weights), tuple(sources))
  for_weights, for_sources = backward(jnp.asarray(gradient))
  for actual, expected in (
    (value, np.einsum('nb,nbhwc->bhwc', weights, sources)),
    (for_weights, np.einsum('bhwc,nbhwc->nb', gradient, sources)),
    (for_sources, np.einsum('nb,bhwc->nbhwc', weights, gradient)),
  ):
    np.testing.assert_allclose(np.array(actual), expected, rtol=0, atol=1e-10)


def test_the_bfloat16_sum_is_accumulated_in_float32():
  # In bfloat16, 256 + 1 is 256.
  sources = tuple(jnp.full((2, 3), v, jnp.bfloat16) for v in (256, 1, 1))
  total = masked_sum(jnp.ones((3, 2)), sources, 3)
  assert total.dtype == jnp.float32
  np.testing.assert_array_equal(total, 258)
  total = static_sum(sources, 1.0, sources[0].shape[-1])
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
    value, backward = jax.vjp(
      one_sum, jnp.ones((1, 1)), (jnp.asarray(y[None], jnp.bfloat16),)
    )
    for_weights, (for_source,) = backward(jnp.asarray(g[None], value.dtype))
    assert for_weights.dtype == jnp.float32
    assert for_source.dtype == jnp.bfloat16
    np.testing.assert_array_equal(for_weights, [[expected]])


@pytest.mark.parametrize(('count', 'scale'), [(1, 0.5), (3, 1), (3, 1 / 3)])
def test_static_sum_is_the_scaled_sum(count, scale):
  sources = np.random.default_rng(0).normal(size=(count, 2, 5))
  total = static_sum(
    list(jnp.asarray(sources, jnp.float32)), scale, sources.shape[-1]
  )
  np.testing.assert_allclose(total, sources.sum(0) * scale, atol=1e-6)


def test_one_source_of_scale_1_is_returned_untouched():
  source = jnp.ones((2, 3))
  assert static_sum([source], 1.0, source.shape[-1]) is source


# aggregate.cc, in float32.
COMPILED = pytest.mark.skipif(
  not backend.native.value, reason='no C++ compiler, or not for this system'
)


def in_float32(count, shape):
  """Weights, a third of them zeros, sources and the gradient of their sum."""
  rng = np.random.default_rng(count)
  weights = rng.normal(size=(count, shape[0]))
  weights *= rng.uniform(size=weights.shape) < 2 / 3
  arrays = weights, rng.normal(size=(count, *shape)), rng.normal(size=shape)
  return [array.astype(np.float32) for array in arrays]


@COMPILED
@pytest.mark.parametrize(
  ('count', 'shape'),
  [(1, (2, 3)), (3, (3, 4, 5, 2)), (35, (2, 8, 8, 16)), (2, (1, 70, 64))],
)
def test_native_sums_and_gradients_are_numpys(count, shape):
  """Images of a part of a chunk, of a few, and of no multiple of 64 numbers."""
  weights, sources, gradient = in_float32(count, shape)
  value, backward = jax.vjp(
    one_sum, jnp.asarray(weights), tuple(map(jnp.asarray, sources))
  )
  for_weights, for_sources = backward(jnp.asarray(gradient))
  exact = [array.astype(np.float64) for array in (weights, sources, gradient)]
  for actual, form, arrays in (
    (value, 'nb,nb...->b...', exact[:2]),
    (for_sources, 'nb,b...->nb...', exact[::2]),
  ):
    expected = np.einsum(form, *arrays)
    np.testing.assert_allclose(np.array(actual), expected, rtol=0, atol=2e-5)
  expected = np.sum(exact[1] * exact[2], axis=tuple(range(2, len(shape) + 1)))
  np.testing.assert_allclose(for_weights, expected, rtol=0, atol=2e-4)


BOTH = pytest.mark.parametrize(
  'native', [False, pytest.param(True, marks=COMPILED)]
)


@BOTH
@pytest.mark.parametrize('read', [(), (1,), (2,), (0, 2)])
def test_copies_that_nothing_reads_add_nothing(native, read):
  weights, source = jnp.array([[1.0, 2], [3, 4], [5, 6]]), jnp.ones((2, 7))

  def loss(weights, source):
    copies = fan_out(weights, source)
    own = [masked_sum(weights[j : j + 1], (copies[j],), 7) for j in read]
    return sum((total.sum() for total in own), start=jnp.zeros(()))

  with backend.native(native):
    for_weights, for_source = jax.grad(loss, (0, 1))(weights, source)
  expected = np.zeros((3, 2))
  expected[list(read)] = 7
  np.testing.assert_array_equal(for_weights, expected)
  total = np.array(weights)[list(read)].sum(0)[:, None]
  np.testing.assert_array_equal(for_source, np.broadcast_to(total, (2, 7)))


@BOTH
def test_sources_of_several_widths(native):
  rng, widths = np.random.default_rng(0), (3, 16, 5, 16, 3)
  weights = rng.normal(size=(5, 2)).astype(np.float32)
  sources = [rng.normal(size=(2, 30, 9, n)).astype(np.float32) for n in widths]
  gradient = rng.normal(size=(2, 30, 9, 16)).astype(np.float32)
  with backend.native(native):
    value, backward = jax.vjp(
      one_sum, jnp.asarray(weights), tuple(map(jnp.asarray, sources))
    )
    for_weights, for_sources = backward(jnp.asarray(gradient))
  expected = sum(
    np.pad(w[:, None, None, None] * y, [(0, 0)] * 3 + [(0, 16 - y.shape[-1])])
    for w, y in zip(weights, sources, strict=True)
  )
  np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5)
  for i, (w, y) in enumerate(zip(weights, sources, strict=True)):
    own = gradient[..., : y.shape[-1]]
    products = np.sum(own.astype(np.float64) * y, (1, 2, 3))
    np.testing.assert_allclose(for_weights[i], products, rtol=0, atol=1e-3)
    scaled = w[:, None, None, None] * own
    np.testing.assert_allclose(for_sources[i], scaled, rtol=0, atol=1e-5)


@COMPILED
def test_native_gradients_of_several_readers_are_autodiffs():
  arguments = numbers(7, 4)
  with jax.enable_x64(True):
    expected = jax.grad(plain_loss, (0, 1, 2))(*arguments)
  gradient = jax.jit(jax.grad(masked_loss, (0, 1, 2)))
  calls = gradient.trace(*arguments).lower().as_text()
  assert calls.count('@maskconnect_source_gradients') == 7
  for actual, value in zip(gradient(*arguments), expected, strict=True):
    np.testing.assert_allclose(actual, value, rtol=0, atol=1e-4)


@COMPILED
def test_a_source_that_was_not_drawn_is_not_read():
  sources = jnp.ones((3, 2, 100)).at[1].set(jnp.nan)
  weights = jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
  total = masked_sum(weights, tuple(sources), 100)
  np.testing.assert_array_equal(total, np.repeat([[4.0], [6.0]], 100, 1))


@COMPILED
def test_a_mask_without_a_gradient_costs_no_products():
  weights, sources, _ = numbers(3, 2)[:3]
  own = weights[:, :2], jnp.asarray(np.stack([sources] * 3), jnp.float32)

  def loss(weights, sources):
    return one_sum(weights, tuple(sources)).sum()

  for numbers_of, products in ((0, 3), (1, 0)):
    program = jax.jit(jax.grad(loss, numbers_of)).trace(*own).lower().as_text()
    assert program.count('@maskconnect_source_gradients') == products


@COMPILED
def test_native_second_derivatives_are_those_of_autodiff():
  arguments = numbers(3, 2)

  def curvature(loss):
    def slope(*arguments):
      gradients = jax.grad(loss, (0, 1))(*arguments)
      return sum(jnp.sum(jnp.sin(own)) for own in gradients)

    return jax.grad(slope, (0, 1))

  with jax.enable_x64(True):
    expected = curvature(plain_loss)(*arguments)
  for actual, value in zip(
    jax.jit(curvature(masked_loss))(*arguments), expected, strict=True
  ):
    np.testing.assert_allclose(actual, value, rtol=0, atol=1e-4)
