"""The forms of a convolution against NumPy, and which platform gets which."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax import backend, convolution
from maskconnect_jax.run import distributed


@pytest.fixture(autouse=True)
def xlas():
  """Tests of convolution.cc turn it on again."""
  with backend.native(False):
    yield


# Images, height, width, channels, groups, channels out, kernel, stride.
SHAPES = [
  (2, 8, 8, 3, 1, 16, 3, 1),  # four pixels together
  (2, 6, 4, 16, 1, 16, 3, 1),  # two
  (2, 8, 8, 16, 1, 4, 3, 1),  # eight, and two for the input's gradient
  (3, 5, 7, 16, 1, 16, 3, 1),  # an odd width: none
  (2, 6, 6, 32, 1, 40, 3, 1),
  (2, 8, 6, 16, 1, 32, 3, 2),
  (2, 7, 9, 5, 1, 6, 3, 2),
  (2, 9, 11, 3, 1, 8, 7, 2),
  (3, 2, 2, 6, 1, 5, 3, 1),  # fewer pixels than the kernel has
  (3, 1, 1, 6, 1, 5, 3, 1),
  (3, 4, 3, 6, 1, 8, 3, 2),
  (2, 2, 3, 16, 4, 16, 3, 1),
  (2, 7, 8, 3, 1, 8, 7, 2),
  (2, 5, 4, 12, 1, 7, 1, 1),  # the matrix's gradient is turned
  (2, 5, 4, 7, 1, 12, 1, 1),
  (2, 5, 6, 12, 1, 7, 1, 2),
  (2, 8, 8, 32, 8, 32, 3, 1),
  (2, 7, 7, 32, 8, 32, 3, 2),
  (2, 5, 5, 120, 3, 120, 3, 1),
]


def numpys(x, kernel, dy, groups, stride):
  """The convolution and its gradients, a sum over the kernel's weights."""
  size, _, width, outputs = kernel.shape
  pad, (n, height, over, _) = size // 2, x.shape
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  high, wide = -(-height // stride), -(-over // stride)
  y, back = np.zeros((n, high, wide, outputs)), np.zeros_like(padded)
  gradient, per = np.zeros_like(kernel), outputs // groups
  for row in range(size):
    for column in range(size):
      at = (
        slice(None),
        slice(row, row + (high - 1) * stride + 1, stride),
        slice(column, column + (wide - 1) * stride + 1, stride),
      )
      for g in range(groups):
        of_x = (*at, slice(g * width, (g + 1) * width))
        of_y = (..., slice(g * per, (g + 1) * per))
        own = kernel[row, column][of_y]
        y[of_y] += padded[of_x] @ own
        back[of_x] += dy[of_y] @ own.T
        gradient[row, column][of_y] = np.einsum(
          'nhwi,nhwo->io', padded[of_x], dy[of_y]
        )
  return y, back[:, pad : pad + height, pad : pad + over], gradient


@pytest.mark.parametrize(
  'form', [convolution.on_a_cpu, convolution.by_library, convolution.conv]
)
@pytest.mark.parametrize('shape', SHAPES)
def test_values_and_gradients_are_numpys(form, shape):
  n, height, width, inputs, groups, outputs, size, stride = shape
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, height, width, inputs))
  kernel = rng.normal(size=(size, size, inputs // groups, outputs))
  dy = rng.normal(size=(n, -(-height // stride), -(-width // stride), outputs))
  expected = numpys(x, kernel, dy, groups, stride)
  with jax.enable_x64(True):
    y, pull = jax.vjp(
      lambda x, kernel: form(x, kernel, stride),
      jnp.asarray(x),
      jnp.asarray(kernel),
    )
    for actual, value in zip(
      (y, *pull(jnp.asarray(dy))), expected, strict=True
    ):
      np.testing.assert_allclose(actual, value, rtol=1e-12, atol=1e-12)


def test_across_channels_is_a_product_with_its_gradients():
  rng = np.random.default_rng(0)
  x, matrix = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(5, 3))
  dy = rng.normal(size=(2, 3, 4, 3))
  with jax.enable_x64(True):
    y, pull = jax.vjp(
      convolution.across_channels, jnp.asarray(x), jnp.asarray(matrix)
    )
    dx, dmatrix = pull(jnp.asarray(dy))
  np.testing.assert_allclose(y, x @ matrix, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(dx, dy @ matrix.T, rtol=1e-12, atol=1e-12)
  expected = np.einsum('nhwi,nhwo->io', x, dy)
  np.testing.assert_allclose(dmatrix, expected, rtol=1e-12, atol=1e-12)


def program(platform, shape, kernel):
  """The text of a convolution and its gradients, lowered for a platform."""

  @jax.jit
  def everything(x, kernel):
    y, pull = jax.vjp(convolution.conv, x, kernel)
    return y, pull(y)

  traced = everything.trace(jnp.zeros(shape), jnp.zeros(kernel))
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
@pytest.mark.parametrize(
  ('shape', 'kernel', 'on_cpu', 'elsewhere'),
  [
    # Products, and convolutions for value, input's and kernel's gradient.
    ((1, 4, 4, 8), (1, 1, 8, 4), (3, 0), (0, 3)),
    ((1, 4, 4, 16), (3, 3, 16, 16), (0, 3), (0, 3)),
    ((1, 4, 4, 32), (3, 3, 4, 32), (2, 6), (0, 3)),  # two bundles
  ],
)
def test_each_platform_has_its_form(platform, shape, kernel, on_cpu, elsewhere):
  text = program(platform, shape, kernel)
  products, convolutions = on_cpu if platform == 'cpu' else elsewhere
  assert text.count('stablehlo.convolution') == convolutions
  if kernel[2] == shape[-1]:  # bundles of groups are products of kernels
    assert text.count('stablehlo.dot_general') == products
  groups = shape[-1] // kernel[2]
  grouped = f'feature_group_count = {groups} ' in text
  assert grouped == (groups == 1 or platform != 'cpu') or not convolutions


def test_a_gradient_over_devices_has_no_conditional_and_one_sum():
  """XLA's CPU compiler optimizes nothing inside a conditional."""
  mesh = distributed.make_mesh()
  x, kernel = (
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    for shape, sharding in (
      ((8, 4, 4, 16), distributed.sharded(mesh)),
      ((3, 3, 16, 16), distributed.replicated(mesh)),
    )
  )
  layer = jax.jit(lambda x, kernel: jnp.tanh(convolution.conv(x, kernel)))

  @jax.jit
  def gradient(x, first, second):
    return jax.grad(
      lambda first, second: layer(layer(x, first), second).sum(), (0, 1)
    )(first, second)

  text = gradient.lower(x, kernel, kernel).compile().as_text()
  assert ' conditional(' not in text
  assert text.count(' all-reduce(') == 1


def test_a_gradient_is_as_precise_as_its_value():
  def loss(x, kernel):
    with jax.default_matmul_precision('highest'):
      y = convolution.conv(x, kernel)
    return y.sum()

  traced = jax.jit(jax.grad(loss, (0, 1))).trace(
    jnp.zeros((1, 4, 4, 8)), jnp.zeros((3, 3, 8, 8))
  )
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  convolutions = text.split('stablehlo.convolution')[1:]
  assert len(convolutions) == 2
  assert all('HIGHEST' in rest.splitlines()[0] for rest in convolutions)


# convolution.cc, in float32.
COMPILED = pytest.mark.skipif(
  not backend.native.value, reason='no C++ compiler, or not for this system'
)
# As SHAPES, of a multiple of 16 channels out.
NATIVE = [
  (3, 8, 8, 3, 1, 16, 3, 1),
  (2, 5, 7, 16, 1, 48, 3, 1),  # Winograd's, with half a tile at the border
  (2, 3, 40, 16, 1, 16, 3, 1),  # of more tiles in a row than sums in registers
  (1, 8, 8, 64, 1, 32, 3, 1),  # of several rows at once
  (2, 8, 6, 16, 1, 32, 3, 2),
  (2, 7, 9, 5, 1, 16, 3, 2),
  (2, 9, 11, 3, 1, 64, 7, 2),
  (2, 6, 6, 32, 1, 16, 5, 1),
  (2, 5, 6, 32, 8, 32, 3, 1),  # bundles of 16 channels
  (2, 6, 5, 96, 3, 96, 3, 1),
  (2, 6, 6, 32, 8, 32, 3, 2),
]


@pytest.fixture
def native():
  with backend.native(True):
    yield


def drawn(shape):
  n, height, width, inputs, groups, outputs, size, stride = shape
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(n, height, width, inputs)),
    rng.normal(size=(size, size, inputs // groups, outputs)),
    rng.normal(size=(n, -(-height // stride), -(-width // stride), outputs)),
  )


def pulled(x, kernel, dy, stride):
  """Value and gradients in float32."""
  y, pull = jax.vjp(
    lambda x, kernel: convolution.conv(x, kernel, stride),
    jnp.asarray(x, jnp.float32),
    jnp.asarray(kernel, jnp.float32),
  )
  return y, *pull(jnp.asarray(dy, jnp.float32))


def assert_close(actual, expected):
  """Compares within the rounding of sums in float32."""
  largest = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-6 * largest)


@COMPILED
@pytest.mark.usefixtures('native')
@pytest.mark.parametrize('shape', NATIVE)
def test_native_values_and_gradients_are_numpys(shape):
  x, kernel, dy = drawn(shape)
  expected = numpys(x, kernel, dy, shape[4], shape[-1])
  for actual, value in zip(
    pulled(x, kernel, dy, shape[-1]), expected, strict=True
  ):
    assert_close(actual, value)


@COMPILED
@pytest.mark.usefixtures('native')
@pytest.mark.parametrize('outputs', [16, 32])
def test_every_width_of_a_tile(outputs):
  """A row of pixels is split into tiles of up to 16, and what is left."""
  for width in (*range(3, 16), 19, 33):
    x, kernel, dy = drawn((1, 3, width, 2, 1, outputs, 3, 1))
    for actual, value in zip(
      pulled(x, kernel, dy, 1), numpys(x, kernel, dy, 1, 1), strict=True
    ):
      assert_close(actual, value)


@COMPILED
@pytest.mark.usefixtures('native')
def test_threads_change_no_bit():
  """Parts of a batch, and of a large image, equal each image by itself."""
  x, kernel, _ = drawn((6, 64, 64, 16, 1, 32, 3, 1))
  x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  whole = convolution.conv(x, kernel)
  for n in range(6):
    np.testing.assert_array_equal(
      convolution.conv(x[n : n + 1], kernel)[0], whole[n]
    )
    rows = convolution.conv(x[n : n + 1, :4], kernel)[0, :3]
    np.testing.assert_array_equal(rows, whole[n, :3])


@COMPILED
@pytest.mark.parametrize(
  ('inputs', 'outputs', 'groups'), [(16, 32, 1), (32, 64, 2)]
)
@pytest.mark.usefixtures('native')
def test_threads_change_no_bit_of_a_kernels_gradient(inputs, outputs, groups):
  """In a `shard_map` each device takes one thread, elsewhere all of them."""
  x, kernel, dy = drawn((6, 64, 64, inputs, groups, outputs, 3, 1))
  x, dy = jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32)

  def gradient(x, dy):
    return convolution.kernel_gradient(x, dy, kernel.shape, 1)

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('data',))
  part, whole = jax.P('data'), jax.P()
  by_one = jax.shard_map(
    gradient, mesh=mesh, in_specs=(part, part), out_specs=whole, check_vma=False
  )
  np.testing.assert_array_equal(gradient(x, dy), by_one(x, dy))


def text_of(platform, channels, dtype=jnp.float32, stride=1):
  def everything(x, kernel):
    y, pull = jax.vjp(lambda *own: convolution.conv(*own, stride), x, kernel)
    return y, pull(y)

  traced = jax.jit(everything).trace(
    jnp.zeros((1, 6, 6, channels), dtype),
    jnp.zeros((3, 3, channels, channels), dtype),
  )
  return traced.lower(lowering_platforms=(platform,)).as_text()


@COMPILED
@pytest.mark.usefixtures('native')
def test_who_takes_it():
  assert text_of('cpu', 16).count('@maskconnect_conv') == 3
  # The input's gradient with a stride is XLA's.
  assert text_of('cpu', 16, stride=2).count('@maskconnect_conv') == 2
  for other in (
    text_of('cuda', 16),
    text_of('tpu', 16),
    text_of('cpu', 12),
    text_of('cpu', 16, jnp.bfloat16),
  ):
    assert 'maskconnect' not in other
  with jax.enable_x64(True):
    assert 'maskconnect' not in text_of('cpu', 16, jnp.float64)
  with backend.native(False):
    assert 'maskconnect' not in text_of('cpu', 16)
  assert text_of('cpu', 16).count('@maskconnect_conv') == 3


@COMPILED
@pytest.mark.usefixtures('native')
@pytest.mark.parametrize('groups', [1, 8])
def test_devices_share_a_batch_and_add_a_gradient_once(groups):
  mesh = distributed.make_mesh()
  x, kernel, _ = drawn((16, 6, 6, 32, groups, 32, 3, 1))

  def loss(kernel, x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return (convolution.conv(x, kernel) ** 2).sum()

  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  own = (jnp.asarray(kernel, jnp.float32), jnp.asarray(x, jnp.float32))
  shared = jax.device_put(
    own, (distributed.replicated(mesh), distributed.sharded(mesh))
  )
  compiled = step.lower(*shared).compile()
  text = compiled.as_text()
  assert text.count(' all-reduce(') == 1
  assert 'all-gather' not in text
  with backend.native(False):
    alone = step(*own)
  for actual, expected in zip(
    jax.tree.leaves(compiled(*shared)), jax.tree.leaves(alone), strict=True
  ):
    assert_close(actual, expected)


@COMPILED
@pytest.mark.usefixtures('native')
@pytest.mark.parametrize('stride', [1, 2])
def test_it_can_be_derived_twice(stride):
  x, kernel, _ = drawn((2, 6, 6, 16, 1, 16, 3, stride))

  def slope(x, kernel):
    def loss(x, kernel):
      return jnp.sin(convolution.conv(x, kernel, stride) / 10).sum()

    dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
    return (dx**2).sum() + (dkernel**2).sum()

  own = (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
  twice = jax.jit(jax.grad(slope, (0, 1)))
  with backend.native(False), jax.enable_x64(True):
    expected = twice(jnp.asarray(x), jnp.asarray(kernel))
  for actual, value in zip(twice(*own), expected, strict=True):
    assert_close(actual, value)


@COMPILED
@pytest.mark.usefixtures('native')
def test_a_mapped_convolution():
  x, kernel, _ = drawn((3, 5, 5, 4, 1, 16, 3, 1))
  found = jax.vmap(lambda image: convolution.conv(image[None], kernel)[0])(
    jnp.asarray(x, jnp.float32)
  )
  assert_close(found, convolution.conv(jnp.asarray(x, jnp.float32), kernel))
