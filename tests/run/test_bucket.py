"""Workdirs in a bucket, against an S3 server of the same API on this host."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

import maskconnect_jax
from maskconnect_jax import config as config_lib
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import bucket, inference, locks, mirror

ROOT = Path(__file__).parents[2]
WHOLE = '_CHECKPOINT_METADATA'


@pytest.fixture(scope='module')
def server():
  """The address of the server, which ends with the module."""
  running = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  running.start()
  yield 'http://{}:{}'.format(*running.get_host_and_port())
  running.stop()


@pytest.fixture
def s3(server, tmp_path, monkeypatch):
  """A client of boto3, s3fs's peer; bucket 'store' is empty."""
  for name, value in {
    'AWS_ENDPOINT_URL': server,
    'AWS_ACCESS_KEY_ID': 'test',
    'AWS_SECRET_ACCESS_KEY': 'test',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'XDG_CACHE_HOME': str(tmp_path / 'cache'),
  }.items():
    monkeypatch.setenv(name, value)
  client = boto3.client('s3')
  client.create_bucket(Bucket='store')
  yield client
  for key in keys(client):
    client.delete_object(Bucket='store', Key=key)
  client.delete_bucket(Bucket='store')
  client.close()


def keys(client, prefix=''):
  found = client.list_objects_v2(Bucket='store', Prefix=prefix)
  return [item['Key'] for item in found.get('Contents', [])]


def content(client, key):
  return client.get_object(Bucket='store', Key=key)['Body'].read()


def write(folder, texts):
  for name, text in texts.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def copied(client, prefix, folder):
  for key in keys(client, prefix):
    path = folder / key.removeprefix(prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(client, key))
  return folder


