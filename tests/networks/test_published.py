"""Published weights: a network written out in their own names and layout."""

from __future__ import annotations

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from maskconnect_jax.errors import InputError
from maskconnect_jax.networks import architectures, models, published
from maskconnect_jax.run import init_from, train_state

DEPTHS, WIDTH, CLASSES = (2, 1, 2, 1), 8, 5
NETWORK = architectures.Architecture(
  DEPTHS, width=64, bottleneck=True, large_images=True
)
RESNEXT = architectures.Architecture(
  DEPTHS, width=64, bottleneck=True, large_images=True, cardinality=4,
  branch_width=32,
)  # fmt: skip


BASIC = architectures.Architecture(DEPTHS, width=64, large_images=True)


def shapes(depths, width, classes, groups=1, inner_of=lambda w: w):
  """Name and shape of every array, as torchvision's constructor makes them."""
  found = {}

  def norm(name, size):
    for kind in ('weight', 'bias', 'running_mean', 'running_var'):
      found[f'{name}.{kind}'] = (size,)
    found[f'{name}.num_batches_tracked'] = ()

  found['conv1.weight'] = (width, 3, 7, 7)
  norm('bn1', width)
  channels = width
  for stage, depth in enumerate(depths):
    wide = width * 2**stage
    inner, out = (inner_of(wide), 4 * wide) if inner_of else (wide, wide)
    for block in range(depth):
      name = f'layer{stage + 1}.{block}'
      if inner_of:
        found[f'{name}.conv1.weight'] = (inner, channels, 1, 1)
        norm(f'{name}.bn1', inner)
        found[f'{name}.conv2.weight'] = (inner, inner // groups, 3, 3)
        norm(f'{name}.bn2', inner)
        found[f'{name}.conv3.weight'] = (out, inner, 1, 1)
        norm(f'{name}.bn3', out)
      else:  # a basic block
        found[f'{name}.conv1.weight'] = (out, channels, 3, 3)
        norm(f'{name}.bn1', out)
        found[f'{name}.conv2.weight'] = (out, out, 3, 3)
        norm(f'{name}.bn2', out)
      if block == 0 and (stage or inner_of):
        found[f'{name}.downsample.0.weight'] = (out, channels, 1, 1)
        norm(f'{name}.downsample.1', out)
      channels = out
  found['fc.weight'], found['fc.bias'] = (classes, channels), (classes,)
  return found


def drawn(shapes, seed=0):
  rng = np.random.default_rng(seed)
  arrays = {}
  for name, shape in shapes.items():
    if name.endswith('tracked'):
      arrays[name] = np.array(7)
    elif 'running_var' in name:
      arrays[name] = rng.uniform(0.5, 2, shape)
    else:
      fan = np.prod(shape[1:]) if len(shape) > 1 else 4
      arrays[name] = rng.normal(size=shape) / np.sqrt(fan)
      if name.endswith('weight') and len(shape) == 1:
        arrays[name] += 1
  return arrays


def forward(w, x, depths, groups):
  """The published network, in NCHW, from its own names."""

  def conv(x, name, stride=1, groups=1):
    kernel = w[f'{name}.weight']
    pad = (kernel.shape[-1] - 1) // 2
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), ((pad, pad), (pad, pad)),
      dimension_numbers=('NCHW', 'OIHW', 'NCHW'), feature_group_count=groups,
    )  # fmt: skip

  def norm(x, name):
    own = {
      kind: w[f'{name}.{kind}'][:, None, None]
      for kind in ('weight', 'bias', 'running_mean', 'running_var')
    }
    x = (x - own['running_mean']) / jnp.sqrt(own['running_var'] + 1e-5)
    return x * own['weight'] + own['bias']

  x = jax.nn.relu(norm(conv(x, 'conv1', 2), 'bn1'))
  x = jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2),
    ((0, 0), (0, 0), (1, 1), (1, 1)),
  )  # fmt: skip
  for stage, depth in enumerate(depths):
    for block in range(depth):
      name, stride = f'layer{stage + 1}.{block}', 1 + (stage > 0 and block == 0)
      if f'{name}.conv3.weight' in w:
        y = jax.nn.relu(norm(conv(x, f'{name}.conv1'), f'{name}.bn1'))
        y = conv(y, f'{name}.conv2', stride, groups)
        y = jax.nn.relu(norm(y, f'{name}.bn2'))
        y = norm(conv(y, f'{name}.conv3'), f'{name}.bn3')
      else:
        y = jax.nn.relu(norm(conv(x, f'{name}.conv1', stride), f'{name}.bn1'))
        y = norm(conv(y, f'{name}.conv2'), f'{name}.bn2')
      if f'{name}.downsample.0.weight' in w:
        x = norm(
          conv(x, f'{name}.downsample.0', stride), f'{name}.downsample.1'
        )
      x = jax.nn.relu(x + y)
  return x.mean((2, 3)) @ w['fc.weight'].T + w['fc.bias']


