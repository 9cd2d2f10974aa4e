"""A run that is cut anywhere and started again ends with the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import config, signals
from maskconnect_jax.networks import architectures
from maskconnect_jax.run import locks, loop, metrics, train
from maskconnect_jax.run.preemption import Preemption

# Runs the command line, but kills itself (kill -9) right after the line of a
# step is written, or right after a save has been started in the background.
COMMAND = """
import os, signal, sys
from maskconnect_jax import main
from maskconnect_jax.run import checkpoint, metrics

moment, at = sys.argv.pop(1), int(sys.argv.pop(1))

def write(self, step, *rest, real=metrics.MetricsWriter.write):
  real(self, step, *rest)
  if moment == 'step' and step == at:
    os.kill(os.getpid(), signal.SIGKILL)

def save(self, step, *rest, real=checkpoint.Checkpoints.save):
  real(self, step, *rest)
  if moment == 'save' and step == at:
    os.kill(os.getpid(), signal.SIGKILL)

metrics.MetricsWriter.write = write
checkpoint.Checkpoints.save = save
main.run()
"""

ACCURACIES = (
  'test_accuracy_drawn',
  'test_accuracy_at_freeze',
  'test_accuracy',
  'test_accuracy_pruned',
)


@pytest.fixture
def ctrl_c():
  """What a shell runs in the background ignores SIGINT: not so here."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def start(tiny, workdir, moment='', at=0):
  return subprocess.run(
    [
      sys.executable, '-W', 'error::UserWarning', '-c', COMMAND, moment,
      str(at), f'--config={tiny}', f'--workdir={workdir}',
    ],
    capture_output=True,
    text=True,
    cwd=os.path.dirname(os.path.dirname(__file__)),
    timeout=250,
    check=False,
  )  # fmt: skip


def lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def without_times(records):
  return [
    {k: v for k, v in record.items() if k != 'images_per_second'}
    for record in records
  ]


def steps(workdir):
  """Steps that have a whole checkpoint."""
  return sorted(
    int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()
  )


@pytest.fixture
def assert_same_end(finished, arrays_in):
  """Compares a workdir with that of a run that was never cut."""

  def check(workdir, *, whole=finished, same_lines=True):
    final = arrays_in(workdir / 'checkpoints/24/state')
    expected = arrays_in(whole.workdir / 'checkpoints/24/state')
    groups = {name.partition('.')[0] for name in expected}
    assert groups - {'average'} == {
      'step', 'weights', 'masks', 'statistics', 'optimizer',
    }  # fmt: skip
    assert set(final) == set(expected)
    for name, array in expected.items():
      assert final[name].dtype == array.dtype, name
      assert final[name].tobytes() == array.tobytes(), name
    assert int(final['step']) == 24
    if same_lines:
      assert without_times(lines(workdir)) == without_times(
        lines(whole.workdir)
      )
      with (
        np.load(workdir / 'real_masks.npz') as ours,
        np.load(whole.workdir / 'real_masks.npz') as theirs,
      ):
        np.testing.assert_array_equal(ours['steps'], theirs['steps'])
        np.testing.assert_array_equal(ours['masks'], theirs['masks'])
    summary = json.loads((workdir / 'summary.json').read_text())
    for name in ACCURACIES:
      assert summary[name] == whole.summary[name], name
    assert summary['train_seconds'] * summary[
      'images_per_second'
    ] == pytest.approx(24 * 64)
    topology = (workdir / 'topology.json').read_bytes()
    assert topology == (whole.workdir / 'topology.json').read_bytes()

  return check


def cut(whole, workdir, step):
  """Makes the workdir of a run killed after the save at `step`."""
  shutil.copytree(
    whole.workdir,
    workdir,
    ignore=shutil.ignore_patterns(
      'summary.json', 'topology.json', 'model', 'figures'
    ),
  )
  for number in steps(workdir):
    if number > step:
      shutil.rmtree(workdir / 'checkpoints' / str(number))
  return workdir


