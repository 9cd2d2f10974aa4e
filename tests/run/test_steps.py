"""The training and the evaluation step, against NumPy and each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskconnect_jax.errors import InputError
from maskconnect_jax.method import wiring
from maskconnect_jax.method.topology import Topology
from maskconnect_jax.networks import architectures, layers, models, streams
from maskconnect_jax.run import (
  augment,
  experiment,
  objective,
  optimizer,
  steps,
  train_state,
)

RNG = np.random.default_rng(0)
COUNT, BATCH, CLASSES, SEED = 22, 8, 3, 7
MEAN, STD, SMOOTHING = 100.0, 60.0, 0.1
# Each class has a bright part of its own.
LABELS = np.arange(COUNT, dtype=np.int32) % CLASSES
IMAGES = RNG.integers(0, 120, (COUNT, 8, 8, 1), np.uint8)
IMAGES[np.arange(COUNT), LABELS * 2] += 120


def batch_of(step):
  """Some indices, others at every step."""
  return np.random.default_rng(step).permutation(COUNT)[:BATCH]


train_step = jax.jit(steps.train_step, static_argnums=0)
eval_step = jax.jit(steps.eval_step, static_argnums=0)


def transform(valid):
  return optimizer.partitioned(
    optimizer.weights_transform(
      optimizer.schedule('constant', 0.05, 100),
      momentum=0.9,
      nesterov=True,
      weight_decay=1e-4,
      decay_all=False,
    ),
    optimizer.masks_transform(optimizer.schedule('constant', 0.5, 100), valid),
  )


def made(model, **fields):
  """Recipe and state of a run on one device, without augmentation."""
  mesh = Mesh(
    np.array(jax.devices()[:1]), ('data',), axis_types=(AxisType.Auto,)
  )
  recipe = train_state.Recipe(
    temperature=lambda _: 1.0,
    **{
      'network': train_state.split(model)[0],
      'optimizer': transform(model.stack.valid),
      'seed': SEED,
      'pad': 0,
      'flip': False,
      'mean': (MEAN,),
      'std': (STD,),
      'mixup': 0.0,
      'label_smoothing': SMOOTHING,
      'average': 0.0,
      'batch_sharding': NamedSharding(mesh, PartitionSpec('data')),
    }
    | fields,
  )
  return recipe, train_state.init_state(model, recipe)


def tiny(**options):
  return models.create_model(
    architectures.Architecture((1, 1, 1), width=4),
    **{'num_classes': CLASSES, 'fan_in': 1, 'width': 4, 'in_channels': 1}
    | {'learner': 'draws'}
    | options,
  )


@pytest.fixture(scope='module')
def learned():
  return made(tiny())


@pytest.fixture(scope='module')
def path(learned):
  """The states of 31 steps, and the losses of the 30 between them."""
  recipe, state = learned
  states, losses = [state], []
  for step in range(30):
    indices = batch_of(step)
    state, metrics = train_step(recipe, state, IMAGES[indices], LABELS[indices])
    states.append(state)
    losses.append(metrics)
  return states, losses


def assert_equal_trees(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def cross_entropy(logits, labels, smoothing=0.0):
  """Per example, in NumPy and float64."""
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  target = np.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES
  return -(target * log_p).sum(-1)


def normalized(indices):
  return jnp.asarray((IMAGES[indices] - MEAN) / STD, jnp.float32)


# Training.


def test_two_steps_from_one_state_are_bit_equal(learned, path):
  recipe, _ = learned
  for index in (0, 1):
    indices = batch_of(index)
    again = train_step(recipe, path[0][index], IMAGES[indices], LABELS[indices])
    assert_equal_trees(again, (path[0][index + 1], path[1][index]))


def test_a_step_is_that_of_its_own_images_and_of_the_mask_of_its_key(
  learned, path
):
  """And so a resumed run draws what one without a break would have drawn."""
  recipe, _ = learned
  states, metrics = path
  stream = 3  # steps.MASK: another would change every run
  masks = set()

  @jax.jit
  def run(variables, inputs, mask):
    model = nnx.merge(recipe.network, *variables, copy=True)
    return model(inputs, mask, train=True)

  for step in (0, 1, 2, 5):
    key = jax.random.fold_in(
      jax.random.fold_in(jax.random.key(SEED), stream), step
    )
    before = states[step]
    model = nnx.merge(recipe.network, *before.variables(), copy=True)
    indices = batch_of(step)
    mask = np.array(model.draw(key, 1.0))
    masks.add(mask.tobytes())
    logits = run(before.variables(), normalized(indices), mask)
    losses = cross_entropy(logits, LABELS[indices], SMOOTHING)
    assert float(metrics[step]['loss']) == pytest.approx(
      losses.mean(), rel=1e-4
    )
    right = np.mean(np.argmax(logits, -1) == LABELS[indices])
    assert float(metrics[step]['accuracy']) == pytest.approx(right)
    # Had the last block taken another source, the loss would tell.
    mask[2] = np.roll(mask[2], 1)
    logits = run(before.variables(), normalized(indices), mask)
    other = cross_entropy(logits, LABELS[indices], SMOOTHING).mean()
    assert abs(other - losses.mean()) > 1e-3
  assert len(masks) > 1


def test_the_loss_falls(path):
  _, metrics = path
  losses = [float(m['loss']) for m in metrics]
  assert np.isfinite(losses).all()
  # Smoothed labels have this entropy, below which no loss can fall.
  p = np.array([1 - SMOOTHING * 2 / 3, SMOOTHING / 3, SMOOTHING / 3])
  least = -(p * np.log(p)).sum()
  assert min(losses) >= least - 1e-5
  assert np.mean(losses[-5:]) - least < 0.5 * (np.mean(losses[:3]) - least)


def test_masks_move_where_they_are_valid_also_undrawn_entries(learned, path):
  states, _ = path
  first, second = (np.asarray(jax.tree.leaves(s.masks)[0]) for s in states[:2])
  valid = np.tri(3, dtype=bool)
  np.testing.assert_array_equal(first, np.where(valid, 0.5, 0))
  # With K = 1 the last block drew one of three, yet all three moved.
  assert (second[2] != first[2]).all()
  for state in states:
    (mask,) = jax.tree.leaves(state.masks)
    assert mask.dtype == jnp.float32
    assert np.min(mask) >= 0
    assert np.max(mask) <= 1
    assert not np.any(np.where(valid, 0, mask))
  assert [int(state.step) for state in states] == list(range(31))


@pytest.mark.parametrize('rule', ['fixed_prev', 'fixed_random', 'fixed_all'])
def test_a_fixed_rule_trains_without_masks(rule):
  recipe, state = made(tiny(rule=rule))
  assert not jax.tree.leaves(state.masks)
  after, metrics = jax.eval_shape(
    functools.partial(steps.train_step, recipe),
    state,
    IMAGES[:BATCH],
    LABELS[:BATCH],
  )
  assert not jax.tree.leaves(after.masks)
  assert metrics['loss'].shape == ()


def test_crops_and_flips_are_those_of_the_step(learned):
  recipe, _ = learned
  recipe = dataclasses.replace(recipe, pad=1, flip=True)

  def batch(step):
    return np.asarray(
      steps.augmented(recipe, jnp.asarray(IMAGES[:BATCH]), step)
    )

  np.testing.assert_array_equal(batch(0), batch(0))
  assert (batch(0) != batch(1)).any()
  padded = np.pad(
    normalized(np.arange(BATCH)), ((0, 0), (1, 1), (1, 1), (0, 0))
  )
  for mine, source in zip(batch(3), padded, strict=True):
    crops = [
      source[y : y + 8, x : x + 8][:, ::turn]
      for y in range(3)
      for x in range(3)
      for turn in (1, -1)
    ]
    assert min(np.abs(crop - mine).max() for crop in crops) < 1e-6


def test_mixup_mixes_images_and_targets_alike():
  rng = np.random.default_rng(0)
  x, t = rng.normal(size=(5, 2, 2, 1)), np.eye(5)
  shares = []
  for seed in range(200):
    images, targets = augment.mixup(
      jax.random.key(seed), jnp.asarray(x), jnp.asarray(t), 0.4
    )
    share = float(targets[0, 0])
    expected = share * x + (1 - share) * x[[4, 0, 1, 2, 3]]
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
      targets, share * t + (1 - share) * t[[4, 0, 1, 2, 3]], atol=1e-6
    )
    shares.append(share)
  # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)), also when folded.
  assert min(shares) >= 0.5
  spread = np.mean((np.array(shares) - 0.5) ** 2)
  assert spread == pytest.approx(1 / (4 * 1.8), rel=0.2)


def test_a_step_with_mixup_is_that_of_the_mixed_batch(learned):
  recipe, state = learned
  mixing = dataclasses.replace(recipe, mixup=0.3)
  _, metrics = train_step(mixing, state, IMAGES[:BATCH], LABELS[:BATCH])
  root = jax.random.key(SEED)
  key, mask_key = (
    jax.random.fold_in(jax.random.fold_in(root, stream), 0) for stream in (5, 3)
  )
  m = float(jax.random.beta(key, 0.3, 0.3))
  m = max(m, 1 - m)
  before = np.roll(np.arange(BATCH), 1)
  x = m * normalized(np.arange(BATCH)) + (1 - m) * normalized(before)
  model = nnx.merge(recipe.network, *state.variables(), copy=True)
  logits = model(x, model.draw(mask_key, 1.0), train=True)
  own, other = (
    cross_entropy(logits, LABELS[i], SMOOTHING).mean()
    for i in (np.arange(BATCH), before)
  )
  assert float(metrics['loss']) == pytest.approx(
    m * own + (1 - m) * other, rel=1e-4
  )


def test_residuals_drop_out_and_classes_weigh_as_the_recipe_says():
  """One step, from the draws of its key and the blocks' own layers."""
  recipe, state = made(
    tiny(rule='fixed_prev'), drop_path=0.6, class_weights=(0.5, 1.0, 3.0)
  )
  _, metrics = train_step(recipe, state, IMAGES[:BATCH], LABELS[:BATCH])
  root, drop_path = jax.random.key(SEED), 9
  key = jax.random.fold_in(jax.random.fold_in(root, drop_path), 0)
  stay = 1 - 0.6 * np.array([1, 2, 3]) / 3
  keep = np.asarray(jax.random.bernoulli(key, stay, (BATCH, 3))) / stay
  assert len(set(keep.ravel())) == 4

  @jax.jit
  def run(variables, x):
    model = nnx.merge(recipe.network, *variables)
    x = model.stem(x, train=True)
    for block, column in zip(model.stack.blocks, keep.T, strict=True):
      norms = {'use_running_average': False}
      f = block.norm1(block.conv1(x), **norms)
      f = block.norm2(block.conv2(jnp.maximum(f, 0)), **norms)
      x = x[:, :: block.stride, :: block.stride]
      x = jnp.pad(x, ((0, 0),) * 3 + ((0, f.shape[-1] - x.shape[-1]),))
      x = jnp.maximum(x + f * column[:, None, None, None], 0)
    return model.head(x.mean((1, 2)))

  logits = run(state.variables(), normalized(np.arange(BATCH)))
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  target = np.eye(CLASSES)[LABELS[:BATCH]] * (1 - SMOOTHING)
  target += SMOOTHING / CLASSES
  expected = -(np.array([0.5, 1, 3]) * target * log_p).sum(-1).mean()
  assert float(metrics['loss']) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_mixup_and_cutmix_take_turns_by_a_fair_coin(learned):
  recipe = dataclasses.replace(learned[0], mixup=0.4, cutmix=1.0)
  x, t = normalized(np.arange(BATCH)), jnp.eye(BATCH)
  mix = jax.jit(functools.partial(steps.mixed, recipe))
  boxes = 0
  for step in range(60):
    images, targets = mix(x, t, step)
    # In a box and outside it every pixel is one of two.
    pure = np.isclose(images, x) | np.isclose(images, np.roll(x, 1, 0))
    boxes += bool(pure.all())
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-5)
  assert 15 <= boxes <= 45  # 30 +- 4 standard deviations


