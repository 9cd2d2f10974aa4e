"""The command line: every mode, and every bad input in one line."""

import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

import maskconnect_jax
from maskconnect_jax.run import experiment

DIGITS = np.rint(sklearn.datasets.load_digits().images * 255 / 16).astype(
  np.uint8
)


@pytest.fixture
def refused(cli, tiny, tmp_path):
  """Runs a command that must fail in one line and leave no workdir."""

  def check(*arguments, says, mode='train', config=tiny, workdir=True):
    workdir = tmp_path / 'workdir' if workdir is True else workdir
    ran = cli(
      *([f'--mode={mode}'] if mode else []),
      *([f'--config={config}'] if config else []),
      *([f'--workdir={workdir}'] if workdir else []),
      *arguments,
    )
    assert ran.code == 2, ran
    assert ran.out == ''
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith('error: ')
    for part in [says] if isinstance(says, str) else says:
      assert part in lines[0]
    assert not (tmp_path / 'workdir').exists()

  return check


@pytest.mark.parametrize(
  ('argument', 'says'),
  [
    ('config.sede=1', ['config.sede', 'did you mean config.seed?']),
    (
      'config.connectivity.fanin=1',
      ['config.connectivity.fanin', 'did you mean config.connectivity.fan_in?'],
    ),
    ('config.conectivity.fan_in=1', 'did you mean config.connectivity.fan_in?'),
    ('config.zzzzzz=1', ['config.zzzzzz', 'config.py lists the fields']),
    (
      'config.seed=abc',
      ['config.seed=abc', 'number in [0, 4294967295], such as 0'],
    ),
    ('config.seed=1.5', ['config.seed=1.5', 'a whole number']),
    (
      'config.optimizer.momentum=x',
      ['momentum=x', 'number in [0, 1], such as 0.9'],
    ),
    ('config.data.flip=maybe', ['config.data.flip=maybe', 'true or false']),
    ('config.seed', ['--config.seed', 'Missing value']),
    ('config.connectivity=3', '--config.connectivity=3'),
    ('config.connectivity.rule=lerned', 'learned, fixed_prev, fixed_near'),
    (
      'config.connectivity.fan_in=0',
      ['fan_in=0', 'number in [1, 2147483647]'],
    ),
    ('config.connectivity.phase=150%', ["phase='150%'", 'between 1 and']),
    (
      'config.model.name=resnet21',
      ['resnet21', '6n+2', 'resnet20', 'resnet26'],
    ),
    ('config.model.name=resnext', ['resnext', 'did you mean']),
    ('config.duration=soon', ["duration='soon'", '60 epochs']),
    ('config.duration=10%', ["duration='10%'", 'needs a unit']),
    ('config.duration=0 steps', ["duration='0 steps'", 'not one step']),
    ('config.masks.start=1%', ['masks.start is not', 'any more']),
    ('config.batch_size=1440', ['1440', 'larger than the 1437']),
    ('config.seed=-1', ['config.seed=-1 must be', '[0, 4294967295]']),
    ('config.seed=9223372036854775808', ['config.seed=9', '[0, 4294967295]']),
    ('config.optimizer.steps_at=5', 'config.optimizer.steps_at=(5,) must be'),
    ('config.optimizer.steps_at=30%,60%', 'config.optimizer.steps_at='),
    ('config.data.memory_gb=nan', 'config.data.memory_gb=nan must be'),
    ('config.data.memory_gb=-1', 'config.data.memory_gb=-1.0 must be'),
    ('config.data.crop_scale=None', 'config.data.crop_scale='),
    ('config.duration=1e99 epochs', "duration='1e99 epochs' is too long"),
    ("config.data.mean=('a','b','c')", 'config.data.mean='),
    ('config.data.std=0,0,0', 'config.data.std=(0, 0, 0) must be'),
    ('config.data.mean=1e400', 'config.data.mean=(inf,) must be'),
    ('config.data=3', '--config.data=3'),
    ('config.optimizer=x', '--config.optimizer=x'),
    ('config.data.mean=(1.0,2.0)', ['data.mean', '(), 1 or 3 values']),
    ('config.data.mean=(1.0,2.0,3.0)', ['data.mean', '1 channels']),
    ('mode=tarin', ['--mode=tarin', 'train|evaluate|describe|predict']),
    ('workdr=x', ["'workdr'", 'workdir']),
    ('nonsense=1', ["'nonsense'", '--help']),
    ('json=maybe', '--json=maybe'),
  ],
)
def test_bad_flags(argument, says, refused):
  refused(f'--{argument}', says=says)


