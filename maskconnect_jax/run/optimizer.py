"""Learning rates, and one optax transform for weights and real masks."""

from __future__ import annotations

import collections
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maskconnect_jax.errors import InputError
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
  name: str = 'sgd',
) -> optax.GradientTransformation:
  """An optimizer of optax, with weight decay on kernels.

  'sgd' adds the decay to the gradient:

    v <- momentum * v + g + weight_decay * w,   w <- w - rate * v
    (Nesterov: rate * (g + weight_decay * w + momentum * v)).

  'adamw', 'lamb' and 'lion' decouple it, w <- w - rate * (u + weight_decay *
  w), where u is the direction of Adam or Lion; LAMB scales the sum by |w| / |u
  + weight_decay * w| of each array.

  Args:
    rate: learning rate by step.
    momentum: of 'sgd', where 0 keeps no velocity; b1 of the others.
    nesterov: whether 'sgd' uses Nesterov's form of momentum.
    weight_decay: coefficient of w.
    decay_all: whether all other weights decay too. These are vectors, and all
      weights named scale or bias; a scale or bias of several branches is a
      matrix.
    clip_norm: the largest norm of all gradients together, before weight decay;
      larger ones are scaled down to it. 0: any norm.
    name: 'sgd', 'adamw', 'lamb' or 'lion'.
  """

  def decays(weights: Any) -> Any:
    def of(path: tuple[Any, ...], weight: jax.Array) -> bool:
      # A Flax variable adds a key that is no DictKey below its name.
      names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
      named = bool(names) and names[-1] in ('scale', 'bias')
      return decay_all or (weight.ndim > 1 and not named)

    return jax.tree.map_with_path(of, weights)

  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else None
  if name != 'sgd':
    own = {'adamw': optax.adamw, 'lamb': optax.lamb, 'lion': optax.lion}[name](
      rate, b1=momentum, weight_decay=weight_decay, mask=decays
    )
    return optax.chain(clip or optax.identity(), own)
  decay = optax.add_decayed_weights(weight_decay, decays)
  if clip:
    # One entry, so that checkpoints find the velocity at the same position.
    decay = optax.chain(clip, decay)
  return optax.chain(decay, optax.sgd(rate, momentum or None, nesterov))


def for_parts(
  transform: optax.GradientTransformation,
  *,
  frozen: str = '',
  body_rate: float = 1.0,
) -> optax.GradientTransformation:
  """Returns a transform that leaves some weights, and slows the body's.

  Frozen weights have no state of the optimizer, and do not count in the norm of
  the gradients. BatchNorm's statistics are no weights: they go on.

  Args:
    transform: updates all weights alike.
    frozen: see `parts_of`.
    body_rate: times the rate of every weight except the head's.
  """
  if body_rate != 1:
    transform = optax.chain(
      transform, optax.masked(optax.scale(body_rate), _body)
    )
  prefixes = parts_of(frozen)
  if not prefixes:
    return transform

  def labels(weights: Any) -> Any:
    return jax.tree.map_with_path(
      lambda path, _: 'frozen' if _within(path, prefixes) else 'trained',
      weights,
    )

  return optax.partition(
    {'trained': transform, 'frozen': optax.set_to_zero()}, labels
  )


def parts_of(frozen: str) -> list[str]:
  """Returns the prefixes of names in `config.optimizer.frozen`.

  Args:
    frozen: such as 'stem,stack.blocks.0'; a slash is as good as a dot.
  """
  names = (name.strip().replace('/', '.') for name in frozen.split(','))
  return [name.strip('.') for name in names if name]


def check_parts(frozen: str, weights: Any) -> None:
  """Raises InputError for a part that no weight has, or if none is left.

  Args:
    frozen: see `parts_of`.
    weights: the weights of the network.
  """
  paths = [path for path, _ in jax.tree.leaves_with_path(weights)]
  prefixes = parts_of(frozen)
  for prefix in prefixes:
    if not any(_within(path, [prefix]) for path in paths):
      names = list(dict.fromkeys(_parts(paths)))
      near = difflib.get_close_matches(prefix, names, n=1, cutoff=0)
      raise InputError(
        f'config.optimizer.frozen={frozen!r}: no parameter is named {prefix}'
        f' or begins with {prefix}.; did you mean {near[0]}? --mode=describe'
        ' lists the names'
      )
  if all(_within(path, prefixes) for path in paths):
    raise InputError(
      f'config.optimizer.frozen={frozen!r} leaves no parameter to train'
    )


def _name(path: Any) -> str:
  """Returns the name of a weight, such as 'stem.conv.kernel'."""
  name = jax.tree_util.keystr(path, simple=True, separator='.')
  # `partitioned` gives a transform the whole tree, {'weights': ...}.
  return name.removeprefix('weights.')


def _parts(paths: Sequence[Any]) -> Iterator[str]:
  """Yields every prefix of the names, the shortest first."""
  for path in paths:
    for end in range(1, len(path) + 1):
      yield _name(path[:end])


def _within(path: Any, prefixes: Sequence[str]) -> bool:
  name = f'{_name(path)}.'
  return any(name.startswith(f'{prefix}.') for prefix in prefixes)


def _body(weights: Any) -> Any:
  return jax.tree.map_with_path(
    lambda path, _: not _within(path, ['head', 'head_norm']), weights
  )


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
