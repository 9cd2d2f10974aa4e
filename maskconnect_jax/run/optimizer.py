"""Learning rates, and one optax transform for weights and real masks."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maskconnect_jax.method import connectivity
from maskconnect_jax.method.spec import NARROWING


def schedule(
  kind: str,
  base: float,
  total_steps: int,
  *,
  warmup_steps: int = 0,
  steps_at: Sequence[int] = (),
) -> optax.Schedule:
  """Returns the learning rate as a function of the step.

  Args:
    kind: 'constant'; 'cosine', from base to 0 at `total_steps`; or 'step',
      times 0.1 at each of `steps_at`.
    base: the rate after the warm-up.
    total_steps: length of the run, warm-up included.
    warmup_steps: w; step s = 0 ... w - 1 has the rate base * (s + 1) / w.
    steps_at: steps at which 'step' drops, counted from the start of the run.
  """
  if kind == 'cosine':
    after = optax.cosine_decay_schedule(
      base, max(1, total_steps - warmup_steps)
    )
  elif kind == 'step':
    drops = collections.Counter(max(0, at - warmup_steps) for at in steps_at)
    after = optax.piecewise_constant_schedule(
      base, {at: 0.1**times for at, times in drops.items()}
    )
  else:
    after = optax.constant_schedule(base)
  if not warmup_steps:
    return after

  def rising(step: Any) -> Any:
    return base * ((step + 1) / warmup_steps)

  return optax.join_schedules([rising, after], [warmup_steps])


def until(active: optax.Schedule, end: int) -> optax.Schedule:
  """Returns `active` before step `end`, and 0 from there on."""

  def rate(step: Any) -> Any:
    return jnp.where(step < end, active(step), 0.0)

  return rate


def weights_transform(
  rate: optax.Schedule,
  *,
  momentum: float,
  nesterov: bool,
  weight_decay: float,
  decay_all: bool,
  clip_norm: float = 0.0,
) -> optax.GradientTransformation:
  """SGD with momentum and weight decay on kernels.

  v <- momentum * v + g + weight_decay * w,   w <- w - rate * v
  (Nesterov: rate * (g + weight_decay * w + momentum * v)).

  Args:
    rate: learning rate by step.
    momentum: 0 keeps no velocity.
    nesterov: whether to use Nesterov's form of momentum.
    weight_decay: coefficient of w in the gradient.
    decay_all: whether all other weights decay too. These are vectors, and all
      weights named scale or bias; a scale or bias of several branches is a
      matrix.
    clip_norm: the largest norm of all gradients together, before weight decay;
      larger ones are scaled down to it. 0: any norm.
  """

  def decays(weights: Any) -> Any:
    def of(path: tuple[Any, ...], weight: jax.Array) -> bool:
      # A Flax variable adds a key that is no DictKey below its name.
      names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
      named = bool(names) and names[-1] in ('scale', 'bias')
      return decay_all or (weight.ndim > 1 and not named)

    return jax.tree.map_with_path(of, weights)

  decay = optax.add_decayed_weights(weight_decay, decays)
  if clip_norm:
    # One entry, so that checkpoints find the velocity at the same position.
    decay = optax.chain(optax.clip_by_global_norm(clip_norm), decay)
  return optax.chain(decay, optax.sgd(rate, momentum or None, nesterov))


def masks_transform(
  rate: optax.Schedule,
  valid: Any,
  *,
  learner: str = 'draws',
  name: str = 'sgd',
  momentum: float = 0.0,
) -> optax.GradientTransformation:
  """r <- project(r - rate * step, valid), without weight decay.

  Args:
    rate: learning rate by step.
    valid: bool, of the shape of the real mask r; other entries stay 0.
    learner: see `WiringSpec`. With 'as_published' the step starts from r /
      sum(r) of each row. A narrowing wiring is not changed by steps.
    name: 'sgd', whose step is dloss/dr, or 'adam'.
    momentum: of 'sgd'; 0 keeps no velocity.
  """
  if learner in NARROWING:
    return optax.set_to_zero()
  step = optax.sgd(rate, momentum or None)
  if name == 'adam':
    step = optax.adam(rate)
  return optax.chain(
    # Checkpoints name each state by its position in this chain. Without this
    # entry the positions would not be those of stored checkpoints.
    optax.identity(),
    step,
    projection(valid, normalized=learner == 'as_published'),
  )


def projection(
  valid: Any, *, normalized: bool = False
) -> optax.GradientTransformation:
  """Replaces an update u by project(r + u) - r, see `connectivity.project`.

  With `normalized` it is project(r / sum(r) + u) - r.

  The new update lies between -r and fl(1 - r), where fl rounds to float32. Its
  sum with r stays within [0, 1] despite rounding, since r + fl(1 - r) rounds
  to 1.

  Args:
    valid: bool, of the shape of the real mask r.
    normalized: whether the entries of a row are divided by their sum first.
  """

  def update(
    updates: Any, state: optax.EmptyState, params: Any = None
  ) -> tuple[Any, optax.EmptyState]:
    if params is None:
      raise ValueError('the projection needs the parameters')
    start = (
      jax.tree.map(lambda r: connectivity.normalized(r, valid), params)
      if normalized
      else params
    )
    return jax.tree.map(
      lambda r, s, u: connectivity.project(s + u, valid) - r,
      params,
      start,
      updates,
    ), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def partitioned(
  weights: optax.GradientTransformation, masks: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Joins two transforms into one of {'weights': ..., 'masks': ...}."""
  return optax.partition(
    {'weights': weights, 'masks': masks},
    {'weights': 'weights', 'masks': 'masks'},
  )
