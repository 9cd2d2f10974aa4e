"""The masked sum that gives a block its input, and its custom VJP.

  x_j = sum_i w[i] * y_i                        forward
  dloss/dy_i = w[i] * g,   dloss/dw[i] = <g, y_i>     backward, g = dloss/dx_j

The mask's gradient is a sum over every number in a batch of activations. It is
accumulated in float32 also when the activations are bfloat16, whose 8 bits
would lose nearly all of it; that is why the backward pass is written here.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


@jax.custom_vjp
def masked_sum(weights: jax.Array, sources: tuple[jax.Array, ...]) -> jax.Array:
  """Returns the sum of the sources, each times its weight.

  Args:
    weights: float32 [n], a row of the mask times the scale of its terms.
    sources: n arrays of one shape and dtype, [batch, ...].

  Returns:
    An array of a source's shape and dtype, accumulated in float32 or better.
  """
  exact = jnp.promote_types(sources[0].dtype, jnp.float32)
  terms = [
    weight.astype(exact) * source.astype(exact)
    for weight, source in zip(weights, sources, strict=True)
  ]
  return sum(terms[1:], start=terms[0]).astype(sources[0].dtype)


def _forward(
  weights: jax.Array, sources: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, tuple[jax.Array, ...]]]:
  return masked_sum(weights, sources), (weights, sources)


def _backward(
  residuals: tuple[jax.Array, tuple[jax.Array, ...]], gradient: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  weights, sources = residuals
  exact = jnp.promote_types(gradient.dtype, jnp.float32)
  wide = gradient.astype(exact)
  for_weights = jnp.stack(
    [jnp.sum(wide * source.astype(exact)) for source in sources]
  ).astype(weights.dtype)
  for_sources = tuple(
    (weight.astype(exact) * wide).astype(source.dtype)
    for weight, source in zip(weights, sources, strict=True)
  )
  return for_weights, for_sources


masked_sum.defvjp(_forward, _backward)


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
  exact = jnp.promote_types(sources[0].dtype, jnp.float32)
  terms = [source.astype(exact) for source in sources]
  total = sum(terms[1:], start=terms[0])
  return (total * scale).astype(sources[0].dtype)
