"""Schedules, and weights and masks as two groups of one optax transform."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maskconnect_jax.method import connectivity


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
    steps_at: where 'step' drops, counted from the start of the run.
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


def between(active: optax.Schedule, start: int, end: int) -> optax.Schedule:
  """Returns `active` from step `start` to before `end`, and 0 elsewhere."""

  def rate(step: Any) -> Any:
    return jnp.where((start <= step) & (step < end), active(step), 0.0)

  return rate


def weights_transform(
  rate: optax.Schedule,
  *,
  momentum: float,
  nesterov: bool,
  weight_decay: float,
  decay_all: bool,
) -> optax.GradientTransformation:
  """SGD with momentum and weight decay on kernels.

  v <- momentum * v + g + weight_decay * w,   w <- w - rate * v
  (Nesterov: rate * (g + weight_decay * w + momentum * v)).

  Args:
    rate: learning rate by step.
    momentum: 0 keeps no velocity.
    nesterov: Nesterov's form of momentum.
    weight_decay: coefficient of w in the gradient.
    decay_all: whether vectors, and whatever is named scale or bias, decay too.
      Of several branches these are matrices.
  """

  def decays(weights: Any) -> Any:
    def of(path: tuple[Any, ...], weight: jax.Array) -> bool:
      # A Flax variable has a key of its own below its name.
      names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
      named = bool(names) and names[-1] in ('scale', 'bias')
      return decay_all or (weight.ndim > 1 and not named)

    return jax.tree.map_with_path(of, weights)

  return optax.chain(
    optax.add_decayed_weights(weight_decay, decays),
    optax.sgd(rate, momentum or None, nesterov),
  )


def masks_transform(
  rate: optax.Schedule,
  valid: Any,
  *,
  momentum: float = 0.0,
  relative: float = 0.0,
) -> optax.GradientTransformation:
  """r <- project(r - rate * dloss/dr, valid), without weight decay.

  Args:
    rate: learning rate by step.
    valid: bool, of the shape of r; other entries stay 0.
    momentum: 0 keeps no velocity.
    relative: the decay of `by_running_scale`; 0 leaves gradients as they are.
  """
  return optax.chain(
    by_running_scale(relative) if relative else optax.identity(),
    optax.sgd(rate, momentum or None),
    projection(valid),
  )


def by_running_scale(decay: float) -> optax.GradientTransformation:
  """Divides all entries alike by their running root mean square s.

  s_t^2 = d s_(t-1)^2 + (1 - d) |g|^2 / n, over 1 - d^t; n counts the entries
  that are not 0. One number for the whole mask: what entries have of another's
  gradient stays as it is.
  """

  def init(params: Any) -> Any:
    del params
    return jnp.zeros(()), jnp.zeros((), jnp.int32)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    square, count = state
    leaves = jax.tree.leaves(updates)
    used = sum(jnp.sum(g != 0) for g in leaves)
    mean = sum(jnp.sum(g**2) for g in leaves) / jnp.maximum(used, 1)
    square, count = decay * square + (1 - decay) * mean, count + 1
    scale = jnp.sqrt(square / (1 - decay**count))
    return jax.tree.map(
      lambda g: jnp.where(scale > 0, g / scale, g), updates
    ), (square, count)

  return optax.GradientTransformation(init, update)


def projection(valid: Any) -> optax.GradientTransformation:
  """Changes updates u so that r + u is `connectivity.project`ed.

  The update is project(r + u) - r. It is at least -r and at most fl(1 - r), so
  that adding it to r does not leave the box, rounding included: r + fl(1 - r)
  rounds to 1.

  Args:
    valid: bool, of the shape of r.
  """

  def update(
    updates: Any, state: optax.EmptyState, params: Any = None
  ) -> tuple[Any, optax.EmptyState]:
    if params is None:
      raise ValueError('the projection needs the parameters')
    return jax.tree.map(
      lambda r, u: connectivity.project(r + u, valid) - r, params, updates
    ), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def partitioned(
  weights: optax.GradientTransformation, masks: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Joins both for parameters {'weights': ..., 'masks': ...}."""
  return optax.partition(
    {'weights': weights, 'masks': masks},
    {'weights': 'weights', 'masks': 'masks'},
  )
