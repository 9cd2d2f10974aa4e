"""The masked sum against NumPy in float64 and autodiff of a plain sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax.aggregate import masked_sum, static_sum


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def numbers(count):
  """Weights with zeros among them, sources, and a gradient, in float64."""
  rng = np.random.default_rng(count)
  weights = rng.normal(size=count) * (rng.uniform(size=count) < 0.6)
  sources = rng.normal(size=(count, 3, 4, 5, 2))
  return weights, sources, rng.normal(size=(3, 4, 5, 2))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('count', [1, 2, 7])
def test_masked_sum_and_its_gradients_are_numpys_and_autodiffs(count):
  weights, sources, gradient = numbers(count)
  value, backward = jax.vjp(masked_sum, weights, tuple(sources))
  for_weights, for_sources = backward(jnp.asarray(gradient))
  expected = {
    'value': np.einsum('n,nbhwc->bhwc', weights, sources),
    'weights': np.einsum('bhwc,nbhwc->n', gradient, sources),
    'sources': np.einsum('n,bhwc->nbhwc', weights, gradient),
  }

  def plain(weights, sources):
    return sum(w * y for w, y in zip(weights, sources, strict=True))

  plain_value, plain_backward = jax.vjp(plain, weights, tuple(sources))
  plain_weights, plain_sources = plain_backward(jnp.asarray(gradient))
  for actual, by_autodiff, name in (
    (value, plain_value, 'value'),
    (for_weights, plain_weights, 'weights'),
    (for_sources, plain_sources, 'sources'),
  ):
    assert jax.tree.leaves(actual)[0].dtype == jnp.float64
    np.testing.assert_allclose(
      np.array(actual), expected[name], rtol=0, atol=1e-10
    )
    np.testing.assert_allclose(
      np.array(actual), np.array(by_autodiff), rtol=0, atol=1e-10
    )


@pytest.mark.usefixtures('x64')
def test_a_source_of_weight_0_gets_no_gradient_but_its_weight_does():
  _, sources, gradient = numbers(2)
  _, backward = jax.vjp(masked_sum, np.array([0.0, 1.0]), tuple(sources))
  for_weights, for_sources = backward(jnp.asarray(gradient))
  assert not np.any(for_sources[0])
  assert abs(for_weights[0] - np.sum(gradient * sources[0])) < 1e-10


def test_the_bfloat16_sum_is_accumulated_in_float32():
  # In bfloat16, 256 + 1 is 256.
  sources = tuple(jnp.full((2, 3), v, jnp.bfloat16) for v in (256, 1, 1))
  total = masked_sum(jnp.ones(3), sources)
  assert total.dtype == jnp.bfloat16
  np.testing.assert_array_equal(total.astype(jnp.float32), 258)
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
    value, backward = jax.vjp(
      masked_sum, jnp.ones(1), (jnp.asarray(y, jnp.bfloat16),)
    )
    assert value.dtype == jnp.bfloat16
    for_weights, for_sources = backward(jnp.asarray(g, jnp.bfloat16))
    assert for_weights.dtype == jnp.float32
    assert for_sources[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(for_weights, [expected])


@pytest.mark.parametrize(('count', 'scale'), [(1, 0.5), (3, 1), (3, 1 / 3)])
def test_static_sum_is_the_scaled_sum(count, scale):
  sources = np.random.default_rng(0).normal(size=(count, 2, 5))
  total = static_sum(list(jnp.asarray(sources, jnp.float32)), scale)
  np.testing.assert_allclose(total, sources.sum(0) * scale, atol=1e-6)


def test_one_source_of_scale_1_is_returned_untouched():
  source = jnp.ones((2, 3))
  assert static_sum([source], 1.0) is source
