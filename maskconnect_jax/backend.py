"""Computations in the form from which XLA compiles the fastest program.

The first line of a docstring names the result. The rest says why the code has
its form on a CPU, a GPU or a TPU. The figures stand in docs/notebook.md: a
CPU's under "On a CPU", a GPU's (H100) and a TPU's (v5e) under "Compiled for an
H100 and a TPU v5e, on neither". Mcycles are the million cycles that a TPU's
compiler predicts. Convolutions have a module of their own, `convolution`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# Whether `by_platform` chooses; see `without_platforms`. The value is a part of
# the key under which JAX keeps what it has traced.
_choosing = jax.make_user_context(default_value=True)

# Whether a CPU takes the code that `run.native` has compiled for it. It runs
# where it was compiled: a program for another machine takes XLA's forms.
native = jax.make_user_context(default_value=False)

TERMS_AT_ONCE = 9  # of a sum: see `in_parts`

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


def without_platforms() -> contextlib.AbstractContextManager[None]:
  """Returns a context in which programs have only what ONNX has, too.

  `by_platform` returns `default` alone: ONNX has no choice by platform.
  """
  return cast(contextlib.AbstractContextManager[None], _choosing(False))


def by_platform(
  cpu: Callable[..., jax.Array], default: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
  """Returns a function of arrays: `cpu` on a CPU, `default` elsewhere.

  Its gradients are chosen alike. Autodiff of `platform_dependent` would put a
  conditional into the program. XLA's CPU compiler changes layouts, combines the
  sums over devices and schedules only outside of conditionals. So the gradient
  of a convolution took 100 times as long, and over two devices it had a sum of
  its own in each layer.

  Args:
    cpu: linear in each of its arguments, so that gradients need these alone.
    default: equal to `cpu` up to rounding.
  """
  if not _choosing.value:
    return default
  settings: Any = jax.config
  # Gradients are traced later, where the precision may be another.
  precise = functools.partial(
    jax.default_matmul_precision, settings.jax_default_matmul_precision
  )

  @jax.custom_vjp
  def function(*arrays: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=default)

  def forward(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return function(*arrays), arrays

  def pull(own: Callable[..., jax.Array]) -> Callable[..., tuple[Any, ...]]:
    return lambda dy, *arrays: jax.vjp(own, *arrays)[1](dy)

  def backward(arrays: tuple[jax.Array, ...], dy: jax.Array) -> Any:
    with precise():
      return jax.lax.platform_dependent(
        dy, *arrays, cpu=pull(cpu), default=pull(default)
      )

  function.defvjp(forward, backward)
  return function


def natively(
  local: Callable[..., Any],
  plain: Callable[..., Any],
  inputs: Any,
  outputs: Any,
) -> Callable[..., Any]:
  """Returns a function: `local` on a CPU, `plain` elsewhere and in gradients.

  Args:
    local: calls compiled code, for one device's part of the batch.
    plain: equal to it up to rounding.
    inputs: see `on_each_device`.
    outputs: the same.
  """

  @jax.custom_vjp
  def function(*arrays: Any) -> Any:
    cpu = on_each_device(local, inputs, outputs)
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=plain)

  function.defvjp(
    lambda *arrays: (function(*arrays), arrays),
    lambda arrays, slopes: jax.vjp(plain, *arrays)[1](slopes),
  )
  return function


def native_call(name: str, results: Any) -> Any:
  """Returns a function of the compiled code; its results are shaped like these.

  Args:
    name: of its handler.
    results: float32 arrays, or their shapes and dtypes.
  """
  shapes = jax.tree.map(
    lambda like: jax.ShapeDtypeStruct(like.shape, jnp.float32), results
  )
  return jax.ffi.ffi_call(name, shapes, vmap_method='sequential')


def on_each_device(
  local: Callable[..., Any], inputs: Any, outputs: Any
) -> Callable[..., Any]:
  """Returns a function that each device computes for its part of the batch.

  Args:
    local: a function of arrays.
    inputs: where each argument has its batch: a spec of axis 'data'.
    outputs: the same of the results; those that have no batch are added.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes or mesh.size == 1:
    return local  # the batch is whole, or we are in the `shard_map` of a step

  def own(*arrays: Any) -> Any:
    return jax.tree.map(
      lambda spec, part: part if 'data' in spec else jax.lax.psum(part, 'data'),
      outputs,
      local(*arrays),
      is_leaf=lambda spec: isinstance(spec, PartitionSpec),
    )

  return jax.shard_map(own, in_specs=inputs, out_specs=outputs)