def test_averages_are_those_of_the_weights_and_statistics(path):
  """In NumPy over the same path, of which averaging changes nothing."""
  recipe, state = made(tiny(), average=0.9)
  expected = (
    jax.tree.map(np.float64, state.weights),
    jax.tree.map(np.float64, state.statistics),
  )
  for step in range(15):
    indices = batch_of(step)
    state, _ = train_step(recipe, state, IMAGES[indices], LABELS[indices])
    decay = min(0.9, (1 + step) / (10 + step))
    expected = jax.tree.map(
      lambda old, new, d=decay: d * old + (1 - d) * np.float64(new),
      expected,
      (state.weights, state.statistics),
    )
  weights, _, statistics = state.variables()
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    (state.weights, weights, statistics),
    (path[0][15].weights, *expected),
  )
  assert_equal_trees(state.average['weights'], weights)


@pytest.mark.slow
def test_several_labels_are_trained_by_the_cross_entropy_of_each():
  """Smoothed by halves and mixed, in NumPy."""
  recipe, state = made(tiny(rule='fixed_prev'), multi_label=True, mixup=0.4)
  indices = batch_of(0)
  labels = np.stack([LABELS == 0, LABELS != 1, LABELS < 2], -1)[indices]
  _, found = train_step(recipe, state, IMAGES[indices], labels)
  u = float(jax.random.beta(recipe.key(streams.MIXUP, 0), 0.4, 0.4))
  m = max(u, 1 - u)

  def mixed(x):
    return m * x + (1 - m) * np.roll(x, 1, axis=0)

  @jax.jit
  def run(inputs):
    model = nnx.merge(recipe.network, *state.variables(), copy=True)
    return model(inputs, train=True)

  logits = np.asarray(run(mixed(normalized(indices))), np.float64)
  targets = mixed(labels * (1 - SMOOTHING) + SMOOTHING / 2)
  p = 1 / (1 + np.exp(-logits))
  losses = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
  assert float(found['loss']) == pytest.approx(losses.mean(), rel=1e-4)
  right = (logits > 0) == labels
  assert float(found['accuracy']) == pytest.approx(right.mean())


