"""Schedules by hand, SGD in NumPy, and the box that r never leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskconnect_jax.errors import InputError
from maskconnect_jax.run import optimizer

L = 6
VALID = np.tri(L, dtype=bool)


# Schedules.


def test_a_constant_rate_is_constant():
  rate = optimizer.schedule('constant', 0.3, 10)
  assert [float(rate(step)) for step in (0, 5, 99)] == pytest.approx([0.3] * 3)


def test_cosine_falls_from_base_to_0_at_the_end_of_the_run():
  rate = optimizer.schedule('cosine', 0.4, 100)
  for step, expected in (
    (0, 0.4),
    (25, 0.2 * (1 + np.sqrt(0.5))),
    (50, 0.2),
    (100, 0),
    (200, 0),
  ):
    assert float(rate(step)) == pytest.approx(expected, abs=1e-7)


def test_warm_up_rises_linearly_and_counts_into_the_run():
  rate = optimizer.schedule('cosine', 0.4, 110, warmup_steps=10)
  for step, expected in ((0, 0.04), (4, 0.2), (9, 0.4), (10, 0.4), (60, 0.2)):
    assert float(rate(step)) == pytest.approx(expected, abs=1e-7)
  assert float(rate(110)) == pytest.approx(0, abs=1e-7)


def by_hand(kind, base, total, warmup, drops):
  """The rates of a run, in NumPy: no step of it without a rate."""
  rates = np.empty(total)
  for step in range(total):
    if step < warmup:
      rates[step] = base * (step + 1) / warmup
    elif kind == 'cosine':
      turn = np.pi * (step - warmup) / (total - warmup)
      rates[step] = base * (1 + np.cos(turn)) / 2
    elif kind == 'step':
      rates[step] = base / 10 ** sum(step >= drop for drop in drops)
    else:
      rates[step] = base
  return rates


@pytest.mark.parametrize('warmup', [0, 1, 2, 5, 11, 12])
@pytest.mark.parametrize('kind', ['constant', 'cosine', 'step'])
def test_schedules_by_hand(kind, warmup):
  rate = optimizer.schedule(kind, 0.3, 12, warmup_steps=warmup, steps_at=(4, 8))
  expected = by_hand(kind, 0.3, 12, warmup, (4, 8))
  assert (expected > 0).all()
  steps = jnp.arange(12)
  for found in (
    [float(rate(int(step))) for step in steps],
    jax.jit(jax.vmap(rate))(steps),
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_warm_up_longer_than_the_run_only_rises():
  rate = optimizer.schedule('cosine', 1.0, 4, warmup_steps=8)
  found = [float(rate(step)) for step in range(4)]
  assert found == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])


@pytest.mark.parametrize('warmup', [0, 4])
def test_step_drops_tenfold_where_it_says(warmup):
  rate = optimizer.schedule(
    'step', 0.1, 100, warmup_steps=warmup, steps_at=(50, 75)
  )
  for step, expected in (
    (4, 0.1),
    (49, 0.1),
    (50, 0.01),
    (74, 0.01),
    (75, 0.001),
    (99, 0.001),
  ):
    assert float(rate(step)) == pytest.approx(expected, rel=1e-5)
  if warmup:
    assert float(rate(1)) == pytest.approx(0.05)


def test_until_a_step_a_schedule_is_active():
  rate = optimizer.until(optimizer.schedule('cosine', 0.4, 100), 50)
  assert float(rate(25)) == pytest.approx(0.2 * (1 + np.sqrt(0.5)))
  assert float(rate(0)) > float(rate(49)) > 0.2
  assert [float(rate(step)) for step in (50, 99)] == [0, 0]


# Weights.


@pytest.mark.parametrize('decay_all', [False, True])
@pytest.mark.parametrize(
  ('momentum', 'nesterov'), [(0.9, True), (0.9, False), (0.0, False)]
)
def test_weights_move_as_numpys_sgd(momentum, nesterov, decay_all):
  rng = np.random.default_rng(0)
  weights = {
    'kernel': rng.normal(size=(3, 3, 2, 4)),
    'matrix': rng.normal(size=(4, 5)),
    'offset': rng.normal(size=4),
    'scale': rng.normal(size=(2, 4)),  # of two branches
    'bias': rng.normal(size=(2, 4)),
  }
  rates = [0.1, 0.1, 0.03, 0.0, 0.2, 0.1]
  decay = 0.05
  transform = optimizer.weights_transform(
    lambda step: jnp.asarray(rates)[step],
    momentum=momentum,
    nesterov=nesterov,
    weight_decay=decay,
    decay_all=decay_all,
  )
  actual = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)
  state = transform.init(actual)
  velocity = {name: np.zeros_like(w) for name, w in weights.items()}
  for rate in rates:
    gradients = {name: rng.normal(size=w.shape) for name, w in weights.items()}
    updates, state = transform.update(
      jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients),
      state,
      actual,
    )
    actual = optax.apply_updates(actual, updates)
    for name in weights:
      gradient = gradients[name]
      if decay_all or name in ('kernel', 'matrix'):
        gradient = gradient + decay * weights[name]
      velocity[name] = momentum * velocity[name] + gradient
      move = velocity[name]
      if nesterov:
        move = gradient + momentum * velocity[name]
      weights[name] = weights[name] - rate * move
      np.testing.assert_allclose(
        actual[name], weights[name], rtol=1e-5, atol=1e-5
      )


def test_flax_variables_and_lists_decay_by_their_names_too():
  layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  layer.bias = nnx.Param(jnp.ones((2, 3)))
  transform = optimizer.weights_transform(
    lambda _: 1.0, momentum=0, nesterov=False, weight_decay=0.5, decay_all=False
  )
  for weights, expected in (
    (nnx.state(layer, nnx.Param), [0, -0.5]),  # bias, kernel
    ([jnp.ones((2, 2)), jnp.ones(2)], [-0.5, 0]),
  ):
    updates, _ = transform.update(
      jax.tree.map(jnp.zeros_like, weights), transform.init(weights), weights
    )
    for update, weight, factor in zip(
      *map(jax.tree.leaves, (updates, weights)), expected, strict=True
    ):
      np.testing.assert_allclose(update, factor * weight)


# Masks.


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_masks_move_as_numpys_clipped_sgd(momentum):
  rng = np.random.default_rng(1)
  expected = rng.uniform(size=(L, L)) * VALID
  transform = optimizer.masks_transform(lambda _: 0.1, VALID, momentum=momentum)
  actual = jnp.asarray(expected, jnp.float32)
  state = transform.init(actual)
  velocity = 0
  for _ in range(10):
    gradient = rng.normal(0, 3, size=(L, L))
    updates, state = transform.update(
      jnp.asarray(gradient, jnp.float32), state, actual
    )
    actual = optax.apply_updates(actual, updates)
    velocity = momentum * velocity + gradient
    expected = np.clip(expected - 0.1 * velocity, 0, 1) * VALID
    np.testing.assert_allclose(actual, expected, atol=1e-5)
  assert {0.0, 1.0} < set(expected[VALID])  # clipped at both ends


@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize('rate', [1e-3, 0.1, 7.0])
def test_r_never_leaves_its_box_whatever_the_gradient(rate, momentum):
  rng = np.random.default_rng(2)
  shape = (32, L, L)
  real = rng.uniform(size=shape)
  real[0], real[1], real[2], real[3] = 0, 1, 1e-42, 1 - 2**-24
  real[4:8] = 10.0 ** rng.uniform(-44, 0, size=(4, L, L))
  real = np.where(VALID, real, 0).astype(np.float32)
  steps = 300
  # Denormal to all but infinite, of both signs, a few zeros, ...
  magnitude = rng.uniform(-45, 37.5, size=(steps, *shape))
  gradients = rng.choice([-1, 0, 1], size=magnitude.shape, p=[0.49, 0.02, 0.49])
  gradients = gradients * 10.0**magnitude
  # ... and for half of the matrices of the size of r.
  gradients[:, ::2] = rng.normal(0, 1 / rate, size=gradients[:, ::2].shape)
  gradients = gradients.astype(np.float32)
  assert np.isfinite(gradients).all()
  transform = optimizer.masks_transform(
    lambda _: rate, VALID, momentum=momentum
  )

  @jax.jit
  def run(real, gradients):
    def step(carry, gradient):
      real, state = carry
      updates, state = transform.update(gradient, state, real)
      real = optax.apply_updates(real, updates)
      return (real, state), real

    return jax.lax.scan(step, (real, transform.init(real)), gradients)[1]

  path = np.asarray(run(real, gradients))
  assert path.dtype == np.float32
  assert (path >= 0).all()
  assert (path <= 1).all()
  assert not path[..., ~VALID].any()
  inside = (path > 0) & (path < 1)
  assert inside.any()
  assert (path[..., VALID] == 1).any()
  assert (np.diff(path, axis=0) != 0).any(0)[::2, VALID].all()


def test_the_projection_asks_for_the_parameters():
  transform = optimizer.masks_transform(lambda _: 0.1, VALID)
  with pytest.raises(ValueError, match='parameters'):
    transform.update(jnp.zeros((L, L)), transform.init(jnp.zeros((L, L))))


def test_weights_and_masks_each_follow_their_own_rule():
  transform = optimizer.partitioned(
    optimizer.weights_transform(
      lambda _: 0.5, momentum=0, nesterov=False, weight_decay=0, decay_all=False
    ),
    optimizer.masks_transform(lambda _: 0.1, VALID),
  )
  params = {
    'weights': {'kernel': jnp.ones((L, L))},
    'masks': {'real_mask': jnp.asarray(0.5 * VALID, jnp.float32)},
  }
  gradients = jax.tree.map(lambda p: jnp.full(p.shape, 3.0), params)
  updates, _ = transform.update(gradients, transform.init(params), params)
  params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(
    params['weights']['kernel'], -0.5 + np.zeros((L, L))
  )
  np.testing.assert_allclose(
    params['masks']['real_mask'], 0.2 * VALID, rtol=1e-5
  )


def test_drops_that_coincide_multiply():
  twice = optimizer.schedule('step', 1.0, 100, steps_at=(50, 50))
  assert float(twice(49)) == pytest.approx(1.0)
  assert float(twice(51)) == pytest.approx(0.01)
  early = optimizer.schedule('step', 1.0, 100, steps_at=(3, 5), warmup_steps=10)
  assert float(early(20)) == pytest.approx(0.01)


def test_the_authors_step_starts_from_rows_that_add_up_to_1():
  """r <- clip(r / sum(r) - rate g, 0, 1), in NumPy."""
  rng = np.random.default_rng(11)
  real = (rng.uniform(size=(L, L)) * VALID).astype(np.float32)
  transform = optimizer.masks_transform(
    lambda _: 0.3, VALID, learner='as_published'
  )
  state = transform.init(jnp.asarray(real))
  for step in range(4):
    gradient = rng.normal(size=(L, L)).astype(np.float32)
    updates, state = transform.update(
      jnp.asarray(gradient), state, jnp.asarray(real)
    )
    stored = np.asarray(optax.apply_updates(jnp.asarray(real), updates))
    shares = real / np.maximum((real * VALID).sum(-1, keepdims=True), 1e-6)
    expected = np.clip(shares - 0.3 * gradient, 0, 1) * VALID
    np.testing.assert_allclose(stored, expected, atol=1e-6, err_msg=str(step))
    real = stored


def test_adam_moves_masks_by_its_rate_whatever_the_gradients_size():
  """The first step of Adam is the rate times the sign of the gradient."""
  rng = np.random.default_rng(12)
  gradient = rng.normal(size=(L, L)) * VALID * 1e-4
  real = np.where(VALID, 0.5, 0).astype(np.float32)
  transform = optimizer.masks_transform(lambda _: 0.01, VALID, name='adam')
  updates, _ = transform.update(
    jnp.asarray(gradient, jnp.float32),
    transform.init(jnp.asarray(real)),
    jnp.asarray(real),
  )
  np.testing.assert_allclose(updates, -0.01 * np.sign(gradient), atol=2e-4)


@pytest.mark.parametrize('clip', [0.0, 0.5, 100.0])
def test_gradients_are_clipped_by_their_norm_before_the_decay(clip):
  """v <- 0.9 v + s g + 0.1 w with s = min(1, clip / |g|), in NumPy."""
  rng = np.random.default_rng(14)
  weights = {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)}
  transform = optimizer.weights_transform(
    lambda _: 0.2, momentum=0.9, nesterov=False, weight_decay=0.1,
    decay_all=False, clip_norm=clip,
  )  # fmt: skip
  own = jax.tree.map(jnp.float32, weights)
  state, velocity = transform.init(own), jax.tree.map(np.zeros_like, weights)
  for _ in range(3):
    gradient = {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)}
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    factor = min(1, clip / norm) if clip else 1
    for name, w in weights.items():
      decay = 0.1 * w if name == 'kernel' else 0
      velocity[name] = 0.9 * velocity[name] + factor * gradient[name] + decay
      weights[name] = w - 0.2 * velocity[name]
    updates, state = transform.update(
      jax.tree.map(jnp.float32, gradient), state, own
    )
    own = optax.apply_updates(own, updates)
  for name, expected in weights.items():
    np.testing.assert_allclose(own[name], expected, rtol=1e-4, atol=1e-6)


# Optimizers by name, and parts of the network.


class ByHand:
  """AdamW, LAMB and Lion of their papers, in NumPy and float64."""

  def __init__(self, name, weights, decay):
    self.name, self.decay, self.count = name, decay, 0
    self.m = {key: np.zeros_like(w) for key, w in weights.items()}
    self.v = {key: np.zeros_like(w) for key, w in weights.items()}

  def step(self, weights, gradients, rate):
    self.count += 1
    moved = {}
    for key, w in weights.items():
      g, decay = gradients[key], self.decay * (w.ndim > 1)
      if self.name == 'lion':  # Chen et al., 2023, algorithm 2
        direction = np.sign(0.9 * self.m[key] + 0.1 * g)
        self.m[key] = 0.99 * self.m[key] + 0.01 * g
        moved[key] = w - rate * (direction + decay * w)
        continue
      self.m[key] = 0.9 * self.m[key] + 0.1 * g
      self.v[key] = 0.999 * self.v[key] + 0.001 * g**2
      m, v = self.m[key], self.v[key]
      m, v = m / (1 - 0.9**self.count), v / (1 - 0.999**self.count)
      epsilon = 1e-6 if self.name == 'lamb' else 1e-8
      direction = m / (np.sqrt(v) + epsilon) + decay * w
      trust = 1.0
      if self.name == 'lamb':  # You et al., 2020, algorithm 2
        trust = np.linalg.norm(w) / np.linalg.norm(direction)
      moved[key] = w - rate * trust * direction
    return moved


@pytest.mark.parametrize('name', ['adamw', 'lamb', 'lion'])
def test_weights_move_as_numpys_adamw_lamb_and_lion(name):
  rng = np.random.default_rng(15)
  weights = {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)}
  rates = [0.1, 0.05, 0.1, 0.02]
  transform = optimizer.weights_transform(
    lambda step: jnp.asarray(rates)[step], name=name, momentum=0.9,
    nesterov=True, weight_decay=0.3, decay_all=False,
  )  # fmt: skip
  own = jax.tree.map(jnp.float32, weights)
  state, by_hand = transform.init(own), ByHand(name, weights, 0.3)
  for rate in rates:
    gradient = {key: rng.normal(size=w.shape) for key, w in weights.items()}
    weights = by_hand.step(weights, gradient, rate)
    updates, state = transform.update(
      jax.tree.map(jnp.float32, gradient), state, own
    )
    own = optax.apply_updates(own, updates)
    for key, expected in weights.items():
      np.testing.assert_allclose(own[key], expected, rtol=1e-4, atol=1e-5)


WHOLE = {
  'stem': {'kernel': np.ones((2, 2))},
  'stack': {'blocks': {n: {'kernel': np.full((2, 2), 2.0)} for n in (1, 10)}},
  'head': {'kernel': np.full((2, 3), 3.0)},
  'head_norm': {'scale': np.full(2, 4.0)},
}


def moves(frozen='', body_rate=1.0, **options):
  """How far each weight of WHOLE moves in one step of gradient 1, rate 0.5."""
  both = {
    'weights': jax.tree.map(jnp.float32, WHOLE),
    'masks': {'real_mask': jnp.asarray(0.5 * VALID, jnp.float32)},
  }
  weights = optimizer.for_parts(
    optimizer.weights_transform(
      lambda _: 0.5,
      **{'momentum': 0.0, 'nesterov': False, 'weight_decay': 0.0}
      | {'decay_all': False}
      | options,
    ),
    frozen=frozen,
    body_rate=body_rate,
  )
  # Joined with the masks' transform, as in a run.
  transform = optimizer.partitioned(
    weights, optimizer.masks_transform(lambda _: 0.1, VALID)
  )
  updates, _ = transform.update(
    jax.tree.map(jnp.ones_like, both), transform.init(both), both
  )
  assert np.abs(updates['masks']['real_mask']).max() > 0
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): float(u.ravel()[0])
    for path, u in jax.tree.leaves_with_path(updates['weights'])
  }


def test_frozen_parts_stay_and_the_others_move_as_without():
  found = moves(frozen='stem, stack/blocks/1')
  assert found == {
    'stem.kernel': 0,
    'stack.blocks.1.kernel': 0,
    'stack.blocks.10.kernel': -0.5,  # 10 does not begin with 1
    'head.kernel': -0.5,
    'head_norm.scale': -0.5,
  }


def test_a_frozen_gradient_does_not_count_in_the_norm():
  # Of 20 gradients of 1, 10 are frozen or, without `frozen`, none is.
  assert moves(clip_norm=1.0)['head.kernel'] == pytest.approx(-0.5 / 20**0.5)
  found = moves(frozen='stem,stack.blocks.1,head_norm', clip_norm=1.0)
  assert found['head.kernel'] == pytest.approx(-0.5 / 10**0.5)


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_the_body_moves_at_its_share_of_the_rate_decay_included(name):
  options = {'name': name, 'weight_decay': 0.1, 'momentum': 0.9}
  full, slow = moves(**options), moves(body_rate=0.25, **options)
  for key, move in full.items():
    share = 1 if key.startswith('head') else 0.25
    assert slow[key] == pytest.approx(share * move)
  frozen = moves(frozen='stem', body_rate=0.25, **options)
  assert frozen == {**slow, 'stem.kernel': 0}


@pytest.mark.parametrize(
  ('frozen', 'says'),
  [
    ('steam', 'no parameter is named steam .*did you mean stem?'),
    ('stem,stack.blocks.2', r'stack.blocks.2 or begins .* stack.blocks.1\?'),
    ('stack.block', r'did you mean stack.blocks\?'),
    ('stem,stack,head,head_norm', 'leaves no parameter to train'),
  ],
)
def test_parts_that_cannot_be_frozen(frozen, says):
  with pytest.raises(InputError, match=says) as error:
    optimizer.check_parts(frozen, WHOLE)
  assert '\n' not in str(error.value)
  optimizer.check_parts('stem,stack.blocks.10.kernel', WHOLE)
