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
from maskconnect_jax import sweep, train

ROOT = Path(__file__).parents[1]


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

  def visible(*arguments):
    given = sweep.environments(*arguments)
    return [environment['CUDA_VISIBLE_DEVICES'] for environment in given]

  assert sweep.environments('cpu', 8, None) == [{}]
  assert sweep.environments('cpu', 1, 3) == [{}, {}, {}]
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
    (['config.seeds=0,a'], 'whole numbers, such as 0,1,2'),
    (['config.variants=connectivity.fanin=1'], 'config.connectivity.fan_in?'),
    (
      ['config.variants=connectivity.fan_in=x'],
      ["'connectivity.fan_in=x'", 'a whole number, such as 4'],
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
      ['config.variants=', 'config.variants=connectivity.rule=lerned'],
      'learned, fixed_prev',
    ),
    (
      ['config.variants=', 'config.variants=data.workers=4'],
      'are the same row',
    ),
    (['config.batch_size=0'], 'at least 1'),
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


def test_a_member_of_another_config_is_refused_first(start, tmp_path, finished):
  workdir = tmp_path / 'sweep'
  shutil.copytree(finished.workdir, workdir / 'base/seed7')
  ran = start('--config.seeds=6,7')
  assert ran.code == 2
  assert 'base/seed7 was written by another config: seed (6 there' in ran.err
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
    f'--workdirs={tmp_path / "uncut/learned5"}',
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
