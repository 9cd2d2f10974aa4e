"""Batches from memory and from a stream: what is in them, in which order."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import config
from maskconnect_jax.data import datasets
from maskconnect_jax.run import batches, cores, distributed

COUNT, BATCH, SEED = 22, 8, 7
PER_EPOCH = COUNT // BATCH


@pytest.fixture(scope='module')
def mesh():
  return distributed.make_mesh()


@pytest.fixture(scope='module')
def sharding(mesh):
  return distributed.sharded(mesh)


def first(iterator, count):
  return [jax.device_get(batch) for batch in itertools.islice(iterator, count)]


def assert_same(one, other):
  for a, b in zip(one, other, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# From memory.


@pytest.fixture(scope='module')
def resident(sharding):
  """Image i is full of i, and so is its label."""
  numbers = np.arange(COUNT)
  images = np.broadcast_to(numbers[:, None, None, None], (COUNT, 2, 3, 1))
  split = datasets.Split(images.astype(np.uint8), numbers.astype(np.int32))
  return batches.Resident(split, BATCH, seed=SEED, sharding=sharding)


def test_resident_epochs_are_the_permutations_of_their_keys(resident):
  taken = first(resident.starting_at(0), 3 * PER_EPOCH)
  order = jax.random.fold_in(jax.random.key(SEED), 0)  # steps.ORDER
  for step, (images, labels) in enumerate(taken):
    epoch, place = divmod(step, PER_EPOCH)
    expected = jax.random.permutation(
      jax.random.fold_in(order, epoch * PER_EPOCH), COUNT
    )[place * BATCH : (place + 1) * BATCH]
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(images[:, 1, 2, 0], labels)
    assert images.shape == (BATCH, 2, 3, 1)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_resident_goes_on_in_the_middle_of_an_epoch(resident):
  whole = first(resident.starting_at(0), 7)
  for start in (1, PER_EPOCH, 5):
    assert_same(first(resident.starting_at(start), 2), whole[start : start + 2])


def test_resident_batches_are_sharded(resident):
  images, labels = next(resident.starting_at(0))
  for array in (images, labels):
    assert len(array.sharding.device_set) == jax.device_count()
    assert {s.data.shape[0] for s in array.addressable_shards} == {
      BATCH // jax.device_count()
    }


# Decoded.


def grey_of(split, number):
  """A value that names an image, far from any other."""
  return 10 + 7 * number + (160 if split != 'train' else 0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """22 + 9 JPEGs of mixed sizes, each of one grey value of its own."""
  root = tmp_path_factory.mktemp('folder')
  for split, count in (('train', COUNT), ('val', 9)):
    for i in range(count):
      path = root / split / f'class{i % 2}' / f'{i}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      value = grey_of(split, i)
      Image.new('RGB', (30 + i, 50 - i), (value,) * 3).save(path, quality=95)
  return root


def fields(folder, **changes):
  data = config.default().data
  data.source, data.dir = 'folder', str(folder)
  data.image_size, data.crop = 16, 'resized'
  data.update(changes)
  return data


@pytest.fixture(scope='module')
def streams(folder):
  return datasets.load(fields(folder))


def streamed(stream, sharding, *, threads=2, workers=0):
  return batches.Decoded(
    stream,
    BATCH,
    seed=SEED,
    sharding=sharding,
    threads=threads,
    workers=workers,
  )


def values_of(taken):
  """The grey value of every image, which names it."""
  return [images.mean((1, 2, 3)).round().tolist() for images, _ in taken]


def test_streamed_epochs_hold_every_image_once_in_new_orders(streams, sharding):
  taken = first(streamed(streams.train, sharding).starting_at(0), 3 * PER_EPOCH)
  known = {}
  for number in range(COUNT):
    known[grey_of('train', number)] = number % 2
  epochs = []
  for epoch in range(3):
    mine = taken[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH]
    values = list(itertools.chain.from_iterable(values_of(mine)))
    nearest = [min(known, key=lambda k, v=v: abs(k - v)) for v in values]
    assert max(abs(n - v) for n, v in zip(nearest, values, strict=True)) <= 2
    assert len(set(nearest)) == PER_EPOCH * BATCH
    labels = np.concatenate([labels for _, labels in mine])
    assert labels.tolist() == [known[n] for n in nearest]
    epochs.append(tuple(nearest))
  assert len(set(epochs)) == 3
  # What is left out of an epoch is not always the same.
  assert len({frozenset(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize('start', [1, PER_EPOCH, 5])
def test_streamed_goes_on_anywhere_with_any_number_of_threads(
  streams, sharding, start
):
  whole = first(streamed(streams.train, sharding).starting_at(0), start + 2)
  again = streamed(streams.train, sharding, threads=1)
  assert_same(first(again.starting_at(start), 2), whole[start:])


def test_slow_decoding_is_told_once(streams, sharding, monkeypatch):
  monkeypatch.setattr(cores, 'available', lambda: 16)
  stream = streamed(streams.train, sharding)
  assert stream.advice(100.0) is None  # nothing was waited for
  first(stream.starting_at(0), 2)
  assert 0 < stream._waited < 30
  stream._waited = 51.0
  assert stream.advice(100.0).endswith(
    '--config.data.workers=14 decodes in 14 processes'
  )
  stream._waited = 51.0
  assert stream.advice(100.0) is None
  waiting = streamed(streams.train, sharding, workers=14)
  waiting._waited = 51.0
  assert waiting.advice(100.0) is None  # as many as there can be


@pytest.mark.parametrize(
  ('threads', 'processes', 'expected'),
  [(16, 1, 6), (4, 1, 4), (16, 4, 2), (16, 6, 1), (16, 9, 1)],
)
def test_no_more_threads_than_cores(monkeypatch, threads, processes, expected):
  monkeypatch.setattr(cores, 'available', lambda: 6)
  assert batches._read_options(threads, processes).num_threads == expected


@pytest.mark.slow
def test_streamed_through_worker_processes_is_the_same(streams, sharding):
  whole = first(streamed(streams.train, sharding).starting_at(1), 5)
  workers = streamed(streams.train, sharding, workers=2)
  assert_same(first(workers.starting_at(1), 5), whole)


WORKERS = """
import itertools, os, signal, sys, time
import jax
from maskconnect_jax import config
from maskconnect_jax.data import datasets
from maskconnect_jax.run import batches, distributed

