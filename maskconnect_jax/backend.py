"""Computations in the form from which XLA compiles the fastest program.

The first line of a docstring names the result. The rest says why the code has
its form on a CPU, a GPU or a TPU. The figures stand in docs/notebook.md: a
CPU's under "On a CPU", a GPU's (H100) and a TPU's (v5e) under "Compiled for an
H100 and a TPU v5e, on neither", and the convolution's under "The grouped
convolution". Mcycles are the million cycles that a TPU's compiler predicts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

SOURCES_AT_ONCE = 9  # in a call of a masked sum: see `sum_in_parts`

Arrays = Sequence[jax.Array]
P = ParamSpec('P')
T = TypeVar('T')


def traced_once(*static: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
  """Returns a decorator: calls that are alike are traced and lowered once.

  Calls are alike if their arrays have equal shapes and dtypes and their static
  arguments are equal. JAX traces a plain function at every call. The 54 blocks
  of resnet110 are of five kinds: with the decorator its step is traced in 1.6 s
  instead of 8.1 s.

  Args:
    *static: the positions of the static arguments, which must be hashable.
  """
  return lambda function: jax.jit(function, static_argnums=static)


def sum_in_parts(
  add: Callable[[jax.Array, tuple[jax.Array, ...]], jax.Array],
  weights: jax.Array,
  terms: Arrays,
) -> jax.Array:
  """Returns add(weights, terms), the sum of parts of at most nine terms.

  Each block sums one term more than the block before it. So no two whole sums
  are alike, but most parts are: half of the tracing is saved. With parts of six
  a GPU makes more passes over a gradient.

  Args:
    add: called with the weights and the terms of a part; returns their sum.
    weights: [n, ...].
    terms: n arrays.
  """
  starts = range(0, len(terms), SOURCES_AT_ONCE)
  parts = [tuple(terms[i : i + SOURCES_AT_ONCE]) for i in starts]
  rows = jax.lax.split(weights, [len(part) for part in parts])
  sums = [add(row, part) for row, part in zip(rows, parts, strict=True)]
  return sum(sums[1:], start=sums[0])


def rows_for_images(weights: jax.Array, batch: int) -> list[jax.Array]:
  """Returns the L rows of weights, [L, n], each repeated to [n, batch].

  The gradients of all weights are then summed over the images once. Otherwise
  every block sums its own. On a GPU this saves a kernel or two for every block
  and width. On a CPU it takes 0.94 of the time to compile.
  """
  wide = jnp.broadcast_to(weights[..., None], (*weights.shape, batch))
  return [row[0] for row in jax.lax.split(wide, (1,) * len(wide))]


def rows_of(weights: jax.Array, groups: list[list[int]]) -> list[jax.Array]:
  """Returns weights[group] for each group of ascending row numbers.

  No two groups share a row. The rows are split off in runs of neighbours. With
  lists of indices resnet38's step holds 70 gathers and 68 scatters, each of
  them a kernel.
  """
  group_of = {row: n for n, group in enumerate(groups) for row in group}
  owners, lengths = [], []
  for n, run in itertools.groupby(map(group_of.get, range(len(weights)))):
    owners.append(n)
    lengths.append(len(list(run)))
  parts = list(zip(owners, jax.lax.split(weights, lengths), strict=True))
  return [
    jnp.concatenate([part for owner, part in parts if owner == n])
    for n in range(len(groups))
  ]


def inner_products(gradient: jax.Array, sources: Arrays) -> jax.Array:
  """Returns <g, y_i> of n sources in each image, [n, batch], in g's dtype.

  Args:
    gradient: g, [batch, ...], float32 or better.
    sources: the y_i, of g's shape, of its dtype or a narrower one.
  """
  return jax.lax.platform_dependent(
    gradient,
    tuple(sources),
    cpu=products_one_by_one,
    tpu=products_one_by_one,
    default=products_at_once,
  )


def products_one_by_one(gradient: jax.Array, sources: Arrays) -> jax.Array:
  """Computes `inner_products` as one dot product for each source.

  On a CPU a dot product is a call of a library. XLA stores g once before the
  calls instead of computing it again for every reader. The step takes 0.91 to
  0.97 of the time that it takes with `products_at_once`. A TPU takes 25.3
  Mcycles for resnet20. With one matrix product of all g and y it takes 32.5.
  """
  axes = tuple(range(1, gradient.ndim))
  of_images = [
    jax.lax.dot_general(
      gradient,
      source.astype(gradient.dtype),
      ((axes, axes), ((0,), (0,))),
      precision=jax.lax.Precision.HIGHEST,
    )
    for source in sources
  ]
  return jnp.stack(of_images)


def products_at_once(gradient: jax.Array, sources: Arrays) -> jax.Array:
  """Computes `inner_products` as one reduction with a result for each source.

  A GPU reads g once for all sources: resnet38's step accesses 18.1 GB. With one
  matrix product of all g and y it accesses 20.4 GB. XLA fuses the reduction
  into one kernel if it has at most 96 operands and results.
  """
  terms = [gradient * source.astype(gradient.dtype) for source in sources]
  zeros = [jnp.zeros((), gradient.dtype)] * len(terms)
  axes = tuple(range(1, gradient.ndim))

  def add(these: Arrays, those: Arrays) -> list[jax.Array]:
    return list(map(jax.lax.add, these, those))

  return jnp.stack(jax.lax.reduce(terms, zeros, add, axes))


def rounded_again(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Returns x, rounded to `dtype` and back; `dtype` holds its values exactly.

  XLA may keep more precision than the program asks for. A TPU's compiler stores
  the gradient of a bfloat16 sum in float32, unless the gradient is rounded once
  more where it is read. With this rounding resnet20's step takes 751 MB instead
  of 795 MB.
  """
  return x.astype(dtype).astype(x.dtype)


