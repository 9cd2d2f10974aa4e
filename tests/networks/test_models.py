"""The networks against a plain ResNet, NumPy loops and finite differences."""

import collections
import functools
import inspect
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskconnect_jax import config, convolution
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import adapters, connectivity, wiring
from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.method.stack import MaskedStack
from maskconnect_jax.method.topology import Topology, from_mask
from maskconnect_jax.networks import architectures, cost, layers
from maskconnect_jax.networks.branches import BranchBlock, BranchStack
from maskconnect_jax.networks.models import create_model

RNG = np.random.default_rng(0)


def small(depths=(2, 2, 2), **options):
  """Blocks of 4, 8 and 16 channels."""
  options = {'num_classes': 5, 'width': 4, 'fan_in': 2, 'seed': 3} | options
  options = {'learner': 'draws'} | options
  return create_model(architectures.Architecture(depths, width=4), **options)


def images(count=4, height=8, width=8, channels=3):
  return jnp.asarray(
    RNG.normal(size=(count, height, width, channels)), jnp.float32
  )


def shake(model):
  """Moves every BatchNorm away from the identity, so that nothing hides."""
  rng = np.random.default_rng(1)
  for _, module in nnx.iter_graph(model):
    if isinstance(module, layers.BatchNorm):
      for variable in (module.scale, module.var):
        variable[...] *= rng.uniform(0.7, 1.3, variable.shape).astype('f')
      for variable in (module.bias, module.mean):
        variable[...] += rng.normal(0, 0.2, variable.shape).astype('f')
  return model


# Fixed-Prev is the ordinary network.


class Plain(nnx.Module):
  """A CIFAR ResNet with wiring of its own and the parameters of `model`."""

  def __init__(self, model):
    rngs = nnx.Rngs(9)

    def conv(channels, to, stride=1):
      return nnx.Conv(
        channels,
        to,
        (3, 3),
        strides=stride,
        padding=1,
        use_bias=False,
        rngs=rngs,
      )

    def norm(channels):
      return layers.BatchNorm(channels, dtype=jnp.float32)

    self.strides = (1, 1, 2)
    channels = (4, 4, 4, 8)
    parts = [conv(3, 4), norm(4)]
    for i, stride in enumerate(self.strides):
      channel, to = channels[i : i + 2]
      parts += [conv(channel, to, stride), norm(to), conv(to, to), norm(to)]
    parts.append(nnx.Linear(8, 5, rngs=rngs))
    for mine, path in zip(parts, PATHS, strict=True):
      other = model
      for name in path:
        other = other[name] if isinstance(name, int) else getattr(other, name)
      for name, variable in vars(other).items():
        if isinstance(variable, nnx.Variable):
          assert getattr(mine, name).shape == variable.shape
          getattr(mine, name)[...] = variable[...]
    self.parts = nnx.List(parts)

  def __call__(self, x, train):
    parts = iter(self.parts)

    def step(x):
      x = next(parts)(x)
      return next(parts)(x, use_running_average=not train)

    x = nnx.relu(step(x))
    for stride in self.strides:
      y = step(nnx.relu(step(x)))
      if stride == 2:
        x = x[:, ::2, ::2, :]
        x = jnp.concatenate([x, jnp.zeros_like(x)], -1)
      x = nnx.relu(y + x)
    return next(parts)(x.mean((1, 2), dtype=jnp.float32))


PATHS = [
  ('stem', 'conv'),
  ('stem', 'norm'),
  *(
    ('stack', 'blocks', i, name)
    for i in range(3)
    for name in ('conv1', 'norm1', 'conv2', 'norm2')
  ),
  ('head',),
]


# conftest.py takes quicker emitters, by which equal sums in other fusions
# round differently. Users' do not.
EMITTERS = 'xla_cpu_use_fusion_emitters'
AS_USERS = {EMITTERS: True} if EMITTERS in os.environ['XLA_FLAGS'] else None


def step_of(model, call):
  """Loss, logits, gradients and statistics of one jitted training step."""
  network, weights, statistics, rest = nnx.split(
    model, nnx.Param, nnx.BatchStat, ...
  )
  labels = jnp.arange(4) % 5

  @functools.partial(jax.jit, compiler_options=AS_USERS)
  def step(weights, statistics, x):
    def loss_of(weights):
      model = nnx.merge(network, weights, statistics, rest, copy=True)
      logits = call(model, x)
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return loss.mean(), (logits, nnx.state(model, nnx.BatchStat))

    (loss, (logits, after)), gradients = jax.value_and_grad(
      loss_of, has_aux=True
    )(weights)
    return loss, logits, gradients, after

  return step, weights, statistics


