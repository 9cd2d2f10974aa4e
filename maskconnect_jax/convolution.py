"""Convolutions in the form that is fastest on each platform.

`conv` takes each convolution of the networks. A GPU and a TPU have libraries
for it. On a CPU XLA computes many of them at half the speed that the cores
have. So on a CPU

- a 1x1 convolution is a matrix product, and so is that of images of fewer
  pixels than the kernel,
- the others are those of convolution.cc if `backend.native` is on, and groups
  of channels are bundled to 16 channels at least,
- without them, with 16 output channels or fewer, neighbouring pixels are
  computed together.

All forms are equal up to rounding. Their figures stand in docs/notebook.md
under "Convolutions on a CPU" and "The grouped convolution".
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from maskconnect_jax import backend

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')
_BUNDLE = 16  # channels at least, see `bundled`
_LANES = 16  # the output channels of a group are a multiple, in convolution.cc
_BATCH, _WHOLE = PartitionSpec('data'), PartitionSpec()
_OUTPUTS = 32  # channels of all pixels that `side_by_side` computes together

NATIVE = ('maskconnect_conv', 'maskconnect_conv_kernel_gradient')


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Returns the convolution of x with a square kernel, zeros at the border.

  Args:
    x: [N, H, W, C].
    kernel: [k, k, C / groups, C'], k odd.
    stride: s, in both directions.

  Returns:
    [N, ceil(H/s), ceil(W/s), C'].
  """
  return backend.by_platform(
    cpu=functools.partial(on_a_cpu, stride=stride),
    default=functools.partial(by_library, stride=stride),
  )(x, kernel)


