"""The method: gradients learn which sources feed each block.

Karim Ahmed, Lorenzo Torresani, "MaskConnect: Connectivity Learning by Gradient
Descent", ECCV 2018, arXiv 1807.11473.

A network of L blocks has the sources 0..L: source 0 is the stem's output,
source i the output y_i of block i. Row t of every array here belongs to block
j = t + 1, column i to source i. A block takes its input from earlier sources
only, so `valid[t, i]` is False wherever i > t.

The real mask begins as r = initial(key, valid, center, spread). One step of the
connectivity phase is, in the names used below:

  b   = draw(key, r, valid, K, T)               K sources a row, p ∝ r^(1/T)
  p   = proxy(r, b, valid, 'normalized')        r / sum(r)
  b   = straight_through(p, b)                  b; its gradient goes to p
  x_j = c * sum_i b[j, i] * A(y_i),   y_j = F_j(x_j)
  r   = project(r - rate * dloss/dr, valid)     into the box [0, 1]

`Wiring.draw` runs the first three lines, `MaskedStack` the fourth and the
optimizer the last. T falls from 1 during the phase. At its end the mask
`top_k(r, valid, K)` becomes a static `topology`, which is then fine-tuned.

The functions of masks accept leading axes. A branch-level r is [L-1, C, C]: one
matrix for each two consecutive blocks. All of its entries are valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# An entry below the floor is drawn as if it were the floor. So k_j distinct
# sources can be drawn from every row, even from a row of zeros.
PROBABILITY_FLOOR = 1e-6


def valid_sources(
  num_blocks: int,
  *,
  stem_source: bool = True,
  stages: Sequence[int] | None = None,
) -> tuple[tuple[bool, ...], ...]:
  """Returns which sources each block may take.

  Args:
    num_blocks: L.
    stem_source: whether blocks after the first may take the stem (source 0).
    stages: the shape class of each source 0..L-1. If given, block j may take
      only sources of the same class as source j-1, whose shape its input has.

  Returns:
    A table of bool, [L, L]: row j-1 belongs to block j, column i to source i.
  """

  def allowed(target: int, source: int) -> bool:
    if source == target:  # the block before is always valid: no row is empty
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
  """Returns which branches each branch may take: all of the block before.

  Args:
    num_blocks: L.
    branches: C.

  Returns:
    A table of bool, [L-1, C, C], all True.
  """
  return (((True,) * branches,) * branches,) * (num_blocks - 1)


def fan_in_of(valid: Any, fan_in: int) -> np.ndarray:
  """Returns k_j = min(K, number of valid sources of row j), int [..., rows].

  Args:
    valid: bool [..., rows, sources].
    fan_in: K.
  """
  return np.minimum(fan_in, np.sum(valid, -1, dtype=np.int64))


def initial(
  key: jax.Array, valid: Any, *, center: float, spread: float
) -> jax.Array:
  """Returns r before training: uniform in center ± spread, then projected.

  Args:
    key: a PRNG key.
    valid: bool [..., rows, sources].
    center: the mean of the entries.
    spread: half the width of the uniform noise.

  Returns:
    float32, of `valid`'s shape.
  """
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

  Gumbel noise is added to log(r) / T, and the k_j largest scores of each row
  are kept. This equals drawing one source after another, each from the sources
  that are left, with p ∝ r^(1/T) (Kool, van Hoof, Welling, "Stochastic Beams
  and Where to Find Them", 2019).

  Args:
    key: a PRNG key. One draw serves all images of a step.
    real_mask: r, float [..., rows, sources].
    valid: bool, of r's shape.
    fan_in: K.
    temperature: T > 0. T = 1 draws with p ∝ r; a smaller T sharpens the draw.

  Returns:
    b, of r's shape and dtype, with exactly k_j ones in row j.
  """
  noise = jax.random.gumbel(key, real_mask.shape, real_mask.dtype)
  scores = jnp.log(jnp.maximum(real_mask, PROBABILITY_FLOOR)) / temperature
  return top_k(scores + noise, valid, fan_in)


def top_k(scores: jax.Array | np.ndarray, valid: Any, fan_in: int) -> jax.Array:
  """Returns ones at the k_j largest valid scores of each row, else zeros.

  Of equal scores the latest source is kept. Ties are common in a real mask:
  clipping leaves many entries at 0 or 1.

  Args:
    scores: float [..., rows, sources], such as a real mask.
    valid: bool, of the same shape.
    fan_in: K.

  Returns:
    A mask of the scores' shape and dtype.
  """
  valid = jnp.asarray(valid)
  num_sources = scores.shape[-1]
  # Of equal scores lax.top_k keeps the lowest index. In a reversed row the
  # lowest index is the latest source.
  backwards = jnp.flip(jnp.where(valid, scores, -jnp.inf), -1)
  _, picked = jax.lax.top_k(backwards, min(fan_in, num_sources))
  ones = jax.nn.one_hot(
    num_sources - 1 - picked, num_sources, dtype=scores.dtype
  ).sum(-2)
  # A row with fewer than K valid sources has also picked invalid ones.
  return jnp.where(valid, ones, 0)