def test_fixed_prev_is_a_plain_resnet_bit_for_bit(monkeypatch):
  # A CPU's own forms of a convolution round differently.
  monkeypatch.setattr(convolution, 'on_a_cpu', convolution.by_library)
  model = shake(small((2, 1), rule='fixed_prev'))
  plain = Plain(model)
  x = images()
  step, *state = step_of(model, lambda model, x: model(x, train=True))
  loss, logits, gradients, after = step(*state, x)
  step, *state = step_of(plain, lambda plain, x: plain(x, True))
  plain_loss, plain_logits, plain_gradients, plain_after = step(*state, x)

  assert np.isfinite(loss)
  np.testing.assert_array_equal(loss, plain_loss)
  np.testing.assert_array_equal(logits, plain_logits)
  compared = collections.Counter()
  for tree, plain_tree in ((gradients, plain_gradients), (after, plain_after)):
    for i, path in enumerate(PATHS):
      node = tree
      for name in path:
        node = node.get(name, {})
      for name, variable in node.items():
        np.testing.assert_array_equal(
          variable[...], plain_tree['parts'][i][name][...], str((path, name))
        )
        assert np.any(variable[...])
        compared[name] += 1
  assert compared == {
    'kernel': 8,
    'scale': 7,
    'bias': 8,
    'mean': 7,
    'var': 7,
  }
  assert sum(compared.values()) == len(
    jax.tree.leaves((gradients, after))
  )  # all

  def evaluated(model, call):
    network, state = nnx.split(model)
    run = jax.jit(
      lambda state: call(nnx.merge(network, state)), compiler_options=AS_USERS
    )
    return run(state)

  np.testing.assert_array_equal(
    evaluated(model, lambda model: model(x)),
    evaluated(plain, lambda plain: plain(x, False)),
  )


# The stack's sum, by a NumPy loop.


class Affine(nnx.Module):
  """y = a x + c, elementwise."""

  def __init__(self, a, c):
    self.a, self.c = a, c

  def __call__(self, x, *, train=False):
    del train
    return self.a * x + self.c


def stack_of(count=5, seed=0, **options):
  coefficients = np.random.default_rng(2).normal(size=(count, 2)).tolist()
  blocks = [Affine(a, c) for a, c in coefficients]
  options = {'learner': 'draws'} | options
  return MaskedStack(blocks, rngs=nnx.Rngs(seed), **options), coefficients


def numpy_stack(coefficients, x, mask, scale, valid):
  outputs = [np.asarray(x, np.float64)]
  for j, (a, c) in enumerate(coefficients):
    terms = sum(mask[j][i] for i in range(j + 1) if valid[j][i])
    total = sum(mask[j][i] * outputs[i] for i in range(j + 1) if valid[j][i])
    total = total / terms if scale == 'mean' else total
    outputs.append(a * total + c)
  return outputs[-1]


@pytest.mark.parametrize('stem_source', [True, False])
@pytest.mark.parametrize('scale', ['mean', 'sum'])
def test_each_block_takes_the_scaled_masked_sum(scale, stem_source):
  valid = connectivity.valid_sources(5, stem_source=stem_source)
  stack, coefficients = stack_of(fan_in=3, scale=scale, valid=valid)
  x = RNG.normal(size=(2, 3))
  # Any number of ones in a row; the block before is always valid.
  mask = RNG.integers(0, 2, (5, 5)) | np.eye(5, dtype=int)
  real = RNG.choice([0, 0.5, 1], size=(5, 5))
  stack.real_mask[...] = jnp.asarray(real, jnp.float32)
  chosen = [
    sorted(
      (i for i in range(5) if valid[j][i]),
      key=lambda i, row=real[j]: (-row[i], -i),
    )[:3]
    for j in range(5)
  ]
  largest = [[float(i in row) for i in range(5)] for row in chosen]
  inputs = jnp.asarray(x, jnp.float32)
  for given, used in ((jnp.asarray(mask, jnp.float32), mask), (None, largest)):
    np.testing.assert_allclose(
      stack(inputs, given),
      numpy_stack(coefficients, x, used, scale, valid),
      rtol=1e-4,
      atol=1e-5,
    )
  # Frozen, the same.
  stack.topology = nnx.static(Topology(tuple(map(tuple, map(sorted, chosen)))))
  np.testing.assert_allclose(
    stack(inputs),
    numpy_stack(coefficients, x, largest, scale, valid),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ('rule', 'sources'),
  [
    ('fixed_prev', ((0,), (1,), (2,))),
    ('fixed_all', ((0,), (0, 1), (0, 1, 2))),
  ],
)
def test_a_fixed_rule_has_its_topology_and_no_mask(rule, sources):
  stack, _ = stack_of(3, fan_in=2, rule=rule)
  assert stack.topology.sources == sources
  assert not hasattr(stack, 'real_mask')
  assert stack.draw(jax.random.key(0)) is None