def assert_same_arrays(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name, array in theirs.items():
    assert ours[name].tobytes() == array.tobytes(), name


def checkpoint(step):
  return {f'checkpoints/{step}/{WHOLE}': '{}', f'checkpoints/{step}/a': 'abc'}


def test_a_folder_and_its_bucket(s3, monkeypatch):
  monkeypatch.setattr(locks, 'PATIENCE', 0.1)
  with bucket.mirrored('s3://store/r/un/') as folder:
    assert not list(folder.iterdir())
    again = bucket.mirrored('s3://store/r/un')
    with pytest.raises(InputError, match='s3://store/r/un is being trained'):
      again.__enter__()
    write(folder, {'config.json': '1', **checkpoint(4), 'tensorboard/e': 't'})
    write(folder, {'.lock': '', 'checkpoints/8.orbax-checkpoint-tmp/a': ''})
  assert not folder.exists()
  assert keys(s3) == [
    f'r/un/checkpoints/4/{WHOLE}',
    'r/un/checkpoints/4/a',
    'r/un/config.json',
    'r/un/tensorboard/e',
  ]
  # A push of checkpoint 6 that was killed before its end.
  s3.put_object(Bucket='store', Key='r/un/checkpoints/6/a', Body=b'')
  with bucket.mirrored('s3://store/r/un') as folder:
    names = {p.relative_to(folder).as_posix() for p in folder.rglob('*')}
    assert names == {
      'checkpoints', 'checkpoints/4', *checkpoint(4), 'config.json',
    }  # fmt: skip
    assert (folder / 'checkpoints/4/a').read_text() == 'abc'
    write(folder, {'config.json': '22', **checkpoint(8)})
    shutil.rmtree(folder / 'checkpoints/4')
  assert keys(s3) == [
    f'r/un/checkpoints/8/{WHOLE}',
    'r/un/checkpoints/8/a',
    'r/un/config.json',
    'r/un/tensorboard/e',  # neither fetched nor deleted
  ]
  assert content(s3, 'r/un/config.json') == b'22'
  with bucket.reading('s3://store/r', ['config.json']) as folder:
    (found,) = (p for p in folder.rglob('*') if p.is_file())
    assert found == folder / 'un/config.json'
    assert folder.parts[-2:] == ('store', 'r')


def test_in_which_order_objects_come_and_go(s3, tmp_path, monkeypatch):
  """So a process that is killed leaves no checkpoint that counts in part."""
  told = []

  def record(kind):
    real = getattr(mirror.Mirror('s3://store/run')._system, kind)

    def call(*args):
      told.append((kind[0], args[-1].removeprefix('store/run/')))
      return real(*args)

    return call

  ours = mirror.Mirror('s3://store/run')
  for kind in ('put_file', 'rm_file'):
    monkeypatch.setattr(ours._system, kind, record(kind))
  write(tmp_path, {'summary.json': '', 'model/model.json': '', 'model/z': ''})
  write(tmp_path, {'metrics.jsonl': '', 'config.json': '', **checkpoint(4)})
  ours.push(tmp_path)
  assert told == [
    ('p', 'config.json'),
    ('p', 'metrics.jsonl'),
    ('p', 'checkpoints/4/a'),
    ('p', f'checkpoints/4/{WHOLE}'),
    ('p', 'model/z'),
    ('p', 'model/model.json'),
    ('p', 'summary.json'),
  ]
  told.clear()
  ours.push(tmp_path)
  assert told == []  # nothing has changed
  shutil.rmtree(tmp_path / 'checkpoints/4')
  write(tmp_path, {'checkpoints/accuracies.json': '', **checkpoint(8)})
  write(tmp_path, checkpoint(12))
  ours.push(tmp_path)
  assert told == [
    ('p', 'checkpoints/accuracies.json'),
    ('p', 'checkpoints/8/a'),
    ('p', f'checkpoints/8/{WHOLE}'),
    ('p', 'checkpoints/12/a'),
    ('p', f'checkpoints/12/{WHOLE}'),
    ('r', f'checkpoints/4/{WHOLE}'),
    ('r', 'checkpoints/4/a'),
  ]


def test_what_changes_goes_up_meanwhile(s3, monkeypatch):
  monkeypatch.setattr(mirror, 'SECONDS', 0.05)
  with bucket.mirrored('s3://store/run') as folder:
    write(folder, {'metrics.jsonl': 'a line\n'})
    waiter = s3.get_waiter('object_exists')
    waiter.config.delay = 0.1
    waiter.wait(Bucket='store', Key='run/metrics.jsonl')


def a_run(*steps, seed=0):
  """The files of a run with checkpoints; the log tells the newest one."""
  config = config_lib.default()
  config.seed = seed
  texts = {'config.json': config.to_json(), 'metrics.jsonl': f'{steps[-1]}\n'}
  for step in steps:
    texts |= checkpoint(step)
  return texts


def kept_of(text):
  return Path(re.search(r' in (/\S+?),', text)[1])


def test_a_bucket_that_is_lost_loses_nothing(s3):
  with bucket.mirrored('s3://store/run') as folder:
    write(folder, a_run(4))
  there = {key: content(s3, key) for key in keys(s3)}
  work = bucket.mirrored('s3://store/run')
  write(work.__enter__(), a_run(4, 8))
  for key in there:
    s3.delete_object(Bucket='store', Key=key)
  s3.delete_bucket(Bucket='store')
  with pytest.raises(InputError, match='cannot be written .*all files') as told:
    work.__exit__(None, None, None)
  assert '\n' not in str(told.value)
  kept = kept_of(str(told.value))
  assert (kept / 'checkpoints/8/a').read_text() == 'abc'
  with pytest.raises(InputError, match='cannot be written'):
    bucket.mirrored('s3://store/run').__enter__()
  assert (kept / 'checkpoints/8/a').read_text() == 'abc'
  s3.create_bucket(Bucket='store')
  for key, body in there.items():
    s3.put_object(Bucket='store', Key=key, Body=body)
  with bucket.mirrored('s3://store/run') as folder:
    assert (folder / 'checkpoints/8/a').read_text() == 'abc'
  assert not kept.parent.exists()


def test_what_a_killed_run_did_not_send_is_sent_first(s3, caplog):
  with bucket.mirrored('s3://store/run') as folder:
    write(folder, a_run(4, 8))
  write(folder, a_run(8, 12, 100))  # as a process that was killed leaves it
  write(folder, {'checkpoints/8/a': 'of other names and bytes'})
  write(folder, {'checkpoints/104.orbax-checkpoint-tmp/a': ''})
  with bucket.mirrored('s3://store/run') as again:
    assert again == folder
    assert 'sending it now, up to the checkpoint of step 100' in caplog.text
    steps = {path.name for path in (folder / 'checkpoints').iterdir()}
    assert steps == {'4', '8', '12', '100'}
    assert (folder / 'checkpoints/8/a').read_text() == 'abc'
    assert (folder / 'metrics.jsonl').read_text() == '100\n'
  assert not folder.parent.exists()
  # Its last checkpoint is there, and its results are not.
  write(folder, a_run(100) | {'summary.json': '{}'})
  with bucket.mirrored('s3://store/run'):
    assert content(s3, 'run/summary.json') == b'{}'


def test_a_bucket_that_is_ahead_stays_as_it_is(s3, caplog):
  with bucket.mirrored('s3://store/run') as folder:
    write(folder, a_run(4, 12))
  write(folder, a_run(4, 8))
  with bucket.mirrored('s3://store/run'):
    steps = {path.name for path in (folder / 'checkpoints').iterdir()}
    assert steps == {'4', '12'}
    assert (folder / 'metrics.jsonl').read_text() == '12\n'
  assert not [r for r in caplog.records if r.levelname == 'WARNING']
  assert not list(folder.parents[1].iterdir())


@pytest.mark.parametrize(
  'there', [a_run(12, seed=1), {}], ids=['other', 'none']
)
def test_an_unsent_run_that_is_not_that_of_the_bucket_is_kept(
  there, s3, caplog
):
  with bucket.mirrored('s3://store/run') as folder:
    write(folder, there)
  before = keys(s3)
  write(folder, a_run(4, 24))
  with bucket.mirrored('s3://store/run'):
    names = {p.relative_to(folder).as_posix() for p in folder.rglob('*.*')}
    assert names == {name for name in there if '.' in name}
  assert keys(s3) == before
  assert 'was cut on this machine after step 24' in caplog.text
  kept = kept_of(caplog.text)
  assert (kept / 'checkpoints/24/a').read_text() == 'abc'
  # It stays as long as it is used, and for a month.
  old = time.time() - 31 * 86_400
  for path in (kept, *kept.rglob('*')):
    os.utime(path, (old, old))
  os.utime(kept / 'config.json')
  with bucket.mirrored('s3://store/run'):
    assert kept.exists()
  os.utime(kept / 'config.json', (old, old))
  with bucket.mirrored('s3://store/run'):
    assert not kept.exists()
  assert f'removing {kept}' in caplog.text


@pytest.mark.parametrize('clean', [True, False])
def test_an_interrupt_while_the_last_files_go_up(
  clean, s3, monkeypatch, caplog
):
  def interrupted(*_):
    raise KeyboardInterrupt

  def run():
    with bucket.mirrored('s3://store/run') as folder:
      write(folder, a_run(4, 8))
      system = mirror.Mirror('s3://store/run')._system
      monkeypatch.setattr(system, 'put_file', interrupted)
      if not clean:
        raise ValueError

  with bucket.mirrored('s3://store/run') as folder:
    write(folder, a_run(4))
  with pytest.raises(KeyboardInterrupt):
    run()
  assert kept_of(caplog.text) == folder
  assert (folder / 'checkpoints/8/a').read_text() == 'abc'
  monkeypatch.undo()


@pytest.fixture
def cut(s3, finished):
  """The address of the tiny run as it was before its model was written.

  Of its checkpoints three are there, and the end of a fourth is missing.
  """
  for path in finished.workdir.rglob('*'):
    name = path.relative_to(finished.workdir).as_posix()
    sent = re.match(
      r'(config|inputs|checkpoints/accuracies)\.json|checkpoints/(8|12|16|20)/',
      name,
    )
    if path.is_file() and sent and name != f'checkpoints/20/{WHOLE}':
      s3.upload_file(str(path), 'store', f'run/{name}')
  return 's3://store/run'


def accuracies(workdir):
  return {
    record['step']: record['test_accuracy']
    for record in records(workdir / 'metrics.jsonl')
    if 'test_accuracy' in record
  }


def test_a_run_in_a_bucket_that_is_not_finished(cut, finished):
  """The newest checkpoint, that of a step and the best; each fetched alone."""
  measured = accuracies(finished.workdir)
  best = max((8, 16), key=lambda step: (measured[step], step))
  for step, number in ((None, 16), (12, 12), ('best', best)):
    model = maskconnect_jax.load(cut, step=step)
    theirs = maskconnect_jax.load(finished.workdir, step=number)
    assert model.topology == theirs.topology
    assert_same_arrays(
      *(
        {name: np.asarray(array) for name, array in each.arrays.items()}
        for each in (model, theirs)
      )
    )
    with inference.reading(cut, step) as folder:
      data = {path.parts for path in folder.glob('checkpoints/*/state/**/*')}
      assert {parts[len(folder.parts) + 1] for parts in data} == {str(number)}


@pytest.mark.parametrize(
  ('step', 'says'),
  [
    (20, r's3://store/run/checkpoints has .* step 20; those there: 8, 12, 16$'),
    ('bets', "^step='bets' is neither"),
  ],
)
def test_checkpoints_that_are_not_in_the_bucket(cut, step, says):
  with pytest.raises(InputError, match=says):
    maskconnect_jax.load(cut, step=step)


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_not_finished_is_evaluated(
  cut, finished, cli
):
  there = cli('--mode=evaluate', f'--workdir={cut}')
  assert there.code == 0, there.err
  assert json.loads(there.out)['test_accuracy'] == pytest.approx(
    accuracies(finished.workdir)[16]
  )


@pytest.mark.parametrize(
  ('address', 'says'),
  [
    (
      's3://store',
      "'s3://store' names no folder in a bucket; give one such as s3://store/",
    ),
    ('s3://store/../x', 'names no folder'),
    ('s3://no-such/run', 's3://no-such/run cannot be written'),
  ],
)
def test_what_is_no_bucket(s3, address, says, tmp_path):
  with pytest.raises(InputError, match=says) as told, bucket.mirrored(address):
    pass
  assert '\n' not in str(told.value)
  assert not (tmp_path / 'cache/maskconnect_jax/buckets').exists() or not list(
    (tmp_path / 'cache/maskconnect_jax/buckets').iterdir()
  )


@pytest.mark.parametrize(
  ('address', 'extra'), [('gs://store/run', 'gcs'), ('s3://store/run', 's3')]
)
def test_a_missing_package_is_named(address, extra, monkeypatch):
  """As on an installation without the extra: Python finds no such module."""
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *rest: (
      None if name in ('gcsfs', 's3fs') else real(name, *rest)
    ),
  )
  with pytest.raises(InputError, match=rf"'maskconnect_jax\[{extra}\]'$"):
    maskconnect_jax.load(address)