def in_parts(
  weights: jax.Array, terms: Arrays
) -> list[tuple[jax.Array, tuple[jax.Array, ...]]]:
  """Returns the terms in parts of at most nine, with their weights.

  No two sums of a network have as many terms. So no two whole sums are alike,
  but most parts are: half of the tracing is saved. With parts of six a GPU
  makes more passes over what the terms are multiplied with.

  Args:
    weights: [n, ...].
    terms: n arrays.
  """
  starts = range(0, len(terms), TERMS_AT_ONCE)
  parts = [tuple(terms[i : i + TERMS_AT_ONCE]) for i in starts]
  rows = jax.lax.split(weights, [len(part) for part in parts])
  return list(zip(rows, parts, strict=True))


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


def inner_products(y: jax.Array, gradients: Arrays) -> jax.Array:
  """Returns <g_j, y> of n gradients in each image, [n, batch], in y's dtype.

  Args:
    y: [batch, ...], float32 or better.
    gradients: the g_j, of y's shape, of its dtype or a narrower one.
  """
  return jax.lax.platform_dependent(
    y,
    tuple(gradients),
    cpu=products_one_by_one,
    tpu=products_one_by_one,
    default=products_at_once,
  )


def products_one_by_one(y: jax.Array, gradients: Arrays) -> jax.Array:
  """Computes `inner_products` as one dot product for each gradient.

  On a CPU a dot product is a call of a library. XLA stores g_j before the call
  instead of computing it again for every reader. The step takes 0.91 to
  0.97 of the time that it takes with `products_at_once`. A TPU takes 25.3
  Mcycles for resnet20. With one matrix product of all g and y it takes 32.5.
  """
  axes = tuple(range(1, y.ndim))
  of_images = [
    jax.lax.dot_general(
      y,
      gradient.astype(y.dtype),
      ((axes, axes), ((0,), (0,))),
      precision=jax.lax.Precision.HIGHEST,
    )
    for gradient in gradients
  ]
  return jnp.stack(of_images)


def products_at_once(y: jax.Array, gradients: Arrays) -> jax.Array:
  """Computes `inner_products` as one reduction with a result for each gradient.

  A GPU reads y once for all of them: resnet38's step accesses 18.1 GB. With one
  matrix product of all g and y it accesses 20.4 GB. XLA fuses the reduction
  into one kernel if it has at most 96 operands and results.
  """
  terms = [y * gradient.astype(y.dtype) for gradient in gradients]
  zeros = [jnp.zeros((), y.dtype)] * len(terms)
  axes = tuple(range(1, y.ndim))

  def add(these: Arrays, those: Arrays) -> list[jax.Array]:
    return list(map(jax.lax.add, these, those))

  return jnp.stack(jax.lax.reduce(terms, zeros, add, axes))


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


def with_channels(x: jax.Array, features: int) -> jax.Array:
  """Returns a finite x, [..., C], with as many channels: [..., features].

  Zero channels are appended, or the last channels are left out. A CPU
  multiplies x by the identity, which is a call of a library. A padding would be
  fused into the loops around it. These loops would ask for each element whether
  it lies inside x, and would use no vector instructions. With the product the
  learned step of resnet110 takes 0.91 of the time.
  """
  if x.shape[-1] == features:
    return x
  return _with_channels(x, features)


@traced_once(1)
def _with_channels(x: jax.Array, features: int) -> jax.Array:
  more = max(0, features - x.shape[-1])
  around = [(0, 0)] * (x.ndim - 1) + [(0, more)]

  def product(x: jax.Array) -> jax.Array:
    identity = jnp.eye(x.shape[-1], features, dtype=x.dtype)
    return jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST)

  def pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, around)[..., :features]

  return by_platform(cpu=product, default=pad)(x)


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


def max_of_windows(x: jax.Array) -> jax.Array:
  """Returns the maximum of 3x3 windows at stride 2, with a border of one pixel.

  Without platforms it is the maximum of the three rows of a window, then of the
  three columns. The converter to ONNX turns `reduce_window` of a batch into a
  pool over four axes, which onnxruntime does not have.

  Args:
    x: [N, H, W, C]. Pixels beyond the border are -inf.

  Returns:
    [N, ceil(H/2), ceil(W/2), C].
  """
  around = ((0, 0), (1, 1), (1, 1), (0, 0))
  if _choosing.value:
    return jax.lax.reduce_window(
      x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around
    )
  sides = x.shape[1:3]
  x = jnp.pad(x, around, constant_values=-jnp.inf)
  for axis, side in enumerate(sides, start=1):
    end = 2 * (-(-side // 2) - 1) + 1
    first, second, third = (
      jax.lax.slice_in_dim(x, start, start + end, 2, axis) for start in range(3)
    )
    x = jnp.maximum(jnp.maximum(first, second), third)
  return x