@pytest.mark.parametrize(
  ('name', 'level'), [('resnet8', 'block'), ('resnext20_8x4d', 'branch')]
)
def test_products_are_as_precise_as_asked_for(name, level):
  """Forward and backward; the statistics and masks always are."""

  def program(precision):
    model = create_model(
      name,
      num_classes=2,
      width=16,
      level=level,
      learner='draws',
      matmul_precision=precision,
    )
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss(weights, images):
      model = nnx.merge(graph, weights, rest, copy=True)
      return model(images, model.draw(jax.random.key(0)), train=True).sum()

    images = jnp.zeros((2, 8, 8, 3))
    text = str(jax.make_jaxpr(jax.grad(loss))(weights, images))
    return set(re.findall(r'precision=([\w.]+|\([^)]*\))', text))

  assert 'None' in program('default')
  (precise,) = program('highest')
  assert 'HIGHEST' in precise


def test_the_seed_decides_a_random_rule():
  topologies = [
    stack_of(6, fan_in=2, rule='fixed_random', seed=seed)[0].topology
    for seed in (0, 1, 2, 3, 0)
  ]
  assert topologies[0] == topologies[4]
  assert len(set(topologies)) > 1
  for topology in topologies:
    assert [len(row) for row in topology.sources] == [1, 2, 2, 2, 2, 2]


# The mask's gradient.


@pytest.mark.parametrize(
  ('scale', 'gradient', 'train'),
  [('mean', 'all', True), ('sum', 'drawn', False)],
)
def test_masks_gradient_is_the_finite_difference(scale, gradient, train):
  epsilon = 1e-6
  with jax.enable_x64(True):
    model = shake(
      small((2, 1, 1), dtype='float64', scale=scale, gradient=gradient)
    )
    network, masks, rest = nnx.split(model, wiring.RealMask, ...)
    real = RNG.uniform(0.2, 0.8, size=(4, 4)) * np.tri(4)
    masks = jax.tree.map(lambda _: jnp.asarray(real), masks)
    rest = jax.tree.map(lambda w: w.astype(jnp.float64), rest)
    x = RNG.normal(size=(2, 8, 8, 3))
    key = jax.random.key(5)
    weighting = RNG.normal(size=(2, 2, 2, 16))

    def loss(masks, mask=None):
      model = nnx.merge(network, masks, rest, copy=True)
      if mask is None:
        mask = model.draw(key)
      y = model.stem.conv(x)
      y = nnx.relu(model.stem.norm(y, use_running_average=not train))
      y = model.stack(y, mask, train=train)
      assert y.dtype == jnp.float64
      return jnp.sum(y * weighting), mask

    (_, drawn), actual = jax.jit(jax.value_and_grad(loss, has_aux=True))(masks)
    actual = np.array(jax.tree.leaves(actual)[0])
    drawn = np.array(drawn)
    entries = np.argwhere(np.tri(4))
    steps = np.zeros((len(entries), 4, 4))
    steps[np.arange(len(entries)), *entries.T] = epsilon
    shifted = jax.jit(
      lambda m: jax.lax.map(lambda mask: loss(masks, mask)[0], m)
    )(np.concatenate([drawn + steps, drawn - steps]))
    up, down = np.split(np.array(shifted), 2)
  if scale == 'mean':
    # The number of ones that divides the sum moves as well, and by the chain
    # rule takes sum(b g) / k from each entry of a row.
    count = drawn.sum(-1, keepdims=True)
    actual -= (drawn * actual).sum(-1, keepdims=True) / count * np.tri(4)
  expected = np.zeros((4, 4))
  expected[*entries.T] = (up - down) / (2 * epsilon)
  if scale == 'mean':
    expected[0] = 0  # one source: the mean does not change
  # What no block downstream reads has no gradient; the rest has.
  moved = np.abs(expected) > 1e-3
  assert (moved & (drawn == 0)).sum() >= 2
  assert (moved & (drawn == 1)).sum() >= 4
  if gradient == 'drawn':
    expected = expected * drawn
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-7 * np.abs(expected).max()
  )


# Freezing and pruning.