def written_in_own_dtype(x: jax.Array) -> jax.Array:
  """Returns x, behind an optimization barrier.

  Without the barrier XLA leaves out the rounding of a bfloat16 mean that is
  widened again. It then writes a float32 copy beside the bfloat16 array. On a
  GPU resnet38's step accesses 21.3 GB without the barrier and 20.7 GB with it.
  """
  return jax.lax.optimization_barrier(x)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """Returns max(x, 0); its derivative at 0 is 0.

  The form x + max(-x, 0) is equal to the bit for any x except -inf. XLA's CPU
  compiler computes an operation on one array again for each reader, with all
  operations before it, block after block. It stores the result of an operation
  on two arrays. With this form Fixed-Prev's step of resnet110 takes 0.47 of the
  time on a CPU. On a GPU and a TPU nothing changes.
  """
  return x + jnp.maximum(-x, 0)


relu.defjvps(lambda dx, _, x: jnp.where(x > 0, dx, 0))


def scaled_sum(terms: Arrays, scale: float) -> jax.Array:
  """Returns scale * sum(terms), of at least two terms of one shape.

  A CPU computes a sum again and again if only a scaling reads it. If the last
  term is scaled by itself, the CPU stores the sum: Fixed-Random's step of
  resnet38 takes 0.74 of the time. The other terms are added before they are
  scaled. Under Fixed-All each sum is the sum before it and one term more, so
  the sums share their beginnings. With every term scaled by itself they share
  nothing: on a GPU resnet110's step accesses 58.7 GB instead of 49.0 GB.
  """
  *others, last = terms
  return sum(others[1:], start=others[0]) * scale + last * scale


def append_zero_channels(x: jax.Array, features: int) -> jax.Array:
  """Returns a finite x, [..., C], with zero channels: [..., features].

  A CPU multiplies x by the identity, which is a call of a library. A padding
  would be fused into the loops around it. These loops would ask for each
  element whether it lies inside x, and would use no vector instructions. With
  the product the learned step of resnet110 takes 0.91 of the time.
  """
  if x.shape[-1] == features:
    return x
  return _append_zero_channels(x, features)


