"""Workdirs made by hand, and a reader of pages."""

from __future__ import annotations

import base64
import html.parser
import json
from pathlib import Path

import numpy as np
import pytest

from maskconnect_jax import config as config_lib

VOID = {'meta', 'link', 'img', 'input', 'br'}


class Element:
  """An element of a page: its name, attributes, children and text."""

  def __init__(self, name, attributes):
    self.name, self.attributes = name, dict(attributes)
    self.children, self.words = [], ''

  def get(self, name):
    return self.attributes.get(name) or ''

  def all(self, kind):
    """Every element below with this name or class."""
    for child in self.children:
      if child.name == kind or kind in child.get('class').split():
        yield child
      yield from child.all(kind)

  def all_elements(self):
    for child in self.children:
      yield child
      yield from child.all_elements()

  @property
  def text(self):
    parts = [self.words, *(child.text for child in self.children)]
    return ' '.join(' '.join(parts).split())


class Page(html.parser.HTMLParser):
  """Parses a page; fails if its elements do not close one another."""

  def __init__(self, text):
    super().__init__()
    self.root = Element('', {})
    self.open = [self.root]
    self.feed(text)
    self.close()
    assert self.open == [self.root]

  def handle_starttag(self, tag, attributes):
    element = Element(tag, attributes)
    self.open[-1].children.append(element)
    if tag not in VOID:
      self.open.append(element)

  def handle_startendtag(self, tag, attributes):
    self.open[-1].children.append(Element(tag, attributes))

  def handle_endtag(self, tag):
    assert self.open.pop().name == tag

  def handle_data(self, data):
    self.open[-1].words += data


@pytest.fixture(scope='session')
def parsed():
  return lambda path: Page(Path(path).read_text('utf-8')).root


@pytest.fixture(scope='session')
def levels_of():
  """The real masks that a page holds, int [T, cells], in hundredths."""

  def read(page):
    (stored,) = (e for e in page.all('script') if e.get('id') == 'masks')
    record = json.loads(stored.words)
    levels = np.frombuffer(base64.b64decode(record['levels']), np.uint8)
    return record['steps'], levels.reshape(len(record['steps']), -1)

  return read


def write_run(folder, *, rows=None, branches=None, seed=0, summary=None, **own):
  """Writes the files of a finished run of nine blocks, or of six by eight."""
  config = config_lib.default()
  config.seed = seed
  config.data.source = 'digits'
  config.model.name = 'resnext20_8x4d' if branches else 'resnet20'
  config.connectivity.level = 'branch' if branches else 'block'
  config.connectivity.fan_in = 2
  for name, value in own.items():
    config.connectivity[name] = value
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(config.to_json())
  plan = dict.fromkeys(
    ('log_every', 'evaluate_every', 'checkpoint_every', 'per_epoch'), 5
  )
  plan |= {'total': 100, 'freeze': 40, 'moments': 4, 'measuring': 10}
  plan['schema'] = 'maskconnect_jax.plan/1'
  (folder / 'plan.json').write_text(json.dumps(plan))
  lines = [
    {
      'step': step,
      'phase': 'connectivity' if step <= 40 else 'fine-tune',
      'epoch': step / 5,
      'loss': 2 / step,
      'accuracy': 1 - 1 / step,
      'learning_rate': 0.1,
      'mask_learning_rate': 0.0,
      'images_per_second': 1000.0,
    }
    for step in range(10, 101, 10)
  ]
  (folder / 'metrics.jsonl').write_text(
    ''.join(f'{json.dumps(line)}\n' for line in lines)
  )
  if branches:
    blocks = [
      {'block': 1, 'branches': [{'branch': c, 'sources': []} for c in range(8)]}
    ]
    blocks += [
      {
        'block': at,
        'branches': [
          {'branch': c, 'sources': row} for c, row in enumerate(part)
        ],
      }
      for at, part in enumerate(branches, start=2)
    ]
    form = {'form': 'branch', 'num_blocks': 6, 'num_branches': 8}
  else:
    blocks = [{'block': j, 'sources': row} for j, row in enumerate(rows, 1)]
    form = {'form': 'block', 'num_blocks': 9}
  (folder / 'topology.json').write_text(
    json.dumps(
      {'schema': 'maskconnect_jax.topology/1', 'blocks': blocks, **form}
    )
  )
  if summary is not None:
    summary = {
      'model': config.model.name, 'rule': config.connectivity.rule, 'fan_in': 2,
      'seed': seed, 'test_accuracy': 0.91, 'test_accuracy_pruned': 0.905,
      'num_test_examples': 360, 'num_train_examples': 1437, 'blocks': 9,
      'blocks_pruned': 8, 'parameters': 269434, 'parameters_pruned': 200000,
      'multiply_adds': 2516608, 'multiply_adds_pruned': 2000000,
      'images_per_second': 100.0, 'num_devices': 1, 'device': 'cpu',
      'steps': 100, 'train_seconds': 25.0, 'jax': '0.10.2', **summary,
    }  # fmt: skip
    (folder / 'summary.json').write_text(json.dumps(summary))
  return folder