def across_channels(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Returns a 1x1 convolution.

  Args:
    x: [N, H, W, C].
    matrix: [C, C'].

  Returns:
    [N, H, W, C'].
  """
  return backend.by_platform(
    cpu=product,
    default=lambda x, matrix: jnp.einsum('nhwi,io->nhwo', x, matrix),
  )(x, matrix)


def groups_of(x: jax.Array, kernel: jax.Array) -> int:
  """Returns the number of groups of channels."""
  return x.shape[-1] // kernel.shape[2]


def plain(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, int], groups: int = 1
) -> jax.Array:
  """Returns XLA's own convolution; the padding is half the kernel's height."""
  pad = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    strides,
    ((pad, pad), (pad, pad)),
    dimension_numbers=_LAYOUT,
    feature_group_count=groups,
  )


def by_library(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Computes `conv`; with groups, each device computes its part of the batch.

  The batch is sharded over axis 'data' of the mesh that `jax.set_mesh` sets.
  With groups and outside `shard_map`, XLA gathers the whole batch on every
  device. Each of eight devices then computes 4.22 MFLOP instead of 0.75.
  """
  groups = groups_of(x, kernel)
  local = functools.partial(plain, strides=(stride, stride), groups=groups)
  if groups == 1:
    return local(x, kernel)
  return backend.on_each_device(local, (_BATCH, _WHOLE), _BATCH)(x, kernel)


def on_a_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Computes `conv` in the form that a CPU runs fastest."""
  if groups_of(x, kernel) > 1:
    return bundled(x, kernel, stride)
  size = len(kernel)
  if size == 1:
    return product(x[:, ::stride, ::stride], kernel[0, 0])
  if -(-x.shape[1] // stride) * -(-x.shape[2] // stride) < size**2:
    return of_small_images(x, kernel, stride)
  return dense(x, kernel, stride)


@jax.custom_vjp
def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Computes `across_channels` as a product of two matrices.

  The gradient of the matrix is dL/dM = x^T dy. XLA's CPU compiler copies the
  first factor of such a product, transposed. So the narrower one comes first.
  Without the barrier XLA would turn the product around again. For 64 images of
  32x32 pixels, 256 to 32 channels and one core, the gradient takes 15 ms
  instead of 30 ms; that of a 1x1 convolution takes 124 ms.
  """
  return jnp.matmul(_rows(x), matrix).reshape(*x.shape[:-1], -1)


def _rows(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])


def _product_forward(
  x: jax.Array, matrix: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return product(x, matrix), (x, matrix)


def _product_backward(
  given: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, matrix = given
  dx = jnp.matmul(_rows(dy), matrix.T).reshape(x.shape)
  if x.shape[-1] <= dy.shape[-1]:
    return dx, jnp.matmul(_rows(x).T, _rows(dy))
  turned = jnp.matmul(_rows(dy).T, _rows(x))
  return dx, jax.lax.optimization_barrier(turned).T


product.defvjp(_product_forward, _product_backward)


def of_small_images(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Computes `conv` without groups as a product of whole images.

  The matrix holds a weight of the kernel for each pixel in and out. If an image
  has fewer pixels than the kernel, XLA exchanges the two, and then computes the
  convolution by plain loops: for 128 images of 2x2 pixels with 64 channels it
  takes 4.8 ms.
  """
  n, height, width, _ = x.shape
  size, _, _, outputs = kernel.shape
  wide = jnp.pad(kernel, ((height, height), (width, width), (0, 0), (0, 0)))
  rows, columns = (
    [length + size // 2 - at for at in range(0, length, stride)]
    for length in (height, width)
  )
  # For each pixel out, the weights of all pixels in.
  weights = [
    wide[top : top + height, left : left + width]
    for top in rows
    for left in columns
  ]
  matrix = jnp.stack(weights, 3).reshape(-1, len(weights) * outputs)
  y = product(x.reshape(n, -1), matrix)
  return y.reshape(n, len(rows), len(columns), outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Computes `conv`, and its gradients as `input_` and `kernel_gradient`.

  Autodiff would ask for the same convolutions in other layouts, which XLA's CPU
  compiler changes before it chooses how to compute them, but not in a
  conditional (see `backend.by_platform`). XLA's forms here have no groups: x
  has them only where convolution.cc takes it.
  """
  if _is_native(x, kernel.shape):
    local = functools.partial(_native_conv, stride=stride)
    return backend.on_each_device(local, (_BATCH, _WHOLE), _BATCH)(x, kernel)
  if stride == 1:
    return side_by_side(x, kernel)
  return plain(x, kernel, (stride, stride))


def _dense_forward(
  x: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return dense(x, kernel, stride), (x, kernel)


def _dense_backward(
  stride: int, given: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, kernel = given
  return (
    input_gradient(dy, kernel, x.shape, stride),
    kernel_gradient(x, dy, kernel.shape, stride),
  )


dense.defvjp(_dense_forward, _dense_backward)


def input_gradient(
  dy: jax.Array, kernel: jax.Array, shape: tuple[int, ...], stride: int
) -> jax.Array:
  """Returns the gradient of x, a convolution of dy with the turned kernel.

  Its rows and columns are reversed, its inputs and outputs exchanged.

  Args:
    dy: [N, ceil(H/s), ceil(W/s), C'].
    kernel: [k, k, C / groups, C'].
    shape: of x, [N, H, W, C].
    stride: s, 1 with groups.
  """
  size, _, inputs, outputs = kernel.shape
  groups = shape[-1] // inputs
  apart = kernel[::-1, ::-1].reshape(size, size, inputs, groups, -1)
  turned = apart.swapaxes(2, 4).reshape(size, size, outputs // groups, -1)
  if stride == 1:
    return dense(dy, turned, 1)
  before = size // 2
  return jax.lax.conv_general_dilated(
    dy,
    turned,
    (1, 1),
    [
      (size - 1 - before, n + before - own)
      for n, own in zip(shape[1:3], _reach(dy, stride), strict=True)
    ],
    lhs_dilation=(stride, stride),
    dimension_numbers=_LAYOUT,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def kernel_gradient(
  x: jax.Array, dy: jax.Array, shape: tuple[int, ...], stride: int
) -> jax.Array:
  """Returns the gradient of the kernel, of the given shape.

  By XLA it is a convolution of x, whose images are its channels, with dy as the
  kernel.

  Args:
    x: [N, H, W, C].
    dy: [N, ceil(H/s), ceil(W/s), C'].
    shape: [k, k, C / groups, C'].
    stride: s.
  """
  if _is_native(x, shape):
    local = functools.partial(_native_gradient, shape=shape, stride=stride)
    return backend.on_each_device(local, (_BATCH, _BATCH), _WHOLE)(x, dy)
  size, before = shape[0], shape[0] // 2
  found = jax.lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    dy.transpose(1, 2, 0, 3),
    (1, 1),
    [
      (before, size - 1 - before + own - n)
      for n, own in zip(x.shape[1:3], _reach(dy, stride), strict=True)
    ],
    rhs_dilation=(stride, stride),
    dimension_numbers=_LAYOUT,
  )
  return found.transpose(1, 2, 0, 3)


def _gradient_forward(
  x: jax.Array, dy: jax.Array, shape: tuple[int, ...], stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return kernel_gradient(x, dy, shape, stride), (x, dy)


def _gradient_backward(
  shape: tuple[int, ...],
  stride: int,
  given: tuple[jax.Array, jax.Array],
  slope: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  x, dy = given
  return (
    input_gradient(dy, slope, x.shape, stride),
    dense(x, slope, stride),
  )


kernel_gradient.defvjp(_gradient_forward, _gradient_backward)


def _reach(dy: jax.Array, stride: int) -> list[int]:
  """Returns the rows and columns of x, with zeros, that one weight meets."""
  return [(n - 1) * stride + 1 for n in dy.shape[1:3]]


def _is_native(x: jax.Array, kernel: tuple[int, ...]) -> bool:
  """Returns whether convolution.cc computes this, on a kernel of this shape."""
  per_group = kernel[-1] * kernel[2] // x.shape[-1]
  return bool(
    backend.native.value and x.dtype == jnp.float32 and per_group % _LANES == 0
  )


def _native_conv(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
  """Computes `dense`."""
  sides = (-(-n // stride) for n in x.shape[1:3])
  shape = len(x), *sides, kernel.shape[-1]
  return _native(NATIVE[0], shape, x, kernel, stride)


def _native_gradient(
  x: jax.Array, dy: jax.Array, *, shape: tuple[int, ...], stride: int
) -> jax.Array:
  """Computes `kernel_gradient`."""
  return _native(NATIVE[1], shape, x, dy, stride)


def _native(
  name: str, shape: tuple[int, ...], x: jax.Array, y: jax.Array, stride: int
) -> jax.Array:
  """Calls a handler, on all threads unless other devices share the batch."""
  call = backend.native_call(name, jax.ShapeDtypeStruct(shape, x.dtype))
  threads = not jax.sharding.get_abstract_mesh().manual_axes
  return call(x, y, stride=stride, threads=threads)


def side_by_side(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Computes `conv` at stride 1 with a few neighbouring pixels together.

  p pixels of a row, with C' channels each, are one pixel with p C' channels.
  Their kernel is p - 1 columns wider, and its stride is p. This takes more
  arithmetic, (k + p - 1) / k times. But the inner loop of a CPU's product is
  as wide as the output, and 16 channels fill a third of it. For 64 images of
  32x32 pixels with 16 channels and one core, p = 2 takes 4.1 ms instead of
  6.3 ms, and the first convolution, of 3 channels, 1.3 ms instead of 4.2 ms.
  """
  n, height, width, inputs = x.shape
  outputs = kernel.shape[-1]
  # The wider kernel of a colour image is still small.
  most = (2 if inputs < 8 else 1) * _OUTPUTS
  pixels = 1
  while 2 * pixels * outputs <= most and width % (2 * pixels) == 0:
    pixels *= 2
  if pixels == 1:
    return plain(x, kernel, (1, 1))
  wider = jnp.stack(
    [
      jnp.pad(kernel, ((0, 0), (i, pixels - 1 - i), (0, 0), (0, 0)))
      for i in range(pixels)
    ],
    axis=3,
  )
  wider = wider.reshape(*wider.shape[:3], pixels * outputs)
  y = plain(x, wider, (1, pixels))
  return y.reshape(n, height, width, outputs)


def bundled(
  x: jax.Array, kernel: jax.Array, stride: int, channels: int = _BUNDLE
) -> jax.Array:
  """Computes `conv` in groups as dense convolutions of bundles of groups.

  The dense kernels are block-diagonal. On a CPU XLA's own grouped convolution
  takes 40 to 290 times as long. Bundles of 16 channels, or of one group if that
  is wider, are the fastest or within the noise of the fastest.
  """
  size, _, width, outputs = kernel.shape
  groups = groups_of(x, kernel)
  bundle = max(1, min(groups, channels // width))
  while groups % bundle:
    bundle -= 1
  count = groups // bundle
  apart = kernel.reshape(size, size, width, count, bundle, -1)
  eye = jnp.eye(bundle, dtype=kernel.dtype)
  joined = jnp.einsum('hwinjo,gj->hwginjo', apart, eye)
  joined = joined.reshape(size, size, bundle * width, outputs)
  # With a stride, or where `dense` cannot turn the kernel, bundle by bundle.
  whole = stride == 1 < size and joined.shape[2] % _LANES == 0
  if whole and _is_native(x, joined.shape):
    return dense(x, joined, stride)
  parts = [
    on_a_cpu(part, own, stride)
    for part, own in zip(
      jnp.split(x, count, -1), jnp.split(joined, count, -1), strict=True
    )
  ]
  return jnp.concatenate(parts, -1)
