"""The branch-level form against the equations written down as they stand.

The oracle holds every x_c and y_c at full width, one branch at a time, and
shares no code with `branches.py`: plain jax.lax convolutions and NumPy's
formulas for BatchNorm.
"""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskconnect_jax
from maskconnect_jax.method import connectivity, wiring
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.networks import architectures, cost, models
from maskconnect_jax.run import inference

# Four blocks of eight branches, the stages as in resnext20_8x4d.
NETWORK = architectures.Architecture(
  (1, 2, 1), width=64, bottleneck=True, cardinality=8, branch_width=4
)
CLASSES, WIDTH, SIZE = 5, 16, 8
EPSILON = 1e-5


def make(fan_in=3, **options):
  return models.create_model(
    NETWORK,
    level='branch',
    num_classes=CLASSES,
    fan_in=fan_in,
    width=WIDTH,
    initial_spread=0.5,
    **{'learner': 'draws'} | options,
  )


def shaken(model, seed=0):
  """The model with scales, biases and statistics that are not 0 or 1."""
  rng = np.random.default_rng(seed)
  model = nnx.clone(model)
  for block in model.stack.blocks:
    for part in (block, block.norm1, block.norm2):
      for name in ('scale', 'var'):
        variable = getattr(part, name)
        variable.set_value(
          jnp.asarray(rng.uniform(0.5, 1.5, variable.shape), jnp.float32)
        )
      for name in ('bias', 'mean'):
        variable = getattr(part, name)
        variable.set_value(
          jnp.asarray(rng.normal(size=variable.shape) * 0.1, jnp.float32)
        )
  return model


def images(count=4, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(count, SIZE, SIZE, 3)), jnp.float32)


