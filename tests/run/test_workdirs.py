"""Whose a folder is, and what a run in it was made from."""

import gzip
import json
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import config as config_lib
from maskconnect_jax import files
from maskconnect_jax.data import sources
from maskconnect_jax.run import train, workdirs

CHECKPOINT = 'checkpoints/4/state'  # of a step that was saved


def put(folder, *names, text='precious'):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name[-1] == '/':
      path.mkdir(exist_ok=True)
    else:
      path.write_text(text)


def refused(config, folder):
  """Returns the line; nothing in the folder may have changed."""
  before = {path: path.lstat().st_mtime_ns for path in folder.rglob('*')}
  with pytest.raises(config_lib.InputError) as raised:
    workdirs.check(config, folder)
  assert '\n' not in str(raised.value)
  assert before == {
    path: path.lstat().st_mtime_ns for path in folder.rglob('*')
  }
  return str(raised.value)


@pytest.fixture
def config():
  return config_lib.default()


# Whose it is.


@pytest.mark.parametrize(
  'name',
  [
    'model/net.py', 'model/weights.bin', 'summary.json', 'topology.json',
    'metrics.jsonl', 'checkpoints/best.pt', 'checkpoints/100/weights.bin',
    'figures/topology.png', 'tensorboard/events.out.tfevents.1',
    'real_masks.npz', 'inputs.json', 'config.json/file', 'thesis.tex',
    'train/ant/1.jpg', 'seed0/config.json', 'a.log/file',
  ],
)  # fmt: skip
def test_somebody_elses_folder(name, config, tmp_path):
  put(tmp_path, name, '.DS_Store')
  line = refused(config, tmp_path)
  assert f"{tmp_path} holds '{name.partition('/')[0]}', and no" in line
  assert 'DS_Store' not in line


def test_much_of_it_is_not_all_named(config, tmp_path):
  put(tmp_path, *'abcdefg')
  assert "'a', 'b', 'c', 'd', 'e' and 2 more" in refused(config, tmp_path)


@pytest.mark.parametrize(
  'names',
  [
    [],
    ['.DS_Store', '.git/config', 'lost+found/', 'Thumbs.db', '@eaDir/x'],
    ['checkpoints/', 'figures/.DS_Store'],  # nothing to lose
    ['log.txt', 'slurm-12.out', 'run.err', 'train.log', 'nohup.out'],
  ],
)
def test_a_run_may_begin_here(names, config, tmp_path):
  put(tmp_path, *names)
  workdirs.check(config, tmp_path)
  workdirs.check(config, tmp_path / 'new/run')


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ('{"model_type": "vit"}', 'is not of a run'),
    ('{"model": {"name": "resnet38"}, "data": {}}', 'is not of a run'),
    ('{}', 'is not of a run'),
    ('[]', 'is not of a run'),
    ('null', 'is not of a run'),
    ('{', 'is damaged'),
    ('[' * 100_000, 'is damaged'),
  ],
)
def test_somebody_elses_config(text, says, config, tmp_path):
  put(tmp_path, 'config.json', text=text)
  assert f'config.json {says}' in refused(config, tmp_path)


def test_a_runs_own_folder(config, tmp_path):
  workdirs.write_config(config, tmp_path)
  put(tmp_path, 'log.txt')  # a member of a sweep, before it began
  workdirs.check(config, tmp_path)
  put(tmp_path, 'model/model.json', CHECKPOINT, 'notes.md', 'tensorboard/e')
  workdirs.check(config, tmp_path)
  config.seed = 1
  assert 'seed (0 there, 1 now)' in refused(config, tmp_path)