def random_topology(model, seed):
  """Sources that the model may take, with at least one dead block."""
  rng = np.random.default_rng(seed)
  while True:
    rows = []
    for row in model.stack.valid:
      sources = np.flatnonzero(row)
      size = min(len(sources), rng.integers(1, 3))
      picked = rng.choice(sources, size, replace=False)
      rows.append(tuple(np.sort(picked).tolist()))
    topology = Topology(tuple(rows))
    if not all(topology.live):
      return topology


def adapted(model, y, shape, source):
  """A(y) in NumPy; 8x8 images, so that every size divides."""
  factor = y.shape[1] // shape[1]
  n, h, w, c = y.shape
  y = y.reshape(n, h // factor, factor, w // factor, factor, c).mean((2, 4))
  if c == shape[-1]:
    return y
  if not hasattr(model.stack.adapter, 'projections'):
    return np.concatenate([y, np.zeros((*shape[:3], shape[-1] - c))], -1)
  name = f'source{source}_to{shape[-1]}'
  kernel = model.stack.adapter.projections[name].kernel[...]
  return y @ np.asarray(kernel, np.float64)[0, 0]


def by_hand(model, topology, x):
  """Logits from a loop over all blocks, the dead ones too."""
  x = nnx.relu(model.stem.norm(model.stem.conv(x), use_running_average=True))
  outputs = [x]
  for block, sources in zip(model.stack.blocks, topology.sources, strict=True):
    shape = outputs[-1].shape
    terms = [
      adapted(model, np.asarray(outputs[i], np.float64), shape, i)
      for i in sources
    ]
    outputs.append(block(jnp.asarray(sum(terms) / len(terms), jnp.float32)))
  y = np.asarray(outputs[-1], np.float64).mean((1, 2))
  return y @ np.asarray(model.head.kernel[...]) + model.head.bias[...]


def numbers_left(topology, projection):
  """Parameters after pruning, by hand."""
  channels = (4, 4, 4, 8, 8, 16, 16)
  # What the output needs, going back from the last block.
  queue, live = [6], set()
  while queue:
    block = queue.pop()
    if block and block not in live:
      live.add(block)
      queue += topology.sources[block - 1]
  count = 27 * 4 + 2 * 4 + 16 * 5 + 5
  used = set()
  for block in live:
    own, to = channels[block - 1 : block + 1]
    count += 9 * own * to + 9 * to * to + 4 * to
    for source in topology.sources[block - 1]:
      if projection and channels[source] != own:
        used.add((source, own))
  return count + sum(channels[source] * own for source, own in used)


@pytest.mark.parametrize('adapter', ['pool', 'projection', 'same_stage'])
def test_pruning_keeps_the_logits_and_drops_the_parameters(adapter):
  model = shake(small(adapter=adapter))
  whole = cost.count_parameters(model)
  x = images()
  for seed in range(4):
    topology = random_topology(model, seed)
    expected = by_hand(model, topology, x)
    frozen = wiring.freeze(model, topology)
    pruned = wiring.prune(frozen)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(frozen(x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pruned(x), expected, rtol=1e-4, atol=1e-4)
    # The mask that says the same gives the same while it is still data.
    mask = np.array(
      [[float(i in row) for i in range(6)] for row in topology.sources]
    )
    # The learned form always divides by k_j, so that rows must be full.
    k = np.minimum(2, np.sum(model.stack.valid, -1))
    mask *= (k / mask.sum(-1))[:, None]
    np.testing.assert_allclose(
      model(x, jnp.asarray(mask, jnp.float32)), expected, rtol=1e-4, atol=1e-4
    )
    assert cost.count_parameters(frozen) == whole
    assert cost.count_parameters(pruned) == numbers_left(
      topology, adapter == 'projection'
    )
    assert cost.count_parameters(pruned) < whole
    assert not jax.tree.leaves(nnx.state(pruned, wiring.RealMask))
    assert pruned.topology == topology
    again = wiring.prune(pruned)
    np.testing.assert_array_equal(again(x), pruned(x))
  assert cost.count_parameters(model) == whole
  assert model.topology is None


def test_a_pruned_network_runs_jitted_and_is_split_and_merged():
  model = shake(small(adapter='projection'))
  topology = random_topology(model, 0)
  pruned = wiring.prune(wiring.freeze(model, topology))
  network, state = nnx.split(pruned)
  x = images(height=9, width=11)
  run = jax.jit(lambda state, x: nnx.merge(network, state)(x))
  np.testing.assert_allclose(
    run(state, x), wiring.freeze(model, topology)(x), rtol=1e-4, atol=1e-5
  )


def number_of(primitive, program):
  """How often it is in a jaxpr, each call of a function counted."""
  count = 0
  for equation in getattr(program, 'jaxpr', program).eqns:
    count += equation.primitive.name == primitive
    parameters = list(equation.params.values())
    # One branch for each platform; the last is that of GPUs and TPUs.
    parameters += equation.params.get('branches', ())[-1:]
    for parameter in parameters:
      if hasattr(getattr(parameter, 'jaxpr', parameter), 'eqns'):
        count += number_of(primitive, parameter)
  return count


def test_dead_blocks_are_not_in_the_program():
  model = small()
  for seed in range(4):
    topology = random_topology(model, seed)
    frozen = wiring.freeze(model, topology)
    program = jax.make_jaxpr(lambda x, frozen=frozen: frozen(x))(images())
    dead = topology.live.count(False)
    assert number_of('conv_general_dilated', program) == 1 + 2 * (6 - dead)


def test_freeze_takes_the_largest_entries_and_leaves_the_model():
  model = small()
  real = RNG.uniform(size=(6, 6)).astype(np.float32)
  model.stack.real_mask[...] = jnp.asarray(real)
  frozen = wiring.freeze(model)
  assert model.topology is None
  assert frozen.topology.sources == tuple(
    tuple(sorted(np.argsort(row[: j + 1])[-2:].tolist()))
    for j, row in enumerate(real)
  )
  assert wiring.freeze(frozen).topology == frozen.topology


def test_pruning_asks_for_a_frozen_model():
  with pytest.raises(ValueError, match='freeze'):
    wiring.prune(small((1, 1, 1)))


# Sizes, counts, names, dtypes.


def parameters(depth, num_classes, width=16, in_channels=3):
  blocks = (depth - 2) // 6
  total, channels = 9 * in_channels * width + 2 * width, width
  for to in (width, 2 * width, 4 * width):
    for _ in range(blocks):
      total += 9 * channels * to + 9 * to * to + 2 * 2 * to
      channels = to
  return total + channels * num_classes + num_classes


@pytest.mark.parametrize(
  ('depth', 'num_classes', 'millions'),
  [(20, 10, 0.270), (38, 100, 0.567), (74, 100, 1.151), (110, 100, 1.734)],
)
def test_parameter_counts_are_the_published(depth, num_classes, millions):
  model = nnx.eval_shape(
    lambda: create_model(
      f'resnet{depth}', num_classes=num_classes, rule='fixed_prev'
    )
  )
  count = cost.count_parameters(model)
  assert count == parameters(depth, num_classes)
  # 0.2697 M by the paper's count is 0.270 M.
  assert abs(count / 1e6 - millions) < 1.0e-3
  assert len(model.stack.blocks) == (depth - 2) // 2


def test_all_that_is_wired_has_the_configs_defaults():
  spec = config.wiring_spec(config.default())
  assert spec == WiringSpec()
  stack = MaskedStack([Affine(1, 0)], rngs=nnx.Rngs(0))
  assert stack.spec == spec
  own = inspect.signature(create_model).parameters
  fields = config.default().connectivity
  for name in ('stem_source', 'adapter'):
    assert own[name].default == fields[name]


def test_real_masks_are_not_counted_as_parameters():
  model = nnx.eval_shape(lambda: small((1, 1, 1), width=8, in_channels=1))
  assert cost.count_parameters(model) == parameters(8, 5, 8, 1)
  (mask,) = jax.tree.leaves(nnx.state(model, wiring.RealMask))
  assert mask.shape == (3, 3)
  assert mask.dtype == jnp.float32


@pytest.mark.parametrize(
  'rule', ['learned', pytest.param('fixed_all', marks=pytest.mark.slow)]
)
def test_blocks_computed_again_change_nothing_but_the_memory(rule):
  x, key = images(), jax.random.key(0)

  def outcome(remat):
    model = small(rule=rule, remat=remat)
    graph, variables, statistics = nnx.split(
      model, (nnx.Param, wiring.RealMask), ...
    )

    def loss(variables):
      model = nnx.merge(graph, variables, statistics, copy=True)
      logits = model(x, model.draw(key), train=True)
      return jnp.sum(logits**2), nnx.state(model, nnx.BatchStat)

    value = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return value(variables), str(jax.make_jaxpr(loss)(variables))

  kept, plain = outcome('none')
  again, marked = outcome('block')
  assert (plain.count('remat2['), marked.count('remat2[')) == (0, 6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    again,
    kept,
  )


class Listed(nnx.Module):
  """A block whose graph cannot be hashed, as it holds a list."""

  def __init__(self, rngs):
    self.factors = nnx.static([1.0, 0.5])
    self.dense = nnx.Linear(4, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x, train):
    y = self.norm(self.dense(x), use_running_average=not train)
    return sum(jnp.tanh(factor * y) for factor in self.factors)


def test_blocks_that_hold_lists_are_computed_again_too():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), 'f')

  def outcome(remat):
    rngs = nnx.Rngs(0, connectivity=1)
    model = MaskedStack(
      [Listed(rngs) for _ in range(3)],
      fan_in=2,
      rule='fixed_all',
      remat=remat,
      rngs=rngs,
    )
    with pytest.raises(TypeError, match='unhashable'):
      hash(nnx.split(model.blocks[0])[0])
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss(weights):
      model = nnx.merge(graph, weights, rest, copy=True)
      y = model(x, train=True)
      return jnp.sum(y**2), nnx.state(model, nnx.BatchStat)

    value = jax.value_and_grad(loss, has_aux=True)(weights)
    return value, str(jax.make_jaxpr(loss)(weights)), nnx.state(model)

  kept, plain, before = outcome('none')
  again, marked, _ = outcome('block')
  assert (plain.count('remat2['), marked.count('remat2[')) == (0, 3)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    again,
    kept,
  )
  mean = kept[0][1]['blocks'][0]['norm']['mean']
  assert not np.allclose(mean, before['blocks'][0]['norm']['mean'])


