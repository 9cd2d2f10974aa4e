"""Convolutions in the form from which XLA compiles the fastest program.

`conv` takes each convolution of the networks. A GPU and a TPU have libraries
for it. XLA's CPU compiler has fast matrix products, and convolutions that are
fast for 32 output channels and more. So on a CPU

- a 1x1 convolution is a matrix product, and so is that of images of fewer
  pixels than the kernel,
- with 16 output channels or fewer, neighbouring pixels are computed together,
- groups of channels are bundled to 16 channels at least.

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
_OUTPUTS = 32  # channels of all pixels that `side_by_side` computes together


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
  mesh = jax.sharding.get_abstract_mesh()
  inside = mesh.empty or mesh.manual_axes  # in the `shard_map` of a step
  if groups > 1 and not inside and mesh.size > 1:
    batch, whole = PartitionSpec('data'), PartitionSpec()
    local = jax.shard_map(local, in_specs=(batch, whole), out_specs=batch)
  return local(x, kernel)


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
  """Computes `conv` without groups, its gradients as convolutions, too.

  The input's gradient is a convolution of dy with the kernel, turned by 180
  degrees and with inputs and outputs exchanged. The kernel's gradient is one of
  x, whose images are its channels, with dy as the kernel. Autodiff would ask
  for the same two in other layouts, which XLA's CPU compiler changes before it
  chooses how to compute them, but not in a conditional (see
  `backend.by_platform`).
  """
  if stride == 1:
    return side_by_side(x, kernel)
  return plain(x, kernel, (stride, stride))


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


def _dense_forward(
  x: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return dense(x, kernel, stride), (x, kernel)


def _dense_backward(
  stride: int, given: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, kernel = given
  size, before = len(kernel), len(kernel) // 2
  # Rows and columns of x that a kernel's first weight meets, zeros included.
  reach = [(n - 1) * stride + 1 for n in dy.shape[1:3]]
  lengths = x.shape[1:3]

  turned = kernel[::-1, ::-1].swapaxes(2, 3)
  if stride == 1:
    dx = side_by_side(dy, turned)
  else:
    dx = jax.lax.conv_general_dilated(
      dy,
      turned,
      (1, 1),
      [
        (size - 1 - before, n + before - own)
        for n, own in zip(lengths, reach, strict=True)
      ],
      lhs_dilation=(stride, stride),
      dimension_numbers=_LAYOUT,
    )
  dkernel = jax.lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    dy.transpose(1, 2, 0, 3),
    (1, 1),
    [
      (before, size - 1 - before + own - n)
      for n, own in zip(lengths, reach, strict=True)
    ],
    rhs_dilation=(stride, stride),
    dimension_numbers=_LAYOUT,
  )
  return dx, dkernel.transpose(1, 2, 0, 3)


dense.defvjp(_dense_forward, _dense_backward)


def bundled(
  x: jax.Array, kernel: jax.Array, stride: int, channels: int = _BUNDLE
) -> jax.Array:
  """Computes `conv` in groups as dense convolutions of bundles of groups.

  The dense kernels are block-diagonal. On a CPU XLA's own grouped convolution
  takes 40 to 290 times as long. Bundles of 16 channels, or of one group if that
  is wider, are the fastest or within the noise of the fastest.
  """
  size, _, width, _ = kernel.shape
  groups = groups_of(x, kernel)
  bundle = max(1, min(groups, channels // width))
  while groups % bundle:
    bundle -= 1
  outputs = kernel.shape[-1] // groups
  eye = jnp.eye(bundle, dtype=kernel.dtype)
  parts = []
  for part, own in zip(
    jnp.split(x, groups // bundle, -1),
    jnp.split(kernel, groups // bundle, -1),
    strict=True,
  ):
    blocks = own.reshape(size, size, width, bundle, outputs)
    joined = jnp.einsum('hwigo,gj->hwjigo', blocks, eye)
    joined = joined.reshape(size, size, bundle * width, bundle * outputs)
    parts.append(on_a_cpu(part, joined, stride))
  return jnp.concatenate(parts, -1)