@pytest.mark.parametrize(
  ('name', 'kind'),
  [
    ('checkpoints', 'folder'), ('figures', 'folder'), ('model', 'folder'),
    ('tensorboard', 'folder'), ('metrics.jsonl/', 'file'),
    ('real_masks.npz/', 'file'), ('summary.json/', 'file'),
    ('topology.json/', 'file'), ('inputs.json/', 'file'),
  ],
)  # fmt: skip
def test_what_is_of_another_kind(name, kind, config, tmp_path):
  workdirs.write_config(config, tmp_path)
  put(tmp_path, name)
  path = tmp_path / name
  assert f'{path} is not a {kind}; move it away' in refused(config, tmp_path)


def test_a_link_into_nowhere(config, tmp_path):
  workdirs.write_config(config, tmp_path)
  (tmp_path / 'checkpoints').symlink_to(tmp_path / 'gone')
  assert 'checkpoints is not a folder' in refused(config, tmp_path)
  (tmp_path / 'gone').mkdir()
  workdirs.check(config, tmp_path)


def test_a_workdir_that_is_a_file(config, tmp_path):
  put(tmp_path, 'run')
  with pytest.raises(config_lib.InputError, match='run is not a folder'):
    workdirs.check(config, tmp_path / 'run')
  assert (tmp_path / 'run').read_text() == 'precious'


def test_leftovers_of_killed_processes(tmp_path):
  put(
    tmp_path, '.model.tmp/model.json', '.summary.json.tmp', 'figures/a.png',
    'figures/.topology.png.123.tmp', 'figures/.real_mask.svg.tmp',
  )  # fmt: skip
  with files.replacing(tmp_path / 'metrics.jsonl') as left:
    left.touch()
  left.touch()
  kept = ['.mine.tmp', 'figures/.mine.tmp', 'notes.tmp']
  put(tmp_path, *kept)
  workdirs.remove_leftovers(tmp_path)
  found = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*')]
  assert sorted(found) == sorted(
    [*kept, 'figures', 'figures/a.png', 'metrics.jsonl']
  )


def test_two_workdirs_of_one_run(config, tmp_path):
  one, other = tmp_path / 'one', tmp_path / 'other'
  inputs = {
    'schema': workdirs.INPUTS_SCHEMA,
    'data': {'train': 9, 'test': 3, 'classes': ['a'], 'digest': 'd'},
    'topology': None,
  }
  assert not workdirs.are_of_one_run(one, other)
  for folder in (one, other):
    workdirs.write_config(config, folder)
  assert workdirs.are_of_one_run(one, other)
  workdirs.write_inputs(inputs, one)
  assert not workdirs.are_of_one_run(one, other)
  workdirs.write_inputs(inputs | {'resizer': 'pillow'}, other)
  with config.unlocked():
    config.data.dir, config.log_every = 'moved', '7 steps'
    workdirs.write_config(config, other)
    assert workdirs.are_of_one_run(one, other)
    for folder in (one, other):
      (folder / 'inputs.json').unlink()
    assert not workdirs.are_of_one_run(one, other)  # what is in 'moved'?
    for folder, topology in ((one, 'x'), (other, 'y')):
      workdirs.write_inputs(inputs | {'topology': topology}, folder)
    assert not workdirs.are_of_one_run(one, other)
    workdirs.write_inputs(inputs | {'topology': 'x'}, other)
    assert workdirs.are_of_one_run(one, other)
    config.seed += 1
    workdirs.write_config(config, other)
    assert not workdirs.are_of_one_run(one, other)


def test_somebody_elses_table(tmp_path):
  path = tmp_path / 'table.csv'
  workdirs.check_is_table(path)
  for text in ('', 'row,num_seeds,seeds\n', '|  | seeds | duration |\n'):
    path.write_text(text)
    workdirs.check_is_table(path)
  path.write_text('name,age\n')
  with pytest.raises(config_lib.InputError, match='no table of a sweep'):
    workdirs.check_is_table(path)
  with pytest.raises(config_lib.InputError, match='cannot be read'):
    workdirs.check_is_table(tmp_path)


# What it was made from.