def conv(x, kernel, stride=1):
  pad = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((pad, pad), (pad, pad)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def normalized(x, scale, bias, mean, var, train):
  if train:
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias


def adapted(x, like):
  factor = x.shape[1] // like.shape[1]
  n, h, w, c = x.shape
  x = x.reshape(n, h // factor, factor, w // factor, factor, c).mean((2, 4))
  return jnp.concatenate(
    [x, jnp.zeros((*x.shape[:3], like.shape[3] - c), x.dtype)], -1
  )


def reference(model, x, masks, s, train, first=1 / 8):
  """Returns the logits, every branch computed by itself at full width.

  s is `first` in the first block, whose branches share the stem. It is a number
  or [L-1, C].
  """
  values = {
    '/'.join(map(str, path)): leaf[...]
    for path, leaf in nnx.to_flat_state(nnx.state(model))
  }

  def norm(x, name, part=slice(None)):
    parts = [values[f'{name}/{p}'][part] for p in ('scale', 'bias')]
    stats = [values[f'{name}/{p}'][part] for p in ('mean', 'var')]
    return normalized(x, *parts, *stats, train)

  stem = jax.nn.relu(norm(conv(x, values['stem/conv/kernel']), 'stem/norm'))
  inputs, outputs = [stem] * 8, []
  for index, block in enumerate(model.stack.blocks):
    own = f'stack/blocks/{index}'
    if index:
      inputs = [
        sum(masks[index - 1][c][k] * outputs[k] for k in range(8))
        for c in range(8)
      ]
    outputs = []
    for c in range(8):
      w = values[f'{own}/reduce'].shape[-1]
      part = slice(c * w, (c + 1) * w)
      h = conv(inputs[c], values[f'{own}/reduce'][c][None, None])
      h = jax.nn.relu(norm(h, f'{own}/norm1', part))
      h = conv(h, values[f'{own}/conv2/kernel'][..., part], block.stride)
      h = jax.nn.relu(norm(h, f'{own}/norm2', part))
      z = conv(h, values[f'{own}/expand'][c][None, None])
      z = norm(z, own, c) / np.sqrt(8)
      share = (
        np.broadcast_to(s, (len(masks), 8))[index - 1][c] if index else first
      )
      outputs.append(z + share * adapted(inputs[c], z))
  pooled = sum(outputs).mean((1, 2))
  return pooled @ values['head/kernel'] + values['head/bias']


@pytest.mark.parametrize('fan_in', [1, 4])
def test_the_head_reads_the_stem_once_before_training(fan_in):
  """Every branch starts as its shortcut, so nothing else is there to read.

  The curvature in the head's kernel grows with the square of that scale.
  """
  model = make(fan_in)
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, x):
    model = nnx.merge(graph, state, copy=True)
    mask = model.draw(jax.random.key(0))
    return model.stem(x, train=True), model(x, mask, train=True)

  stem, logits = map(np.asarray, run(state, images()))
  kernel = np.asarray(model.head.kernel[...])[: stem.shape[-1]]
  np.testing.assert_allclose(
    logits, stem.mean((1, 2)) @ kernel, rtol=1e-4, atol=1e-5
  )


def test_one_drawn_chain_of_branches_trains_at_the_ordinary_rate():
  """With a sum 8 times as large the loss rose to 4.4, from 1.67."""
  steps, batch, rng = 32, 32, np.random.default_rng(0)
  labels = rng.integers(0, CLASSES, (steps, batch))
  means = 0.5 * rng.normal(size=(CLASSES, SIZE, SIZE, 3))
  pixels = means[labels] + rng.normal(size=(steps, batch, SIZE, SIZE, 3))
  model = models.create_model(
    NETWORK,
    level='branch',
    num_classes=CLASSES,
    fan_in=1,
    width=32,
    learner='draws',
  )
  network, weights, rest = nnx.split(model, nnx.Param, ...)
  transform = optax.sgd(0.1, momentum=0.9, nesterov=True)

  @jax.jit
  def step(weights, state, key, x, y):
    def loss_of(weights):
      model = nnx.merge(network, weights, rest, copy=True)
      logits = model(x, model.draw(key), train=True)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, gradient = jax.value_and_grad(loss_of)(weights)
    updates, state = transform.update(gradient, state, weights)
    return optax.apply_updates(weights, updates), state, loss

  state, losses = transform.init(weights), []
  for key, x, y in zip(
    jax.random.split(jax.random.key(1), steps), pixels, labels, strict=True
  ):
    weights, state, loss = step(weights, state, key, jnp.float32(x), y)
    losses.append(float(loss))
  assert max(losses) < 2
  assert np.mean(losses[-8:]) < 1.55 < np.log(CLASSES)


def in_float64(model):
  """The model with every array widened, computing in float64."""
  graph, state = nnx.split(model)
  model = nnx.merge(graph, jax.tree.map(lambda v: v.astype(jnp.float64), state))
  for _, module in nnx.iter_modules(model):
    if hasattr(module, 'dtype'):
      module.dtype = jnp.dtype('float64')
  return model


@pytest.mark.parametrize(('fan_in', 'train'), [(3, True), (8, False)])
def test_logits_equal_the_equations_at_full_width(fan_in, train):
  with jax.enable_x64():
    model = in_float64(shaken(make(fan_in)))
    x = images().astype(jnp.float64)
    masks = connectivity.draw(
      jax.random.key(3),
      model.stack.real_mask[...],
      model.stack.valid,
      fan_in,
    )
    graph, state = nnx.split(model)
    expected, actual = jax.jit(
      lambda state, x, masks: (
        reference(nnx.merge(graph, state), x, masks, 1 / fan_in, train),
        nnx.merge(graph, state, copy=True)(x, masks, train=train),
      )
    )(state, x, masks)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('identity', ['1/K', '1'])
def test_a_mask_may_have_any_number_of_ones_in_a_row(identity):
  """s = 1/k_c holds for each branch by itself; the authors' s is 1."""
  with jax.enable_x64():
    model = in_float64(shaken(make(3, identity=identity)))
    x = images(2).astype(jnp.float64)
    rng = np.random.default_rng(8)
    masks = (rng.uniform(size=(3, 8, 8)) < 0.4).astype(np.float64)
    masks[..., 0] = 1  # no row is empty
    assert len(np.unique(masks.sum(-1))) > 3
    s = 1 / masks.sum(-1) if identity == '1/K' else 1.0
    graph, state = nnx.split(model)
    expected, actual = jax.jit(
      lambda state, x: (
        reference(
          nnx.merge(graph, state), x, masks, s, True,
          first=1 / 8 if identity == '1/K' else 1.0,
        ),
        nnx.merge(graph, state, copy=True)(x, jnp.asarray(masks), train=True),
      )
    )(state, x)  # fmt: skip
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_gradient_of_the_masks_matches_central_differences():
  """With s = 1/C, which does not follow the number of ones that moves here."""
  with jax.enable_x64():
    model = in_float64(shaken(make(3, identity='1/C')))
    x = images(2).astype(jnp.float64)
    graph, state = nnx.split(model)
    real = model.stack.real_mask[...]
    drawn = connectivity.draw(jax.random.key(5), real, model.stack.valid, 3)
    direction = jnp.asarray(
      np.random.default_rng(1).normal(size=CLASSES), jnp.float64
    )

    @jax.jit
    def loss(masks):
      model = nnx.merge(graph, state, copy=True)
      return jnp.sum(jnp.tanh(model(x, masks, train=True)) @ direction)

    through = jax.grad(lambda r: loss(connectivity.straight_through(r, drawn)))(
      real
    )
    seen = set()
    for place in itertools.product((0, 1, 2), (0, 5), range(8)):
      h = 1e-5
      up = loss(drawn.at[place].add(h))
      down = loss(drawn.at[place].add(-h))
      np.testing.assert_allclose(
        through[place], (up - down) / (2 * h), rtol=1e-5, atol=1e-8
      )
      seen.add(float(drawn[place]))
    assert seen == {0.0, 1.0}


@pytest.mark.parametrize('fan_in', [1, 3, 8])
def test_every_draw_has_exactly_k_ones_per_row(fan_in):
  model = make(fan_in)
  one = np.eye(8)[[3, 0, 7, 7, 1, 2, 5, 4]]  # a positive entry in each row
  spread = np.asarray(model.stack.real_mask[...])
  for real in (0 * spread, one, 1e-30 * one, 0.5, 1.0, spread):
    model.stack.real_mask.set_value(
      jnp.broadcast_to(jnp.asarray(real, jnp.float32), spread.shape)
    )
    masks = jax.vmap(model.draw)(jax.random.split(jax.random.key(0), 64))
    assert masks.shape == (64, 3, 8, 8)
    assert np.isin(masks, (0, 1)).all()
    assert (np.asarray(masks).sum(-1) == fan_in).all()


def test_full_fan_in_is_the_ordinary_network_but_for_relu_and_norm():
  """K = C: the streams' sum is the ordinary residual stream.

  Up to three things: no relu after the addition, the last BatchNorm of a
  block normalises each branch and not their sum (folded here, which running
  statistics allow), and shapes change by pool and zeros, not by projection.
  """
  model = shaken(make(8, rule='fixed_all'))
  for block in model.stack.blocks:  # one gain for all branches, as in a sum
    gain = block.scale[...][:1] / jnp.sqrt(block.var[...][:1] + EPSILON)
    block.scale.set_value(gain * jnp.sqrt(block.var[...] + EPSILON))
  x = images()
  values = model.stem(x)
  for block in model.stack.blocks:
    branches, width, features = block.expand.shape
    ordinary = jnp.moveaxis(block.reduce[...], 0, 1).reshape(
      1, 1, -1, branches * width
    )
    h = jax.nn.relu(
      block.norm1(conv(values, ordinary), use_running_average=True)
    )
    h = jax.lax.conv_general_dilated(
      h,
      block.conv2.kernel[...],
      (block.stride, block.stride),
      ((1, 1), (1, 1)),
      feature_group_count=branches,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    h = jax.nn.relu(block.norm2(h, use_running_average=True))
    z = conv(h, block.expand[...].reshape(1, 1, branches * width, features))
    gain = block.scale[...][0] / jnp.sqrt(block.var[...][0] + EPSILON)
    z = (z - block.mean[...].sum(0)) * gain + block.bias[...].sum(0)
    z /= np.sqrt(8)
    values = z + adapted(values, z)
  expected = model.head(values.mean((1, 2)))
  np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('rule', ['learned', 'fixed_random', 'fixed_prev'])
def test_freeze_and_prune_leave_the_logits(rule):
  model = shaken(make(1, rule=rule))
  frozen = wiring.freeze(model)
  pruned = wiring.prune(frozen)
  masks = np.zeros((3, 8, 8), np.float32)
  for i, rows in enumerate(frozen.topology.sources):
    for c, row in enumerate(rows):
      masks[i, c, list(row)] = 1
  x = images()
  run = nnx.jit(lambda model: model(x))
  expected = nnx.jit(
    lambda model: reference(model, x, masks, 1.0, train=False)
  )(frozen)
  np.testing.assert_allclose(run(frozen), expected, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(run(pruned), expected, rtol=1e-3, atol=1e-4)


def test_pruned_branches_are_gone_from_arrays_and_program():
  frozen = wiring.freeze(shaken(make(1)))
  pruned = wiring.prune(frozen)
  # A branch lives if a path of ones leads from it to the last block.
  paths = np.eye(8)
  alive = [8]
  for rows in reversed(frozen.topology.sources):
    matrix = np.zeros((8, 8))
    for c, row in enumerate(rows):
      matrix[c, list(row)] = 1
    paths = paths @ matrix
    alive.append(int((paths.sum(0) > 0).sum()))
  alive.reverse()
  assert min(alive) < 8
  assert [block.reduce.shape[0] for block in pruned.stack.blocks] == alive
  per_branch = []
  for block in frozen.stack.blocks:
    _, wide, width = block.reduce.shape
    features = block.expand.shape[-1]
    per_branch.append(
      wide * width + 9 * width**2 + 4 * width + width * features + 2 * features
    )
  gone = sum((8 - n) * p for n, p in zip(alive, per_branch, strict=True))
  assert cost.count_parameters(frozen) - cost.count_parameters(pruned) == (gone)

  def flops(model):
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return run.lower(state, images()).compile().cost_analysis()['flops']

  assert flops(pruned) < 0.95 * flops(frozen)


def test_a_saved_model_predicts_the_same(tmp_path):
  architecture = {
    'name': 'resnext20_8x4d',
    'num_classes': CLASSES,
    'width': WIDTH,
    'level': 'branch',
    'initial_spread': 0.5,
    'fan_in': 3,
  }
  frozen = wiring.freeze(shaken(models.create_model(**architecture)))
  inference.save(
    tmp_path / 'model',
    wiring.prune(frozen),
    architecture=architecture,
    classes=[str(c) for c in range(CLASSES)],
    image_shape=(16, 16, 3),
    resize=0,
    mean=(0, 0, 0),
    std=(64, 64, 64),
  )
  photos = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
  expected = jax.nn.softmax(frozen(jnp.asarray(photos / 64, jnp.float32)))
  assert np.ptp(expected) > 0.1
  predicted = inference.load(tmp_path / 'model').predict(photos)
  np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-4)


def test_a_model_saved_before_versions_predicts_what_it_did(tmp_path):
  architecture = {
    'name': 'resnext20_8x4d',
    'num_classes': CLASSES,
    'width': WIDTH,
    'level': 'branch',
    'fan_in': 3,
    'version': '1',
  }
  frozen = wiring.freeze(shaken(models.create_model(**architecture)))
  pruned = wiring.prune(frozen)
  inference.save(
    tmp_path / 'model',
    pruned,
    architecture=architecture,
    classes=[str(c) for c in range(CLASSES)],
    image_shape=(SIZE, SIZE, 3),
    resize=0,
    mean=(0, 0, 0),
    std=(64, 64, 64),
  )
  path = tmp_path / 'model/model.json'
  record = json.loads(path.read_text())
  del record['architecture']['version']
  path.write_text(json.dumps(record))
  photos = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), 'u1')
  masks = np.zeros((5, 8, 8), np.float32)
  for i, rows in enumerate(frozen.topology.sources):
    for c, row in enumerate(rows):
      masks[i, c, list(row)] = 1
  expected = reference(
    frozen, jnp.asarray(photos / 64, jnp.float32), masks, 1 / 3, False, 1 / 3
  )
  logits = inference.load(tmp_path / 'model').logits(photos)
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_topology_round_trip_and_errors():
  topology = wiring.freeze(make(2)).topology
  record = json.loads(json.dumps(topology.to_dict()))
  assert topology_lib.from_dict(record) == topology
  assert record['form'] == 'branch'
  with pytest.raises(ValueError, match='branch 1 of block 2'):
    topology_lib.BranchTopology((((0,), (2,)),))
  with pytest.raises(ValueError, match='distinct'):
    topology_lib.BranchTopology((((0, 0), (1,)),))