def test_help(cli):
  ran = cli('--help')
  assert (ran.code, ran.err) == (0, '')
  assert '--mode=sweep --config=configs/digits.py' in ran.out
  assert '  --workdirs: summarize, dynamics, report: a run' in ran.out


def test_batch_that_does_not_divide(refused):
  devices = jax.device_count()
  refused(
    f'--config.batch_size={8 * devices + 1}',
    says=['config.batch_size=', f'over {devices} devices; {8 * devices} does'],
  )


def test_bad_command_lines(refused, tmp_path):
  refused(config=None, says='--mode=train needs --config')
  refused(config=None, mode='describe', says='--mode=describe needs --config')
  for mode in ('train', 'evaluate'):
    refused(mode=mode, workdir=None, says=f'--mode={mode} needs --workdir')
  refused(mode='predict', says='--mode=predict needs --images')
  refused(mode='prepare', says='--mode=prepare needs --images=DIR, one folder')
  refused('stray', says="'stray' is no flag")
  refused('--config.seed=1', config=None, says='--config, which is missing')
  refused(mode='evaluate', config=None, says='holds no config.json')
  refused(mode='evaluate', says='holds no model.json')
  for more in ((), ('--config.seed=1',)):
    refused(*more, config='none.py', says=['--config=none.py', 'no such file'])
  other = tmp_path / 'other.py'
  other.write_text('{"not": Python')
  refused(config=other, says=['other.py is no config file', 'get_config'])
  other.write_text('def get_config():\n  return 1 + ""')
  says = ['other.py is no config file', 'unsupported operand', 'get_config']
  refused(config=other, says=says)
  other.write_text('def get_config():\n  return 1')
  says = ['other.py:small is no config file', 'get_config() takes 0']
  refused(config=f'{other}:small', says=says)


