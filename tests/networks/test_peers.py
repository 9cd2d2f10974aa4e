"""Published networks as torchvision and timm build them, with random weights.

CI has neither: pip install torchvision timm, and `make slow`.
"""

from __future__ import annotations

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
  with jax.enable_x64():
    model = models.create_model(
      name, num_classes=7, rule='fixed_prev', dtype='float64'
    )
    found, unknown = published.renamed(published.read(path), model.stages)
    assert unknown == []
    graph, state = nnx.split(model)
    # As it is, float64: a run would take it as float32.
    state = nnx.from_flat_state(
      (key, leaf.replace(jnp.asarray(found.pop('/'.join(map(str, key))))))
      for key, leaf in nnx.to_flat_state(state)
    )
    assert not found  # one to one
    ours = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, images)
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * scale)
