"""Every network of the registry, in both forms, against published counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskconnect_jax
from maskconnect_jax.method import wiring
from maskconnect_jax.networks import architectures, cost, models
from maskconnect_jax.run import describe, optimizer

# At fixed_prev: method tables for CIFAR (100 classes), torchvision's model
# tables for ImageNet (1000).
PUBLISHED = {
  'resnet38': (100, 0.567e6, 5e-4),
  'resnet74': (100, 1.151e6, 5e-4),
  'resnet110': (100, 1.734e6, 5e-4),
  'resnext29_8x64d': (100, 34.5e6, 1e-3),
  'resnet18': (1000, 11689512, 0),
  'resnet34': (1000, 21797672, 0),
  'resnet50': (1000, 25557032, 0),
  'resnet101': (1000, 44549160, 0),
  'resnext50_32x4d': (1000, 25028904, 0),
  'resnext101_32x4d': (1000, 44.18e6, 1e-3),
  'resnext101_64x4d': (1000, 83455272, 0),
}


def counted_by_hand(own, classes, *, width=None, channels=3, level='block'):
  """Parameters of an architecture, layer by layer."""
  first = wide = width or own.width
  total = (49 if own.large_images else 9) * channels * wide + 2 * wide
  for stage, depth in enumerate(own.blocks_per_stage):
    width = first * 2**stage
    for position in range(depth):
      if not own.bottleneck:
        total += 9 * (wide * width + width**2) + 4 * width
        if own.large_images and stage and position == 0:
          total += wide * width + 2 * width  # the shortcut's
        wide = width
        continue
      inner = width
      if own.branch_width:
        inner = own.cardinality * own.branch_width * width // own.width
      # 1x1, 3x3 in groups, 1x1; the BatchNorms of the first two.
      total += wide * inner + 9 * inner**2 // own.cardinality
      total += inner * 4 * width + 4 * inner
      if level == 'branch':  # a BatchNorm for each branch, no projection
        total += own.cardinality * 8 * width
      else:
        total += 8 * width
        if position == 0:
          total += wide * 4 * width + 8 * width
      wide = 4 * width
  return total + classes * wide + classes


@pytest.fixture(autouse=True)
def forget_network():
  """Lets go of a test's programs, each of a network that no other test has.

  All of them are more memory maps than Linux grants a process (65,530), and
  XLA crashes where it gets no more.
  """
  yield
  jax.clear_caches()


def abstract(name, **options):
  return nnx.eval_shape(
    lambda: maskconnect_jax.create_model(name, rule='fixed_prev', **options)
  )


@pytest.mark.parametrize('name', maskconnect_jax.list_models())
def test_parameter_count(name):
  classes, published, tolerance = PUBLISHED.get(name, (100, None, None))
  count = cost.count_parameters(abstract(name, num_classes=classes))
  if published:
    assert count == pytest.approx(published, rel=tolerance, abs=0.5)
  assert count == counted_by_hand(architectures.architecture_of(name), classes)


RULES = ('learned', 'fixed_prev', 'fixed_random', 'fixed_all')
# One of each kind in the suite; all names under every rule with `make slow`.
KINDS = {
  ('resnet20', 'block', 'learned'),
  ('resnet50', 'block', 'learned'),
  ('resnext20_8x4d', 'block', 'fixed_random'),
  ('resnext20_8x4d', 'branch', 'learned'),
  ('resnext50_32x4d', 'branch', 'fixed_random'),
}
CASES = [
  pytest.param(
    *case, marks=() if case in KINDS else pytest.mark.slow, id='-'.join(case)
  )
  for case in (
    (name, level, rule)
    for name in maskconnect_jax.list_models()
    for level in ('block', 'branch')
    if level == 'block' or 'resnext' in name
    for rule in RULES
  )
]


def one_step(model, x, y):
  """Takes a training step; returns the loss and the model after it."""
  graph, weights, masks, statistics = nnx.split(
    model, nnx.Param, wiring.RealMask, nnx.BatchStat
  )
  transform = optimizer.partitioned(
    optax.sgd(0.1),
    optimizer.masks_transform(lambda step: 0.1, model.stack.valid),
  )

  @jax.jit
  def step(params, statistics):
    def loss_of(params):
      model = nnx.merge(
        graph, params['weights'], params['masks'], statistics, copy=True
      )
      logits = model(x, model.draw(jax.random.key(1)), train=True)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return losses.mean(), nnx.state(model, nnx.BatchStat)

    (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(
      params
    )
    updates, _ = transform.update(gradients, transform.init(params), params)
    return loss, optax.apply_updates(params, updates), statistics

  loss, params, statistics = step(
    {'weights': weights, 'masks': masks}, statistics
  )
  return loss, nnx.merge(
    graph, params['weights'], params['masks'], statistics, copy=True
  )


@pytest.mark.parametrize(('name', 'level', 'rule'), CASES)
def test_trains_freezes_and_prunes(reduced, name, level, rule):
  model = maskconnect_jax.create_model(
    name,
    num_classes=7,
    fan_in=1,
    rule=rule,
    learner='draws',
    level=level,
    width=16,
    seed=3,
  )
  large = architectures.architecture_of(name).large_images
  rng = np.random.default_rng(0)
  side = 32 if large else 8
  x = jnp.asarray(rng.normal(size=(4, side, side, 3)), jnp.float32)
  for _ in range(2):
    loss, model = one_step(model, x, jnp.arange(4))
    assert np.isfinite(loss)
  frozen = wiring.freeze(model)
  pruned = wiring.prune(frozen)
  run = nnx.jit(lambda model: model(x))
  logits = run(frozen)
  assert logits.shape == (4, 7)
  np.testing.assert_allclose(run(pruned), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('name', 'level', 'rule'), CASES)
def test_is_described(reduced, by_xla, tiny_config, name, level, rule):
  fan_in = 2
  tiny_config.model.name, tiny_config.model.width = name, 16
  tiny_config.connectivity.level = level
  tiny_config.connectivity.rule = rule
  tiny_config.connectivity.fan_in = fan_in
  text = describe.describe(tiny_config)

  own = architectures.architecture_of(name)
  depth = len(own.blocks_per_stage)
  if level == 'block':  # block j has j sources
    rows = range(1, depth + 1)
  else:
    rows = [own.cardinality] * own.cardinality * (depth - 1)
  takes = {'fixed_prev': 1, 'fixed_all': sum(rows)}.get(rule, fan_in)
  edges = sum(min(takes, sources) for sources in rows)
  count = counted_by_hand(own, 10, width=16, channels=1, level=level)
  assert f'{name}, {depth} blocks, {count:,} parameters\n' in text
  assert f'Total: {count:,}' in text
  assert (
    f'{rule}, {level}-level, {edges:,} edges of {sum(rows):,} valid,' in text
  )
  moves = 'per epoch; masks move for the first 12, '
  assert (moves in text) == (rule == 'learned')


def test_resnet50_is_the_ordinary_one():
  """Against a ResNet-50 written out, on the same parameters: equal logits."""
  model = maskconnect_jax.create_model(
    'resnet50', num_classes=5, rule='fixed_prev', width=8
  )
  for block in model.stack.blocks:
    assert not block.norm3.scale[...].any()  # zero-initialised
    block.norm3.scale.set_value(jnp.full_like(block.norm3.scale[...], 0.7))
  x = jnp.asarray(
    np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32
  )

  def conv(x, layer, stride, pad):
    return jax.lax.conv_general_dilated(
      x,
      layer.kernel[...],
      (stride, stride),
      ((pad, pad), (pad, pad)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  def norm(x, layer):
    return layer(x, use_running_average=True)

  relu = jax.nn.relu
  y = relu(norm(conv(x, model.stem.conv, 2, 3), model.stem.norm))
  y = jax.lax.reduce_window(
    y,
    -jnp.inf,
    jax.lax.max,
    (1, 3, 3, 1),
    (1, 2, 2, 1),
    ((0, 0), (1, 1), (1, 1), (0, 0)),
  )
  blocks = iter(model.stack.blocks)
  for stage, depth in enumerate((3, 4, 6, 3)):
    for position in range(depth):
      block = next(blocks)
      stride = 2 if stage and not position else 1
      shortcut = y
      if position == 0:
        shortcut = norm(
          conv(y, block.shortcut_conv, stride, 0), block.shortcut_norm
        )
      z = relu(norm(conv(y, block.conv1, 1, 0), block.norm1))
      z = relu(norm(conv(z, block.conv2, stride, 1), block.norm2))
      y = relu(norm(conv(z, block.conv3, 1, 0), block.norm3) + shortcut)
  assert y.shape == (2, 2, 2, 256)
  np.testing.assert_allclose(
    model(x), model.head(y.mean((1, 2))), rtol=1e-5, atol=1e-5
  )


def test_a_bottleneck_depth_beside_the_registry():
  own = architectures.architecture_of('resnet164_bottleneck')
  assert own.blocks_per_stage == (18, 18, 18)
  with pytest.raises(models.InputError, match='9n.2'):
    architectures.architecture_of('resnet165_bottleneck')