if __name__ == '__main__':
  data = config.default().data
  data.source, data.dir = 'folder', sys.argv[1]
  data.image_size, data.crop = 16, 'resized'
  mesh = distributed.make_mesh()
  stream = batches.Decoded(
    datasets.load(data).train, 8, seed=0, sharding=distributed.sharded(mesh),
    threads=1, workers=2)
  kept = list(itertools.islice(stream.starting_at(0), 5))
  if sys.argv[2] == 'killed':
    going = stream.starting_at(0)
    next(going)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def shared_memory():
  return {path.name for path in Path('/dev/shm').glob('psm_*')}


@pytest.mark.slow
@pytest.mark.skipif(not Path('/dev/shm').is_dir(), reason='Linux has it')
@pytest.mark.parametrize('end', ['by itself', 'killed'])
def test_workers_and_shared_memory_end_with_the_run(folder, tmp_path, end):
  """The workers hold the standard error of the run: it closes with the last."""
  (tmp_path / 'run.py').write_text(WORKERS)
  before = shared_memory()
  done = subprocess.run(
    [sys.executable, 'run.py', folder, end],
    cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip
  if end == 'killed':
    assert done.returncode == -signal.SIGKILL
  else:
    assert done.returncode == 0, done.stderr
    assert 'leaked' not in done.stderr
  assert shared_memory() <= before


def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
  """Without Grain, which takes long to start."""
  (tmp_path / 'run.py').write_text("""
import multiprocessing, os, signal, time

def work(sending):
  from maskconnect_jax.run import batches
  batches._prepare_worker(0, 1)
  sending.send(os.getpid())
  time.sleep(100)

if __name__ == '__main__':
  receiving, sending = multiprocessing.Pipe(duplex=False)
  spawning = multiprocessing.get_context('spawn')
  spawning.Process(target=work, args=(sending,), daemon=True).start()
  print(receiving.recv(), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
""")
  # The worker has the standard output too: reading it waits for both.
  done = subprocess.run(
    [sys.executable, 'run.py'],
    cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
  )  # fmt: skip
  assert done.returncode == -signal.SIGKILL
  assert int(done.stdout)


@pytest.mark.parametrize('num_processes', [2, 4])
def test_processes_share_the_batches_of_one(streams, num_processes):
  """Together they see what one would see: every image once, cropped alike."""
  examples = batches.training_examples(streams.train, SEED, BATCH)

  def shares(process, of):
    rows = batches.share_of_batches(examples, BATCH, 1, process, of)
    return [rows[i] for i in range(2 * PER_EPOCH)]

  (alone,) = [shares(0, 1)]
  parts = [shares(process, num_processes) for process in range(num_processes)]
  for batch, *pieces in zip(alone, *parts, strict=True):
    for whole, *part in zip(batch, *pieces, strict=True):
      assert {len(p) for p in part} == {BATCH // num_processes}
      np.testing.assert_array_equal(whole, np.concatenate(part))


@pytest.mark.parametrize('num_processes', [1, 2])
def test_evaluation_counts_every_image_once(streams, num_processes):
  examples = batches.evaluation_examples(streams.test, 4)
  assert len(examples) == 12
  seen = []
  for process in range(num_processes):
    rows = batches.share_of_batches(examples, 4, 0, process, num_processes)
    for index in range(3):
      images, labels, counted = rows[index]
      seen += [
        (round(image.mean()), label)
        for image, label, counts in zip(images, labels, counted, strict=True)
        if counts
      ]
  expected = sorted((grey_of('val', i), i % 2) for i in range(9))
  assert len(seen) == 9
  for (value, label), (colour, own) in zip(sorted(seen), expected, strict=True):
    assert abs(value - colour) <= 2
    assert label == own


def test_evaluation_of_a_stream_is_that_of_its_decoded_images(folder, mesh):
  """Both ways of holding a set give the same batches."""
  plain = fields(folder, crop='pad')
  split = datasets.load(plain).test
  stream = datasets.load(fields(folder, crop='pad', memory_gb=1e-6)).test
  assert isinstance(split, datasets.Split)
  assert isinstance(stream, datasets.LazySplit)
  one, other = (
    first(batches.evaluation_batches(s, 8, mesh, threads=2), 3)
    for s in (split, stream)
  )
  assert len(one) == 2
  assert_same(one, other)


# Damage.


@pytest.fixture
def damaged(folder, tmp_path):
  """The folder with one damaged file to train on and one to test on."""
  for path in folder.rglob('*.jpg'):
    copy = tmp_path / path.relative_to(folder)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(path.read_bytes())
  bad = [tmp_path / 'train/class1/7.jpg', tmp_path / 'val/class0/4.jpg']
  for path in bad:
    path.write_bytes(path.read_bytes()[:200])
  return tmp_path, bad


def test_a_damaged_file_ends_the_stream_and_is_named(damaged, sharding, mesh):
  root, (bad, bad_test) = damaged
  dataset = datasets.load(fields(root))
  with pytest.raises(config.InputError, match=f'{bad} .*skip_errors=True'):
    first(streamed(dataset.train, sharding).starting_at(0), 6)
  with pytest.raises(config.InputError, match=f'{bad_test} .*skip_errors'):
    first(batches.evaluation_batches(dataset.test, 8, mesh, threads=1), 2)


def test_a_damaged_file_is_replaced_and_counted(damaged, sharding, mesh):
  root, _ = damaged
  dataset = datasets.load(fields(root, skip_errors=True))
  stream = streamed(dataset.train, sharding)
  taken = first(stream.starting_at(0), 6)
  files = sorted(path.name for path in (root / 'train/class1').iterdir())
  number = 11 + files.index('7.jpg')  # class0 has eleven files
  assert stream.damaged == {number}
  assert {len(labels) for _, labels in taken} == {BATCH}
  assert not any((images == 0).all((1, 2, 3)).any() for images, _ in taken)
  counted = np.concatenate(
    [
      counted
      for *_, counted in first(
        batches.evaluation_batches(dataset.test, 8, mesh, threads=1), 2
      )
    ]
  )
  assert counted.sum() == 8


# TFDS.


def test_a_tfds_set_is_streamed_from_array_record(
  tmp_path, sharding, write_tfds
):
  values = {'train': [], 'test': []}

  def image(split, i):
    values[split].append(grey_of(split, i))
    return Image.new('RGB', (40, 30 + i), (values[split][-1],) * 3)

  write_tfds(tmp_path, 'photos', image, num_train=16, num_test=5, classes='abc')
  data = fields('', source='tfds', name='photos', dir=str(tmp_path))
  dataset = datasets.load(data)
  assert dataset.classes == ('a', 'b', 'c')
  assert (len(dataset.train), len(dataset.test)) == (16, 5)
  taken = first(streamed(dataset.train, sharding).starting_at(0), 2)
  seen = sorted(itertools.chain.from_iterable(values_of(taken)))
  np.testing.assert_allclose(seen, sorted(values['train']), atol=2)
  for i in range(5):
    image, label, whole = dataset.test.evaluation_example(i)
    assert whole
    assert label == i % 3
    assert abs(image.mean() - values['test'][i]) <= 2
