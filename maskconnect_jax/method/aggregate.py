"""The masked sum that gives a block its input, and its gradients.

  x_j = sum_i w[j, i] * y_i                                        forward
  dloss/dy_i = sum_j w[j, i] * g_j,   g_j = dloss/dx_j             backward
  dloss/dw[j, i] = <g_j, y_i>, for drawn and undrawn i alike

Autodiff would compute the last entry by entry, each reading a g and a y. Here
all of a block are made when the backward pass comes to it, on a GPU in a pass
over its g for every few y_i. They are accumulated in float32 also when the
activations are bfloat16, whose 8 bits would lose nearly all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maskconnect_jax.errors import InputError

# So many sources go into a call of a function that is traced and lowered once
# for calls that are alike; whole sums are not, as each has one source more.
SOURCES_AT_ONCE = 9


def masked_sum(
  weights: jax.Array,
  sources: Sequence[jax.Array],
  every: int = 1,
) -> jax.Array:
  """Returns the sum of the sources, each times its weight.

  Args:
    weights: float32 [n, batch], those of each image. The mask's are the same in
      all images of a step: the caller broadcasts them, and autodiff then sums
      their gradients over the images, for all blocks at once.
    sources: n arrays of one shape and dtype, [batch, ...].
    every: the gradient of the weights is taken over every so many images, and
      stands for the others between: unbiased over batches in random order, and
      that much cheaper.

  Returns:
    An array of a source's shape, in float32 or better, for other sums to be
    added to before it is rounded to the sources' dtype.

  Raises:
    InputError: where a gradient is taken, of a batch that is not a multiple
      of `every`.
  """
  parts = [
    tuple(sources[i : i + SOURCES_AT_ONCE])
    for i in range(0, len(sources), SOURCES_AT_ONCE)
  ]
  rows = jax.lax.split(weights, [len(part) for part in parts])
  sums = [
    _traced_once(row, part, every)
    for row, part in zip(rows, parts, strict=True)
  ]
  return sum(sums[1:], start=sums[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum(
  weights: jax.Array, sources: tuple[jax.Array, ...], every: int
) -> jax.Array:
  del every
  exact = _exact(sources[0].dtype)
  terms = [
    weight * source.astype(exact)
    for weight, source in zip(
      _beside(weights.astype(exact), sources[0]), sources, strict=True
    )
  ]
  return sum(terms[1:], start=terms[0])


def _sum_forward(
  weights: jax.Array, sources: tuple[jax.Array, ...], every: int
) -> tuple[jax.Array, tuple[jax.Array, tuple[jax.Array, ...]]]:
  if sources[0].shape[0] % every:
    raise InputError(
      f'gradient_every={every} must divide the batch of {sources[0].shape[0]}'
    )
  return _sum(weights, sources, every), (weights, sources)


def _sum_backward(
  every: int,
  residuals: tuple[jax.Array, tuple[jax.Array, ...]],
  gradient: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  weights, sources = residuals
  # It is rounded already, as the sum was; but a TPU's compiler, which may keep
  # more precision than asked for, would write down what it was before, float32.
  gradient = gradient.astype(sources[0].dtype).astype(gradient.dtype)
  for_sources = tuple(
    (weight * gradient).astype(source.dtype)
    for weight, source in zip(_beside(weights, gradient), sources, strict=True)
  )
  products = jax.lax.platform_dependent(
    _every(gradient, every),
    tuple(_every(source, every) for source in sources),
    cpu=products_one_by_one,
    tpu=products_one_by_one,
    default=products_at_once,
  )
  products = jnp.repeat(products, every, axis=1)
  return products.astype(weights.dtype), for_sources


_sum.defvjp(_sum_forward, _sum_backward)
_traced_once = jax.jit(_sum, static_argnums=2)


def _beside(weights: jax.Array, x: jax.Array) -> jax.Array:
  """Returns weights [n, batch] such that each multiplies x, [batch, ...]."""
  return weights.reshape(*weights.shape, *[1] * (x.ndim - 1))


def _every(x: jax.Array, every: int) -> jax.Array:
  """Returns every so many images of x.

  By reshape: of a sharded batch each device keeps its own.
  """
  if every == 1:
    return x
  return x.reshape(-1, every, *x.shape[1:])[:, 0]


def products_one_by_one(
  gradient: jax.Array, sources: Sequence[jax.Array]
) -> jax.Array:
  """Returns <g, y_i> of n sources in each image, [n, batch], as g's dtype.

  On a CPU each is a call of a library, before which XLA must write down g once
  instead of computing it again for every reader; a TPU's compiler expects this
  to take less than all at once. docs/performance.md has the figures.

  Args:
    gradient: g, [batch, ...], float32 or better.
    sources: the y_i, of the same shape, perhaps of a narrower dtype.
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


def products_at_once(
  gradient: jax.Array, sources: Sequence[jax.Array]
) -> jax.Array:
  """Returns the same, but reads g once for all sources, for GPUs.

  Args:
    gradient: see `products_one_by_one`.
    sources: see there.
  """
  terms = [gradient * source.astype(gradient.dtype) for source in sources]
  zeros = [jnp.zeros((), gradient.dtype)] * len(terms)
  axes = tuple(range(1, gradient.ndim))
  return jnp.stack(jax.lax.reduce(terms, zeros, _add_each, axes))


def _add_each(
  these: Sequence[jax.Array], those: Sequence[jax.Array]
) -> list[jax.Array]:
  return [a + b for a, b in zip(these, those, strict=True)]


def _exact(dtype: DTypeLike) -> jnp.dtype:
  """Returns float32, or float64 for float64: what sums are accumulated in."""
  return jnp.promote_types(dtype, jnp.float32)


def static_sum(sources: Sequence[jax.Array], scale: float) -> jax.Array:
  """Returns the scaled sum of the sources of a frozen block.

  One source with scale 1 is returned as it is, so that Fixed-Prev is the
  ordinary network bit for bit.

  Args:
    sources: at least one array, all of one shape and dtype.
    scale: c, 1 or 1/k.
  """
  if len(sources) == 1:
    return sources[0] if scale == 1 else sources[0] * scale
  exact = _exact(sources[0].dtype)
  *others, last = [source.astype(exact) for source in sources]
  # Not the whole sum is scaled: XLA's CPU compiler would compute a sum that
  # feeds nothing but a scaling again and again (docs/performance.md). Nor is
  # each term: under Fixed-All a sum is the one before and one more.
  total = sum(others[1:], start=others[0]) * scale + last * scale
  return total.astype(sources[0].dtype)