def test_no_traceback_in_a_process_of_its_own(tiny, tmp_path):
  ran = subprocess.run(
    [
      sys.executable,
      '-m',
      'maskconnect_jax.main',
      f'--config={tiny}',
      f'--workdir={tmp_path / "workdir"}',
      '--config.connectivity.fan_inn=3',
    ],
    cwd=os.path.dirname(os.path.dirname(__file__)),
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
  assert ran.returncode == 2
  assert ran.stdout == ''
  assert ran.stderr == (
    'error: config.connectivity.fan_inn is not a config field;'
    ' did you mean config.connectivity.fan_in?\n'
  )
  assert not (tmp_path / 'workdir').exists()


# Data.


def make_folder(root, train=('cat', 'dog'), test=('cat', 'dog')):
  for split, classes in (('train', train), ('test', test)):
    for name in classes:
      folder = root / split / name
      folder.mkdir(parents=True)
      for number in range(8):
        Image.fromarray(DIGITS[number]).convert('RGB').save(
          folder / f'{number}.png'
        )
  return root


@pytest.mark.parametrize(
  ('train', 'test', 'says'),
  [
    (None, None, 'data'),  # missing
    ((), (), 'train'),  # empty
    (('cat', 'dog'), (), 'test'),
    (('cat',), ('cat',), 'cat'),
    (('cat', 'dog'), ('cat', 'cow'), ['cow', 'dog']),
  ],
)
def test_bad_data_dir(train, test, says, refused, tmp_path):
  root = tmp_path / 'data'
  if train is not None:
    root.mkdir()
    make_folder(root, train, test)
  refused(
    '--config.data.source=folder', f'--config.data.dir={root}',
    '--config.batch_size=8', says=[says] if isinstance(says, str) else says,
  )  # fmt: skip


def test_truncated_image_is_named(refused, tmp_path):
  root = make_folder(tmp_path / 'data')
  bad = root / 'train/dog/3.png'
  bad.write_bytes(bad.read_bytes()[:60])
  refused(
    '--config.data.source=folder', f'--config.data.dir={root}',
    '--config.batch_size=8', says=[str(bad), 'skip_errors'],
  )  # fmt: skip


def test_idx_cut_short(refused, tmp_path):
  for part in ('train', 't10k'):
    images = struct.pack('>4I', 0x803, 16, 8, 8) + DIGITS[:16].tobytes()
    labels = struct.pack('>2I', 0x801, 16) + bytes(range(2)) * 8
    (tmp_path / f'{part}-labels-idx1-ubyte').write_bytes(labels)
    path = tmp_path / f'{part}-images-idx3-ubyte.gz'
    path.write_bytes(gzip.compress(images[:-5]))
  refused(
    '--config.data.source=idx', f'--config.data.dir={tmp_path}',
    '--config.batch_size=8', says='train-images-idx3-ubyte.gz',
  )  # fmt: skip


# The other modes.


def test_describe(cli, tiny, tmp_path):
  ran = cli(
    f'--config={tiny}', '--mode=describe', '--config.connectivity.fan_in=7'
  )
  assert ran.code == 0
  assert '6 edges of 6 valid, fan-in 7; no block has more than 3' in ran.out
  assert '19,074 parameters' in ran.out
  assert 'MFLOP' in ran.out


def test_evaluate(cli, finished, tiny):
  summary = finished.summary
  for more in ((), (f'--config={tiny}', '--config.eval_batch_size=77')):
    ran = cli('--mode=evaluate', f'--workdir={finished.workdir}', *more)
    assert ran.code == 0
    assert json.loads(ran.out) == {
      'test_accuracy': pytest.approx(summary['test_accuracy_pruned']),
      'test_top5_accuracy': pytest.approx(summary['test_top5_accuracy']),
      'test_loss': pytest.approx(summary['test_loss'], rel=1e-5),
      'num_test_examples': 360,
    }
  ran = cli('--mode=evaluate', f'--workdir={finished.workdir}', '--json')
  found = json.loads(ran.out)
  assert found['confusion'] == summary['confusion']  # of the unpruned network
  assert found['class_accuracy'] == summary['class_accuracy']
  right = sum(row.get(name, 0) for name, row in found['confusion'].items())
  assert right / 360 == pytest.approx(summary['test_accuracy'])
  of_each = [sum(row.values()) for row in found['confusion'].values()]
  assert of_each == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]  # test digits


def test_evaluate_with_a_damaged_config(refused, finished, tmp_path):
  workdir = tmp_path / 'other'
  shutil.copytree(finished.workdir / 'model', workdir / 'model')
  (workdir / 'config.json').write_text('{')
  refused(
    mode='evaluate', config=None, workdir=workdir,
    says=['config.json is damaged', '--workdir'],
  )  # fmt: skip


@pytest.fixture
def photos(tmp_path):
  """A folder of digits: grey, larger, with alpha, 16 bits, and a note."""
  folder = tmp_path / 'photos'
  (folder / 'deeper').mkdir(parents=True)
  image = Image.fromarray(DIGITS[4])
  image.save(folder / 'a_grey.png')
  image.resize((32, 32)).save(folder / 'b_large.png')
  image.convert('RGBA').save(folder / 'c_alpha.png')
  Image.fromarray(DIGITS[4].astype(np.uint16) << 8).save(folder / 'd_16.png')
  (folder / 'note.txt').write_text('not a picture')
  return folder


def test_predict(cli, finished, photos):
  arguments = (
    '--mode=predict', f'--workdir={finished.workdir}', f'--images={photos}',
    f'--images={photos / "a_grey.png"}',
  )  # fmt: skip
  model = maskconnect_jax.load(finished.workdir / 'model')
  names = ['a_grey.png', 'b_large.png', 'c_alpha.png', 'd_16.png', 'a_grey.png']
  expected = model.predict([photos / name for name in names])

  ran = cli(*arguments)
  assert ran.code == 0
  assert ran.out.splitlines() == [
    f'{photos / name}\t{row.argmax()}\t{row.max():.4f}'
    for name, row in zip(names, expected, strict=True)
  ]

  ran = cli(*arguments, '--json')
  records = [json.loads(line) for line in ran.out.splitlines()]
  assert [r['image'] for r in records] == [str(photos / name) for name in names]
  for record, row in zip(records, expected, strict=True):
    assert record['class'] == str(row.argmax())
    assert record['probability'] == pytest.approx(row.max())
    assert list(record['probabilities']) == list('0123456789')
    assert sum(record['probabilities'].values()) == pytest.approx(1, abs=1e-5)