# Evaluation.


def test_scores_are_numpys():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(40, 9)).astype(np.float32)
  labels, counted = rng.integers(0, 9, 40), rng.uniform(size=40) < 0.8
  best = np.argsort(-logits, -1)
  among = best == labels[:, None]
  losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(40), labels]
  found = objective.scores(logits, labels, counted, multi_label=False)
  assert found['correct'] == among[counted, 0].sum()
  assert found['correct_of_5'] == among[counted, :5].sum()
  assert found['count'] == counted.sum()
  assert found['loss'] == pytest.approx(losses[counted].sum(), rel=1e-5)


@pytest.mark.parametrize('key', [None, 11])
def test_evaluation_counts_the_examples_and_not_the_padding(learned, path, key):
  recipe, _ = learned
  variables = path[0][-1].variables()
  key = None if key is None else jax.random.key(key)
  model = nnx.merge(recipe.network, *variables, copy=True)
  mask = None if key is None else model.draw(key, 1.0)
  logits = model(normalized(np.arange(COUNT)), mask)
  losses = cross_entropy(logits, LABELS)
  right = np.argmax(logits, -1) == LABELS
  totals = {'correct': 0, 'loss': 0.0, 'count': 0}
  for start in range(0, COUNT, BATCH):
    indices = np.arange(start, start + BATCH)
    counted = indices < COUNT
    images, labels = IMAGES[indices % COUNT], LABELS[indices % COUNT]
    sums = eval_step(recipe, variables, images, labels, counted, key, 0)
    for name in totals:
      totals[name] += sums[name].item()
  assert totals['count'] == COUNT
  assert totals['correct'] == right.sum()
  assert totals['loss'] == pytest.approx(losses.sum(), rel=1e-4)
  nothing = eval_step(
    recipe,
    variables,
    IMAGES[:BATCH],
    LABELS[:BATCH],
    np.zeros(BATCH, bool),
    key,
    0,
  )
  assert [nothing[name].item() for name in totals] == [0, 0, 0]