def gaps(real_mask: np.ndarray, valid: Any, fan_in: int) -> np.ndarray:
  """Returns how far the K-th largest entry of each row is above the next one.

  Args:
    real_mask: r, float [..., rows, sources].
    valid: bool, of r's shape.
    fan_in: K.

  Returns:
    Float [n], for the rows with more than K valid sources.
  """
  table = np.broadcast_to(np.asarray(valid), real_mask.shape)
  ordered = -np.sort(-np.where(table, real_mask, -np.inf), -1)
  choosing = table.sum(-1) > fan_in
  if not choosing.any():
    return np.zeros(0)
  found = ordered[choosing]
  return np.asarray(found[:, fan_in - 1] - found[:, fan_in])


def proxy(
  real_mask: jax.Array, mask: jax.Array, valid: Any, gradient: str
) -> jax.Array:
  """Returns the function of r to which `straight_through` gives the gradient.

  With g = dloss/db, the gradient of an entry of r is::

    'all':         g
    'drawn':       g where drawn, else 0
    'centered':    g minus its mean over the valid entries of the row
    'normalized':  (g - sum(p g)) / sum(r), through p = r / sum(r), so that the
                   row cannot drift as a whole

  Args:
    real_mask: r, float [..., rows, sources], 0 where not valid.
    mask: b, drawn, of r's shape.
    valid: bool, of r's shape.
    gradient: 'all', 'drawn', 'centered' or 'normalized'.

  Returns:
    float, of r's shape.
  """
  valid = jnp.asarray(valid)
  mean = jnp.mean(real_mask, -1, where=valid, keepdims=True)
  # Only the gradients are used: a compiled step computes none of these values.
  return {
    'all': real_mask,
    'drawn': real_mask * mask,
    'centered': jnp.where(valid, real_mask - mean, 0),
    'normalized': normalized(real_mask, valid),
  }[gradient]


def normalized(real_mask: jax.Array, valid: Any) -> jax.Array:
  """Returns r / sum(r): the entries of each row add up to 1.

  Args:
    real_mask: r, float [..., rows, sources].
    valid: bool, of r's shape.
  """
  total = jnp.sum(real_mask, -1, where=jnp.asarray(valid), keepdims=True)
  return real_mask / jnp.maximum(total, PROBABILITY_FLOOR)


@jax.custom_vjp
def straight_through(proxy: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns `mask`; backward, dloss/db goes to `proxy` unchanged.

  So the entry of an undrawn source gets a gradient, too. Bengio, Léonard,
  Courville, "Estimating or Propagating Gradients Through Stochastic Neurons",
  2013.

  Args:
    proxy: a function of r, of b's shape; see `proxy`.
    mask: b, drawn.
  """
  del proxy
  return mask


straight_through.defvjp(
  lambda proxy, mask: (mask, None), lambda _, gradient: (gradient, None)
)


def project(real_mask: jax.Array, valid: Any) -> jax.Array:
  """Returns r clipped to the box: [0, 1], and 0 where a source is not valid."""
  return jnp.where(jnp.asarray(valid), jnp.clip(real_mask, 0, 1), 0)


# The masks of the fixed rules, with which the learned wiring is compared.


def fixed_prev(valid: Any) -> jax.Array:
  """Returns the mask in which block j takes source j-1: the ordinary network.

  At the branch level, each branch takes the branch of the same number.
  """
  shape = np.shape(valid)
  return jnp.asarray(
    np.broadcast_to(np.eye(shape[-1], dtype=np.float32), shape)
  )


def fixed_near(valid: Any, fan_in: int) -> jax.Array:
  """Returns the mask in which block j takes the k_j latest of its sources.

  At the branch level, branch c takes c and the K - 1 branches before it; branch
  C - 1 comes before branch 0.
  """
  valid = jnp.asarray(valid)
  place = jnp.arange(valid.shape[-1])
  distance = jnp.mod(place[:, None] - place, valid.shape[-1])
  scores = jnp.broadcast_to(-distance.astype(jnp.float32), valid.shape)
  return top_k(scores, valid, fan_in)


def fixed_random(key: jax.Array, valid: Any, fan_in: int) -> jax.Array:
  """Returns a mask in which block j takes k_j uniformly drawn sources."""
  valid = jnp.asarray(valid)
  return draw(key, jnp.ones(valid.shape, jnp.float32), valid, fan_in)


def fixed_all(valid: Any) -> jax.Array:
  """Returns the mask in which each block takes every valid source."""
  return jnp.asarray(np.asarray(valid, np.float32))