@pytest.mark.parametrize(
  ('network', 'groups', 'inner_of'),
  [(NETWORK, 1, lambda w: w), (RESNEXT, 4, lambda w: 2 * w), (BASIC, 1, None)],
  ids=['resnet', 'resnext', 'basic'],
)
def test_logits_are_those_of_the_published_network(network, groups, inner_of):
  with jax.enable_x64():
    weights = drawn(shapes(DEPTHS, WIDTH, CLASSES, groups, inner_of))
    found, unknown = published.renamed(weights, network.stages)
    assert unknown == []
    model = models.create_model(
      network, num_classes=CLASSES, width=WIDTH, rule='fixed_prev',
      dtype='float64',
    )  # fmt: skip
    graph, state = nnx.split(model)
    own = {
      '/'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)
    }
    assert own.keys() == found.keys()  # one to one
    state = nnx.from_flat_state(
      (path, leaf.replace(jnp.asarray(found['/'.join(map(str, path))])))
      for path, leaf in nnx.to_flat_state(state)
    )
    x = np.random.default_rng(1).normal(size=(2, 64, 64, 3))
    ours, theirs = jax.jit(
      lambda state, w, x: (
        nnx.merge(graph, state)(x),
        forward(w, x.transpose(0, 3, 1, 2), DEPTHS, groups),
      )
    )(state, weights, x)
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
  ('name', 'depths', 'entries'),
  [
    ('resnet18', (2, 2, 2, 2), 122),
    ('resnet34', (3, 4, 6, 3), 218),
    ('resnet50', (3, 4, 6, 3), 320),
    ('resnet101', (3, 4, 23, 3), 626),
  ],
)
def test_every_array_of_a_published_network_has_a_place(name, depths, entries):
  """The number of entries is that of torchvision's state_dict."""
  inner_of = (lambda width: width) if entries >= 320 else None
  expected = shapes(depths, 64, 1000, inner_of=inner_of)
  assert len(expected) == entries
  model = nnx.eval_shape(
    lambda: models.create_model(name, num_classes=1000, rule='fixed_prev')
  )
  weights = {
    key: np.broadcast_to(np.float32(0), shape)
    for key, shape in expected.items()
  }
  found, unknown = published.renamed(weights, model.stages)
  assert unknown == []
  own = {
    '/'.join(map(str, path)): leaf.shape
    for path, leaf in nnx.to_flat_state(nnx.state(model))
  }
  assert {key: array.shape for key, array in found.items()} == own


@pytest.fixture
def saved(tmp_path):
  weights = {
    name: np.asarray(array, np.float32)
    for name, array in drawn(shapes(DEPTHS, WIDTH, 9)).items()
  }
  path = tmp_path / 'weights.safetensors'
  save_file(weights, path)
  return path, weights


def test_a_run_begins_with_published_weights(saved):
  """Other classes: the head begins anew; what is left over is named."""
  path, weights = saved
  save_file(weights | {'layer9.0.conv1.weight': np.zeros(3)}, path)
  model = models.create_model(
    NETWORK, num_classes=CLASSES, width=WIDTH, fan_in=2
  )
  model, line = init_from.filled(model, path)
  np.testing.assert_array_equal(
    model.stem.conv.kernel[...], weights['conv1.weight'].transpose(2, 3, 1, 0)
  )
  np.testing.assert_array_equal(
    model.stack.blocks[2].shortcut_norm.var[...],
    weights['layer2.0.downsample.1.running_var'],
  )
  assert 'head/kernel [256, 5] (is [256, 9] there)' in line
  assert 'not used: layer9.0.conv1.weight' in line
  assert jax.tree.leaves(train_state.split(model)[2])  # the real mask is there


@pytest.mark.parametrize(
  'name',
  [
    'layer1.9.conv1.weight', 'layer5.0.conv1.weight', 'layer1.0.conv1.bias',
    'layer1.0.bn4.weight', 'conv2.weight', 'bn1.gamma', 'fc.gamma', 'layer1',
  ],
)  # fmt: skip
def test_names_that_are_none_of_ours(name):
  found, unknown = published.renamed({name: np.zeros(1)}, NETWORK.stages)
  assert (found, unknown) == ({}, [name])


def test_a_damaged_file_is_one_line(tmp_path):
  path = tmp_path / 'w.safetensors'
  for content in (b'', b'\xff' * 100, b'{}'):
    path.write_bytes(content)
    with pytest.raises(InputError, match='holds no weights') as error:
      published.read(path)
    assert '\n' not in str(error.value)


def test_a_pickle_needs_pytorch_or_is_told_how_to_convert(
  tmp_path, monkeypatch
):
  path = tmp_path / 'w.pth'
  path.write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(
    InputError, match=r'torch.load\(.w.pth., weights_only=True'
  ):
    published.read(path)


@pytest.mark.skipif(
  importlib.util.find_spec('torch') is None, reason='PyTorch is not installed'
)
def test_a_pickle_that_runs_code_is_refused(tmp_path):
  import pickle

  class Bomb:
    def __reduce__(self):
      return (open, (str(tmp_path / 'ran'), 'w'))

  path = tmp_path / 'w.pth'
  path.write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(InputError, match='holds no weights'):
    published.read(path)
  assert not (tmp_path / 'ran').exists()