def test_killed_and_started_again(tiny, tmp_path, finished, assert_same_end):
  """kill -9 in the first phase, then during a save after the freeze."""
  workdir = tmp_path / 'run'
  ran = start(tiny, workdir, 'step', 6)
  assert ran.returncode == -signal.SIGKILL, ran.stderr
  assert lines(workdir)[-1]['step'] == 6
  assert steps(workdir) in ([], [4])  # the save of 4 may be under way still

  ran = start(tiny, workdir, 'save', 16)
  assert ran.returncode == -signal.SIGKILL, ran.stderr
  # The save comes before the evaluation, and that before the record.
  assert [r['step'] for r in lines(workdir)] == list(range(2, 16, 2))
  assert 16 not in steps(workdir)
  assert 8 in steps(workdir)

  ran = start(tiny, workdir)
  assert ran.returncode == 0, ran.stderr
  assert 'going on from step' in ran.stderr
  assert_same_end(workdir)
  assert not [p for p in workdir.rglob('*') if 'tmp' in p.name]
  # The table a person reads.
  for name in ACCURACIES:
    assert f'{finished.summary[name]:.2%}' in ran.stdout
  for name in ('parameters', 'parameters_pruned'):
    assert f'{finished.summary[name]:,}' in ran.stdout
  for name in (
    'summary.json', 'topology.json', 'metrics.jsonl', 'config.json', 'figures/',
    'model/', 'tensorboard/', 'checkpoints/',
  ):  # fmt: skip
    assert str(workdir / name) + '/' * (name[-1] == '/') in ran.stdout
    assert (workdir / name).exists()
  assert 'Traceback' not in ran.stderr


def test_killed_in_an_evaluation(tiny_config, tmp_path, assert_same_end):
  """The steps before it are saved; the evaluation is done anew."""
  workdir = tmp_path / 'run'

  def killed(self, *arguments, **more):
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.evaluation.Evaluator, '__call__', killed)
    with pytest.raises(KeyboardInterrupt):
      train.train(tiny_config, workdir)
  assert lines(workdir)[-1]['step'] == 6
  assert steps(workdir)[-1] == 8
  train.train(tiny_config, workdir)
  assert_same_end(workdir)


@pytest.mark.parametrize('step', [12, 16])
def test_from_any_checkpoint(
  step, tiny_config, tmp_path, finished, assert_same_end, capsys
):
  """Exactly at and after the freeze; a kill before it is tested above."""
  workdir = cut(finished, tmp_path / 'run', step)
  # A kill also leaves a line half written, and lines of steps done again.
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 26, "pha')
  train.train(tiny_config, workdir)
  assert f'going on from step {step} of 24' in capsys.readouterr().err
  assert_same_end(workdir)


@pytest.mark.slow
def test_a_branch_level_run_is_cut_too(
  tiny_config, tmp_path, assert_same_end, monkeypatch
):
  """While masks of branches are learned."""
  architecture = architectures.Architecture(
    (1, 1), width=8, bottleneck=True, cardinality=4, branch_width=2
  )
  monkeypatch.setitem(architectures.REGISTRY, 'tiny_resnext', architecture)
  tiny_config.model.name = 'tiny_resnext'
  tiny_config.connectivity.level = 'branch'
  whole = train.train(tiny_config, tmp_path / 'whole')
  whole = SimpleNamespace(workdir=tmp_path / 'whole', summary=whole.summary)
  workdir = cut(whole, tmp_path / 'run', 8)
  train.train(tiny_config, workdir)
  assert_same_end(workdir, whole=whole)
  with np.load(workdir / 'real_masks.npz') as history:
    assert history['masks'].shape[1:] == (1, 4, 4)
    assert (history['masks'][0] != history['masks'][-1]).all()