@pytest.fixture
def data(tmp_path):
  """Files of two classes; nothing decodes them here."""
  root = tmp_path / 'data'
  for part, count in (('train', 3), ('test', 2)):
    for label in ('ant', 'bee'):
      for i in range(count):
        put(root, f'{part}/{label}/{i}.jpg', text='x' * (i + 1))
  return root


def identity(folder, **fields):
  config = config_lib.default()
  config.data.update({'source': 'folder', 'dir': str(folder), **fields})
  return sources.open_source(config.data).identity


def run_of(config, folder, tmp_path):
  """Makes the workdir of a run that was cut."""
  workdir = tmp_path / 'run'
  workdirs.write_config(config, workdir)
  inputs = workdirs.checked_inputs(workdir, identity(folder), None)
  workdirs.write_inputs(inputs, workdir)
  put(workdir, CHECKPOINT)
  return workdir


def test_the_same_images_elsewhere(data, config, tmp_path, monkeypatch):
  config.data.source, config.data.dir = 'folder', str(data)
  workdir = run_of(config, data, tmp_path)
  shutil.copytree(data, tmp_path / 'job7')
  monkeypatch.chdir(tmp_path)
  for place in (f'{data}/', 'data', './data/../data', tmp_path / 'job7'):
    config.data.dir = str(place)
    workdirs.check(config, workdir)
    workdirs.checked_inputs(workdir, identity(place), None)
  # A run of before there was a record: by its config, as then.
  (workdir / 'inputs.json').unlink()
  assert "data.dir ('" in refused(config, workdir)
  for place in (f'{data}/', 'data'):
    config.data.dir = place
    workdirs.check(config, workdir)


@pytest.mark.parametrize(
  ('before', 'now', 'warns'),
  [
    ('opencv', 'opencv', False),
    ('opencv', 'pillow', True),
    ('pillow', 'opencv', True),
    (None, None, False),
    ('unrecorded', 'pillow', True),  # OpenCV, as every run had then
    ('unrecorded', 'opencv', False),
    ('unrecorded', None, False),
  ],
)
def test_another_library_that_resizes_crops_is_named(
  before, now, warns, data, config, tmp_path, caplog
):
  workdir = run_of(config, data, tmp_path)
  inputs = workdirs.checked_inputs(workdir, identity(data), None, before)
  if before == 'unrecorded':
    del inputs['resizer']
  workdirs.write_inputs(inputs, workdir)
  caplog.clear()
  ours = workdirs.checked_inputs(workdir, identity(data), None, now)
  assert ours['resizer'] == now
  assert [record.getMessage().count('\n') for record in caplog.records] == (
    [0] if warns else []
  )
  assert ('maskconnect_jax[opencv]' in caplog.text) == warns


def more(root):
  put(root, 'train/ant/7.jpg')


def renamed(root):
  for part in ('train', 'test'):
    (root / part / 'ant').rename(root / part / 'dog')


def added(root):
  put(root, 'train/cow/0.jpg', 'test/cow/0.jpg')


def removed(root):
  for part in ('train', 'test'):
    shutil.rmtree(root / part / 'bee')
  put(root, 'train/ant/4.jpg')


def other_name(root):
  (root / 'train/ant/0.jpg').rename(root / 'train/ant/00.jpg')


def other_size(root):
  put(root, 'train/ant/0.jpg', text='y' * 100)


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    (more, '6 training images there, 7 now'),
    (renamed, "class 'dog' new, class 'ant' gone; give"),
    (added, "class 'cow' new, 6 training images there, 7 now, 4 test"),
    (removed, "class 'bee' gone, 6 training"),
    (other_name, 'as many images, of other names or sizes'),
    (other_size, 'as many images, of other names or sizes'),
  ],
)
def test_other_images(change, says, data, config, tmp_path):
  workdir = run_of(config, data, tmp_path)
  change(data)
  with pytest.raises(config_lib.InputError) as raised:
    workdirs.checked_inputs(workdir, identity(data), None)
  assert f'{workdir} was trained on: {says}' in str(raised.value)
  assert str(data) in str(raised.value)
  shutil.rmtree(workdir / 'checkpoints')  # nothing is lost
  workdirs.checked_inputs(workdir, identity(data), None)


