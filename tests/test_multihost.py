"""Two processes train what one trains, and one of them writes it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import backend

ROOT = Path(__file__).parents[1]


def free_port():
  with socket.socket() as server:
    server.bind(('localhost', 0))
    return server.getsockname()[1]


def command(tiny, workdir, data, *more, **environment):
  inherited = {
    name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'
  }
  arguments = [f'--config={tiny}', f'--workdir={workdir}']
  if environment:
    arguments.append('--multihost')
  count = 1 if environment else 2
  flag = f'--xla_force_host_platform_device_count={count}'
  return subprocess.Popen(
    [
      sys.executable, '-m', 'maskconnect_jax.main', *arguments,
      '--config.data.source=folder', f'--config.data.dir={data}',
      '--config.data.image_size=8', '--config.data.crop=resized',
      '--config.data.eval_resize=10', '--config.eval_batch_size=8',
      '--config.data.mixup=0.1', '--config.data.flip=true',
      '--config.checkpoint_every=2 steps', *more,
    ],
    env=inherited | {'XLA_FLAGS': flag} | environment,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )  # fmt: skip


def joining(port, process):
  return {
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
    'JAX_NUM_PROCESSES': '2',
    'JAX_PROCESS_ID': str(process),
  }


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny, tmp_path, arrays_in):
  rng = np.random.default_rng(0)
  for split, count in (('train', 150), ('val', 21)):
    for i in range(count):
      path = tmp_path / 'data' / split / str(i % 2) / f'{i}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      pixels = rng.integers(0, 200, (20, 24, 3), np.uint8) + np.uint8(
        i % 2 * 50
      )
      Image.fromarray(pixels).save(path)
  data, port = tmp_path / 'data', free_port()
  both = [
    command(tiny, tmp_path / 'both', data, **joining(port, process))
    for process in range(2)
  ]
  outputs = [process.communicate(timeout=280)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  assert 'after pruning' in outputs[0]
  assert 'step' not in outputs[1]
  alone = command(tiny, tmp_path / 'alone', data)
  said = alone.communicate(timeout=280)[0]
  assert alone.returncode == 0, said

  summaries, lines = [], []
  for name in ('both', 'alone'):
    folder = tmp_path / name
    summaries.append(json.loads((folder / 'summary.json').read_text()))
    text = (folder / 'metrics.jsonl').read_text()
    lines.append([json.loads(line) for line in text.splitlines()])
  assert summaries[0]['num_devices'] == summaries[1]['num_devices'] == 2
  assert summaries[0]['num_test_examples'] == 21
  first = [[line['loss'] for line in run[:3]] for run in lines]
  np.testing.assert_allclose(*first, rtol=1e-3)
  # Later, a mask that is drawn otherwise by a rounding makes another network.
  states = [
    arrays_in(tmp_path / name / 'checkpoints/2/state')
    for name in ('both', 'alone')
  ]
  assert states[0].keys() == states[1].keys()
  for name, array in states[0].items():
    np.testing.assert_allclose(
      array, states[1][name], rtol=1e-3, atol=1e-4, err_msg=name
    )

  # Going on, where the second host does not see the first one's folder.
  port = free_port()
  apart = [
    command(tiny, tmp_path / name, data, **joining(port, process))
    for process, name in enumerate(('both', 'elsewhere'))
  ]
  outputs = [process.communicate(timeout=100)[0] for process in apart]
  assert [process.returncode for process in apart] == [2, 2], outputs
  for output in outputs:
    assert 'found checkpoints of the steps [24, 0]' in output
    assert 'Traceback' not in output


@pytest.mark.slow
@pytest.mark.skipif(not backend.native.value, reason='no C++ compiler')
def test_hosts_with_and_without_a_compiler(tiny, tmp_path):
  """Their programs would wait for other sums."""
  for i in range(160):
    path = (
      tmp_path / 'data' / ('train', 'val')[i % 8 == 0] / f'{i // 8 % 2}/{i}.png'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (20, 24), (i, 0, 0)).save(path)
  port = free_port()
  uneven = [
    command(
      tiny, tmp_path / 'run', tmp_path / 'data', **joining(port, n), **own
    )
    for n, own in enumerate(({}, {'CXX': ''}))
  ]
  outputs = [process.communicate(timeout=100)[0] for process in uneven]
  assert [process.returncode for process in uneven] == [2, 2], outputs
  for output in outputs:
    assert 'processes [1] have not compiled the C++ code' in output
    assert 'Traceback' not in output


@pytest.mark.slow
@pytest.mark.parametrize('bad', [0, 1])
@pytest.mark.parametrize(
  ('more', 'says'),
  [
    (['--config.sede=1'], 'config.sede is not a config field'),
    (['--config.data.dir=/nonexistent'], "config.data.dir='/nonexistent'"),
    (['--config.data.dir={damaged}'], 'is damaged or cut short'),
  ],
)
def test_what_is_wrong_on_one_host_ends_all(bad, more, says, tiny, tmp_path):
  """In one line each, which names the host that failed, and why."""
  for name, size in (('data', None), ('damaged', 100)):
    for i in range(160):
      split, path = ('train', 'val')[i % 8 == 0], f'{i // 8 % 2}/{i}.jpg'
      path = tmp_path / name / split / path
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (20, 24), (i, 0, 0)).save(path)
      if size:
        path.write_bytes(path.read_bytes()[:size])
  port = free_port()
  started = []
  for process in range(2):
    extra = [a.format(damaged=tmp_path / 'damaged') for a in more]
    started.append(
      command(
        tiny,
        tmp_path / 'run',
        tmp_path / 'data',
        *(extra if process == bad else []),
        **joining(port, process),
      )
    )
  outputs = [process.communicate(timeout=100)[0] for process in started]
  assert [process.returncode for process in started] == [2, 2], outputs
  for process, output in enumerate(outputs):
    (line,) = [line for line in output.splitlines() if 'error' in line]
    assert says in line
    assert 'Traceback' not in output
    assert line.startswith(
      'error: '
      if process == bad
      else f'error: process {bad} ({socket.gethostname()}): '
    )