# The statistics at the freeze.


def test_batch_statistics_are_of_the_batch_and_a_dead_block_keeps_its_own(
  path, learned
):
  recipe, _ = learned
  state = path[0][-1]
  model = nnx.merge(recipe.network, *state.variables(), copy=True)
  model = wiring.freeze(model, Topology(((0,), (0,), (0, 2))))
  recipe = dataclasses.replace(recipe, network=train_state.split(model)[0])
  measure = jax.jit(steps.batch_statistics, static_argnums=0)
  kernel = np.asarray(model.stem.conv.kernel[...], np.float64)
  for step in (0, 1, 2):
    indices = batch_of(step)
    x = np.asarray(normalized(indices), np.float64)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    outputs = sum(
      x[:, i : i + 8, j : j + 8] @ kernel[i, j]
      for i in range(3)
      for j in range(3)
    )
    found = measure(recipe, state.variables(), IMAGES[indices], step)
    stem = found['stem']['norm']
    np.testing.assert_allclose(
      stem['mean'][...], outputs.mean((0, 1, 2)), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
      stem['var'][...], outputs.var((0, 1, 2)), rtol=1e-3
    )
    blocks, old = (s['stack']['blocks'] for s in (found, state.statistics))
    assert_equal_trees(blocks[0], old[0])
    for live in (1, 2):
      for norm in ('norm1', 'norm2'):
        assert (
          blocks[live][norm]['var'][...] != old[live][norm]['var'][...]
        ).all()
    assert jax.tree.structure(found) == jax.tree.structure(state.statistics)


