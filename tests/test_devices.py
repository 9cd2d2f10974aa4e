"""One step on four devices is one step on one, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskconnect_jax import convolution
from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.networks import architectures, layers, models
from maskconnect_jax.run import measure, optimizer, steps, train_state

RNG = np.random.default_rng(0)
BATCH, CLASSES = 16, 3
IMAGES = RNG.integers(0, 256, (BATCH, 8, 8, 1), np.uint8)
LABELS = RNG.integers(0, CLASSES, BATCH, np.int32)


RESNET = architectures.Architecture((2, 1), width=4)
RESNEXT = architectures.Architecture(
  (1, 1), width=8, bottleneck=True, cardinality=4, branch_width=2
)


def make(level, architecture, rule):
  spec = WiringSpec(level=level, fan_in=2, rule=rule, learner='draws')
  model = models.create_model(
    architecture, num_classes=CLASSES, in_channels=1, spec=spec, seed=2
  )
  if level == 'branch':  # with a scale of 0 the branches would not train yet
    for block in model.stack.blocks:
      block.scale.set_value(jnp.ones_like(block.scale[...]))
  for _, module in nnx.iter_modules(model):
    if hasattr(module, 'dtype'):
      module.dtype = jnp.dtype('float64')
  graph, state = nnx.split(model)
  wide = jax.tree.map(lambda x: x.astype(jnp.float64), state)
  return nnx.merge(graph, wide)


def recipe_on(count, model, **options):
  """The recipe of a step on the first devices."""
  transform = optimizer.partitioned(
    optimizer.weights_transform(
      lambda _: 0.1,
      momentum=0.9,
      nesterov=True,
      weight_decay=1e-4,
      decay_all=False,
    ),
    optimizer.masks_transform(lambda _: 0.1, model.stack.valid),
  )
  mesh = Mesh(
    np.array(jax.devices()[:count]), ('data',), axis_types=(AxisType.Auto,)
  )
  plain: dict[str, object] = dict(  # noqa: C408
    temperature=lambda _: 1.0,
    network=train_state.split(model)[0],
    optimizer=transform,
    seed=1,
    pad=1,
    flip=True,
    mean=(120.0,),
    std=(70.0,),
    mixup=0.2,
    cutmix=1.0,
    erasing=0.5,
    drop_path=0.2 * (model.stack.spec.level == 'block'),
    class_weights=(0.5,) + (1.0,) * (model.head.out_features - 1),
    label_smoothing=0.0,
    average=0.9,
    batch_sharding=NamedSharding(mesh, PartitionSpec('data')),
  )
  return train_state.Recipe(**plain | options)


def step_on(count, model, **options):
  """One compiled training step, what it gives, and what evaluation does."""
  recipe = recipe_on(count, model, **options)
  sharded = recipe.batch_sharding
  whole = NamedSharding(sharded.mesh, PartitionSpec())
  state = train_state.on_devices(recipe, train_state.init_state(model, recipe))
  images, labels = jax.device_put((IMAGES, LABELS), sharded)
  compiled = (
    jax.jit(steps.train_step, static_argnums=0)
    .lower(recipe, state, images, labels)
    .compile()
  )
  after, metrics = compiled(state, images, labels)
  for one, other in zip(
    jax.tree.leaves(state), jax.tree.leaves(after), strict=True
  ):
    assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
  batch = jax.device_put((IMAGES, LABELS, np.arange(BATCH) < 13), sharded)
  sums = jax.jit(steps.eval_step, static_argnums=0)(
    recipe,
    after.variables(),
    *batch,
    jax.device_put(jax.random.key(2), whole),
    0,
  )
  if jax.tree.leaves(state.masks):
    masks = (
      np.random.default_rng(3).uniform(size=(5, *np.shape(model.stack.valid)))
      < 0.7
    ) | np.eye(np.shape(model.stack.valid)[-1], dtype=bool)
    sums['differences'] = jax.jit(measure.differences, static_argnums=(0, 7))(
      recipe,
      (after.weights, after.masks, after.statistics),
      images,
      labels,
      0,
      jax.device_put(masks.astype(np.float32), whole),
      len(masks) - 1,
      2,
    )
  assert metrics['loss'].sharding.device_set == set(jax.devices()[:count])
  return jax.device_get((state, after, metrics, sums)), compiled


@pytest.mark.parametrize(
  ('level', 'architecture', 'rule', 'native', 'parts', 'shard'),
  [
    ('block', RESNET, 'learned', False, 1, False),
    pytest.param(
      'block', RESNET, 'fixed_random', False, 2, True, marks=pytest.mark.slow
    ),
    pytest.param(
      'block', RESNEXT, 'learned', True, 1, False, marks=pytest.mark.slow
    ),
    pytest.param(
      'branch', RESNEXT, 'learned', False, 1, False, marks=pytest.mark.slow
    ),
    pytest.param(
      'block', RESNEXT, 'learned', True, 1, True, marks=pytest.mark.slow
    ),
    pytest.param(
      'branch', RESNEXT, 'learned', False, 2, True, marks=pytest.mark.slow
    ),
  ],
  ids=[
    'resnet', 'resnet-fixed-parts-sharded', 'resnext', 'resnext-branch',
    'resnext-sharded', 'resnext-branch-parts-sharded',
  ],
)  # fmt: skip
def test_a_step_on_four_devices_is_one_on_one(
  level, architecture, rule, native, parts, shard, monkeypatch
):
  assert jax.device_count() >= 4
  monkeypatch.setattr(train_state, '_SMALL', 0)
  if native:  # the grouped convolution of GPUs and TPUs, in shard_map
    monkeypatch.setattr(convolution, 'on_a_cpu', convolution.by_library)
  with jax.enable_x64(True):
    model = make(level, architecture, rule)
    (before, one, metrics, sums), alone = step_on(1, model, parts=parts)
    (_, four, metrics4, sums4), shared = step_on(
      4, model, parts=parts, shard=shard
    )
  assert len(jax.tree.leaves(one.masks)) == (rule == 'learned')
  assert {leaf.dtype for leaf in jax.tree.leaves(one.weights)} == {
    np.dtype(np.float64)
  }
  for a, b in zip(
    jax.tree.leaves((one, metrics)),
    jax.tree.leaves((four, metrics4)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
  # It moved far more than that, but for a block that nothing read.
  for tree in ('weights', 'masks', 'statistics'):
    moved = [
      np.abs(a - b).max() > 1e-6
      for a, b in zip(
        jax.tree.leaves(getattr(before, tree)),
        jax.tree.leaves(getattr(one, tree)),
        strict=True,
      )
    ]
    assert np.mean(moved) > 0.6 if moved else rule != 'learned'
  assert sums['count'] == sums4['count'] == 13
  assert sums['correct'] == sums4['correct']
  np.testing.assert_allclose(sums['loss'], sums4['loss'], rtol=1e-12)
  if rule == 'learned':
    assert np.abs(sums['differences']).max() > 1e-3
    np.testing.assert_allclose(
      sums['differences'], sums4['differences'], rtol=1e-10, atol=1e-11
    )
  # The work is shared, not done four times over.
  flops = [program.cost_analysis()['flops'] for program in (alone, shared)]
  assert flops[1] < flops[0] / 3
  # And so is the memory, of a state that is sharded.
  held = [p.memory_analysis().argument_size_in_bytes for p in (alone, shared)]
  assert (held[1] < held[0] / 2) == shard


@pytest.mark.parametrize(
  ('level', 'architecture'),
  [
    ('block', RESNET),
    pytest.param('block', RESNEXT, marks=pytest.mark.slow),
    pytest.param('branch', RESNEXT, marks=pytest.mark.slow),
  ],
)
def test_statistics_of_each_device_are_those_of_its_images(
  level, architecture, monkeypatch
):
  """The step is linear in the gradient: it is the mean of the devices' own."""
  monkeypatch.setattr(convolution, 'on_a_cpu', convolution.by_library)
  plain = {
    'pad': 0, 'flip': False, 'mixup': 0.0, 'cutmix': 0.0, 'erasing': 0.0,
    'drop_path': 0.0, 'class_weights': (),
  }  # fmt: skip
  with jax.enable_x64(True):
    model = make(level, architecture, 'fixed_random')
    program = jax.jit(steps.train_step, static_argnums=0)
    results = []
    for count, options in ((1, plain), (4, plain | {'own_statistics': True})):
      recipe = recipe_on(count, model, **options)
      state = train_state.on_devices(
        recipe, train_state.init_state(model, recipe)
      )
      size = BATCH // 4 if count == 1 else BATCH
      each = []
      for start in range(0, BATCH, size):
        batch = IMAGES[start : start + size], LABELS[start : start + size]
        batch = jax.device_put(batch, recipe.batch_sharding)
        after, metrics = program(recipe, state, *batch)
        each.append((after.weights, after.statistics, metrics))
      results.append(jax.device_get(each))
    means = jax.tree.map(lambda *x: np.mean(x, 0), *results[0])
  for a, b in zip(
    jax.tree.leaves(means), jax.tree.leaves(results[1][0]), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
  one = jax.tree.leaves(results[0][0][0])
  assert max(np.abs(a - b).max() for a, b in zip(
    one, jax.tree.leaves(means[0]), strict=True
  )) > 1e-3  # fmt: skip


def test_batch_norm_is_over_the_whole_batch():
  # Every device holds one number: its own variance would be 0.
  mesh = Mesh(
    np.array(jax.devices()[:4]), ('data',), axis_types=(AxisType.Auto,)
  )
  x = np.repeat(np.arange(4.0, dtype=np.float32), 4)[:, None, None, None]
  x = np.broadcast_to(x, (16, 2, 2, 3))
  norm = layers.BatchNorm(3, dtype=jnp.float32)
  inputs = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
  network, state = nnx.split(norm)

  @jax.jit
  def run(state, x):
    norm = nnx.merge(network, state, copy=True)
    return norm(x, use_running_average=False)

  np.testing.assert_allclose(
    run(state, inputs), (x - 1.5) / np.sqrt(1.25 + 1e-5), rtol=1e-4
  )