class Halve(nnx.Module):
  """A block of half as many places and twice as many channels."""

  def __call__(self, x):
    return jnp.tile(jnp.tanh(x[:, ::2]), 2)


@pytest.mark.parametrize('rule', ['learned', 'fixed_all'])
def test_an_adapter_may_leave_channels_to_be_zero_but_no_other_shape(rule):
  x = np.random.default_rng(0).normal(size=(2, 8, 3))

  def run(adapter):
    model = MaskedStack(
      [Halve(), Halve()], fan_in=2, rule=rule, adapter=adapter, rngs=nnx.Rngs(0)
    )
    return model(jnp.asarray(x, 'f'))

  first = np.tile(np.tanh(x[:, ::2]), 2)
  wide = np.concatenate([x[:, :4], np.zeros((2, 4, 3))], -1)
  expected = np.tile(np.tanh(((first + wide) / 2)[:, ::2]), 2)
  actual = run(lambda x, shape, *_: x[:, : shape[1]])
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  for wrong in (lambda x, *_: x, lambda x, *_: jnp.tile(x[:, :4], 3)):
    with pytest.raises(ValueError, match='source 0 to the shape'):
      run(wrong)


class Shrink(nnx.Module):
  """A block of half as many rows and columns and twice as many channels."""

  def __call__(self, x):
    return jnp.tile(jnp.tanh(x[:, ::2, ::2]), 2)


