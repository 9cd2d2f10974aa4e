"""Sweeps: what they train, in which order, and what cuts and crashes leave."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maskconnect_jax import config as config_lib
from maskconnect_jax.run import locks, train
from maskconnect_jax.study import sweep

ROOT = Path(__file__).parents[2]


def members(**fields):
  config = config_lib.default()
  config.update(fields)
  return sweep.members(config, Path('runs'))


def test_members():
  found = members(
    seeds=(3, 1),
    variants=('', 'duration=2 epochs  --config.connectivity.fan_in=7'),
  )
  assert [str(member.workdir) for member in found] == [
    'runs/base/seed3',
    'runs/base/seed1',
    'runs/duration=2-epochs,fan_in=7/seed3',
    'runs/duration=2-epochs,fan_in=7/seed1',
  ]
  for member, seed in zip(found, (3, 1, 3, 1), strict=True):
    expected = config_lib.default()
    expected.seed = seed
    if 'fan_in' in member.name:
      expected.duration = '2 epochs'
      expected.connectivity.fan_in = 7
    assert member.config.to_dict() == expected.to_dict()


def test_a_plain_config_is_a_sweep_of_one():
  (member,) = members(seed=4)
  assert member.name == 'base/seed4'
  assert member.config.seed == 4


@pytest.mark.parametrize(
  ('override', 'value'),
  [
    ('data.flip=false', False),
    ('model.width=16', 16),
    ('optimizer.weight_decay=1e-4', 1e-4),
    ('optimizer.momentum=1', 1.0),
    ("optimizer.steps_at=('10%', '20%')", ('10%', '20%')),
    ('data.mean=1.5,2', (1.5, 2)),
    ('data.dir=/some where', '/some where'),
    ('data.dir=', ''),
  ],
)
def test_an_override_is_of_its_type(override, value):
  path = override.partition('=')[0]
  parsed = sweep.parse_variant(override)
  assert parsed == {path: value}
  assert type(parsed[path]) is type(value)


def test_environments(monkeypatch):
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  monkeypatch.delenv('JAX_NUM_CPU_DEVICES', raising=False)

  def visible(*arguments):
    given = sweep.environments(*arguments)
    return [environment['CUDA_VISIBLE_DEVICES'] for environment in given]

  assert sweep.environments('cpu', 8, None) == [{}]
  one = {'JAX_NUM_CPU_DEVICES': '1'}
  assert sweep.environments('cpu', 1, 3) == [one, one, one]
  with monkeypatch.context() as given:
    given.setenv('JAX_NUM_CPU_DEVICES', '4')
    assert sweep.environments('cpu', 4, 2) == [{'JAX_NUM_CPU_DEVICES': '4'}] * 2
  assert sweep.environments('tpu', 4, None) == [{}]
  with pytest.raises(config_lib.InputError, match='--parallel=2'):
    sweep.environments('tpu', 4, 2)
  assert visible('gpu', 3, None) == ['0', '1', '2']
  assert visible('gpu', 8, 2) == ['0,1,2,3', '4,5,6,7']
  assert visible('gpu', 3, 2) == ['0', '1']
  shared = sweep.environments('gpu', 2, 4)
  assert [e['CUDA_VISIBLE_DEVICES'] for e in shared] == ['0', '1', '0', '1']
  assert {e['XLA_PYTHON_CLIENT_MEM_FRACTION'] for e in shared} == {'0.45'}
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5,GPU-7')
  assert visible('gpu', 2, None) == ['5', 'GPU-7']


@pytest.fixture
def start(cli, tiny, tmp_path):
  """Runs a sweep in this process; its members have their own."""

  def run(*arguments):
    return cli(
      '--mode=sweep', f'--config={tiny}', f'--workdir={tmp_path / "sweep"}',
      *arguments,
    )  # fmt: skip

  return run


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['config.seeds=0,1,0'], ['config.seeds=(0, 1, 0)', 'different whole']),
    (['config.seeds=0,a'], ["config.seeds=('0,a',)", 'each a whole number in']),
    (['config.seeds=-1'], 'config.seeds=(-1,)'),
    (['config.seeds=4294967296'], 'each a whole number in [0, 4294967295]'),
    (['config.variants=batch_size=0'], 'batch_size=0 must be'),
    (
      ['config.variants=optimizer.steps_at=30%,60%'],
      "'optimizer.steps_at=30%,60%' cannot be; give () or several values",
    ),
    (['config.variants=optimizer.steps_at=5'], 'steps_at=(5,) must be'),
    (['config.variants=connectivity.fanin=1'], 'config.connectivity.fan_in?'),
    (
      ['config.variants=connectivity.fan_in=x'],
      ["'connectivity.fan_in=x'", 'a whole number in [1, 2147483647]'],
    ),
    (['config.variants=data.flip=maybe'], 'true or false'),
    (['config.variants=learned'], "'learned' is no override; write FIELD="),
    (['config.variants=seed=3'], 'config.seeds are the seeds'),
    (
      ['config.variants=model.width=8', 'config.variants='],
      "'model.width=8' and '' are the same row",
    ),
    (
      ['config.variants=data.dir=/a/b', 'config.variants=data.dir=/a b'],
      'would share the folder dir=-a-b',
    ),
    (
      ['config.variants=', 'config.variants=data.source=idx data.dir=/no/such'],
      "config.data.dir='/no/such' does not exist",
    ),
    (
      [
        'config.variants=',
        'config.variants=connectivity.rule=fixed_given'
        ' connectivity.topology=~/no.json',
      ],
      "config.connectivity.topology='~/no.json' does not exist",
    ),
    (  # one folder where cases are not told apart
      ['config.variants=data.dir=/a/B', 'config.variants=data.dir=/a/b'],
      'would share the folder dir=-a-b',
    ),
    (  # or Unicode's forms
      [
        'config.variants=data.name=\uac00',
        'config.variants=data.name=\u1100\u1161',
      ],
      'the same row, or would share the folder data.name=',
    ),
    (
      ['config.variants=', 'config.variants=connectivity.rule=lerned'],
      'learned, fixed_prev',
    ),
    (
      ['config.variants=', 'config.variants=data.workers=4'],
      'are the same row',
    ),
    (['config.batch_size=0'], 'a whole number in [1, 2147483647]'),
    (['parallel=0'], '--parallel=0'),
    (['multihost'], 'omit --multihost'),
    (['mode=train', 'config.seeds=0,1'], ['seeds=(0, 1)', '--mode=sweep']),
    (['mode=train', 'config.variants='], ["variants=('',)", '--mode=sweep']),
  ],
)
def test_refusals(arguments, says, start, tmp_path):
  ran = start(*(f'--{argument}' for argument in arguments))
  assert ran.code == 2, ran
  assert ran.out == ''
  assert ran.err.count('\n') == 1, ran.err
  for part in [says] if isinstance(says, str) else says:
    assert part in ran.err
  assert not (tmp_path / 'sweep').exists()


LONG = (
  'connectivity.rule=learned connectivity.gradient=normalized data.pad=2'
  ' connectivity.temperature=0.1 connectivity.initial=0.5 masks.momentum=0.0'
  ' connectivity.initial_spread=0.0 connectivity.batchnorm_batches=2'
  ' masks.learning_rate=1.0 optimizer.weight_decay=0.0005 data.flip=False'
  ' optimizer.label_smoothing=0.1 optimizer.average=0.99 model.width=16'
  ' optimizer.learning_rate=0.05 optimizer.warmup=5 epochs data.mixup='
)


@pytest.mark.parametrize(
  'variants',
  [
    (LONG + '0.2', LONG + '0.25'),
    ('data.dir=/' + '/'.join(['a name'] * 50), 'data.dir=' + '/a name' * 51),
    # Bytes, not characters; the cut is within a character.
    ('data.dir=' + 'é/' * 100, 'data.dir=x' + 'é/' * 100),
    ('data.dir=' + '漢/' * 100, 'data.dir=x' + '漢/' * 100),
    # Alike when shortened, and alike in all that a folder's name shows.
    ('data.dir=' + 'a b/' * 80, 'data.dir=' + 'a/b ' * 79 + 'a/b/'),
  ],
)
def test_the_folder_of_a_long_variant(variants, tmp_path):
  names = [member.name.split('/')[0] for member in members(variants=variants)]
  assert len(set(names)) == 2
  # Whatever stands beside it, a variant has the same folder.
  again = [sweep.folder_name(sweep.parse_variant(one)) for one in variants]
  assert names == again
  for name in names:
    assert len(name.encode()) <= 255
    assert name.isprintable()
    (tmp_path / name).mkdir()


def test_names_stay_that_fit():
  for count in (1, 100, 251):
    assert sweep.folder_name({'data.dir': 'x' * count}) == f'dir={"x" * count}'
  name = sweep.folder_name({'data.dir': 'x' * 252})
  assert name.startswith('dir=xxx')
  assert len(name) == 255


def test_a_path_that_is_too_long_is_refused_first(cli, tiny, tmp_path):
  workdir = tmp_path / '/'.join(['x' * 200] * 17)
  ran = cli(
    '--mode=sweep', f'--config={tiny}', f'--workdir={workdir}',
    f'--config.variants={LONG}0.2',
  )  # fmt: skip
  assert ran.code == 2
  assert ran.err.count('\n') == 1
  assert 'is too long' in ran.err
  assert not (tmp_path / ('x' * 200)).exists()


@pytest.mark.parametrize('name', ['table.csv', 'table.md', ''])
def test_a_table_that_cannot_be_written(name, start, tmp_path):
  workdir = tmp_path / 'sweep'
  if name:
    (workdir / name).mkdir(parents=True)
  else:
    workdir.write_text('')
  ran = start()
  assert ran.code == 2
  assert ran.err.startswith(f'error: {workdir / name}')
  assert 'is a folder' in ran.err or 'is not a folder' in ran.err
  assert ran.err.count('\n') == 1
  if name:
    assert [path.name for path in workdir.iterdir()] == [name]


def test_a_member_of_another_config_is_refused_first(start, tmp_path, finished):
  workdir = tmp_path / 'sweep'
  shutil.copytree(finished.workdir, workdir / 'base/seed7')
  ran = start('--config.seeds=6,7')
  assert ran.code == 2
  assert 'base/seed7 was written by another config: seed (6 there' in ran.err
  assert not (workdir / 'base/seed6').exists()


def test_nothing_begins_where_another_process_trains(
  start, tmp_path, monkeypatch
):
  """A member, which outlives a sweep that is killed; or a whole sweep."""
  workdir = tmp_path / 'sweep'
  monkeypatch.setattr(locks, 'PATIENCE', 0.0)
  for folder in (workdir / 'base/seed7', workdir):
    with locks.locked(folder):
      ran = start('--config.seeds=6,7')
    assert ran.code == 2
    assert f'error: {folder} is being trained by another process' in ran.err
    assert not (workdir / 'base/seed6').exists()


def test_what_is_somebody_elses_is_refused_first(start, tmp_path):
  workdir = tmp_path / 'sweep'
  workdir.mkdir()
  (workdir / 'table.md').write_text('# My table')
  assert 'table.md is no table of a sweep' in start().err
  (workdir / 'table.md').unlink()
  model = workdir / 'base/seed7/model/net.py'
  model.parent.mkdir(parents=True)
  model.touch()
  ran = start('--config.seeds=6,7')
  assert ran.code == 2
  assert "base/seed7 holds 'model', and no" in ran.err
  assert not (workdir / 'base/seed6').exists()


def test_a_crash_leaves_the_others_alone(start, tmp_path, finished):
  """One member fails, one goes on from its last checkpoint, none is redone."""
  workdir = tmp_path / 'sweep'
  arguments = (
    '--config.variants=batch_size=1440',  # more than there are images
    '--config.variants=',
  )
  shutil.copytree(finished.workdir, workdir / 'base/seed6')
  (workdir / 'base/seed6/summary.json').unlink()
  # It failed before with another batch, and saved nothing.
  stale = workdir / 'batch_size=1440/seed6/config.json'
  stale.parent.mkdir(parents=True)
  text = (finished.workdir / 'config.json').read_text()
  stale.write_text(text.replace('"batch_size": 64', '"batch_size": 32'))
  ran = start(*arguments)
  assert json.loads(stale.read_text())['batch_size'] == 1440
  assert ran.code == 1
  log = workdir / 'batch_size=1440/seed6/log.txt'
  failure = ran.err.splitlines()[-1]
  assert failure.startswith('batch_size=1440/seed6 failed (exit status 2): ')
  assert 'larger than the 1437' in failure
  assert failure.endswith(f'; {log}')
  assert 'going on from step 24' in (
    (workdir / 'base/seed6/log.txt').read_text()
  )
  accuracy = finished.summary['test_accuracy_pruned']
  assert f'base/seed6 ends: test accuracy {accuracy:.2%}' in ran.err
  assert f'{100 * accuracy:.2f} ± - %' in ran.out
  assert f'in no row: {log.parent}.' in ran.out
  assert (workdir / 'table.md').read_text() == ran.out
  with (workdir / 'table.csv').open(newline='') as file:
    (row,) = csv.DictReader(file)
  assert float(row['test_accuracy_mean']) == accuracy

  before = (workdir / 'base/seed6/summary.json').stat().st_mtime_ns
  ran = start(*arguments[1:])
  assert ran.code == 0
  assert ran.err == '1 of 1 members finished\n'
  assert (workdir / 'base/seed6/summary.json').stat().st_mtime_ns == before


def test_sigterm_saves_and_stops(start, tmp_path):
  workdir = tmp_path / 'sweep/base/seed6'

  def stop_it():
    while 'compiling' not in read(workdir / 'log.txt'):
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=stop_it)
  thread.start()
  ran = start('--config.seeds=6,7')
  thread.join()
  assert ran.code == 128 + signal.SIGTERM
  assert ran.out == ''
  assert ran.err.splitlines()[-1] == 'stopped; the same command goes on'
  # Compiling, it had nothing to save yet.
  log = read(workdir / 'log.txt')
  assert log.endswith(
    'SIGTERM: stopped; a run goes on from its newest checkpoint\n'
  )
  assert not workdir.with_name('seed7').exists()
  assert signal.getsignal(signal.SIGTERM) == before


def read(path):
  return path.read_text() if path.exists() else ''


def until(condition, process):
  while not condition():
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_started_again(
  start, cli, tiny, tiny_config, tmp_path, finished
):
  """Ends with the table of four runs that were never cut."""
  workdir = tmp_path / 'sweep'
  arguments = (
    '--config.seeds=6,7',
    '--config.variants=connectivity.rule=learned',
    '--config.variants=connectivity.rule=fixed_prev',
  )
  process = subprocess.Popen(
    [
      sys.executable, '-m', 'maskconnect_jax.main', '--mode=sweep',
      f'--config={tiny}', f'--workdir={workdir}', *arguments,
    ],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  with process:
    second = workdir / 'rule=learned/seed7'
    until(
      lambda: (second / 'checkpoints/4/_CHECKPOINT_METADATA').exists(), process
    )
    process.kill()
    said = process.stderr.read()
  pid = int(said.rpartition('seed7 begins as process ')[2].partition(';')[0])
  os.kill(pid, signal.SIGSTOP)
  try:
    assert os.getpgid(pid) == pid  # out of reach of Ctrl-C
    assert not (second / 'summary.json').exists()
    ran = start(*arguments)
    assert ran.code == 2
    assert f'{second} is being trained by another process' in ran.err
  finally:
    os.kill(pid, signal.SIGKILL)

  ran = start(*arguments)
  assert ran.code == 0, ran.err
  assert ran.err.startswith('1 of 4 members finished\n')
  assert 'seed7 begins' in ran.err
  assert 'learned/seed6 begins' not in ran.err
  assert 'going on from step' in read(second / 'log.txt')

  for rule in ('learned', 'fixed_prev'):
    for seed in (6, 7):
      own = tiny_config.copy_and_resolve_references()
      own.connectivity.rule, own.seed = rule, seed
      train.train(own, tmp_path / f'uncut/{rule}{seed}')
  uncut = cli(
    '--mode=summarize', f'--csv={tmp_path / "uncut.csv"}',
    f'--workdirs={tmp_path / "uncut/learned6"}',
    f'--workdirs={tmp_path / "uncut"}',
  )  # fmt: skip
  assert uncut.code == 0
  ours, theirs = (
    [row | {'images_per_second': ''} for row in csv.DictReader(text)]
    for text in (
      read(workdir / 'table.csv').splitlines(),
      read(tmp_path / 'uncut.csv').splitlines(),
    )
  )
  assert [row['row'] for row in ours] == ['rule=learned', 'rule=fixed_prev']
  assert ours == theirs
