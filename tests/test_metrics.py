"""Lines, events, rates and the record of masks, also of a run that was cut."""

import contextlib
import io
import json
import os
import sys
import time

import numpy as np
import pytest

from maskconnect_jax import metrics

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


def test_plain_lines(monkeypatch, capsys):
  now = 0.0
  monkeypatch.setattr(time, 'monotonic', lambda: now)
  bar = metrics.Progress(100, 0)
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
  bar = metrics.Progress(100, 80)
  now = 10.0
  bar.update(90, 'train', VALUES)
  assert '00:10 left' in capsys.readouterr().err


def test_bar_on_a_terminal(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  bar = metrics.Progress(100, 20)
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
    bar = metrics.Progress(4, 0)
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


def test_a_history_holds_one_mask(tmp_path):
  history = metrics.MaskHistory(tmp_path, 0)
  with pytest.raises(ValueError, match='unpack'):
    history.add(2, {})