class Noting(adapters.PoolAdapter):
  """Notes the source, its rows and the rows that are wanted."""

  def __init__(self, given):
    self.note = nnx.static(given.append)

  def __call__(self, x, shape, source):
    self.note((source, x.shape[1], shape[1]))
    return super().__call__(x, shape, source)


@pytest.mark.parametrize('pools', [True, False])
def test_only_a_pooled_source_is_pooled_on(pools):
  given = []
  adapter = Noting(given)
  model = MaskedStack(
    [Shrink(), Shrink(), Shrink()],
    fan_in=3,
    rule='fixed_all',
    adapter=adapter if pools else lambda *arguments: adapter(*arguments),
    rngs=nnx.Rngs(0),
  )
  model(jnp.ones((2, 8, 8, 3)))
  assert given == [(0, 8, 4), (0, 4 if pools else 8, 2), (1, 4, 2)]


@pytest.mark.parametrize('rule', ['learned', 'fixed_all'])
@pytest.mark.parametrize(
  'size', [(8, 8), (25, 25), (28, 28), (32, 32), (9, 30)]
)
def test_any_input_size_and_number_of_channels(size, rule):
  for channels, width in ((1, 8), (3, 4)):
    model = nnx.eval_shape(
      lambda channels=channels, width=width: small(
        rule='fixed_prev', in_channels=channels, width=width
      )
    )
    if rule == 'fixed_all':
      model.stack.topology = nnx.static(
        from_mask(connectivity.fixed_all(model.stack.valid))
      )
    else:
      model.stack.topology = nnx.static(None)
    mask = jax.ShapeDtypeStruct((6, 6), jnp.float32)
    x = jax.ShapeDtypeStruct((2, *size, channels), jnp.float32)
    network, state = nnx.split(model)
    logits = jax.eval_shape(
      lambda state, x, mask, network=network: nnx.merge(network, state)(
        x, mask
      ),
      state,
      x,
      mask,
    )
    assert logits.shape == (2, 5)
    assert logits.dtype == jnp.float32


