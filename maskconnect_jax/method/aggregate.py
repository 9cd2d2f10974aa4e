"""The masked sum that gives a block its input, and its gradients.

  x_j = sum_i w[j, i] * y_i                                        forward
  dloss/dy_i = sum_j w[j, i] * g_j,   g_j = dloss/dx_j             backward
  dloss/dw[j, i] = <g_j, y_i>, for drawn and undrawn i alike

Autodiff would compute the last line entry by entry, and would read one g and
one y for each entry. Here all entries of a block are computed when the backward
pass reaches the block. They are accumulated in float32 even if the activations
are bfloat16: its 8 bits of precision would lose nearly all of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maskconnect_jax import backend
from maskconnect_jax.method import adapters


def masked_sum(
  weights: jax.Array,
  sources: Sequence[jax.Array],
) -> jax.Array:
  """Returns the sum of the sources, each times its weight.

  Args:
    weights: float32 [n, batch], the weight of each source in each image; see
      `backend.rows_for_images`.
    sources: n arrays of one shape and dtype, [batch, ...].

  Returns:
    An array of a source's shape, in float32, or in float64 for float64. The
    caller adds other sums to it before rounding to the sources' dtype.
  """
  return backend.sum_in_parts(_traced_once, weights, sources)


def sum_of_widths(
  rows: Sequence[jax.Array],
  groups: Sequence[Sequence[jax.Array]],
  features: int,
) -> jax.Array:
  """Returns the sum of sources of several widths, each times its weight.

  Zero channels are appended to the sum of each width.

  Args:
    rows: the weights of each group, see `masked_sum`.
    groups: the sources of one width each, [batch, ..., C] with C at most
      `features`.
    features: channels of the sum.

  Returns:
    [batch, ..., features], in the dtype of `masked_sum`.
  """
  sums = [
    backend.append_zero_channels(masked_sum(row, group), features)
    for row, group in zip(rows, groups, strict=True)
  ]
  return sum(sums[1:], start=sums[0])


@jax.custom_vjp
def _sum(weights: jax.Array, sources: tuple[jax.Array, ...]) -> jax.Array:
  exact = _exact(sources[0].dtype)
  terms = [
    weight * source.astype(exact)
    for weight, source in zip(
      _beside(weights.astype(exact), sources[0]), sources, strict=True
    )
  ]
  return sum(terms[1:], start=terms[0])


def _sum_forward(
  weights: jax.Array, sources: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, tuple[jax.Array, ...]]]:
  return _sum(weights, sources), (weights, sources)


def _sum_backward(
  residuals: tuple[jax.Array, tuple[jax.Array, ...]],
  gradient: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  weights, sources = residuals
  gradient = backend.rounded_again(gradient, sources[0].dtype)
  for_sources = tuple(
    (weight * gradient).astype(source.dtype)
    for weight, source in zip(_beside(weights, gradient), sources, strict=True)
  )
  products = backend.inner_products(gradient, sources)
  return products.astype(weights.dtype), for_sources


_sum.defvjp(_sum_forward, _sum_backward)
_traced_once = backend.traced_once()(_sum)


def _beside(weights: jax.Array, x: jax.Array) -> jax.Array:
  """Returns weights, [n, batch], with axes of length 1 appended.

  Each row then multiplies x, [batch, ...].
  """
  return weights.reshape(*weights.shape, *[1] * (x.ndim - 1))


def _exact(dtype: DTypeLike) -> jnp.dtype:
  """Returns the dtype that sums are accumulated in: float32 or float64."""
  return jnp.promote_types(dtype, jnp.float32)


def static_sum(
  sources: Sequence[jax.Array], scale: float, features: int
) -> jax.Array:
  """Returns c * sum_i y_i, the scaled sum of the sources of a frozen block.

  One source with scale 1 is returned unchanged. So Fixed-Prev equals the
  ordinary network to the bit. A CPU takes the sums of `masked_sum`, with which
  Fixed-Random's step of resnet38 takes 0.84 to 0.87 of the time.

  Args:
    sources: the y_i, at least one array, [batch, ..., C_i] with C_i at most
      `features`, of one dtype and alike but for C_i.
    scale: c, 1 or 1/k.
    features: channels of the sum; zero channels are appended to the others.

  Returns:
    [batch, ..., features], of the sources' dtype.
  """
  dtype = sources[0].dtype
  if len(sources) == 1:
    total = adapters.zero_pad_channels(sources[0], features)
    return total if scale == 1 else total * scale

  def default(*sources: jax.Array) -> jax.Array:
    padded = [adapters.zero_pad_channels(y, features) for y in sources]
    exact = [y.astype(_exact(dtype)) for y in padded]
    return backend.scaled_sum(exact, scale).astype(dtype)

  def cpu(*sources: jax.Array) -> jax.Array:
    widths = sorted({y.shape[-1] for y in sources})
    groups = [[y for y in sources if y.shape[-1] == w] for w in widths]
    rows = [
      jnp.full((len(own), own[0].shape[0]), scale, _exact(dtype))
      for own in groups
    ]
    return sum_of_widths(rows, groups, features).astype(dtype)

  return backend.by_platform(cpu=cpu, default=default)(*sources)