# Parts of a batch.


def test_a_step_in_parts_is_a_step_of_the_whole_batch():
  """But for BatchNorm, whose scales are 0 here: then nothing is normalised.

  Gradients still reach the biases, the head and the masks.
  """
  model = tiny(fan_in=2)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, layers.BatchNorm):
      module.scale.set_value(jnp.zeros_like(module.scale[...]))
      module.bias.set_value(jnp.full_like(module.bias[...], 0.3))
  outcomes = []
  for parts in (1, 4):
    recipe, state = made(
      model, parts=parts, mixup=0.3, cutmix=1.0, drop_path=0.6,
      class_weights=(0.5, 1.0, 2.0),
    )  # fmt: skip
    state, metrics = train_step(recipe, state, IMAGES[:16], LABELS[:16])
    outcomes.append(
      {'masks': state.masks, 'weights': state.weights, 'metrics': metrics}
    )
  moved = 0
  one, other = (
    jax.tree_util.tree_leaves_with_path(outcome) for outcome in outcomes
  )
  for (path, a), (_, b) in zip(one, other, strict=True):
    if "'scale'" not in jax.tree_util.keystr(path):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
      moved += 1
  assert moved > 10


def test_batch_norm_in_parts_takes_the_statistics_of_each_part():
  """The running mean of the stem, by NumPy, one part after the other."""
  recipe, state = made(tiny(), parts=2)
  after, _ = train_step(recipe, state, IMAGES[:8], LABELS[:8])
  kernel = np.asarray(state.weights['stem']['conv']['kernel'], np.float64)
  running = np.zeros(kernel.shape[-1])
  for part in (IMAGES[:8:2], IMAGES[1:8:2]):
    x = np.pad((part - MEAN) / STD, ((0, 0), (1, 1), (1, 1), (0, 0)))
    view = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    y = np.einsum('nhwcij,ijco->nhwo', view, kernel)
    running = 0.9 * running + 0.1 * y.mean((0, 1, 2))
  np.testing.assert_allclose(
    after.statistics['stem']['norm']['mean'], running, rtol=1e-4, atol=1e-5
  )


def test_parts_that_do_not_divide_a_batch_are_refused(tiny_config):
  tiny_config.optimizer.accumulate_steps = 3
  with pytest.raises(InputError, match='accumulate_steps=3 must divide'):
    experiment.build(tiny_config)