class Recorder(nnx.Module):
  """Notes the dtypes of a block's input and output."""

  def __init__(self, block, seen):
    self.block = block
    self.seen = nnx.static(seen)

  def __call__(self, x, *, train=False):
    y = self.block(x, train=train)
    self.seen.extend([x.dtype, y.dtype])
    return y


@pytest.mark.parametrize('adapter', ['pool', 'projection', 'same_stage'])
@pytest.mark.parametrize('rule', ['learned', 'fixed_prev', 'fixed_all'])
def test_activations_are_bfloat16_if_asked_for(rule, adapter):
  model = small((1, 2, 1), rule=rule, adapter=adapter, dtype='bfloat16')
  seen = []
  for i, block in enumerate(model.stack.blocks):
    model.stack.blocks[i] = Recorder(block, seen)
  logits = jax.eval_shape(lambda x: model(x), images())
  assert seen == [jnp.dtype('bfloat16')] * 8
  assert logits.dtype == jnp.float32


def test_bfloat16_keeps_all_else_float32_and_the_logits_near():
  wide, narrow = (
    small((1, 1), width=8, dtype=dtype) for dtype in ('float32', 'bfloat16')
  )
  x = images(16)
  for train in (True, False):
    logits, exact = narrow(x, train=train), wide(x, train=train)
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - exact).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow))} == {
    jnp.dtype('float32')
  }


def test_list_models_matches_patterns():
  names = ['resnet20', 'resnet32', 'resnet38', 'resnet44', 'resnet56']
  names += ['resnet74', 'resnet110']
  names += ['resnet18', 'resnet34', 'resnet50', 'resnet101']
  assert architectures.list_models('resnet*') == names
  assert len(architectures.list_models()) == len(names) + 6
  assert architectures.list_models('*4') == ['resnet44', 'resnet74', 'resnet34']
  assert architectures.list_models('vgg*') == []


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('resmet38', {}, "'resmet38' is not known; did you mean 'resnet38'"),
    ('vgg', {}, "'vgg' is not known; list_models"),
    ('resnet21', {}, 'must be 6n\\+2, such as resnet20 or resnet26'),
    ('resnet2', {}, 'must be 6n\\+2, such as resnet8 or resnet14'),
    ('resnet8', {'fan_in': 0}, 'fan_in=0 must be at least 1'),
    (
      'resnet99998',
      {},
      'has more than 1,000 blocks; the deepest is resnet2000',
    ),
    ('resnet' + '9' * 5000, {}, 'more than 1,000 blocks'),
    ('resnet99992_bottleneck', {}, 'the deepest is resnet2999_bottleneck'),
    ('resnet\u0662\u0660', {}, 'is not known'),
    (None, {}, 'model None is no name'),
    (['resnet8'], {}, 'is no name'),
    ('x\n' * 10**6, {}, 'is not known'),
    ('resnet8', {'fan_in': -1}, 'fan_in=-1 must be at least 1'),
    ('resnet8', {'fan_in': 2.5}, 'fan_in=2.5 must be a whole number'),
    ('resnet8', {'fan_in': True}, 'fan_in=True must be a whole number'),
    ('resnet8', {'fan_in': None}, 'fan_in=None must be a whole number'),
    ('resnet8', {'fan_in': 2**40}, 'fan_in=.* must be at most 2,147,483,647'),
    ('resnet8', {'num_classes': 0}, 'num_classes=0 must be at least 1'),
    ('resnet8', {'num_classes': 2.0}, 'num_classes=2.0 must be a whole'),
    ('resnet8', {'num_classes': 10**9}, 'num_classes=.* at most 1,000,000'),
    ('resnet8', {'in_channels': 0}, 'in_channels=0 must be at least 1'),
    ('resnet8', {'width': 0}, 'width=0 must be at least 1'),
    ('resnet8', {'width': 10**6}, 'width=1000000 must be at most 8,192'),
    ('resnet56', {'width': 8192}, 'width=8192 gives 27 blocks .* weights'),
    ('resnet8', {'dtype': 'int8'}, "dtype='int8' is none for activations"),
    ('resnet8', {'dtype': 'float' * 9}, 'is none for activations'),
    ('resnet8', {'dtype': None}, 'dtype=None is none for activations'),
    ('resnet8', {'seed': 2**63}, 'seed=.* must be at most'),
    ('resnet8', {'seed': 'x'}, "seed='x' must be a whole number"),
    ('resnet8', {'level': None}, 'level=None is not one of block, branch'),
    ('resnet8', {'rule': ['learned']}, 'is not one of learned'),
    ('resnet8', {'stem_source': 'no'}, "stem_source='no' must be True or"),
    ('resnet8', {'initial': float('nan')}, r'initial=nan must be .* \[0, 1\]'),
    ('resnet8', {'initial_spread': -1}, 'initial_spread=-1 must be .* >= 0'),
    ('resnet8', {'initial_spread': 'x'}, "initial_spread='x' must be a number"),
    ('resnet8', {'fanin': 2}, "'fanin' is no option of level 'block'; it has"),
    ('resnet8', {'rngs': 0}, "'rngs' is no option"),
    ('resnet8', {'identity': '1/K'}, "'identity' is no option of level"),
    (
      'resnext29_8x8d',
      {'level': 'branch', 'scale': 'sum'},
      "'scale' is no opt",
    ),
    ('resnext29_8x8d', {'level': 'branch', 'fan_in': 0}, 'fan_in=0 must be'),
    ('resnext29_8x8d', {'level': 'branch', 'fan_in': True}, 'fan_in=True must'),
    ('resnet8', {'rule': 'best'}, "rule='best' is not one of learned, fixed"),
  ],
)
def test_what_cannot_be_made_is_named(name, options, message):
  arguments = {'num_classes': 2, 'width': 64 if 'branch' in str(options) else 4}
  with pytest.raises(InputError, match=message) as error:
    create_model(name, **arguments | options)
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 400