@pytest.mark.slow
def test_a_streamed_run_is_cut_too(
  tiny_config, tmp_path, assert_same_end, arrays_in
):
  """Random crops, mixed and erased images, a damaged file, AdamW, drop path."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 80), ('val', 10)):
    for i in range(count):
      path = tmp_path / 'data' / split / str(i % 2) / f'{i}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      pixels = rng.integers(0, 200, (20, 24, 3), np.uint8) + np.uint8(
        i % 2 * 50
      )
      Image.fromarray(pixels).save(path)
  for path in ('train/0/6.jpg', 'train/1/9.jpg', 'val/0/4.jpg'):
    path = tmp_path / 'data' / path
    path.write_bytes(path.read_bytes()[:300])
  tiny_config.eval_batch_size = 8
  tiny_config.data.update(
    {
      'source': 'folder',
      'dir': str(tmp_path / 'data'),
      'skip_errors': True,
      'image_size': 8,
      'crop': 'resized',
      'eval_resize': 10,
      'mixup': 0.2,
      'randaugment': 1,
      'cutmix': 1.0,
      'erasing': 0.5,
      'class_weights': 'balanced',
    }
  )
  tiny_config.model.drop_path = 0.3
  tiny_config.optimizer.update(
    {
      'average': 0.9,
      'name': 'adamw',
      'learning_rate': 0.01,
      'body_rate': 0.5,
      'frozen': 'stem,stack.blocks.0.conv1',
    }
  )
  whole = train.train(tiny_config, tmp_path / 'whole')
  assert whole.summary['num_test_examples'] == 9
  assert whole.summary['skipped_files'] == 3
  whole = SimpleNamespace(workdir=tmp_path / 'whole', summary=whole.summary)
  early, late = (
    arrays_in(whole.workdir / f'checkpoints/{step}/state') for step in (4, 24)
  )
  stayed = {
    name.removeprefix('weights.')
    for name, array in early.items()
    if name.startswith('weights.') and array.tobytes() == late[name].tobytes()
  }
  assert stayed == {
    'stem.conv.kernel', 'stem.norm.scale', 'stem.norm.bias',
    'stack.blocks.0.conv1.kernel',
  }  # fmt: skip
  tiny_config.data.threads = 1
  tiny_config.eval_batch_size = 5  # on four devices eight, as before
  for step in (8, 16):  # in both phases; an epoch is one step
    workdir = cut(whole, tmp_path / f'run{step}', step)
    resumed = train.train(tiny_config, workdir)
    assert_same_end(workdir, whole=whole)
    assert resumed.summary['skipped_files'] == 3


def test_same_command_same_bits(tiny_config, tmp_path, assert_same_end):
  train.train(tiny_config, tmp_path / 'run')
  assert_same_end(tmp_path / 'run')


@pytest.mark.usefixtures('ctrl_c')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(
  number, tiny, tmp_path, cli, assert_same_end, caplog
):
  workdir = tmp_path / 'run'
  real = train.finish.at_freeze

  def at_freeze(*arguments):
    os.kill(os.getpid(), number)
    return real(*arguments)

  before = signal.getsignal(number)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.finish, 'at_freeze', at_freeze)
    ran = cli(f'--config={tiny}', f'--workdir={workdir}')
  assert ran.code == 128 + number
  assert ran.out == ''
  assert f'{number.name}: saving after the step under way' in caplog.text
  assert 'stopped after step 13 of 24; the same command goes on' in ran.err
  assert steps(workdir)[-1] == 13  # the step under way, not one of every 4
  assert not (workdir / 'summary.json').exists()
  assert signal.getsignal(number) == before
  ran = cli(f'--config={tiny}', f'--workdir={workdir}')
  assert ran.code == 0
  assert 'going on from step 13 of 24' in ran.err
  assert_same_end(workdir)


@pytest.mark.usefixtures('ctrl_c')
def test_a_signal_in_an_evaluation_and_at_the_freeze(
  tiny_config, tmp_path, assert_same_end
):
  """The state is saved, and the log of both cuts is that of a run without."""
  tiny_config.evaluate_every = '6 steps'  # no checkpoint is due there
  tiny_config.log_every = '3 steps'
  tiny_config.connectivity.phase = '10 steps'  # nor here
  whole = train.train(tiny_config, tmp_path / 'whole')
  whole = SimpleNamespace(workdir=tmp_path / 'whole', summary=whole.summary)
  workdir = tmp_path / 'run'
  for number, module, name, step in (
    (signal.SIGINT, train.evaluation.batches, 'evaluation_batches', 6),
    (signal.SIGTERM, train.freeze, 'freeze', 10),
  ):
    real = getattr(module, name)

    def stopping(*arguments, number=number, real=real, **more):
      os.kill(os.getpid(), number)
      return real(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(module, name, stopping)
      assert train.train(tiny_config, workdir).interrupted == number
    assert steps(workdir)[-1] == step
    assert lines(workdir)[-1]['step'] < step or name == 'freeze'
  train.train(tiny_config, workdir)
  assert_same_end(workdir, whole=whole)


def test_a_signal_for_which_no_step_is_left_is_passed_on():
  came = []
  with signals.caught(lambda number, frame: came.append(number)):
    with Preemption() as preemption:
      os.kill(os.getpid(), signal.SIGTERM)
      assert came == [signal.SIGTERM]  # before the first step
      assert preemption.requested(1) == 0
      os.kill(os.getpid(), signal.SIGHUP)
      assert len(came) == 1
    assert came == [signal.SIGTERM, signal.SIGHUP]
    with Preemption() as preemption:
      preemption.requested(1)
      os.kill(os.getpid(), signal.SIGHUP)
      assert preemption.requested(2) == signal.SIGHUP
    assert len(came) == 2


def test_finished_run_trains_nothing(
  tiny_config, tmp_path, finished, assert_same_end, monkeypatch
):
  workdir = cut(finished, tmp_path / 'run', 24)

  def never(*arguments):
    raise AssertionError('a step was compiled')

  def killed(*arguments, **more):
    raise MemoryError

  monkeypatch.setattr(loop, 'compile_step', never)
  with monkeypatch.context() as patch:
    patch.setattr(train.finish, 'draw_confusion', killed)
    with pytest.raises(MemoryError):
      train.train(tiny_config, workdir)
  # A picture costs no model; without a summary all of it is written again.
  assert (workdir / 'model' / 'model.json').exists()
  assert not (workdir / 'summary.json').exists()
  result = train.train(tiny_config, workdir)
  assert (workdir / 'figures' / 'confusion.png').exists()
  timed = {'batch_seconds': 0, 'batch_seconds_pruned': 0}
  assert result.summary | timed == finished.summary | timed
  assert_same_end(workdir)


def damage(workdir, step, how):
  folder = workdir / 'checkpoints' / str(step)
  files = [path for path in folder.rglob('*') if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  middle = len(content) // 2
  if how == 'flip':
    content[middle : middle + 8] = bytes(b ^ 255 for b in content[middle:][:8])
    largest.write_bytes(content)
  elif how == 'delete':
    largest.unlink()
  else:
    (folder.parent / 'accuracies.json').write_text('{"accu')


@pytest.mark.parametrize(
  ('how', 'falls_back'),
  [
    ('flip', True),
    ('delete', True),
    ('metrics', False),  # only how good it was is lost
  ],
)
def test_damaged_newest_checkpoint(
  how, falls_back, tiny_config, tmp_path, finished, assert_same_end, capsys,
  caplog,
):  # fmt: skip
  workdir = cut(finished, tmp_path / 'run', 24)
  damage(workdir, 24, how)
  train.train(tiny_config, workdir)
  captured = capsys.readouterr().err
  start = 20 if falls_back else 24
  assert f'going on from step {start} of 24' in captured
  said = [r.getMessage() for r in caplog.records if 'damaged' in r.getMessage()]
  assert len(said) == 1
  what = 'checkpoints/24' if falls_back else 'checkpoints/accuracies.json'
  assert str(workdir / what) in said[0]
  assert 'Traceback' not in captured + caplog.text
  assert_same_end(workdir)


def test_all_damaged(tiny, tmp_path, finished, cli):
  workdir = cut(finished, tmp_path / 'run', 8)
  for step in (4, 8):
    damage(workdir, step, 'flip')
  before = (workdir / 'metrics.jsonl').read_bytes()
  ran = cli(f'--config={tiny}', f'--workdir={workdir}')
  assert ran.code == 2
  assert ran.out == ''
  assert ran.err.count('\n') == 1
  assert f'no checkpoint in {workdir / "checkpoints"} can be read' in ran.err
  assert 'another --workdir' in ran.err
  assert (workdir / 'metrics.jsonl').read_bytes() == before
  assert steps(workdir) == [4, 8]


def test_another_config_is_refused(tiny, tmp_path, finished, cli):
  before = {
    path: path.stat().st_mtime_ns for path in finished.workdir.rglob('*')
  }
  ran = cli(
    f'--config={tiny}',
    f'--workdir={finished.workdir}',
    '--config.seed=1',
    '--config.optimizer.schedule=step',
    '--config.optimizer.steps_at=("10%",)',
  )
  assert ran.code == 2
  assert ran.err.count('\n') == 1
  assert 'seed (6 there, 1 now)' in ran.err
  assert "optimizer.steps_at (['50%', '75%'] there, ['10%'] now)" in ran.err
  assert 'batch_size' not in ran.err
  after = {
    path: path.stat().st_mtime_ns for path in finished.workdir.rglob('*')
  }
  assert after == before


def test_a_workdir_in_which_nothing_was_saved_takes_another_config(
  tiny, tmp_path, cli
):
  workdir = tmp_path / 'run'
  arguments = f'--config={tiny}', f'--workdir={workdir}'
  ran = cli(*arguments, '--config.optimizer.learning_rate=1e38')
  assert ran.code == 2
  assert 'there is no checkpoint yet' in ran.err
  assert cli(*arguments, '--config.duration=4 steps').code == 0
  stored = json.loads((workdir / 'config.json').read_text())
  assert stored['optimizer']['learning_rate'] == 0.1
  ran = cli(*arguments, '--config.duration=8 steps')
  assert "duration ('4 steps' there, '8 steps' now)" in ran.err


def test_one_run_at_a_time(tiny, tmp_path, finished, cli, monkeypatch):
  """Of this config or another: one line, and nothing is touched."""
  monkeypatch.setattr(locks, 'PATIENCE', 0.0)
  for workdir in (finished.workdir, tmp_path / 'new'):
    with locks.locked(workdir):
      before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
      for seed in (6, 1) if workdir != finished.workdir else (6,):
        ran = cli(
          f'--config={tiny}', f'--workdir={workdir}', f'--config.seed={seed}'
        )
        assert ran.code == 2
        assert ran.err.startswith(f'error: {workdir} is being trained by an')
        assert ran.err.count('\n') == 1
      assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before


def test_a_workdir_that_cannot_be_made(tiny, tmp_path, cli):
  (tmp_path / 'file').write_text('')
  ran = cli(f'--config={tiny}', f'--workdir={tmp_path / "file/run"}')
  assert ran.code == 2
  assert 'file/run cannot be made (Not a directory); give another' in ran.err


def test_a_damaged_config_is_refused(tiny_config, tmp_path):
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(config.InputError, match='config.json is damaged'):
    train.train(tiny_config, tmp_path)


@pytest.mark.usefixtures('ctrl_c')
def test_ctrl_c_twice_stops_at_once(tiny, tmp_path, cli, monkeypatch, caplog):
  """No traceback, the status that shells expect."""

  def write(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(metrics.MetricsWriter, 'write', write)
  ran = cli(f'--config={tiny}', f'--workdir={tmp_path}')
  assert ran.code == 130
  assert 'SIGINT: saving after the step under way' in caplog.text
  assert 'interrupted; a run goes on from its newest checkpoint' in ran.err
  assert 'Traceback' not in ran.err
  assert steps(tmp_path) == []


@pytest.mark.slow
def test_kills_at_twenty_random_moments(tiny, tmp_path, assert_same_end):
  """Start, compile, steps, saves, freeze, report: kill -9 wherever it is.

  A run that comes to its end before the kill is compared, and another begins.
  """
  rng = np.random.default_rng(0)
  command = [sys.executable, '-m', 'maskconnect_jax.main', f'--config={tiny}']
  environment = os.environ | {'XLA_FLAGS': ''}

  def begin(workdir):
    return subprocess.Popen(
      [*command, f'--workdir={workdir}'],
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )

  # As long as the others, in the same kind of process.
  begun = time.monotonic()
  assert begin(tmp_path / 'whole').wait(timeout=300) == 0
  length = time.monotonic() - begun
  summary = json.loads((tmp_path / 'whole/summary.json').read_text())
  whole = SimpleNamespace(workdir=tmp_path / 'whole', summary=summary)
  kills, finished, number = 0, 0, 0
  while kills < 20 or not finished:
    workdir = tmp_path / f'run{number}'
    process = begin(workdir)
    try:
      wait = rng.uniform(0, length) if kills < 20 else 300
      assert process.wait(timeout=wait) == 0
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      kills += 1
      continue
    assert_same_end(workdir, whole=whole)
    assert not [p for p in workdir.rglob('*') if 'tmp' in p.name]
    finished, number = finished + 1, number + 1