@traced_once(1)
def _append_zero_channels(x: jax.Array, features: int) -> jax.Array:
  identity = jnp.eye(x.shape[-1], features, dtype=x.dtype)
  around = [(0, 0)] * (x.ndim - 1) + [(0, features - x.shape[-1])]
  return jax.lax.platform_dependent(
    x,
    cpu=lambda x: jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST),
    default=lambda x: jnp.pad(x, around),
  )


@traced_once(1)
def mean_of_windows(x: jax.Array, window: tuple[int, int]) -> jax.Array:
  """Returns the mean of each (height, width) window of x, [N, H, W, C].

  The windows lie side by side. A window that reaches beyond the border is
  averaged over its pixels inside the image. For resnet20 a TPU takes 25.3
  Mcycles. With a reshape and a sum in place of `reduce_window` it takes 33.8.
  """
  size = (1, *window, 1)

  def sums(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, size, size, 'SAME')

  count = sums(jnp.ones((1, *x.shape[1:3], 1)))
  return (sums(x) / count).astype(x.dtype)


def grouped_conv(
  x: jax.Array, kernel: jax.Array, groups: int, stride: int
) -> jax.Array:
  """Returns the 3x3 convolution of x in groups, with zeros at the border.

  Args:
    x: [N, H, W, C].
    kernel: [3, 3, C / groups, C].
    groups: a divisor of C.
    stride: s, in both directions.

  Returns:
    [N, ceil(H/s), ceil(W/s), C].
  """
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=lambda x, kernel: bundled_grouped_conv(x, kernel, groups, stride),
    default=lambda x, kernel: sharded_grouped_conv(x, kernel, groups, stride),
  )


def bundled_grouped_conv(
  x: jax.Array, kernel: jax.Array, groups: int, stride: int, channels: int = 64
) -> jax.Array:
  """Computes `grouped_conv` as dense convolutions of bundles of groups.

  The dense kernels are block-diagonal. On a CPU XLA's own grouped convolution
  takes 40 to 290 times as long. Bundles of about 64 channels are within the
  noise of the fastest, except for groups of 32 channels. They compile sooner
  than one convolution for each group.
  """
  width = kernel.shape[2]
  bundle = max(1, min(groups, channels // width))
  while groups % bundle:
    bundle -= 1
  eye = jnp.eye(bundle, dtype=kernel.dtype)
  parts = []
  for part, own in zip(
    jnp.split(x, groups // bundle, -1),
    jnp.split(kernel, groups // bundle, -1),
    strict=True,
  ):
    blocks = own.reshape(3, 3, width, bundle, width)
    dense = jnp.einsum('hwigo,gj->hwjigo', blocks, eye)
    dense = dense.reshape(3, 3, bundle * width, bundle * width)
    parts.append(_conv3x3(part, dense, 1, stride))
  return jnp.concatenate(parts, -1)


def sharded_grouped_conv(
  x: jax.Array, kernel: jax.Array, groups: int, stride: int
) -> jax.Array:
  """Computes `grouped_conv`; each device computes its part of the batch.

  The batch is sharded over axis 'data' of the mesh that `jax.set_mesh` sets.
  Outside `shard_map` XLA gathers the whole batch on every device. Each of eight
  devices then computes 4.22 MFLOP instead of 0.75.
  """
  local = functools.partial(_conv3x3, groups=groups, stride=stride)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    batch, whole = PartitionSpec('data'), PartitionSpec()
    local = jax.shard_map(local, in_specs=(batch, whole), out_specs=batch)
  return local(x, kernel)


def _conv3x3(
  x: jax.Array, kernel: jax.Array, groups: int, stride: int
) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )
