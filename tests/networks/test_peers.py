"""Published networks as others build them, with random weights.

torchvision's and timm's own, and the graph of ResNet-50 in the onnx wheel. CI
has none of them: pip install torchvision timm onnx, and `make slow`.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskconnect_jax.networks import models, published


def drawn(network, torch):
  """Draws weights, and statistics as of a trained network, in float64."""
  generator = torch.Generator().manual_seed(0)
  network = network.double().eval()
  for name, array in network.state_dict().items():
    if name.endswith('running_var'):
      array.copy_(torch.rand(array.shape, generator=generator) + 0.5)
    elif name.endswith(('running_mean', 'bias')):
      array.copy_(0.1 * torch.randn(array.shape, generator=generator))
    elif name.endswith('weight') and array.ndim == 1:
      array.copy_(1 + 0.1 * torch.randn(array.shape, generator=generator))
  return network


def logits(name, weights, images, classes=7):
  """Our network's logits in float64, from weights under published names."""
  with jax.enable_x64():
    model = models.create_model(
      name, num_classes=classes, rule='fixed_prev', dtype='float64'
    )
    found, unknown = published.renamed(weights, model.stages)
    assert unknown == []
    graph, state = nnx.split(model)
    # As it is, float64: a run would take it as float32.
    state = nnx.from_flat_state(
      (key, leaf.replace(jnp.asarray(found.pop('/'.join(map(str, key))))))
      for key, leaf in nnx.to_flat_state(state)
    )
    assert not found  # one to one
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, images)


@pytest.mark.slow
@pytest.mark.parametrize('library', ['torchvision', 'timm'])
@pytest.mark.parametrize(
  'name', ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnext50_32x4d']
)
def test_logits_are_theirs(library, name, tmp_path):
  torch = pytest.importorskip('torch')
  peer = pytest.importorskip(library)
  if library == 'torchvision':
    network = peer.models.get_model(name, weights=None, num_classes=7)
  else:
    network = peer.create_model(name, pretrained=False, num_classes=7)
  network = drawn(network, torch)
  path = tmp_path / 'weights.pth'
  torch.save(network.state_dict(), path)
  images = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
  with torch.no_grad():
    theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
  ours = logits(name, published.read(path), images)
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * scale)


def torchvisions_name(name):
  """'gpu_0/res3_0_branch2a_bn_rm_0' as 'layer2.0.bn1.running_mean'."""
  kinds = {'s': 'weight', 'b': 'bias', 'rm': 'running_mean',
           'riv': 'running_var'}  # fmt: skip
  parts = name.removeprefix('gpu_0/').removesuffix('_0').split('_')
  if parts[0] == 'pred':
    return f'fc.{"weight" if parts[1] == "w" else "bias"}'
  if parts[0] == 'conv1':
    return 'conv1.weight'
  if parts[:2] == ['res', 'conv1']:
    return f'bn1.{kinds[parts[3]]}'
  block = f'layer{int(parts[0][3:]) - 1}.{parts[1]}'
  norm = parts[3] == 'bn'
  kind = kinds[parts[4]] if norm else 'weight'
  if parts[2] == 'branch1':
    return f'{block}.downsample.{int(norm)}.{kind}'
  number = 'abc'.index(parts[2][-1]) + 1
  return f'{block}.{"bn" if norm else "conv"}{number}.{kind}'


@pytest.mark.slow
def test_logits_are_those_of_the_onnx_wheels_graph():
  """ResNet-50 of Caffe2, run in float64 by onnx's reference evaluator.

  The wheel's graph fills its weights by ConstantOfShape. Drawn ones take their
  place. Its epsilon is 1e-5 but for 7e-13, and so the bound is 1e-10. It is run
  as of operator set 15: the evaluator's BatchNormalization of set 9 takes the
  batch's own mean and variance (onnxruntime takes the running ones).
  """
  onnx = pytest.importorskip('onnx')
  reference = pytest.importorskip('onnx.reference')
  path = Path(onnx.__file__).parent / 'backend/test/data/light'
  graph = onnx.load(path / 'light_resnet50.onnx').graph
  rng, weights, kept = np.random.default_rng(0), {}, []
  shapes = {
    array.name: tuple(array.dims)
    for array in graph.initializer
    if array.name.startswith('gpu_0/') and 'queue' not in array.name
    and not array.name.endswith('__SHAPE')
  }  # fmt: skip
  of = {a.name: onnx.numpy_helper.to_array(a) for a in graph.initializer}
  for node in graph.node:
    if node.op_type == 'ConstantOfShape':
      shapes[node.output[0]] = tuple(of[node.input[0]])
    else:
      kept.append(node)
  for name, shape in sorted(shapes.items()):
    drawn = rng.normal(size=shape)
    if name.endswith('_riv_0'):
      drawn = rng.uniform(0.5, 1.5, shape)
    elif name.endswith('_s_0'):
      drawn = 1 + 0.1 * drawn
    elif len(shape) > 1:
      drawn /= np.sqrt(np.prod(shape[1:]))
    weights[name] = drawn
  others = [
    array for array in graph.initializer
    if array.name not in shapes and not array.name.endswith('__SHAPE')
  ]  # fmt: skip
  double = onnx.TensorProto.DOUBLE
  network = onnx.helper.make_model(
    onnx.helper.make_graph(
      kept,
      'resnet50',
      [onnx.helper.make_tensor_value_info(
        'gpu_0/data_0', double, (1, 3, 224, 224))],
      # Before the softmax.
      [onnx.helper.make_tensor_value_info(
        kept[-2].output[0], double, (1, 1000))],
      [onnx.numpy_helper.from_array(a, n) for n, a in weights.items()] + others,
    ),
    opset_imports=[onnx.helper.make_opsetid('', 15)],
  )  # fmt: skip
  images = rng.normal(size=(1, 224, 224, 3))
  (theirs,) = reference.ReferenceEvaluator(network).run(
    None, {'gpu_0/data_0': images.transpose(0, 3, 1, 2)}
  )
  assert theirs.dtype == np.float64
  named = {torchvisions_name(name): array for name, array in weights.items()}
  assert len(named) == len(weights) == 267
  ours = logits('resnet50', named, images, classes=1000)
  scale = np.abs(theirs).max()
  assert scale > 0.1
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * scale)
