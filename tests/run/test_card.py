"""The model card, read as a hub reads it: by a YAML parser."""

import json
import re

import jax
import pytest
import yaml

from maskconnect_jax.run import card


@pytest.fixture(scope='module')
def written(finished):
  return (finished.workdir / 'model/README.md').read_text('utf-8')


def test_the_front_matter_is_what_hubs_read(written, finished):
  _, front, _ = written.split('---\n', 2)
  record = yaml.safe_load(front)
  assert record['license'] == 'unknown'
  assert record['library_name'] == 'maskconnect_jax'
  assert record['pipeline_tag'] == 'image-classification'
  assert record['datasets'] == ['digits']
  assert record['metrics'] == ['accuracy']
  assert {'jax', 'resnet8'} <= set(record['tags'])
  (result,) = record['model-index'][0]['results']
  summary = json.loads((finished.workdir / 'summary.json').read_text())
  assert result['metrics'][0]['value'] == summary['test_accuracy_pruned']


def test_every_picture_it_shows_lies_beside_it(written, finished):
  shown = re.findall(r'!\[[^\]]*\]\(([^)]+)\)', written)
  assert shown == ['topology.png']
  picture = (finished.workdir / 'model/topology.png').read_bytes()
  assert picture == (finished.workdir / 'figures/topology.png').read_bytes()


def test_it_names_accuracy_and_classes(written, finished):
  accuracy = finished.summary['test_accuracy_pruned']
  assert f'| test accuracy | {accuracy:.2%} of 360 images |' in written
  assert '| classes | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |' in written
  software = f'jax {jax.__version__}, jaxlib {jax.lib.__version__}, flax'
  assert software in written


def test_no_name_breaks_it(tiny_config, finished):
  names = ['a|b', 'x\ny', '\udcff', '<script>', '[a](http://b)', '"q": 1']
  names += [f'n{i}' for i in range(30)]
  tiny_config.data.name = 'evil"\n---\nlicense: mine\udcff'
  text = card.text(
    tiny_config, finished.summary, classes=names, image_shape=(8, 8, 1)
  )
  text.encode('utf-8')
  _, front, body = text.split('---\n', 2)
  assert yaml.safe_load(front)['license'] == 'unknown'
  (row,) = re.findall(r'^\| classes \|.*$', body, re.MULTILINE)
  assert row.replace(r'\|', '').count('|') == 3
  assert 'and 16 more' in row
  assert '<script>' not in body
