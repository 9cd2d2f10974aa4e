"""The method: which earlier blocks feed each block, learned by gradient.

Karim Ahmed, Lorenzo Torresani, "MaskConnect: Connectivity Learning by Gradient
Descent", ECCV 2018, arXiv 1807.11473.

A network of L blocks has the sources 0..L: source 0 is the stem's output,
source i the output y_i of block i. Row t of every array here belongs to block
j = t + 1, column i to source i. A block takes its input from earlier sources
only, so `valid[t, i]` is False wherever i > t.

The real mask begins as r = initial(key, valid, center, spread). One step of the
connectivity phase is, in the names used below:

  b   = draw(key, r, valid, K, T)               K of p ∝ r^(1/T) for each row
  p   = proxy(r, b, valid, 'normalized')        r / sum(r)
  b   = straight_through(p, b)                  b; its gradient goes to p
  x_j = c * sum_i b[j, i] * A(y_i),   y_j = F_j(x_j)
  r   = project(r - rate * dloss/dr, valid)     into the box [0, 1]

`Wiring.draw` runs the first three lines, `MaskedStack` the fourth and the
optimizer the last. T falls from 1 during the phase. At its end
`top_k(r, valid, K)` is the mask that is fine-tuned, as a static `topology`.

All functions take leading axes: a branch-level r is [L-1, C, C], a matrix for
each two consecutive blocks, and all of its entries are valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Below it an entry draws as if it stood here, so that k_j distinct sources
# can be drawn from every row, also from one that is all zero.
PROBABILITY_FLOOR = 1e-6


def valid_sources(
  num_blocks: int,
  *,
  stem_source: bool = True,
  stages: Sequence[int] | None = None,
) -> tuple[tuple[bool, ...], ...]:
  """Returns which sources each block may take, as an [L, L] table.

  Args:
    num_blocks: L.
    stem_source: whether blocks after the first may take the stem (source 0).
    stages: the shape class of sources 0..L-1; if given, block j may only take
      sources that have the class of its input, which is that of source j-1.
  """

  def allowed(target: int, source: int) -> bool:
    if source == target:  # the block before: always there, so no row is empty
      return True
    return (
      source < target
      and (source > 0 or stem_source)
      and (stages is None or stages[source] == stages[target])
    )

  return tuple(
    tuple(allowed(target, source) for source in range(num_blocks))
    for target in range(num_blocks)
  )


def valid_branches(
  num_blocks: int, branches: int
) -> tuple[tuple[tuple[bool, ...], ...], ...]:
  """Returns the same for branches, [L-1, C, C]: any of the block before."""
  return (((True,) * branches,) * branches,) * (num_blocks - 1)


def fan_in_of(valid: Any, fan_in: int) -> np.ndarray:
  """Returns k_j = min(K, valid sources of block j), int [..., L]."""
  return np.minimum(fan_in, np.sum(valid, -1, dtype=np.int64))


def initial(
  key: jax.Array, valid: Any, *, center: float, spread: float
) -> jax.Array:
  """Returns r before training, float32: center +- spread, projected."""
  valid = jnp.asarray(valid)
  noise = jax.random.uniform(key, valid.shape, minval=-spread, maxval=spread)
  return project(center + noise, valid)


def draw(
  key: jax.Array,
  real_mask: jax.Array,
  valid: Any,
  fan_in: int,
  temperature: jax.Array | float = 1.0,
) -> jax.Array:
  """Draws k_j distinct sources per row, without replacement, p ∝ r^(1/T).

  Perturbing log r by Gumbel noise and keeping the k largest is the same as
  drawing one source after the other from r / sum(r) of those that are left
  (Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", 2019).

  Args:
    key: a PRNG key; one draw serves every example of a step.
    real_mask: r, float [..., rows, sources].
    valid: bool, of r's shape.
    fan_in: K.
    temperature: T; 1 draws by r itself, less sharpens the draw.

  Returns:
    b, of r's shape and dtype, with exactly k_j ones in row j.
  """
  noise = jax.random.gumbel(key, real_mask.shape, real_mask.dtype)
  scores = jnp.log(jnp.maximum(real_mask, PROBABILITY_FLOOR)) / temperature
  return top_k(scores + noise, valid, fan_in)


def top_k(scores: jax.Array, valid: Any, fan_in: int) -> jax.Array:
  """Returns ones at the k_j largest valid scores of each row, else zeros.

  Of equal scores the latest source is kept: clipping makes ties at 0 and 1 of
  a real mask common.

  Args:
    scores: float [..., rows, sources]; a real mask, say.
    valid: bool, of the same shape.
    fan_in: K.
  """
  valid = jnp.asarray(valid)
  num_sources = scores.shape[-1]
  # lax.top_k prefers the lower index among equals: turned round, the latest.
  backwards = jnp.flip(jnp.where(valid, scores, -jnp.inf), -1)
  _, picked = jax.lax.top_k(backwards, min(fan_in, num_sources))
  ones = jax.nn.one_hot(
    num_sources - 1 - picked, num_sources, dtype=scores.dtype
  ).sum(-2)
  # A row with fewer than K valid sources has also picked invalid ones.
  return jnp.where(valid, ones, 0)


def proxy(
  real_mask: jax.Array, mask: jax.Array, valid: Any, gradient: str
) -> jax.Array:
  """Returns the function of r that `straight_through` hands the gradient to.

  With g = dloss/db, an entry of r then gets

    'all':         g
    'drawn':       g where drawn, else 0
    'centered':    g minus its mean over the valid entries of the row
    'normalized':  (g - sum(p g)) / sum(r), through p = r / sum(r), so that the
                   row cannot drift as a whole

  Args:
    real_mask: r, float [..., rows, sources], 0 where not valid.
    mask: b, drawn, of r's shape.
    valid: bool, of r's shape.
    gradient: one of the above.
  """
  valid = jnp.asarray(valid)
  total = jnp.sum(real_mask, -1, where=valid, keepdims=True)
  # Only their gradients are used: a compiled step computes none of the values.
  return {
    'all': real_mask,
    'drawn': real_mask * mask,
    'centered': jnp.where(
      valid, real_mask - total / jnp.sum(valid, -1, keepdims=True), 0
    ),
    'normalized': real_mask / jnp.maximum(total, PROBABILITY_FLOOR),
  }[gradient]


@jax.custom_vjp
def straight_through(proxy: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns `mask`; backward, dloss/db goes to `proxy` unchanged.

  Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through
  Stochastic Neurons", 2013. An undrawn source can thus earn its way in.
  """
  del proxy
  return mask


straight_through.defvjp(
  lambda proxy, mask: (mask, None), lambda _, gradient: (gradient, None)
)


def project(real_mask: jax.Array, valid: Any) -> jax.Array:
  """Returns r clipped to the box: [0, 1], and 0 where a source is not valid."""
  return jnp.where(jnp.asarray(valid), jnp.clip(real_mask, 0, 1), 0)


# Rules to compare with, as masks of the same kind.


def fixed_prev(valid: Any) -> jax.Array:
  """Each block takes the one before: the ordinary network."""
  valid = jnp.asarray(valid)
  return jnp.broadcast_to(jnp.eye(valid.shape[-1]), valid.shape)


def fixed_random(key: jax.Array, valid: Any, fan_in: int) -> jax.Array:
  """Each block takes k_j sources drawn uniformly, once."""
  valid = jnp.asarray(valid)
  return draw(key, jnp.ones(valid.shape, jnp.float32), valid, fan_in)


def fixed_all(valid: Any) -> jax.Array:
  """Each block takes every valid source."""
  return jnp.asarray(valid, jnp.float32)