def test_masks_stay_in_the_box_and_move():
  from maskconnect_jax.run import optimizer

  model = make(2)
  transform = optimizer.masks_transform(lambda step: 10.0, model.stack.valid)
  r = model.stack.real_mask[...]
  state = transform.init(r)
  rng = np.random.default_rng(0)
  for _ in range(5):
    gradient = jnp.asarray(rng.normal(size=r.shape), jnp.float32)
    update, state = transform.update(gradient, state, r)
    r = r + update
    assert 0 <= float(r.min()) <= float(r.max()) <= 1
  assert float(r.max()) == 1
  assert float(r.min()) == 0


def test_a_network_without_branches_is_refused():
  with pytest.raises(
    maskconnect_jax.networks.models.InputError, match='no branches'
  ):
    maskconnect_jax.create_model('resnet20', num_classes=2, level='branch')


def test_features_of_a_block_are_the_mean_of_its_branches_sum():
  """The head's kernel on those of the last block gives the logits."""
  model = wiring.freeze(shaken(make(3)))
  x = images(2)
  last = model.features(x)
  np.testing.assert_allclose(
    last @ model.head.kernel[...] + model.head.bias[...], model(x), atol=1e-4
  )
  np.testing.assert_array_equal(last, model.features(x, 4))
  outputs = model.stack.outputs(model.stem(x))
  assert [y.shape[-1] for y in outputs] == [
    block.expand.shape[-1] for block in model.stack.blocks
  ]
