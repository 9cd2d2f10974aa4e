"""Narrowing: blocks begin with all sources and lose the least useful ones.

Under drawn masks the weights are trained for wirings that are thrown away. Here
no mask is drawn. A block begins as in Fixed-All, with the mean of all its
sources. At N moments of the connectivity phase it loses some, until K are left:

  k_j(n) = K (n_j / K)^(1 - n/N),   n = 1 .. N

n_j is the number of sources that row j may take. The weights follow: between
two moments they are trained under the wiring that is left.

A trained network, such as a published one, knows the mean of all sources as
little as any other. With start='previous' a block therefore begins with the one
before, as in the ordinary network, and until the first moment the other sources
fade in.

Which source goes? Let b be the mask of the moment and b - e the mask without
the edge e. The learner 'measured' keeps the sources with the largest

  d(e) = mean over images of loss(b - e) - loss(b),

measured on training images that both losses share. Leave-one-out losses choose
better than coefficients do in relaxed architecture search (Wang et al.,
"Rethinking Architecture Selection in Differentiable NAS", ICLR 2021, arXiv
2108.04392).

Many d are equal up to noise. `race` spends the images where they decide: each
round measures only the half of the edges that are the nearest to their row's
cut, the middle between the last d that stays and the first that goes, counted
in standard errors. It measures them on twice as many images, so that all rounds
cost the same. Of equal d the latest source stays. A block that no path connects
with the output has d = 0 for all its sources, and keeps the latest ones.

Losses see a block without a reader only by chance: it costs nothing to leave
out what nobody reads. So, unless `keep_readers` is False, the rows first give
as many blocks as possible a reader, and fill the rest of their places by d.
Without it a K of 2 left 7 to 9 of 12 blocks, and cost a point
(docs/results.md).

The real mask r records it: an entry is 1 while the source is kept, and n/(N+1)
if it was lost at moment n. So the largest entries of a row are those that it
kept the longest, and `connectivity.top_k(r)` is the mask at the end.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy

ROUNDS = 3  # of `race`


def kept(real_mask: Any, valid: Any) -> Any:
  """Returns the mask b of a step: ones where a source is still kept.

  Args:
    real_mask: r, float [..., rows, sources], of JAX or of NumPy.
    valid: bool, of r's shape.

  Returns:
    b, of r's shape, dtype and library. Its gradient with respect to r is 0.
  """
  still = np.asarray(valid) & (real_mask >= 1)
  return still.astype(real_mask.dtype)


def fading_in(mask: jax.Array, chain: Any, weight: Any) -> jax.Array:
  """Returns b while the sources besides the previous one fade in.

  With weight w, a row of k sources reads (y_prev + w Σ y_i) / (1 + w (k - 1)):
  the ordinary network for w = 0, and the mean of all for w = 1.

  Args:
    mask: b, [rows, sources], with the chain's ones.
    chain: the previous source of each row, of b's shape.
    weight: w, float32 [], in [0, 1].
  """
  return jnp.where(jnp.asarray(chain) > 0, mask, weight * mask)


def left_after(valid: Any, fan_in: int, share: float) -> np.ndarray:
  """Returns k_j(n), how many sources each row has after a moment.

  Args:
    valid: bool [..., rows, sources].
    fan_in: K.
    share: n/N, in [0, 1].

  Returns:
    int [..., rows]; all n_j for a share of 0, and min(K, n_j) for 1.
  """
  all_of_row = np.sum(valid, -1, dtype=np.int64)
  ratio = np.maximum(all_of_row / fan_in, 1.0)
  left = np.rint(fan_in * ratio ** (1 - share)).astype(np.int64)
  return np.minimum(left, all_of_row)


def losing(mask: np.ndarray, left: np.ndarray) -> np.ndarray:
  """Returns the edges of all rows that must lose some.

  Args:
    mask: b, [..., rows, sources].
    left: int [..., rows], how many sources each row keeps.

  Returns:
    int [E, mask.ndim], the position of each edge, in rising order.
  """
  too_many = mask.sum(-1) > left
  return np.argwhere((mask > 0) & too_many[..., None])


def edges_measured(valid: Any, fan_in: int, moments: int) -> int:
  """Returns how many edges are measured at all moments together.

  Args:
    valid: bool [..., rows, sources].
    fan_in: K.
    moments: N.
  """
  left = [left_after(valid, fan_in, n / moments) for n in range(moments + 1)]
  return sum(
    int(before[before > after].sum())
    for before, after in itertools.pairwise(left)
  )


def without(mask: np.ndarray, edges: np.ndarray) -> np.ndarray:
  """Returns b - e for each edge e, [E, ...], as the mask.

  Args:
    mask: b.
    edges: int [E, mask.ndim].
  """
  masks = np.repeat(mask[None], len(edges), 0)
  masks[(np.arange(len(edges)), *edges.T)] = 0
  return masks


@dataclasses.dataclass
class Differences:
  """What leaving out each edge costs: sums over images, so that they add up.

  Attributes:
    edges: int [E, ndim], the positions of the edges in the mask.
    total: float64 [E], sum of loss(b - e) - loss(b).
    squares: float64 [E], sum of the squares.
    count: int64 [E], images.
  """

  edges: np.ndarray
  total: np.ndarray
  squares: np.ndarray
  count: np.ndarray

  @classmethod
  def none(cls, edges: np.ndarray) -> Differences:
    """Returns the differences of edges that are not measured yet."""
    zeros = np.zeros(len(edges))
    return cls(edges, zeros, zeros.copy(), np.zeros(len(edges), np.int64))

  def add(self, which: np.ndarray, sums: np.ndarray, count: int) -> None:
    """Adds one measurement.

    Args:
      which: int [n], the edges that were measured.
      sums: [n, 2], the sum of the differences and that of their squares.
      count: images.
    """
    self.total[which] += sums[:, 0]
    self.squares[which] += sums[:, 1]
    self.count[which] += count

  @property
  def mean(self) -> np.ndarray:
    """d(e), float64 [E]."""
    return self.total / np.maximum(self.count, 1)

  @property
  def standard_error(self) -> np.ndarray:
    """The standard error of d(e) over the images, float64 [E]."""
    count = np.maximum(self.count, 2)
    variance = (self.squares - self.total**2 / count) / (count - 1)
    return np.sqrt(np.maximum(variance, 0) / count)

  def on(self, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the values at the places of the edges; elsewhere infinity."""
    table = np.full(mask.shape, np.inf)
    table[tuple(self.edges.T)] = values
    return table


