"""Lines, events, rates and the record of masks, also of a run that was cut."""

import contextlib
import gc
import io
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax import config
from maskconnect_jax.run import metrics

VALUES = {
  'loss': 2.5,
  'accuracy': 0.25,
  'learning_rate': 0.1,
  'images_per_second': 1000.0,
}


def test_lines(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(2, 'train', VALUES)
  # On disk at once: a kill loses no line.
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(text) == {'step': 2, 'phase': 'train', **VALUES}
  writer.close()
  assert metrics.read(tmp_path) == [json.loads(text)]


def test_lines_after_the_checkpoint_go(tmp_path):
  assert metrics.read(tmp_path) == []
  writer = metrics.MetricsWriter(tmp_path, 0)
  for step in (2, 4, 6):
    writer.write(step, 'train', {'loss': step})
  writer.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 8, "lo')
  writer = metrics.MetricsWriter(tmp_path, 4)
  writer.write(6, 'train', {'loss': 60})
  writer.close()
  found = [(r['step'], r['loss']) for r in metrics.read(tmp_path)]
  assert found == [(2, 2), (4, 4), (6, 60)]


@pytest.mark.parametrize('file', ['metrics.jsonl', 'tensorboard'])
def test_a_full_disk(file, small_disk, tmp_path, capfd):
  full, workdir = small_disk('64k'), tmp_path / 'run'
  (tmp_path / 'roomy').mkdir()
  if file == 'tensorboard':
    workdir.mkdir()
    (workdir / file).symlink_to(full)
  else:
    workdir.symlink_to(full)
    (workdir / 'tensorboard').symlink_to(tmp_path / 'roomy')
  writer = metrics.MetricsWriter(workdir, 0)
  writer.write(1, 'train', VALUES)

  def fill():
    for step in range(2, 5000):
      writer.write(step, 'train', VALUES)

  with pytest.raises(config.InputError, match='No space left') as error:
    fill()
  assert str(error.value).startswith(f'{workdir / file} cannot be written')
  assert '\n' not in str(error.value)
  writer.close()  # it neither hangs nor tells of it again
  assert metrics.read(workdir)[0] == {'step': 1, 'phase': 'train', **VALUES}
  gc.collect()
  assert capfd.readouterr().err == ''


NO_RECORDS = [
  b'{"step": 4, "lo', b'\xff\xfe', b'\0\0\0', b'7', b'[]', b'null', b'"text"',
  b'{"loss": 1}', b'{"step": "4"}', b'{"step": true}', b'{"step": 4.0}',
  b'{"step": 4, "nested": [NaN]}', b'[' * 100_000,
]  # fmt: skip


@pytest.mark.parametrize('line', NO_RECORDS, ids=lambda line: str(line[:15]))
def test_a_damaged_line_loses_no_other(line, tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  whole = [b'{"step": %d, "loss": 0.5}' % step for step in (2, 6, 8)]
  path.write_bytes(b'\n'.join([whole[0], line, *whole[1:], b'']))
  assert [r['step'] for r in metrics.read(tmp_path)] == [2, 6, 8]
  assert path.read_bytes().count(b'\n') == 4  # reading changes nothing
  metrics.MetricsWriter(tmp_path, 6).close()
  assert path.read_bytes() == b'\n'.join([*whole[:2], b''])
  assert (tmp_path / 'metrics.jsonl.damaged').read_bytes() == line + b'\n'
  (message,) = caplog.messages
  assert f'{path}: line 2 is damaged and now in metrics.jsonl.dam' in message
  metrics.MetricsWriter(tmp_path, 6).close()
  assert len(caplog.messages) == 1


def test_damaged_lines_gather(tmp_path, caplog):
  for line in ('one', 'two'):
    with (tmp_path / 'metrics.jsonl').open('a') as file:
      file.write(f'{line}\n{line}\n')
    metrics.MetricsWriter(tmp_path, 6).close()
  aside = tmp_path / 'metrics.jsonl.damaged'
  assert aside.read_text() == 'one\none\ntwo\ntwo\n'
  assert '2 lines from line 1 on are damaged' in caplog.messages[0]


def test_no_line_holds_what_json_has_not(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(  # by an earlier version
    '{"step": 2, "test_loss": NaN, "loss": 1e999}\n'
  )
  writer = metrics.MetricsWriter(tmp_path, 2)
  writer.write(4, 'train', {'a': float('inf'), 'b': None, 'c': 1.5})
  writer.close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert lines == [
    '{"step": 2, "test_loss": null, "loss": null}',
    '{"step": 4, "phase": "train", "a": null, "b": null, "c": 1.5}',
  ]


def test_only_one_process_writes(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0, enabled=False)
  writer.write(2, 'train', VALUES)
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_throughput(monkeypatch):
  now = 100.0
  monkeypatch.setattr(time, 'perf_counter', lambda: now)
  clock = metrics.Throughput(images=50, seconds=1.0)
  assert clock.stop(10) == 0.0  # it had not begun
  clock.start()
  now = 102.0
  assert clock.stop(300) == 150.0
  now = 1000.0  # a pause
  clock.start()
  now = 1001.0
  assert clock.stop(50) == 50.0
  assert (clock.images, clock.seconds) == (400, 4.0)
  assert clock.images_per_second == 100.0
  assert metrics.Throughput().images_per_second == 0.0


def test_throughput_waits_for_the_device():
  """A step is only handed over when its call returns."""
  long = jax.jit(
    lambda x: jax.lax.fori_loop(0, 300, lambda _, x: x @ x * 1e-3, x)
  )
  x = jnp.ones((300, 300))
  long(x).block_until_ready()  # compiles
  alone = []
  for _ in range(3):
    start = time.perf_counter()
    long(x).block_until_ready()
    alone.append(time.perf_counter() - start)
  clock = metrics.Throughput()
  clock.start()
  result = long(x)
  clock.stop(1, {'weights': result})
  assert clock.seconds > 0.5 * min(alone)


def test_plain_lines(monkeypatch, capsys):
  now = 0.0
  monkeypatch.setattr(time, 'monotonic', lambda: now)
  bar = metrics.ProgressBar(100, 0)
  now = 5.0
  bar.update(10, 'train', VALUES)
  assert capsys.readouterr().err == ''  # too soon
  now = 20.0
  bar.update(40, 'train', VALUES)
  line = capsys.readouterr().err
  assert line == (
    'train step 40/100  loss 2.500  acc 0.250  lr 0.1  img/s 1000  00:30 left\n'
  )
  now = 21.0
  bar.update(100, 'fine-tune', VALUES)  # the last is always printed
  assert '100/100' in capsys.readouterr().err
  bar.close()


def test_time_left_counts_this_run_only(monkeypatch, capsys):
  now = 0.0
  monkeypatch.setattr(time, 'monotonic', lambda: now)
  bar = metrics.ProgressBar(100, 80)
  now = 10.0
  bar.update(90, 'train', VALUES)
  assert '00:10 left' in capsys.readouterr().err


@pytest.mark.parametrize('terminal', [False, True])
def test_a_pause_is_no_part_of_the_time_left(terminal, monkeypatch, capsys):
  """Ten steps of a second each after a minute of compiling: 90 s are left."""
  now = 1000.0
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: terminal)
  monkeypatch.setattr(time, 'monotonic', lambda: now)
  monkeypatch.setattr('tqdm.std.time', lambda: now)
  bar = metrics.ProgressBar(100, 0)
  with bar.pause():
    now += 60
  now += 10
  bar.update(10, 'train', VALUES)
  shown = capsys.readouterr().err
  bar.close()
  assert ('<01:30' if terminal else '01:30 left') in shown


def test_bar_on_a_terminal(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  bar = metrics.ProgressBar(100, 20)
  bar.update(40, 'train', VALUES)
  bar.say('a line')
  bar.close()
  shown = capsys.readouterr().err
  assert 'a line\n' in shown
  assert '40/100' in shown
  assert 'train' in shown
  assert 'loss=2.500' in shown


@pytest.mark.parametrize('terminal', [True, False])
@pytest.mark.parametrize('how', ['full', 'broken', 'closed', 'none'])
def test_what_cannot_be_shown_ends_nothing(how, terminal, monkeypatch):
  """A terminal that hung up, a pipe or stream that was closed, a full disk."""
  reader, writer = os.pipe()
  os.close(reader)
  with (
    open('/dev/full', 'w') as full,
    open(writer, 'w', closefd=False) as broken,
  ):
    closed = io.StringIO()
    closed.isatty = lambda: terminal
    streams = {'full': full, 'broken': broken, 'closed': closed, 'none': None}
    stream = streams[how]
    monkeypatch.setattr(sys, 'stderr', stream)
    bar = metrics.ProgressBar(4, 0)
    closed.close()
    bar.say('a line')
    for step in range(1, 5):
      bar.update(step, 'train', VALUES)
    bar.close()
    for file in (full, broken):  # what they hold back cannot be written either
      with contextlib.suppress(OSError):
        file.close()
  os.close(writer)


def test_mask_history(tmp_path):
  history = metrics.MaskHistory(tmp_path, 0)
  history.save()
  assert not (tmp_path / 'real_masks.npz').exists()
  for step in (2, 4, 6):
    history.add(step, {'mask': np.full((3, 3), step, np.float32)})
  history.save()
  again = metrics.MaskHistory(tmp_path, 4)  # the newest checkpoint is of 4
  assert len(again) == 2
  again.add(6, {'mask': np.full((3, 3), 60, np.float32)})
  again.save()
  with np.load(tmp_path / 'real_masks.npz') as file:
    np.testing.assert_array_equal(file['steps'], [2, 4, 6])
    np.testing.assert_array_equal(file['masks'][:, 0, 0], [2, 4, 60])
  # A run that starts anew does not take over what is there.
  assert len(metrics.MaskHistory(tmp_path, 0)) == 0


def archive(**arrays):
  def write(path):
    np.savez(path, **arrays)

  return write


STEPS, MASKS = np.arange(2), np.zeros((2, 3, 3), np.float32)


@pytest.mark.parametrize(
  'write',
  [
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(b'no archive'),
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(path.read_bytes()[:100]),
    lambda path: path.write_bytes(
      path.read_bytes().replace(b'\x93NUMPY', b'\x93NUMPi')
    ),
    lambda path: np.save(path.open('wb'), MASKS),
    archive(steps=STEPS),
    archive(steps=STEPS, masks=np.zeros((2, 4, 4), np.float32)),
    archive(steps=STEPS, masks=MASKS[:1]),
    archive(steps=STEPS, masks=MASKS * np.float32('nan')),
    archive(steps=STEPS, masks=MASKS.astype(str)),
    archive(steps=STEPS, masks=np.array([None, {}])),
    archive(steps=np.float32(3), masks=MASKS),
  ],
)
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_history_begins_anew(write, tmp_path, caplog):
  path = tmp_path / 'real_masks.npz'
  archive(steps=STEPS, masks=MASKS)(path)
  assert len(metrics.MaskHistory(tmp_path, 4, (3, 3))) == 2
  write(path)
  damaged = path.read_bytes()
  others = metrics.MaskHistory(tmp_path, 4, (3, 3), enabled=False)
  assert len(others) == 0
  assert path.read_bytes() == damaged
  history = metrics.MaskHistory(tmp_path, 4, (3, 3))
  assert len(history) == 0
  (message,) = caplog.messages
  assert f'{path} is damaged' in message
  assert (tmp_path / 'real_masks.npz.damaged').read_bytes() == damaged
  history.add(6, {'mask': MASKS[0]})
  history.save()
  assert len(metrics.MaskHistory(tmp_path, 6, (3, 3))) == 1
  assert len(caplog.messages) == 1


def test_a_history_holds_one_mask(tmp_path):
  history = metrics.MaskHistory(tmp_path, 0)
  with pytest.raises(ValueError, match='unpack'):
    history.add(2, {})