def test_predict_names_what_it_cannot_read_and_goes_on(cli, finished, photos):
  (photos / 'b_cut.png').write_bytes((photos / 'b_large.png').read_bytes()[:80])
  (photos / 'Thumbs.db').write_bytes(b'')
  ran = cli(
    '--mode=predict', f'--workdir={finished.workdir}', f'--images={photos}'
  )
  assert ran.code == 2
  assert [line.split('\t')[0] for line in ran.out.splitlines()] == [
    str(photos / f'{name}.png')
    for name in ('a_grey', 'b_large', 'c_alpha', 'd_16')
  ]
  note, said = ran.err.splitlines()
  assert (
    note == f'note: {photos}: left out 1: note.txt (no image that Pillow reads)'
  )
  assert said.startswith(f'error: {photos / "b_cut.png"} is damaged or cut')


def test_predict_shows_any_name_and_counts_what_is_no_image(
  cli, finished, photos
):
  """Latin-1 names, names of several lines, a pipe, linked folders, AVIF."""
  image = Image.fromarray(DIGITS[4]).convert('RGB')
  photographs = photos.with_name('others')
  photographs.mkdir()
  for name in (
    b'e\xe9.png',
    b'f\nf.png',
    b'g\t\x1b[31m.png',
    b'h.avif',
    b'i.jp2',
  ):
    image.save(photos / os.fsdecode(name))
  image.save(photographs / 'k.png')
  (photos / 'link').symlink_to(photographs)
  (photos / os.fsdecode(b'd\xe9.png')).write_text('no image')
  (photos / 'z').symlink_to(photos)
  os.mkfifo(photos / 'pipe.png')
  arguments = (
    '--mode=predict', f'--workdir={finished.workdir}', f'--images={photos}',
  )  # fmt: skip
  shown = [
    r'e\xe9.png', r'f\nf.png', r'g\t\x1b[31m.png', 'h.avif', 'i.jp2',
    'link/k.png',
  ]  # fmt: skip
  ran = cli(*arguments)
  assert ran.code == 2  # for the damaged one
  lines = [line.split('\t') for line in ran.out.splitlines()]
  assert [line[0] for line in lines][-6:] == [f'{photos}/{n}' for n in shown]
  assert {len(line) for line in lines} == {3}
  note, said = ran.err.splitlines()
  assert said.startswith(rf'error: {photos}/d\xe9.png is not an image')
  assert note == (
    f'note: {photos}: left out 3: note.txt (no image that Pillow reads),'
    ' pipe.png (a named pipe), z (a link to a folder that is read already)'
  )
  ran = cli(*arguments, '--json')
  ran.out.encode('ascii')
  records = [json.loads(line) for line in ran.out.splitlines()]
  names = [record['image'].removeprefix(f'{photos}/') for record in records]
  assert names[-6:-3] == [r'e\xe9.png', 'f\nf.png', 'g\t\x1b[31m.png']
  assert len(names) == 10


def test_predict_shows_any_class(cli, finished, photos, tmp_path):
  shutil.copytree(finished.workdir / 'model', tmp_path / 'model')
  path = tmp_path / 'model' / 'model.json'
  record = json.loads(path.read_text())
  record['classes'] = [os.fsdecode(b'\xe9%d' % i) for i in range(10)]
  path.write_text(json.dumps(record))
  arguments = (
    '--mode=predict', f'--workdir={tmp_path}', f'--images={photos}',
  )  # fmt: skip
  for line in cli(*arguments).out.splitlines():
    assert re.fullmatch(r'.*\t\\xe9\d\t[01]\.\d{4}', line)
  for line in cli(*arguments, '--json').out.splitlines():
    assert re.fullmatch(r'\\xe9\d', json.loads(line)['class'])


def test_out_of_memory_is_one_line(refused, monkeypatch):
  def step(*arguments):
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Out of memory allocating 25560132096 bytes.\nMore.'
    )

  monkeypatch.setattr(experiment, 'build', step)
  refused(says=['Out of memory allocating 25560132096 bytes. Lower', 'remat'])