def test_numbers_of_numpy_are_numbers():
  model = create_model(
    'resnet8', num_classes=np.int64(3), width=np.int32(4), fan_in=np.uint8(2)
  )
  assert model.stack.fan_in == 2
  assert model.head.out_features == 3


@pytest.mark.parametrize(
  ('blocks', 'options', 'message'),
  [
    (0, {}, 'number of blocks=0 must be at least 1'),
    (2, {'fan_in': 0}, 'fan_in=0 must be at least 1'),
    (2, {'fan_in': 1.5}, 'fan_in=1.5 must be a whole number'),
    (2, {'fan_in': True}, 'fan_in=True must be a whole number'),
    (2, {'fan_in': None}, 'fan_in=None must be a whole number'),
    (2, {'rule': None}, 'rule=None is not one of'),
    (2, {'valid': ((True,),)}, r'valid is of shape \(1, 1\); 2 blocks need'),
    (2, {'valid': ((True, True), (True, True))}, 'a source that comes after'),
    (2, {'valid': ((True, False), (False, False))}, 'without a source'),
  ],
)
def test_a_stack_that_cannot_be_made_is_named(blocks, options, message):
  layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(blocks)]
  with pytest.raises(InputError, match=message):
    MaskedStack(layers, **{'fan_in': 1, 'rngs': nnx.Rngs(0)} | options)


@pytest.mark.parametrize(
  ('branches', 'message'),
  [
    ((), 'number of blocks=0 must be at least 2'),
    ((2,), 'number of blocks=1 must be at least 2'),
    ((2, 3), 'all blocks need as many branches, not 2 and 3'),
  ],
)
def test_a_stack_of_branches_that_cannot_be_made_is_named(branches, message):
  blocks = [
    BranchBlock(2, 2, 2, branches=count, rngs=nnx.Rngs(0)) for count in branches
  ]
  with pytest.raises(InputError, match=message):
    BranchStack(blocks, WiringSpec(level='branch'), rngs=nnx.Rngs(0))


@pytest.mark.parametrize('option', ['adapter', 'scale', 'gradient', 'rule'])
def test_a_misspelt_option_is_refused(option):
  with pytest.raises(InputError, match=f"{option}='pol' is not one of"):
    create_model('resnet8', num_classes=2, **{option: 'pol'})


def test_a_head_may_have_a_batch_norm_before_it():
  """In NumPy, from what the head without it reads; it has three parts of it."""
  plain, normed = small((1,)), small((1,), head_norm=True)
  x = images(6)
  graph, state = nnx.split(normed)

  @functools.partial(jax.jit, static_argnums=0)
  def run(train, state, x):
    model = nnx.merge(graph, state, copy=True)
    stem = model.stem(x, train=train)
    pooled = model.pool(model.stack(stem, train=train))
    return pooled, model(x, train=train)

  assert plain.head_norm is None
  kernel = np.asarray(plain.head.kernel[...], np.float64)
  for train in (True, False):
    pooled, logits = run(train, state, x)
    pooled = np.asarray(pooled, np.float64)
    mean, var = (pooled.mean(0), pooled.var(0)) if train else (0, 1)
    expected = (pooled - mean) / np.sqrt(var + 1e-5) @ kernel
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