def race(
  measure: Callable[[np.ndarray, int], tuple[np.ndarray, int]],
  mask: np.ndarray,
  left: np.ndarray,
) -> Differences:
  """Measures the edges that some rows must lose, the undecided ones longer.

  Args:
    measure: called with masks [n, ...] that lack an edge each, and with
      the number of a set of images, 0, 1, ...; returns the sums of
      `Differences.add`, [n, 2], and the number of images.
    mask: b, [..., rows, sources].
    left: int [..., rows], how many sources each row keeps.

  Returns:
    The differences of all edges of the rows that must lose some.
  """
  found = Differences.none(losing(mask, left))
  which, images = np.arange(len(found.edges)), 0
  for number in range(ROUNDS):
    if not len(which):
      break
    for _ in range(2**number):
      sums, count = measure(without(mask, found.edges[which]), images)
      found.add(which, sums, count)
      images += 1
    cut = cuts(found, mask, left)
    near = np.abs(found.mean - cut) / np.maximum(found.standard_error, 1e-12)
    nearest = np.argsort(near[which], kind='stable')
    which = np.sort(which[nearest[: len(which) // 2]])
  return found


def cuts(found: Differences, mask: np.ndarray, left: np.ndarray) -> np.ndarray:
  """Returns the cut of each edge's row, float64 [E].

  It is the middle between the d of the last source that stays and of the first
  that goes.
  """
  scores = found.on(mask, found.mean)
  ordered = -np.sort(-np.where(mask > 0, scores, -np.inf), -1)
  index = np.minimum(left, mask.shape[-1] - 1)[..., None]
  stays = np.take_along_axis(ordered, index - 1, -1)
  goes = np.take_along_axis(ordered, index, -1)
  with np.errstate(invalid='ignore'):  # rows that lose none are infinite
    middle = (stays + goes) / 2
  return np.broadcast_to(middle, mask.shape)[tuple(found.edges.T)]


def narrowed(
  real_mask: np.ndarray,
  valid: Any,
  scores: np.ndarray,
  left: np.ndarray,
  record: float,
  *,
  keep_readers: bool,
) -> np.ndarray:
  """Returns r after a moment: each row keeps its sources of largest score.

  Args:
    real_mask: r, float32 [..., rows, sources].
    valid: bool, of r's shape.
    scores: float64, of r's shape; of equal scores the latest source stays.
    left: int [..., rows], how many sources each row keeps.
    record: n/(N+1), the new value of the entries that go.
    keep_readers: whether as many blocks or branches as possible keep a reader;
      see `_readers`.
  """
  mask = np.asarray(kept(real_mask, valid)) > 0
  order = np.where(mask, scores, -np.inf)
  if keep_readers:
    order = np.where(_readers(mask, scores, left), np.inf, order)
  # Ranks from the best; the last of equals comes first.
  backwards = np.flip(order, -1)
  rank = np.argsort(np.argsort(-backwards, -1, kind='stable'), -1)
  stays = mask & (np.flip(rank, -1) < left[..., None])
  return np.where(mask & ~stays, np.float32(record), real_mask)


def _readers(
  mask: np.ndarray, scores: np.ndarray, left: np.ndarray
) -> np.ndarray:
  """Returns an edge to each block or branch, such that rows have room for all.

  Of all ways to give as many sources as possible a reader, this is the one with
  the largest sum of scores. It is an assignment of sources to places in rows.
  The stem needs no reader. With K = 1 at level 'block' only the chain gives
  every block a reader.

  Args:
    mask: bool [..., rows, sources].
    scores: of the same shape.
    left: int [..., rows], the places of each row.

  Returns:
    bool, of the same shape.
  """
  # Edges of rows that lose none are not measured: they count as the best.
  finite = scores[np.isfinite(scores)]
  best = finite.max() if len(finite) else 0.0
  values = np.where(mask, np.where(np.isfinite(scores), scores, best), 0)
  # One edge more counts more than all scores: most sources get a reader.
  values = values / max(np.abs(values).max(), 1e-30) / mask.size
  values = np.where(mask, 1 + values, 0)
  if mask.ndim == 2:
    values[:, 0] = 0  # the stem
  found = np.zeros(mask.shape, bool)
  for matrix in np.ndindex(mask.shape[:-2]):
    rows = np.repeat(np.arange(mask.shape[-2]), left[matrix])
    places, sources = scipy.optimize.linear_sum_assignment(
      values[matrix][rows], maximize=True
    )
    found[matrix][rows[places], sources] = (
      values[matrix][rows[places], sources] > 0
    )
  return found


def estimate(
  gradients: np.ndarray, mask: np.ndarray, images: int
) -> np.ndarray:
  """Returns d(e) to second order, from gradients of the mask alone.

  Let G be the gradient of a batch's mean loss with respect to b. Without source
  i of k the mean of the others feeds the block. To first order the loss changes
  by k (mean(G) - G_i) / (k - 1). The second order takes the Fisher information
  for the curvature: half the mean over images of the squares of that change
  (Theis et al., "Faster Gaze Prediction with Dense Networks and Fisher
  Pruning", 2018, arXiv 1801.05787). The variance between batches of m images,
  times m, stands for it.

  Args:
    gradients: G of each batch, [batches, ...], of b's shape each.
    mask: b, [..., rows, sources].
    images: m.

  Returns:
    float64, of b's shape; infinite where b is 0.
  """
  gradients = np.asarray(gradients, np.float64)
  count = mask.sum(-1, keepdims=True)
  mean = (gradients * mask).sum(-1, keepdims=True) / np.maximum(count, 1)
  change = (mean - gradients) * count / np.maximum(count - 1, 1)
  second = 0.5 * images * change.var(0)
  return np.where(mask > 0, change.mean(0) + second, np.inf)


@dataclasses.dataclass(frozen=True)
class Margins:
  """How clear the choices of a moment were.

  Attributes:
    choices: rows that lost sources.
    choices_clear: rows in which the worst d that stays exceeds the best d that
      goes by more than two standard errors of the difference.
    margin: mean of that difference over the rows, in nats. It is negative where
      a source stays because its block needs a reader.
    margin_standard_error: mean of its standard errors, in nats.
  """

  choices: int
  choices_clear: int
  margin: float
  margin_standard_error: float


def margins(
  found: Differences, before: np.ndarray, after: np.ndarray
) -> Margins:
  """Returns how clear the choices between two masks were.

  Args:
    found: the differences of the moment.
    before: b before it, [..., rows, sources].
    after: b after it.
  """
  scores = found.on(before, found.mean)
  error = found.on(before, found.standard_error)
  lost = (before > 0) & (after == 0)
  rows = lost.any(-1)
  stays = np.where(after > 0, scores, np.inf)[rows]
  goes = np.where(lost, scores, -np.inf)[rows]
  worst, best = stays.argmin(-1)[:, None], goes.argmax(-1)[:, None]
  gap = np.take_along_axis(stays, worst, -1) - np.take_along_axis(
    goes, best, -1
  )
  errors = np.hypot(
    np.take_along_axis(error[rows], worst, -1),
    np.take_along_axis(error[rows], best, -1),
  )
  return Margins(
    choices=int(rows.sum()),
    choices_clear=int((gap > 2 * errors).sum()),
    margin=float(gap.mean()) if len(gap) else 0.0,
    margin_standard_error=float(errors.mean()) if len(gap) else 0.0,
  )


def narrow(
  stack: Any,
  losses: Callable[[np.ndarray, int], Any],
  *,
  moment: int,
  moments: int,
  keep_readers: bool = True,
) -> Margins:
  """Narrows a stack whose spec has learner='measured', in a loop of one's own.

  Args:
    stack: a `MaskedStack`; its real mask changes.
    losses: called with a mask b and the number of a batch, 0, 1, ... up to six;
      returns the loss of each training image of that batch, [batch]. Call it
      compiled: it is called for every edge.
    moment: n, from 1 to `moments`.
    moments: N. After the last moment each block has K sources.
    keep_readers: see `narrowed`.

  Returns:
    How clear the choices were.
  """
  real_mask = np.asarray(stack.real_mask[...])
  mask = np.asarray(stack.mask())
  left = left_after(stack.valid, stack.fan_in, moment / moments)

  def measure(masks: np.ndarray, batch: int) -> tuple[np.ndarray, int]:
    base = np.asarray(losses(mask, batch), np.float64)
    found = [np.asarray(losses(one, batch), np.float64) - base for one in masks]
    return np.array([[d.sum(), (d**2).sum()] for d in found]), len(base)

  found = race(measure, mask, left)
  after = narrowed(
    real_mask,
    stack.valid,
    found.on(mask, found.mean),
    left,
    moment / (moments + 1),
    keep_readers=keep_readers,
  )
  stack.real_mask.set_value(jnp.asarray(after))
  return margins(found, mask, np.asarray(stack.mask()))