def test_describe_takes_the_config_of_a_workdir(cli, finished):
  ran = cli('--mode=describe', f'--workdir={finished.workdir}')
  assert ran.code == 0
  assert 'resnet8, 3 blocks' in ran.out


def test_predict_what_cannot_be(refused, finished, photos, tmp_path):
  def bad(path, says):
    refused(
      f'--images={path}', mode='predict', config=None,
      workdir=finished.workdir, says=[str(path), says],
    )  # fmt: skip

  bad(tmp_path / 'none.png', '')
  bad(photos / 'note.txt', 'not an image')
  bad(photos / 'deeper', 'image')
  os.mkfifo(tmp_path / 'pipe.png')
  bad(tmp_path / 'pipe.png', 'is a named pipe; give an image file')
  refused(
    f'--images={photos}', mode='predict', config=None, says='no model.json'
  )


def test_a_tilde_in_every_path(cli, refused, finished, tmp_path, monkeypatch):
  home, here = tmp_path / 'home', tmp_path / 'here'
  for folder in (home, here):
    folder.mkdir()
  monkeypatch.setenv('HOME', str(home))
  monkeypatch.chdir(here)
  shutil.copytree(finished.workdir / 'model', home / 'run/model')
  shutil.copy(finished.workdir / 'config.json', home / 'run')
  (home / 'images').mkdir()
  Image.fromarray(DIGITS[4]).save(home / 'images/a.png')
  ran = cli('--mode=predict', '--workdir=~/run', '--images=~/images')
  assert ran.code == 0, ran.err
  assert ran.out.startswith(f'{home}/images/a.png\t')
  ran = cli('--mode=evaluate', '--workdir=~/run')
  assert json.loads(ran.out)['num_test_examples'] == 360
  assert list(maskconnect_jax.load('~/run').classes) == list('0123456789')

  (home / 'file').write_text('')
  refused(workdir='~/file/run', says=f'{home}/file/run cannot be made')
  refused(
    '--config.connectivity.rule=fixed_given',
    '--config.connectivity.topology=~/t.json',
    says=[f'{home}/t.json is not there', 'config.connectivity.topology'],
  )
  refused(
    '--config.data.source=folder', '--config.data.dir=~/file',
    says="config.data.dir='~/file' is not a folder",
  )  # fmt: skip
  assert not list(here.iterdir())


def test_an_error_of_the_system_is_one_line(refused, monkeypatch, tmp_path):
  def step(*arguments):
    (tmp_path / 'folder').mkdir(exist_ok=True)
    (tmp_path / 'folder').write_text('')

  monkeypatch.setattr(experiment, 'build', step)
  refused(says=[f'{tmp_path / "folder"}: Is a directory'])


def test_diverged(cli, tiny, tmp_path):
  ran = cli(
    f'--config={tiny}', f'--workdir={tmp_path}',
    '--config.connectivity.rule=fixed_prev', '--config.duration=4 steps',
    '--config.optimizer.learning_rate=1e38', '--config.optimizer.schedule=step',
  )  # fmt: skip
  assert ran.code == 2
  *_, last = ran.err.splitlines()
  assert last.startswith('error: the loss is not finite at step ')
  assert 'lower config.optimizer.learning_rate' in last
  assert 'Traceback' not in ran.err


@pytest.mark.parametrize('mode', ['describe', 'sweep'])
def test_a_platform_that_is_not_there(mode, tiny, tmp_path):
  """JAX is asked once in a process, so it is one of its own."""
  workdir = tmp_path / 'workdir'
  ran = subprocess.run(
    [
      sys.executable, '-m', 'maskconnect_jax.main', f'--mode={mode}',
      f'--config={tiny}', f'--workdir={workdir}',
    ],
    cwd=os.path.dirname(os.path.dirname(__file__)),
    env=os.environ | {'JAX_PLATFORMS': 'cuda'},
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )  # fmt: skip
  assert (ran.returncode, ran.stdout) == (2, '')
  (line,) = ran.stderr.splitlines()
  assert line.startswith('error: JAX_PLATFORMS=cuda cannot be used on this')
  assert not workdir.exists()
