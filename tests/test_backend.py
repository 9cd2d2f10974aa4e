"""The formulations against NumPy, and which platform gets which."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax import backend

ROOT = Path(__file__).parents[1]


def test_the_headings_that_comments_name_exist():
  named = set()
  for path in (ROOT / 'maskconnect_jax').rglob('*.py'):
    for text in path.read_text('utf-8').split('docs/notebook.md')[1:]:
      mention = re.split('\n\n|"""', text)[0]
      named |= {
        ' '.join(heading.split())
        for heading in re.findall('"(.+?)"', mention, re.S)
      }
  lines = (ROOT / 'docs/notebook.md').read_text('utf-8').splitlines()
  headings = {line.lstrip('# ') for line in lines if line.startswith('#')}
  assert len(named) >= 3
  assert named <= headings


def test_a_function_is_traced_once_for_calls_that_are_alike():
  traced = []

  @backend.traced_once(1)
  def scaled(x, scale):
    traced.append(scale)
    return x * scale

  jax.make_jaxpr(lambda x: scaled(scaled(scaled(x, 2), 3), 2))(jnp.ones(3))
  assert traced == [2, 3]


def test_rows_of_groups_are_those_of_indexing():
  weights = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  groups = [[1, 2, 5], [3, 6]]
  rows, pull = jax.vjp(lambda w: backend.rows_of(w, groups), weights)
  for row, group in zip(rows, groups, strict=True):
    np.testing.assert_array_equal(row, weights[group])
  (gradient,) = pull(rows)
  weights[[0, 4]] = 0  # of no group
  np.testing.assert_array_equal(gradient, weights)


def test_rows_for_images_are_the_rows_and_sum_their_gradients():
  weights = np.arange(6, dtype=np.float32).reshape(2, 3)
  rows, pull = jax.vjp(lambda w: backend.rows_for_images(w, 4), weights)
  for row, values in zip(rows, weights, strict=True):
    np.testing.assert_array_equal(row, np.tile(values[:, None], 4))
  (gradient,) = pull(rows)
  np.testing.assert_array_equal(gradient, 4 * weights)


@pytest.mark.parametrize('shape', [(3,), (3, 4, 5, 2)])
@pytest.mark.parametrize(
  'products', [backend.products_one_by_one, backend.products_at_once]
)
def test_products_are_numpys(products, shape):
  rng = np.random.default_rng(0)
  gradient, sources = rng.normal(size=shape), rng.normal(size=(5, *shape))
  expected = np.einsum(
    'nbi,bi->nb', sources.reshape(5, 3, -1), gradient.reshape(3, -1)
  )
  with jax.enable_x64(True):
    actual = products(jnp.asarray(gradient), tuple(jnp.asarray(sources)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
  'products', [backend.products_one_by_one, backend.products_at_once]
)
def test_products_of_bfloat16_sources_are_float32(products):
  # bfloat16 counts to 256; and (1 + 2^-7)^2 - (1 + 2^-6) is 0 in it, not 2^-14.
  ones = jnp.ones((1, 10_001), jnp.bfloat16)
  ((count,),) = products(ones.astype(jnp.float32), (ones,))
  pair = jnp.array([[1 + 2**-7, -(1 + 2**-6)]], jnp.bfloat16)
  ((left,),) = products(jnp.array([[1 + 2**-7, 1]], jnp.float32), (pair,))
  assert (float(count), float(left)) == (10_001, 2**-14)


@pytest.mark.parametrize(
  ('platform', 'products'), [('cpu', 1), ('cuda', 0), ('tpu', 0)]
)
def test_only_a_cpu_changes_channels_by_a_product(platform, products):
  for channels, other in ((8, 'stablehlo.pad'), (3, 'stablehlo.slice')):
    function = jax.jit(lambda x, n=channels: backend.with_channels(x, n))
    program = function.trace(jnp.zeros((2, 3, 4, 5)))
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('dot_general') == products
    assert text.count(other) == 1 - products


@pytest.mark.parametrize('channels', [3, 5, 8])
def test_channels_are_appended_or_left_out(channels):
  x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
  y, pull = jax.vjp(
    lambda x: backend.with_channels(x, channels), jnp.asarray(x)
  )
  expected = np.pad(x, ((0, 0), (0, 0), (0, 3)))[..., :channels]
  np.testing.assert_array_equal(y, expected)
  (back,) = pull(y)
  np.testing.assert_array_equal(
    back, np.pad(expected, ((0, 0), (0, 0), (0, 5)))[..., :5]
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_relu_is_the_maximum_to_the_bit(dtype):
  x = np.array(
    [-3e38, -1.5, -1e-30, -0.0, 0.0, 1e-30, 0.1, 3e38, np.inf, np.nan],
    jnp.dtype(dtype),
  )
  y = backend.relu(jnp.asarray(x))
  assert y.dtype == x.dtype
  y, x = (np.asarray(array, np.float64) for array in (y, x))
  np.testing.assert_array_equal(y, np.maximum(x, 0))


def test_relu_passes_on_the_gradient_of_what_is_above_zero():
  x = jnp.array([-2.0, -0.0, 0.0, 1e-30, 5.0])
  _, pull = jax.vjp(jax.jit(backend.relu), x)
  np.testing.assert_array_equal(pull(jnp.arange(1.0, 6.0))[0], [0, 0, 0, 4, 5])


@pytest.mark.parametrize('shape', [(2, 8, 6, 3), (1, 7, 9, 2), (1, 1, 2, 1)])
def test_the_maximum_of_windows_with_and_without_platforms(shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32) - 9
  n, height, width, channels = shape
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  expected = np.stack(
    [
      padded[:, i : i + 3, j : j + 3].max((1, 2))
      for i in range(0, height, 2)
      for j in range(0, width, 2)
    ],
    axis=1,
  ).reshape(n, -(-height // 2), -(-width // 2), channels)
  np.testing.assert_array_equal(backend.max_of_windows(x), expected)
  with backend.without_platforms():
    np.testing.assert_array_equal(backend.max_of_windows(x), expected)
