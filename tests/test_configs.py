"""Every config on data of its format: described, and trained two steps."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import config as config_lib
from maskconnect_jax.run import (
  describe,
  distributed,
  experiment,
  loop,
  metrics,
  train_state,
)
from maskconnect_jax.study import sweep

FOLDER = Path(__file__).parents[1] / 'configs'
FILES = {
  path.stem: path
  for path in sorted(FOLDER.glob('*.py'))
  if path.stem != 'study'  # parts, each a sweep: below
}
WORDS = {
  'cifar': (
    '10', '10,branch', '100', '100,branch', '10,branch,as_published',
  ),
  'imagenet': ('', 'branch'),
  'mini_imagenet': ('', 'branch'),
}  # fmt: skip
CONFIGS = [
  f'{name}:{word}' if word else name
  for name in FILES
  for word in WORDS.get(name, ('',))
]
TRAIN, TEST = 24, 8
CLASSES = {'cifar10': 10, 'cifar100': 20, 'mini_imagenet': 20}


def noise(side=None, classes=3):
  """Images that show their class by colour."""
  rng = np.random.default_rng(0)

  def image(split, i):
    del split
    height, width = (side, side) if side else rng.integers(40, 70, 2)
    pixels = rng.integers(0, 99, (height, width, 3), np.uint8)
    pixels[..., 0] += np.uint8(150 * (i % classes) // classes)
    return Image.fromarray(pixels)

  return image


@pytest.fixture(scope='module')
def data_of(tmp_path_factory, write_tfds):
  """The fields of `config.data` that lead to a small set for a config."""
  root = tmp_path_factory.mktemp('data')
  for name, classes in CLASSES.items():
    side = None if name == 'mini_imagenet' else 32
    write_tfds(
      root / 'tfds',
      f'small_{name}',
      noise(side, classes),
      num_train=TRAIN,
      num_test=TEST,
      classes=[f'c{i:02}' for i in range(classes)],
      side=side or -1,
    )
  image = noise()
  for split, count in (('train', TRAIN), ('val', TEST)):
    for i in range(count):
      path = root / 'folder' / split / f'n{i % 3}' / f'{i}.JPEG'
      path.parent.mkdir(parents=True, exist_ok=True)
      image(split, i).save(path)
  (root / 'idx').mkdir()
  for part, count in (('train', TRAIN), ('t10k', TEST)):
    pixels = np.random.default_rng(1).integers(0, 256, (count, 28, 28), 'u1')
    for stem, array in (
      ('images', pixels),
      ('labels', (np.arange(count) % 4).astype('u1')),
    ):
      header = np.array([0x0800 + array.ndim, *array.shape], '>u4').tobytes()
      path = root / 'idx' / f'{part}-{stem}-idx{array.ndim}-ubyte'
      path.write_bytes(header + array.tobytes())

  def fields(data):
    if data.source == 'digits':
      return {}
    name = f'small_{data.name}' if data.name else ''
    return {'dir': str(root / data.source), 'name': name}

  return fields


# One of each kind of data and level; the others with `make slow`.
KINDS = {
  'cifar:10', 'cifar:10,branch', 'digits', 'fashion_mnist', 'imagenet',
  'image_folder',
}  # fmt: skip


def config_of(name):
  stem, colon, word = name.partition(':')
  get_config = runpy.run_path(str(FILES[stem]))['get_config']
  return get_config(word) if colon else get_config()


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
    for name in CONFIGS
  ],
)
def test_config(name, data_of, reduced, by_xla):
  config = config_of(name)
  config_lib.check(config)
  config.data.update(data_of(config.data))
  config.batch_size = config.eval_batch_size = 8
  config.model.width = 16
  if config.data.image_size > 32:
    config.data.image_size, config.data.eval_resize = 24, 28
  text = describe.describe(config)
  blocks = 4 if 'imagenet' in name else 3
  assert f'{config.model.name}, {blocks} blocks' in text
  if config.data.source != 'digits':
    assert f'{TRAIN} training, 0 validation, {TEST} test images' in text

  job = experiment.build(config)
  state = distributed.to_global(
    train_state.init_state(job.model, job.recipe),
    distributed.replicated(job.mesh),
  )
  batches = experiment.training_batches(job).starting_at(0)
  batch = next(batches)
  step = loop.compile_step(job.recipe, state, batch, metrics.ProgressBar(2, 0))
  before = jax.device_get(state.weights)
  for _ in range(2):
    state, values = step(state, *batch)
    assert np.isfinite(values['loss'])
    batch = next(batches)
  assert int(state.step) == 2
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max() > 0, before, jax.device_get(state.weights)
  )
  assert np.mean(jax.tree.leaves(moved)) > 0.5


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_opens_with_its_own_command(name):
  stem, colon, word = name.partition(':')
  text = FILES[stem].read_text(encoding='utf-8')
  header = text.split('"""')[1]
  assert f'--config=configs/{stem}.py{colon}{word} ' in header
  assert '--workdir=' in header
  assert re.search(r'\d (s|min) on|[Nn]ot yet run|not\s+yet\s+run', header)


def test_every_level_and_data_set_of_the_papers_has_a_config():
  for data in ('cifar:10', 'cifar:100', 'mini_imagenet', 'imagenet'):
    assert config_of(data).connectivity.level == 'block'
    branch = f'{data},branch' if ':' in data else f'{data}:branch'
    assert config_of(branch).connectivity.level == 'branch'
    assert config_of(branch).data == config_of(data).data


def test_cifar10_is_cifar_of_10_classes():
  assert config_of('cifar10') == config_of('cifar:10') == config_of('cifar')


@pytest.mark.parametrize(
  ('part', 'rows', 'seeds'),
  [
    ('learners', 12, 5),
    ('branches', 9, 5),
    ('wiring', 2, 5),
    ('settings', 22, 2),
    ('block', 12, 3),
    ('branch', 4, 3),
    ('topology', 3, 3),
    ('fashion', 4, 3),
    ('cpu-learners', 12, 5),
    ('cpu-branches', 9, 5),
    ('cpu-wiring', 2, 5),
    ('cpu-settings', 22, 2),
    ('cpu-block', 4, 3),
    ('cpu-topology', 3, 3),
    ('cpu-fashion', 4, 3),
  ],
)
def test_every_member_of_the_study_can_be(part, rows, seeds, tmp_path):
  config = runpy.run_path(str(FOLDER / 'study.py'))['get_config'](part)
  if part.endswith(('topology', 'wiring')):
    config.connectivity.topology = 'topology.json'
  members = sweep.members(config, tmp_path)
  assert len(members) == rows * seeds
  for member in members:
    config_lib.check(member.config)