# Runs the command line, but kills itself (kill -9) once step 14 is written, and
# all of that is in the bucket; or with 'unsent' what came before step 6 alone.
COMMAND = """
import os, signal, sys, time
from maskconnect_jax import main
from maskconnect_jax.run import metrics, mirror

mirror.SECONDS = 0.1

def write(self, step, *rest, real=metrics.MetricsWriter.write):
  real(self, step, *rest)
  if 'unsent' in os.environ and step == 6:
    time.sleep(5)
    mirror.SECONDS = 1e6
    time.sleep(5)
  if 'kill' in os.environ and step == 14:
    time.sleep(5)
    os.kill(os.getpid(), signal.SIGKILL)

metrics.MetricsWriter.write = write
main.run()
"""


def start(*arguments, **environment):
  return subprocess.run(
    [sys.executable, '-W', 'error::UserWarning', '-c', COMMAND, *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | environment,
    timeout=250,
    check=False,
  )


def records(path):
  return [
    {k: v for k, v in json.loads(line).items() if k != 'images_per_second'}
    for line in path.read_text().splitlines()
  ]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_bucket_alone(
  s3, tiny, finished, arrays_in, tmp_path
):
  address = '--workdir=s3://store/runs/a'
  first = start(f'--config={tiny}', address, kill='')
  assert first.returncode == -signal.SIGKILL, first.stderr
  assert f'runs/a/checkpoints/12/{WHOLE}' in keys(s3)
  assert 'runs/a/summary.json' not in keys(s3)
  other = str(tmp_path / 'of another machine')
  second = start(address, XDG_CACHE_HOME=other)  # the config is there, too
  assert second.returncode == 0, second.stderr
  assert 'going on from step 12 of 24 in s3://store/runs/a' in second.stderr
  assert 's3://store/runs/a/summary.json' in second.stdout
  assert not [p for p in Path(other).rglob('*') if 'buckets/' in str(p)]

  there = copied(s3, 'runs/a/', tmp_path / 'copy')
  whole = finished.workdir
  assert records(there / 'metrics.jsonl') == records(whole / 'metrics.jsonl')
  assert_same_arrays(
    *(arrays_in(f / 'checkpoints/24/state') for f in (there, whole))
  )
  for name in ('topology.json', 'inputs.json', 'plan.json', 'config.json'):
    assert (there / name).read_text() == (whole / name).read_text()
  with (
    np.load(there / 'real_masks.npz') as mine,
    np.load(whole / 'real_masks.npz') as other_masks,
  ):
    np.testing.assert_array_equal(mine['masks'], other_masks['masks'])
  assert {p.name for p in (there / 'figures').iterdir()} == {
    p.name for p in (whole / 'figures').iterdir()
  }

  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
  here = maskconnect_jax.load(there).predict(images)
  for place in ('s3://store/runs/a', 's3://store/runs/a/model/'):
    np.testing.assert_array_equal(
      maskconnect_jax.load(place).predict(images), here
    )
  summary = json.loads((there / 'summary.json').read_text())
  scores = start('--mode=evaluate', address)
  assert scores.returncode == 0, scores.stderr
  assert (
    json.loads(scores.stdout)['test_accuracy']
    == summary['test_accuracy_pruned']
  )
  for mode in ('summarize', 'dynamics'):
    table = start(f'--mode={mode}', '--workdirs=s3://store/runs')
    assert table.returncode == 0, table.stderr
    assert 'maskconnect-' not in table.stdout
  graph = tmp_path / 'graph.dot'
  told = start('--mode=describe', address, f'--graph={graph}')
  assert told.returncode == 0, told.stderr
  assert graph.read_text().startswith('digraph')
  sweep = start('--mode=sweep', f'--config={tiny}', address)
  assert sweep.returncode == 2
  assert '--mode=sweep writes to a folder' in sweep.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_from_what_was_not_sent(
  s3, tiny, finished, arrays_in, tmp_path
):
  address = '--workdir=s3://store/run'
  first = start(f'--config={tiny}', address, kill='', unsent='')
  assert first.returncode == -signal.SIGKILL, first.stderr
  assert f'run/checkpoints/4/{WHOLE}' in keys(s3)
  assert f'run/checkpoints/8/{WHOLE}' not in keys(s3)
  second = start(address)
  assert second.returncode == 0, second.stderr
  assert 'up to the checkpoint of step 12' in second.stderr
  assert 'going on from step 12 of 24 in s3://store/run' in second.stderr
  there, whole = copied(s3, 'run/', tmp_path / 'copy'), finished.workdir
  assert records(there / 'metrics.jsonl') == records(whole / 'metrics.jsonl')
  assert_same_arrays(
    *(arrays_in(f / 'checkpoints/24/state') for f in (there, whole))
  )
  assert not list((tmp_path / 'cache/maskconnect_jax/buckets').iterdir())


@pytest.mark.slow
def test_two_processes_share_a_bucket(s3, tiny, arrays_in, tmp_path):
  """Their machines have no folder in common, and both are lost once."""

  def both(workdir, caches, **environment):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    started = [
      subprocess.Popen(
        [
          sys.executable, '-W', 'error::UserWarning', '-c', COMMAND,
          f'--config={tiny}', f'--workdir={workdir}', '--multihost',
          '--config.optimizer.shard=True',
        ],
        env=os.environ
        | {
          'XDG_CACHE_HOME': str(tmp_path / caches / str(number)),
          'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
          'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
          'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
          'JAX_NUM_PROCESSES': '2',
          'JAX_PROCESS_ID': str(number),
        }
        | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=280)[0] for process in started]
    return [process.returncode for process in started], outputs

  folder = tmp_path / 'a run [1]'  # a name that Orbax misreads
  codes, outputs = both(folder, 'first')
  assert codes == [0, 0], outputs
  codes, outputs = both('s3://store/run', 'second', kill='')
  assert codes[0] == -signal.SIGKILL, outputs
  assert codes[1] not in (0, None), outputs
  assert f'run/checkpoints/12/{WHOLE}' in keys(s3)
  codes, outputs = both('s3://store/run', 'third')
  assert codes == [0, 0], outputs
  assert 'going on from step 12 of 24 in s3://store/run' in outputs[0]

  there = copied(s3, 'run/', tmp_path / 'copy')
  assert records(there / 'metrics.jsonl') == records(folder / 'metrics.jsonl')
  assert_same_arrays(
    *(arrays_in(f / 'checkpoints/24/state') for f in (there, folder))
  )
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
  np.testing.assert_array_equal(
    maskconnect_jax.load('s3://store/run').predict(images),
    maskconnect_jax.load(folder).predict(images),
  )
