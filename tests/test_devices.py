"""One step on eight devices is one step on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskconnect_jax import convolution
from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.networks import layers, models
from maskconnect_jax.run import optimizer, steps

RNG = np.random.default_rng(0)
BATCH, CLASSES = 16, 3
IMAGES = RNG.integers(0, 256, (BATCH, 8, 8, 1), np.uint8)
LABELS = RNG.integers(0, CLASSES, BATCH, np.int32)


RESNET = models.Architecture((2, 1), width=4)
RESNEXT = models.Architecture(
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
  return model


def step_on(count, model, parts=1):
  """One compiled training step, what it gives, and what evaluation does."""
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
  whole = NamedSharding(mesh, PartitionSpec())
  sharded = NamedSharding(mesh, PartitionSpec('data'))
  recipe = steps.Recipe(
    temperature=lambda _: 1.0,
    network=steps.split(model)[0],
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
    batch_sharding=sharded,
    parts=parts,
  )
  state = jax.device_put(steps.init_state(model, recipe), whole)
  images, labels = jax.device_put((IMAGES, LABELS), sharded)
  compiled = (
    jax.jit(steps.train_step, static_argnums=0)
    .lower(recipe, state, images, labels)
    .compile()
  )
  after, metrics = compiled(state, images, labels)
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
      np.random.default_rng(3).uniform(size=(4, *np.shape(model.stack.valid)))
      < 0.7
    ) | np.eye(np.shape(model.stack.valid)[-1], dtype=bool)
    sums['differences'] = jax.jit(steps.differences, static_argnums=(0, 6))(
      recipe,
      (after.weights, after.masks, after.statistics),
      images,
      labels,
      0,
      jax.device_put(masks.astype(np.float32), whole),
      2,
    )
  assert metrics['loss'].sharding.device_set == set(jax.devices()[:count])
  return jax.device_get((state, after, metrics, sums)), compiled


@pytest.mark.parametrize(
  ('level', 'architecture', 'rule', 'native', 'parts'),
  [
    ('block', RESNET, 'learned', False, 1),
    ('block', RESNET, 'fixed_random', False, 2),
    ('block', RESNEXT, 'learned', True, 1),
    ('branch', RESNEXT, 'learned', False, 1),
  ],
  ids=['resnet', 'resnet-fixed-parts', 'resnext', 'resnext-branch'],
)
def test_a_step_on_eight_devices_is_one_on_one(
  level, architecture, rule, native, parts, monkeypatch
):
  assert jax.device_count() >= 8
  if native:  # the grouped convolution of GPUs and TPUs, in shard_map
    monkeypatch.setattr(convolution, 'on_a_cpu', convolution.by_library)
  model = make(level, architecture, rule)
  (before, one, metrics, sums), alone = step_on(1, model, parts)
  (_, eight, metrics8, sums8), shared = step_on(8, model, parts)
  assert len(jax.tree.leaves(one.masks)) == (rule == 'learned')
  for a, b in zip(
    jax.tree.leaves((one, metrics)),
    jax.tree.leaves((eight, metrics8)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
  # All of it moved far more than that.
  for tree in ('weights', 'masks', 'statistics'):
    for a, b in zip(
      jax.tree.leaves(getattr(before, tree)),
      jax.tree.leaves(getattr(one, tree)),
      strict=True,
    ):
      assert np.abs(a - b).max() > 1e-4
  assert sums['count'] == sums8['count'] == 13
  assert sums['correct'] == sums8['correct']
  np.testing.assert_allclose(sums['loss'], sums8['loss'], rtol=1e-4)
  if rule == 'learned':
    assert np.abs(sums['differences']).max() > 1e-3
    np.testing.assert_allclose(
      sums['differences'], sums8['differences'], rtol=1e-3, atol=1e-4
    )
  # The work is shared, not done eight times over.
  flops = [program.cost_analysis()['flops'] for program in (alone, shared)]
  assert flops[1] < flops[0] / 4


def test_batch_norm_is_over_the_whole_batch():
  # Every device holds one number: its own variance would be 0.
  mesh = Mesh(
    np.array(jax.devices()[:8]), ('data',), axis_types=(AxisType.Auto,)
  )
  x = np.repeat(np.arange(8.0, dtype=np.float32), 2)[:, None, None, None]
  x = np.broadcast_to(x, (16, 2, 2, 3))
  norm = layers.BatchNorm(3, dtype=jnp.float32)
  inputs = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
  network, state = nnx.split(norm)

  @jax.jit
  def run(state, x):
    norm = nnx.merge(network, state, copy=True)
    return norm(x, use_running_average=False)

  np.testing.assert_allclose(
    run(state, inputs), (x - 3.5) / np.sqrt(5.25 + 1e-5), rtol=1e-4
  )