def test_train_refuses_other_classes(tiny_config, tmp_path):
  """The whole way to there; before, every label moved by one."""
  tiny_config.batch_size = 8
  tiny_config.data.update({'source': 'folder', 'image_size': 8})
  tiny_config.data.dir = str(tmp_path / 'data')
  rng = np.random.default_rng(0)
  for part in ('train', 'test'):
    for label in ('ant', 'bee'):
      for i in range(8):
        path = tmp_path / 'data' / part / label / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path)
  workdir = run_of(tiny_config, tmp_path / 'data', tmp_path)
  renamed(tmp_path / 'data')
  before = {path: path.lstat().st_mtime_ns for path in workdir.rglob('*')}
  with pytest.raises(config_lib.InputError, match="class 'dog' new, class 'a"):
    train.train(tiny_config, workdir)
  assert before == {
    path: path.lstat().st_mtime_ns for path in workdir.rglob('*')
  }


def test_a_damaged_record_is_as_good_as_none(data, config, tmp_path, caplog):
  workdir = run_of(config, data, tmp_path)
  whole = (workdir / 'inputs.json').read_text()
  assert workdirs.read_inputs(workdir) == json.loads(whole)
  for text in ('', '[]', '{"schema": 1}', whole.replace('"ant"', '3'), '\xff'):
    (workdir / 'inputs.json').write_text(text, 'latin-1')
    caplog.clear()
    assert workdirs.read_inputs(workdir) is None
    assert 'inputs.json is damaged' in caplog.text


class Wiring:
  def __init__(self, *rows):
    self.rows = rows

  def to_dict(self):
    return {'rows': self.rows}


def test_another_given_topology(data, config, tmp_path):
  """By its content: its file may have moved."""
  workdir = run_of(config, data, tmp_path)
  inputs = workdirs.checked_inputs(tmp_path, identity(data), Wiring(1, 2))
  workdirs.write_inputs(inputs, workdir)
  config.connectivity.rule = 'fixed_given'
  config.connectivity.topology = '/a/topology.json'
  workdirs.write_config(config, workdir)
  config.connectivity.topology = '/b/topology.json'
  workdirs.check(config, workdir)
  workdirs.checked_inputs(workdir, identity(data), Wiring(1, 2))
  with pytest.raises(config_lib.InputError, match='topology is not what'):
    workdirs.checked_inputs(workdir, identity(data), Wiring(2, 1))


def test_an_idx_set_is_its_content(tmp_path):
  def write(folder, pixel, open_=open, suffix=''):
    folder.mkdir()
    for part in ('train', 't10k'):
      for name, content in (
        ('images-idx3', struct.pack('>4I', 0x803, 2, 1, 1) + bytes([1, pixel])),
        ('labels-idx1', struct.pack('>2I', 0x801, 2) + bytes([0, 1])),
      ):
        with open_(folder / f'{part}-{name}-ubyte{suffix}', 'wb') as file:
          file.write(content)
    return identity(folder, source='idx').record()

  plain = write(tmp_path / 'plain', 2)
  assert plain == write(tmp_path / 'packed', 2, gzip.open, '.gz')
  assert plain != write(tmp_path / 'other', 3)


def test_names_that_are_written_in_another_way(tmp_path):
  """As on a disk of a Mac; and names that are no UTF-8."""
  found = set()
  for place, letter in (('a', 'e\u0301'), ('b', '\u00e9')):
    for part in ('train', 'test'):
      put(tmp_path / place, f'{part}/x/{letter}.jpg', f'{part}/y/\udcff.jpg')
    found.add(identity(tmp_path / place).digest())
  assert len(found) == 1