@pytest.fixture(scope='session')
def make_run():
  return write_run


@pytest.fixture(scope='session')
def narrowing_rows():
  """Two sources a block, of nine blocks; nobody reads block 5."""
  return [[0], [0, 1], [0, 2], [1, 3], [2, 4], [3, 4], [4, 6], [6, 7], [7, 8]]


@pytest.fixture(scope='session')
def narrowed(tmp_path_factory, make_run, narrowing_rows):
  """A measured run of nine blocks that narrowed twice."""
  folder = make_run(
    tmp_path_factory.mktemp('runs') / 'a<b>&"run',
    rows=narrowing_rows,
    summary={'choices': 7, 'choices_clear': 3, 'margin': -0.25,
             'margin_standard_error': 0.125,
             'class_accuracy': {'<i>cat</i>': 0.5, 'dog': 1.0},
             'confusion': {'<i>cat</i>': {'<i>cat</i>': 2, 'dog': 2},
                           'dog': {'dog': 6}}},
  )  # fmt: skip
  masks = np.repeat(np.tril(np.ones((9, 9), np.float32))[None], 3, 0)
  for j, row in enumerate(narrowing_rows):
    for i in range(j + 1):
      if i not in row:
        masks[1 if i % 2 else 2 :, j, i] = 0.2 if i % 2 else 0.6
  np.savez(folder / 'real_masks.npz', steps=np.array([10, 20, 40]), masks=masks)
  images = np.zeros((3, 8, 8, 1), np.uint8)
  np.savez(
    folder / 'examples.npz', images=images, labels=np.array([0, 1, 1]),
    predicted=np.array([1, 1, 1]),
  )  # fmt: skip
  inputs = {
    'schema': 'maskconnect_jax.inputs/1',
    'data': {
      'train': 4,
      'test': 10,
      'classes': ['<i>cat</i>', 'dog'],
      'digest': 'x',
    },
    'topology': None,
  }
  (folder / 'inputs.json').write_text(json.dumps(inputs))
  return folder


@pytest.fixture(scope='session')
def branched(tmp_path_factory, make_run):
  """A run of six blocks of eight branches, with drawn masks."""
  parts = [[[c, (c + 1) % 8][:: 1 if c < 7 else -1] for c in range(8)]] * 5
  parts = [[sorted(row) for row in part] for part in parts]
  folder = make_run(
    tmp_path_factory.mktemp('runs') / 'branched', branches=parts, summary={
      'branches': 48, 'branches_pruned': 48}, learner='draws',
  )  # fmt: skip
  masks = np.random.default_rng(0).random((4, 5, 8, 8), np.float32)
  steps = np.array([10, 20, 30, 40])
  np.savez(folder / 'real_masks.npz', steps=steps, masks=masks)
  return folder
