"""What --mode=describe says, against counts made by hand."""

import json
import re
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import networkx
import pytest
from flax import nnx

from maskconnect_jax import config
from maskconnect_jax.networks import cost, models
from maskconnect_jax.run import describe


@pytest.fixture(scope='module')
def text(tiny):
  import runpy

  return describe.describe(runpy.run_path(str(tiny))['get_config']())


def number(pattern, text):
  (found,) = re.findall(pattern, text)
  return float(found.replace(',', ''))


def convolutions():
  """(pixels, inputs, outputs) of each 3x3 convolution; width 8 on 8x8."""
  yield 64, 1, 8
  for pixels, into, out in ((64, 8, 8), (16, 8, 16), (4, 16, 32)):
    yield pixels, into, out
    yield pixels, out, out


def test_parameters(text, finished):
  kernels = sum(9 * into * out for _, into, out in convolutions())
  norms = sum(2 * out for _, _, out in convolutions())
  total = kernels + norms + 32 * 10 + 10
  assert number(r'3 blocks, ([\d,]+) parameters', text) == total
  assert number(r'Total: ([\d,]+)', text) == total
  assert total == finished.summary['parameters']


def test_the_topology_as_a_graph(finished, tmp_path):
  """networkx counts nodes and edges of GraphML, XML those of SVG."""
  own = config.stored(finished.workdir)
  model = models.create_model(
    'resnet8', num_classes=10, in_channels=1, width=8,
    spec=config.wiring_spec(own),
  )  # fmt: skip
  stored = json.loads((finished.workdir / 'topology.json').read_text())
  learned = sum(len(block['sources']) for block in stored['blocks'])
  # Blocks 1, 2, 3 may read 1, 2, 3 sources; the head reads the last block.
  for workdir, edges in ((None, 6), (finished.workdir, learned)):
    path = tmp_path / 'graph.graphml'
    describe.write_graph(path, model, workdir)
    graph = networkx.read_graphml(path)
    assert graph.number_of_nodes() == 5
    assert graph.number_of_edges() == edges + 1
    describe.write_graph(path.with_suffix('.svg'), model, workdir)
    root = ET.parse(path.with_suffix('.svg')).getroot()
    drawn = [e for e in root.iter() if e.get('data-to')]
    assert len(drawn) == edges + 1
    describe.write_graph(path.with_suffix('.dot'), model, workdir)
    text = path.with_suffix('.dot').read_text()
    assert text.count('->') == edges + 1


def test_another_kind_of_graph_is_refused(cli, tiny, tmp_path):
  ran = cli('--mode=describe', f'--config={tiny}', f'--graph={tmp_path}/a.png')
  assert ran.code == 2
  assert ran.err.endswith('a.png must end in .svg, .dot, .graphml\n')


def test_layers(text):
  assert re.search(r'stem/conv/kernel.*\(3, 3, 1, 8\)', text)
  assert re.search(r'stack/blocks/2/conv2/kernel.*\(3, 3, 32, 32\)', text)
  assert re.search(r'head/kernel.*\(32, 10\)', text)


def test_wiring_data_and_run(text):
  # Blocks 1, 2, 3 have 1, 2, 3 sources, of which they take at most 2.
  assert '5 edges of 6 valid, fan-in 2\n' in text
  assert '8 x 8 x 1, 10 classes' in text
  assert '1,437 training, 0 validation, 360 test' in text
  assert '1.091 epochs, 24 steps of 64 images, 22 per epoch' in text
  assert 'masks move for the first 12, which is little' in text


def test_cost_of_a_step(text):
  products = 0
  for index, (pixels, into, out) in enumerate(convolutions()):
    # At the border a 3x3 kernel lies partly outside: at most (3n-2)^2 of
    # 9n^2 products of a side n are with pixels. Forward, the kernel's
    # gradient and, but for the first, the input's.
    side = int(pixels**0.5)
    products += (3 * side - 2) ** 2 * into * out * (3 if index else 2)
  per_device = 64 // jax.device_count()
  flops = number(r'a step +([\d,.]+) MFLOP', text) * 1e6
  assert 2 * products * per_device < flops < 20 * products * per_device
  # It must read its images, weights and momenta, and write the latter.
  accessed = number(r'([\d,.]+) MB accessed', text) * 1e6
  assert accessed > 64 / jax.device_count() * 64 + 4 * 4 * 19_074
  temporary = number(r'([\d,.]+) MB temporary', text)
  # A quarter of the batch on each of four devices.
  assert number(r'an image +([\d,.]+) MFLOP', text) == pytest.approx(
    flops / 1e6 / per_device,
    abs=0.06,  # one decimal is shown
  )
  assert number(r'([\d,.]+) MB of activations', text) == pytest.approx(
    temporary / per_device,
    abs=0.006,  # two decimals are shown
  )


def test_forward_products(text):
  # Once for each kernel entry and pixel of the output, whatever it lies on.
  products = sum(9 * p * into * out for p, into, out in convolutions())
  assert number(r'forward +([\d,.]+) M multiply-adds', text) == pytest.approx(
    (products + 32 * 10) / 1e6, abs=0.006
  )


def bottlenecks(depths, *, groups=1, width=64, side=224, classes=1000):
  """Multiply-adds of an ImageNet network, layer by layer, by hand."""
  side //= 2
  total = side**2 * 49 * 3 * 64
  side //= 2  # the pool
  into = 64
  for stage, depth in enumerate(depths):
    inner, out = width << stage, 256 << stage
    for block in range(depth):
      before = side
      if stage and not block:
        side //= 2
      total += before**2 * into * inner
      total += side**2 * 9 * inner * inner // groups
      total += side**2 * inner * out
      if not block:
        total += side**2 * into * out
      into = out
  return total + into * classes


@pytest.mark.parametrize(
  ('name', 'depths', 'groups', 'width', 'published'),
  [  # in 1e9, as torchvision's documentation gives them
    ('resnet50', (3, 4, 6, 3), 1, 64, 4.09),
    ('resnext50_32x4d', (3, 4, 6, 3), 32, 128, 4.23),
  ],
)
def test_forward_products_of_published_networks(
  name, depths, groups, width, published
):
  model = nnx.eval_shape(
    lambda: models.create_model(
      name, num_classes=1000, rule='fixed_prev', fan_in=1
    )
  )
  count = cost.forward_products(model, (224, 224, 3))
  assert count == bottlenecks(depths, groups=groups, width=width)
  assert round(count / 1e9, 2) == published


def test_time(text):
  step = number(r'([\d,.]+) ms a step', text)
  assert 0.1 < step < 60_000
  speed = number(r'([\d,]+) images per second', text)
  assert speed == pytest.approx(64 / step * 1e3, rel=0.05)
  minutes, seconds = re.search(r'(\d+):(\d+) for all', text).groups()
  assert int(minutes) * 60 + int(seconds) == pytest.approx(
    24 * step / 1e3, abs=1
  )


def test_bad_config(tiny_config):
  tiny_config.model.name = 'resnet9'
  with pytest.raises(config.InputError, match='6n'):
    describe.describe(tiny_config)


def test_products_of_a_choice_by_platform_count_once():
  class Chooses(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(jnp.ones((3, 5)))

    def __call__(self, x):
      return jax.lax.platform_dependent(
        x,
        cpu=lambda x: x @ (self.kernel[...] + 1) @ jnp.eye(5),
        default=lambda x: x @ self.kernel[...],
      )

  assert cost.forward_products(Chooses(), (4, 6, 3)) == 4 * 6 * 3 * 5
