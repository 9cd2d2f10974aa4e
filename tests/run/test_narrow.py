"""Moments of a run whose wiring narrows, against networks frozen by hand."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import maskconnect_jax
from maskconnect_jax import config as config_lib
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import connectivity, narrowing, topology, wiring
from maskconnect_jax.networks import architectures, models
from maskconnect_jax.run import (
  describe,
  experiment,
  loop,
  measure,
  narrow,
  optimizer,
  plan,
  steps,
  train,
  train_state,
)

LEARNERS = ['measured', 'fisher', 'random', 'as_published']
NETWORK = architectures.Architecture((1, 2, 1), width=4)
CLASSES, BATCH = 3, 8


def images(seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.integers(0, 256, (BATCH, 8, 8, 1), np.uint8),
    rng.integers(0, CLASSES, BATCH).astype(np.int32),
  )


@pytest.fixture(scope='module')
def made():
  """Recipe and state of a run that narrows, after no step."""
  model = models.create_model(
    NETWORK, num_classes=CLASSES, in_channels=1, fan_in=1, learner='measured'
  )
  mesh = Mesh(
    np.array(jax.devices()[:1]), ('data',), axis_types=(AxisType.Auto,)
  )
  recipe = train_state.Recipe(
    network=train_state.split(model)[0],
    optimizer=optimizer.partitioned(
      optimizer.weights_transform(
        lambda _: 0.1, momentum=0.9, nesterov=True, weight_decay=0.0,
        decay_all=False,
      ),
      optimizer.masks_transform(
        lambda _: 1.0, model.stack.valid, learner='measured'
      ),
    ),
    seed=0,
    temperature=lambda _: 1.0,
    pad=0,
    flip=False,
    mean=(120.0,),
    std=(60.0,),
    mixup=0.0,
    label_smoothing=0.0,
    average=0.0,
    batch_sharding=NamedSharding(mesh, PartitionSpec('data')),
  )  # fmt: skip
  return recipe, train_state.init_state(model, recipe)


def losses_of(recipe, state, mask, pixels, labels):
  """Of each image, by a frozen network and NumPy's cross-entropy."""
  model = nnx.merge(
    recipe.network, state.weights, state.masks, state.statistics
  )
  frozen = wiring.freeze(model, topology.from_mask(mask))
  x = jnp.asarray((pixels - 120.0) / 60.0, jnp.float32)
  logits = np.asarray(frozen(x, train=True), np.float64)
  return np.log(np.exp(logits).sum(-1)) - logits[np.arange(BATCH), labels]


def test_differences_are_those_of_frozen_networks(made):
  recipe, state = made
  pixels, labels = images()
  mask = np.tri(4, dtype=np.float32)
  edges = np.argwhere(mask[1:]) + np.array([1, 0])
  masks = narrowing.without(mask, edges)
  step = jax.jit(measure.differences, static_argnums=(0, 7))
  variables = state.weights, state.masks, state.statistics
  base = losses_of(recipe, state, mask, pixels, labels)
  expected = [
    losses_of(recipe, state, one, pixels, labels) - base for one in masks
  ]
  expected = [[d.sum(), (d**2).sum()] for d in expected]
  assert np.ptp(expected, 0).min() > 1e-4  # the edges do differ
  given = np.zeros((1 + 12, *mask.shape), np.float32)
  given[0], given[1 : 1 + len(masks)] = mask, masks
  for at_once, count in ((1, 9), (4, 9), (1, 3), (4, 3)):
    found = step(recipe, variables, pixels, labels, 0, given, count, at_once)
    np.testing.assert_allclose(
      found[:count], expected[:count], rtol=1e-3, atol=2e-5
    )
    computed = -(-count // at_once) * at_once
    np.testing.assert_array_equal(found[computed:], 0)  # took no time


def test_several_labels_are_measured_by_the_loss_that_trains_them(made):
  recipe, state = made
  recipe = dataclasses.replace(recipe, multi_label=True)
  pixels, _ = images()
  labels = np.random.default_rng(2).uniform(size=(BATCH, CLASSES)) < 0.4
  variables = state.weights, state.masks, state.statistics
  mask = np.tri(4, dtype=np.float32)
  masks = np.stack([mask, *narrowing.without(mask, np.array([[3, 0]]))])

  @jax.jit
  def logits_of(mask):
    x = (jnp.asarray(pixels, jnp.float32) - 120.0) / 60.0
    return nnx.merge(recipe.network, *variables)(x, mask, train=True)

  losses = []
  for one in masks:
    p = 1 / (1 + np.exp(-np.asarray(logits_of(one), np.float64)))
    losses.append(-np.log(np.where(labels, p, 1 - p)).mean(1))
  difference = losses[1] - losses[0]
  found = jax.jit(measure.differences, static_argnums=(0, 7))(
    recipe, variables, pixels, labels, 0, masks, 1, 1
  )
  np.testing.assert_allclose(
    found, [[difference.sum(), (difference**2).sum()]], rtol=1e-3, atol=1e-6
  )
  assert abs(difference.sum()) > 1e-3


def test_the_gradient_of_a_mask_matches_central_differences(made):
  """The model divides by the sum of b, whose gradient is left out of G.

  So the derivative along an entry is G_i - mean(G) over the row, which is what
  `narrowing.estimate` is built on.
  """
  recipe, state = made
  pixels, labels = images(1)
  with jax.enable_x64():
    variables = jax.tree.map(
      lambda a: jnp.asarray(a, jnp.float64),
      (state.weights, state.masks, state.statistics),
    )
    model = nnx.merge(recipe.network, *variables)
    for _, module in nnx.iter_modules(model):
      if hasattr(module, 'dtype'):
        module.dtype = jnp.dtype('float64')
    recipe = dataclasses.replace(recipe, network=train_state.split(model)[0])
    mask, h = np.tri(4), 1e-5
    gradient = np.asarray(
      jax.jit(measure.mask_gradient, static_argnums=0)(
        recipe, variables, pixels, labels, 0, jnp.asarray(mask)
      )
    )

    @jax.jit
    def loss(mask):
      x = (jnp.asarray(pixels, jnp.float64) - 120.0) / 60.0
      logits = nnx.merge(recipe.network, *variables)(x, mask, train=True)
      own = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
      return jnp.mean(jax.nn.logsumexp(logits, -1) - own)

    for row, source in np.argwhere(mask[1:]) + np.array([1, 0]):
      one = np.zeros_like(mask)
      one[row, source] = h
      expected = (loss(mask + one) - loss(mask - one)) / (2 * h)
      mean = gradient[row, : row + 1].mean()
      assert gradient[row, source] - mean == pytest.approx(
        float(expected), rel=1e-3, abs=1e-6
      )


def test_a_step_leaves_the_mask_of_a_narrowing_wiring(made):
  recipe, state = made
  after, _ = jax.jit(steps.train_step, static_argnums=0)(
    recipe, state, *images()
  )
  jax.tree.map(np.testing.assert_array_equal, after.masks, state.masks)


PLAN = plan.Plan(
  total=100, freeze=50, log_every=5, evaluate_every=50, checkpoint_every=50,
  per_epoch=10, moments=5, measuring=10,
)  # fmt: skip


def test_moments_divide_the_phase_and_the_last_is_the_freeze():
  due = {done: n for done in range(101) if (n := PLAN.moment(done))}
  assert due == {10: 1, 20: 2, 30: 3, 40: 4, 50: 5}
  assert all(map(PLAN.records, due))


def test_more_moments_than_steps_are_passed_over():
  short = dataclasses.replace(PLAN, freeze=3)
  assert [short.moment(done) for done in range(5)] == [0, 1, 3, 5, 0]


@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize('measuring', [0, 10, 50, 1000])
def test_the_budget_pays_for_every_edge(measuring, devices):
  stack = SimpleNamespace(valid=np.tri(9, dtype=bool), fan_in=2)
  own = dataclasses.replace(PLAN, measuring=measuring)
  paid = narrow.budget(own, stack, 64, devices)
  assert paid.images % devices == 0
  assert 0 < paid.images <= 64
  # What a race takes, counted by running one at each moment.
  real, spent = np.tri(9, dtype=np.float32), 0

  def count(masks, number):
    nonlocal spent
    del number
    spent += len(masks) * paid.images * paid.batches
    return np.zeros((len(masks), 2)), paid.images * paid.batches

  for n in range(1, 6):
    mask = (real == 1).astype(np.float32)
    left = narrowing.left_after(stack.valid, 2, n / 5)
    narrowing.race(count, mask, left)
    real = narrowing.narrowed(
      real, stack.valid, np.zeros((9, 9)), left, n / 6, keep_readers=True
    )
  forwards = 3 * 100 * 64
  assert spent <= paid.share * forwards * 1.001
  assert spent > 0.9 * paid.share * forwards
  if measuring >= 10:
    assert measuring / 100 / 2 < paid.share <= measuring / 100 + 1e-9


@pytest.fixture
def small(tiny_config):
  """Two moments, six steps, a fixed rule's fan-in of 1."""
  tiny_config.duration = '8 steps'
  tiny_config.evaluate_every = '8 steps'
  tiny_config.checkpoint_every = '2 steps'
  tiny_config.connectivity.phase = '4 steps'
  tiny_config.connectivity.fan_in = 1
  tiny_config.connectivity.moments = 2
  tiny_config.connectivity.gradient = 'normalized'
  tiny_config.connectivity.temperature = 0.1
  tiny_config.connectivity.initial_spread = 0.0
  tiny_config.masks.learning_rate = 1.0
  tiny_config.connectivity.batchnorm_batches = 1
  return tiny_config


def end_of(workdir, arrays_in):
  topology = (workdir / 'topology.json').read_bytes()
  with np.load(workdir / 'real_masks.npz') as history:
    masks = history['masks']
  log = [
    {k: v for k, v in json.loads(line).items() if k != 'images_per_second'}
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  return topology, masks, log, arrays_in(workdir / 'checkpoints/8/state')


def assert_same(one, other):
  assert one[0] == other[0]
  np.testing.assert_array_equal(one[1], other[1])
  assert one[2] == other[2]
  for name, array in one[3].items():
    assert other[3][name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
  'learner',
  [
    learner
    if learner == 'measured'
    else pytest.param(learner, marks=pytest.mark.slow)
    for learner in LEARNERS
  ],
)
def test_a_run_cut_at_a_moment_ends_with_the_same_bits(
  small, learner, tmp_path, arrays_in, capsys
):
  small.connectivity.learner = learner
  if learner == 'as_published':
    small.connectivity.moments = config_lib.default().connectivity.moments
  whole = train.train(small, tmp_path / 'whole')
  told = capsys.readouterr().err
  expected = end_of(tmp_path / 'whole', arrays_in)
  kept = expected[1][-1]
  if learner == 'as_published':
    assert len(np.unique(kept)) > 3
  else:
    assert 'edges went' in told
    assert ((kept == 1).sum(-1) == 1).all()
    assert set(np.unique(kept)) <= {0, np.float32(1 / 3), np.float32(2 / 3), 1}
  assert (learner == 'measured') == ('choices_clear' in whole.summary)
  assert (learner in ('measured', 'as_published')) == (
    'margin' in whole.summary
  )
  # Killed after the save at the first moment, and then in the middle of it.
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  for path in (tmp_path / 'cut').iterdir():
    if path.name in ('summary.json', 'topology.json'):
      path.unlink()
  for path in (tmp_path / 'cut/checkpoints').iterdir():
    if path.is_dir() and int(path.name) > 2:
      shutil.rmtree(path)
  train.train(small, tmp_path / 'cut')
  assert_same(end_of(tmp_path / 'cut', arrays_in), expected)


@pytest.mark.slow
def test_branches_narrow_too(small, tmp_path, monkeypatch):
  architecture = architectures.Architecture(
    (1, 1), width=8, bottleneck=True, cardinality=4, branch_width=2
  )
  monkeypatch.setitem(architectures.REGISTRY, 'tiny_resnext', architecture)
  small.model.name = 'tiny_resnext'
  small.connectivity.level = 'branch'
  small.connectivity.learner = 'measured'
  result = train.train(small, tmp_path)
  assert result.summary['choices'] == 4
  with np.load(tmp_path / 'real_masks.npz') as history:
    masks = history['masks']
  assert [set(m.sum(-1).ravel()) != {1} for m in (masks == 1)][-1] is False
  (rows,) = result.model.stack.topology.sources
  assert all(len(row) == 1 for row in rows)
  for c, row in enumerate(rows):
    assert masks[-1][0, c, row[0]] == 1


def test_a_signal_in_a_moment_saves_and_the_moment_is_done_again(
  small, tmp_path, arrays_in, monkeypatch
):
  small.connectivity.learner = 'measured'
  small.checkpoint_every = '8 steps'  # none is due at the moment
  train.train(small, tmp_path / 'whole')
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  real = narrow._Measurement.__call__

  def stopping(self, *arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return real(self, *arguments)

  try:
    with monkeypatch.context() as patch:
      patch.setattr(narrow._Measurement, '__call__', stopping)
      result = train.train(small, tmp_path / 'run')
  finally:
    signal.signal(signal.SIGINT, before)
  assert result.interrupted == signal.SIGINT
  assert int(result.state.step) == 2
  (mask,) = jax.tree.leaves(result.state.masks)
  assert set(np.unique(mask)) == {0, 1}  # nothing was lost yet
  train.train(small, tmp_path / 'run')
  assert_same(
    end_of(tmp_path / 'run', arrays_in), end_of(tmp_path / 'whole', arrays_in)
  )


def test_describe_tells_what_measuring_costs(small):
  small.connectivity.learner = 'measured'
  (line,) = [
    line
    for line in describe.describe(small).splitlines()
    if line.startswith('measuring')
  ]
  assert line.startswith('measuring    2 moments, ')
  assert "% of the run's arithmetic" in line


def test_sources_that_fade_in_are_evaluated_as_they_are_trained(
  small, tmp_path
):
  """Early in the phase that is the ordinary network, not the mean of all."""
  config = small
  config.connectivity.learner, config.connectivity.start = (
    'measured',
    'previous',
  )
  config.duration, config.connectivity.phase = '4000 steps', '50%'
  config.evaluate_every = '1 steps'
  job = experiment.build(config)
  run = train.start(job, tmp_path, 'here')
  with contextlib.closing(run.checkpoints), contextlib.closing(run.writer):
    loop.record(run, 1, {'loss': 1.0, 'accuracy': 0.0}, 0.0)
    loop.save(run, 1)
  told = json.loads((tmp_path / 'metrics.jsonl').read_text())['test_loss']
  _, split = experiment.held_out(job)
  losses = {}
  for rule in ('prev', 'all'):
    wired = topology.from_mask(
      getattr(connectivity, f'fixed_{rule}')(job.model.stack.valid)
    )
    network, *_ = train_state.split(wiring.freeze(job.model, wired))
    losses[rule] = run.evaluate(network, run.state.variables(), split).loss
  assert abs(losses['all'] - losses['prev']) > 1e-3
  assert abs(told - losses['prev']) < 0.1 * abs(losses['all'] - losses['prev'])
  with pytest.raises(InputError, match='before the wiring first narrowed'):
    maskconnect_jax.load(tmp_path)
