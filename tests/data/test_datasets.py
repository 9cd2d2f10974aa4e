"""Every source against arrays made or read here, and every bad input."""

import dataclasses
import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image

from maskconnect_jax import config
from maskconnect_jax.data import datasets, sources

RNG = np.random.default_rng(0)


def load(**fields):
  data = config.default().data
  with data.unlocked():
    data.update(fields)
  return datasets.load(data)


def assert_splits_equal(actual, expected):
  np.testing.assert_array_equal(actual.images, expected.images)
  np.testing.assert_array_equal(actual.labels, expected.labels)


# Digits, and what all sources share.


def test_digits_are_scikit_learns():
  dataset = load()
  assert (len(dataset.train), len(dataset.test)) == (1437, 360)
  assert dataset.validation is None
  assert dataset.image_shape == (8, 8, 1)
  assert dataset.classes == tuple('0123456789')
  for split in (dataset.train, dataset.test):
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int32
  # Together they are the whole set, each image once.
  bunch = sklearn.datasets.load_digits()
  expected = sorted(
    (label, np.rint(image / 16 * 255).astype(np.uint8).tobytes())
    for label, image in zip(bunch.target, bunch.images, strict=True)
  )
  both = sorted(
    (label, image.tobytes())
    for split in (dataset.train, dataset.test)
    for label, image in zip(split.labels, split.images, strict=True)
  )
  assert both == expected


def test_digits_split_is_stratified_and_fixed():
  dataset, other = load(), load()
  assert_splits_equal(other.train, dataset.train)
  assert_splits_equal(other.test, dataset.test)
  counts = np.bincount(dataset.test.labels)
  total = np.bincount(sklearn.datasets.load_digits().target)
  np.testing.assert_allclose(counts, total * 360 / 1797, atol=1)
  # Published accuracies are of these 360: a new scikit-learn must not move
  # the split unnoticed.
  digest = hashlib.sha256(dataset.test.images.tobytes()).hexdigest()
  assert digest[:16] == 'de85aee14a9506dd'


def test_validation_is_held_out_of_train():
  whole, held, other = load(), load(validation=200), load(validation=200)
  assert (len(held.train), len(held.validation)) == (1237, 200)
  assert_splits_equal(held.test, whole.test)
  assert_splits_equal(other.validation, held.validation)
  both = np.concatenate([held.train.images, held.validation.images])
  assert sorted(i.tobytes() for i in both) == sorted(
    i.tobytes() for i in whole.train.images
  )
  share = np.bincount(whole.train.labels) * 200 / 1437
  np.testing.assert_allclose(np.bincount(held.validation.labels), share, atol=1)


def test_some_training_images_of_those_not_held_out():
  held, fewer = load(validation=200), load(validation=200, train_images=100)
  assert_splits_equal(fewer.validation, held.validation)
  assert_splits_equal(fewer.test, held.test)
  share = np.bincount(held.train.labels) * 100 / 1237
  assert len(fewer.train) == 100
  np.testing.assert_allclose(np.bincount(fewer.train.labels), share, atol=1)
  drawn = {image.tobytes() for image in fewer.train.images}
  assert drawn <= {image.tobytes() for image in held.train.images}


@pytest.mark.parametrize('field', ['validation', 'train_images'])
@pytest.mark.parametrize('count', [1437, 2000])
def test_a_part_is_smaller_than_the_training_images(field, count):
  with pytest.raises(
    config.InputError, match=rf'{field}={count} must be smaller.*1437'
  ):
    load(**{field: count})


@pytest.mark.parametrize('field', ['validation', 'train_images'])
def test_a_part_must_reach_every_class(field):
  with pytest.raises(config.InputError, match=f'{field}=3 .*10 classes'):
    load(**{field: 3})


def test_image_size_resizes():
  dataset = load(image_size=16)
  assert dataset.image_shape == (16, 16, 1)
  expected = Image.fromarray(load().test.images[5, :, :, 0]).resize(
    (16, 16), Image.Resampling.BILINEAR
  )
  np.testing.assert_array_equal(
    dataset.test.images[5, :, :, 0], np.asarray(expected)
  )


def source_of(labels, *, at_hand):
  """Three training records and the test records, with these labels."""
  return sources.Source(
    lambda i: (np.zeros((2, 2, 1), np.uint8), int(labels[i])),
    num_train=3,
    num_test=len(labels) - 3,
    classes=('a', 'b'),
    channels=1,
    name='it',
    labels=np.array(labels) if at_hand else None,
  )


# Of a set that is decoded while training.
LATER = {'trivialaugment': True, 'image_size': 8, 'skip_errors': True}


@pytest.mark.parametrize('fields', [{}, LATER])
@pytest.mark.parametrize(
  ('labels', 'says'),
  [
    ([-1, 1, 1, 0], 'training labels from -1 to 1; its 2 classes'),
    ([-1, -1, -1, 0], 'training labels from -1 to -1; its 2 classes'),
    ([0, 1, 2, 0], 'training labels from 0 to 2; its 2 classes'),
    ([1, 1, 1, 1], r'one class only \(b\)'),
    ([0, 1, 0, 2], r'test images with labels \[2\], of which'),
    ([0, 1, 0, *range(2, 99)], r'labels \[2, 3, 4, 5, 6\] and 92 more, of'),
  ],
)
def test_labels_beyond_the_classes(monkeypatch, fields, labels, says):
  source = source_of(labels, at_hand=True)
  monkeypatch.setattr(sources, 'open_source', lambda data: source)
  with pytest.raises(config.InputError, match=says) as error:
    load(**fields)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('wrong', [-1, 2])
def test_labels_that_only_the_records_hold(monkeypatch, wrong):
  labels = [0, wrong, 1, 0, wrong]
  source = source_of(labels, at_hand=False)
  monkeypatch.setattr(sources, 'open_source', lambda data: source)
  dataset = load(**LATER)
  rng = np.random.default_rng(0)
  for read in (
    dataset.train.read_labels,
    lambda: dataset.train.training_example(1, rng),
    lambda: dataset.test.evaluation_example(1),
  ):
    with pytest.raises(
      config.InputError,
      match=rf'^it has an image with the label {wrong}; its 2 .* from 0 to 1$',
    ):
      read()
  assert dataset.train.training_example(2, rng)[1] == 1


def test_test_labels_are_read_before_a_run_that_tests_at_its_end():
  data = config.default().data
  data.update(LATER)
  source = sources.open_source(data)
  last = len(source) - 1

  def read(i):
    record, label = source.read(i)
    return record, label if i < last else 10

  given = dataclasses.replace(source, read=read, labels=None)
  assert len(datasets.load(data, given).test) == 360
  data.validation = 100
  with pytest.raises(config.InputError, match='an image with the label 10;'):
    datasets.load(data, given)


@pytest.mark.parametrize('name', ['digits', 'idx', 'folder', 'table'])
def test_labels_in_memory_cost_no_read(tmp_path, monkeypatch, name):
  data = config.default().data
  data.source, data.dir, data.image_size = name, str(tmp_path), 4
  data.trivialaugment = True
  if name == 'idx':
    write_mnist(tmp_path)
  else:
    written = write_folder(tmp_path)
  if name == 'table':
    lines = [f'{p},{p.parts[-2]},{p.parts[-3]}' for p in written]
    path = tmp_path / 'all.csv'
    path.write_text('\n'.join(['path,label,split', *lines]))
    data.dir = str(path)
  source = sources.open_source(data)
  expected = [source.read(i)[1] for i in range(len(source))]

  def read(i):
    raise AssertionError(f'record {i} is read')

  # No record is read to draw the validation images, either.
  data.validation = {'digits': 20, 'idx': 3}.get(name, 2)
  dataset = datasets.load(data, dataclasses.replace(source, read=read))
  for part in (dataset.train, dataset.validation, dataset.test):
    found = part.read_labels()
    assert found.dtype == np.int32
    assert found.tolist() == [expected[i] for i in part.chosen]


def test_unknown_source_is_named():
  with pytest.raises(config.InputError, match=r"source='x'.*digits, idx"):
    load(source='x')


def test_mean_and_std():
  images = RNG.integers(0, 256, (2500, 3, 4, 3), np.uint8)
  images[..., 1] //= 3
  images[..., 2] = 7
  split = datasets.Split(images, np.zeros(2500, np.int32))
  dataset = datasets.Dataset(split, None, split, ('a', 'b'))
  mean, std = dataset.mean_and_std()
  assert mean.dtype == std.dtype == np.float64
  np.testing.assert_allclose(mean, images.mean((0, 1, 2), float), rtol=1e-12)
  np.testing.assert_allclose(
    std[:2], images[..., :2].std((0, 1, 2), float), rtol=1e-12
  )
  assert std[2] == 1  # a constant channel can still be divided by


def test_datasets_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    load().skipped = 1


# IDX files.


def write_idx(path, array):
  content = struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape)
  content += array.tobytes()
  path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)


def write_mnist(folder, style='{}-idx{}-ubyte', num_train=30, num_test=12):
  """Writes four files; returns what is in them."""
  arrays = []
  for prefix, count in (('train', num_train), ('t10k', num_test)):
    images = RNG.integers(0, 256, (count, 5, 7), np.uint8)
    labels = (np.arange(count) % 3).astype(np.uint8)
    write_idx(folder / style.format(f'{prefix}-images', 3), images)
    write_idx(folder / style.format(f'{prefix}-labels', 1), labels)
    arrays += [images, labels]
  return arrays


@pytest.mark.parametrize(
  'style', ['{}-idx{}-ubyte', '{}-idx{}-ubyte.gz', '{}.idx{}-ubyte']
)
def test_idx(tmp_path, style):
  arrays = write_mnist(tmp_path, style)
  dataset = load(source='idx', dir=str(tmp_path))
  actual = [
    dataset.train.images[..., 0],
    dataset.train.labels,
    dataset.test.images[..., 0],
    dataset.test.labels,
  ]
  for a, b in zip(actual, arrays, strict=True):
    np.testing.assert_array_equal(a, b)
  assert dataset.classes == ('0', '1', '2')
  assert dataset.image_shape == (5, 7, 1)
  assert dataset.train.labels.dtype == np.int32


@pytest.mark.parametrize('keep', [2, 10, 16, 100, 1065])
def test_idx_cut_short(tmp_path, keep):
  write_mnist(tmp_path)
  path = tmp_path / 'train-images-idx3-ubyte'
  path.write_bytes(path.read_bytes()[:keep])
  expected = 16 + 30 * 5 * 7 if keep >= 16 else 16
  with pytest.raises(
    config.InputError, match=f'{path} .*{expected} bytes.* {keep} found'
  ):
    load(source='idx', dir=str(tmp_path))


def test_idx_too_long(tmp_path):
  write_mnist(tmp_path)
  path = tmp_path / 't10k-labels-idx1-ubyte'
  path.write_bytes(path.read_bytes() + b'x')
  with pytest.raises(config.InputError, match=f'{path} .*20 bytes.* 21 found'):
    load(source='idx', dir=str(tmp_path))


@pytest.mark.parametrize('lost', [1, 8, 500])
def test_gzipped_idx_cut_short(tmp_path, lost):
  write_mnist(tmp_path, '{}-idx{}-ubyte.gz')
  path = tmp_path / 'train-images-idx3-ubyte.gz'
  path.write_bytes(path.read_bytes()[:-lost])
  with pytest.raises(
    config.InputError, match=f'{path} is damaged or cut short: 1066 bytes'
  ) as error:
    load(source='idx', dir=str(tmp_path))
  found = int(re.search(r'(\d+) found', str(error.value))[1])
  # Without the trailer of 8 bytes all the data is there, but unverified.
  assert (found == 1066) if lost <= 8 else (400 < found < 1066)


def test_gzipped_idx_that_is_no_gzip(tmp_path):
  write_mnist(tmp_path, '{}-idx{}-ubyte.gz')
  path = tmp_path / 'train-labels-idx1-ubyte.gz'
  path.write_bytes(b'<html>not found</html>')
  with pytest.raises(config.InputError, match=f'{path} is damaged'):
    load(source='idx', dir=str(tmp_path))


def test_idx_of_another_kind(tmp_path):
  arrays = write_mnist(tmp_path)
  path = tmp_path / 'train-images-idx3-ubyte'
  write_idx(path, arrays[1])
  with pytest.raises(config.InputError, match=f'{path} .*0x00000801.*0803'):
    load(source='idx', dir=str(tmp_path))


def test_idx_images_and_labels_of_different_sets(tmp_path):
  write_mnist(tmp_path)
  write_idx(tmp_path / 'train-labels-idx1-ubyte', np.zeros(29, np.uint8))
  with pytest.raises(config.InputError, match='30 images.* 29 labels'):
    load(source='idx', dir=str(tmp_path))


def test_idx_test_label_that_training_lacks(tmp_path):
  write_mnist(tmp_path)
  labels = np.array([0, 1, 2, 200] * 3, np.uint8)
  write_idx(tmp_path / 't10k-labels-idx1-ubyte', labels)
  with pytest.raises(config.InputError, match=r'test images.*\[200\]'):
    load(source='idx', dir=str(tmp_path))


def test_idx_with_one_class(tmp_path):
  write_mnist(tmp_path)
  write_idx(tmp_path / 'train-labels-idx1-ubyte', np.full(30, 4, np.uint8))
  with pytest.raises(config.InputError, match=r'one class only \(4\)'):
    load(source='idx', dir=str(tmp_path))


@pytest.mark.parametrize(
  ('num_train', 'num_test', 'message'),
  [(0, 12, 'no training images'), (30, 0, 'no test images'),
   (0, 0, 'no training images')],
)  # fmt: skip
def test_idx_without_images(tmp_path, num_train, num_test, message):
  write_mnist(tmp_path, num_train=num_train, num_test=num_test)
  with pytest.raises(config.InputError, match=message) as error:
    load(source='idx', dir=str(tmp_path))
  assert str(tmp_path) in str(error.value)


def test_idx_file_missing(tmp_path):
  write_mnist(tmp_path)
  (tmp_path / 't10k-images-idx3-ubyte').unlink()
  with pytest.raises(config.InputError, match='no t10k-images-idx3-ubyte'):
    load(source='idx', dir=str(tmp_path))


# Image folders.


def write_folder(root, sizes=((6, 9),), test='test', classes=('cat', 'dog')):
  """Writes 3 training and 2 test PNGs a class; returns {path: array}."""
  written = {}
  for split, count in (('train', 3), (test, 2)):
    for name in classes:
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        path = root / split / name / f'{i}.png'
        size = sizes[len(written) % len(sizes)]
        written[path] = RNG.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(written[path]).save(path)
  return written


@pytest.mark.parametrize('test', ['test', 'val'])
def test_folder(tmp_path, test):
  written = write_folder(tmp_path, test=test)
  (tmp_path / 'train' / 'cat' / '.hidden.png').write_bytes(b'')
  (tmp_path / 'train' / '.ipynb_checkpoints').mkdir()
  dataset = load(source='folder', dir=str(tmp_path))
  for split, name in ((dataset.train, 'train'), (dataset.test, test)):
    paths = sorted(p for p in written if p.parts[-3] == name)
    np.testing.assert_array_equal(split.images, [written[p] for p in paths])
    expected = [('cat', 'dog').index(p.parts[-2]) for p in paths]
    assert split.labels.tolist() == expected
    assert split.labels.dtype == np.int32
  assert dataset.classes == ('cat', 'dog')
  assert dataset.skipped == 0


def test_folder_prefers_test_to_val(tmp_path):
  write_folder(tmp_path)
  (tmp_path / 'val').mkdir()
  assert len(load(source='folder', dir=str(tmp_path)).test) == 4


def test_folder_of_jpegs_and_grey_images(tmp_path):
  written = write_folder(tmp_path)
  jpeg = tmp_path / 'train' / 'cat' / '3.jpg'
  Image.fromarray(next(iter(written.values()))).save(jpeg)
  grey = tmp_path / 'train' / 'cat' / '4.png'
  Image.new('L', (9, 6), 77).save(grey)
  dataset = load(source='folder', dir=str(tmp_path))
  with Image.open(jpeg) as image:
    np.testing.assert_array_equal(dataset.train.images[3], np.asarray(image))
  assert (dataset.train.images[4] == 77).all()


def test_folder_of_different_sizes_needs_image_size(tmp_path):
  written = write_folder(tmp_path, sizes=((6, 9), (30, 40), (20, 20)))
  with pytest.raises(config.InputError, match='image_size=20 ') as error:
    load(source='folder', dir=str(tmp_path))
  assert '6x9, 30x40' in str(error.value)
  dataset = load(source='folder', dir=str(tmp_path), image_size=8)
  assert dataset.image_shape == (8, 8, 3)
  expected = Image.fromarray(list(written.values())[1]).resize(
    (8, 8), Image.Resampling.BILINEAR
  )
  np.testing.assert_array_equal(dataset.train.images[1], np.asarray(expected))


def test_folder_beyond_memory(tmp_path):
  write_folder(tmp_path)
  takes = 10 * 6 * 9 * 3 / 1e9
  with pytest.raises(
    config.InputError, match=r'memory_gb=1e-06 .* 1\.62e-06 GB'
  ):
    load(source='folder', dir=str(tmp_path), memory_gb=1e-6)
  load(source='folder', dir=str(tmp_path), memory_gb=takes)


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('content', [b'text', None])
def test_damaged_file_is_named_or_skipped(tmp_path, caplog, content, first):
  written = write_folder(tmp_path)
  train = [p for p in written if 'train' in p.parts]
  bad = [train[0 if first else 2], train[4]]
  for path in bad:
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
  with pytest.raises(
    config.InputError, match=f'{re.escape(str(bad[0]))} .*skip_errors=True'
  ):
    load(source='folder', dir=str(tmp_path))
  with caplog.at_level(logging.WARNING, 'absl'):
    dataset = load(source='folder', dir=str(tmp_path), skip_errors=True)
  assert dataset.skipped == 2
  kept = [p for p in train if p not in bad]
  np.testing.assert_array_equal(
    dataset.train.images, [written[p] for p in kept]
  )
  assert dataset.train.labels.tolist() == [int('dog' in p.parts) for p in kept]
  assert len(dataset.test) == 4
  (record,) = caplog.records  # one warning for all of them
  assert str(bad[0]) in record.getMessage()
  assert record.getMessage().startswith('2 images')


def test_folder_where_nothing_decodes(tmp_path):
  for path in write_folder(tmp_path):
    path.write_bytes(b'text')
  with pytest.raises(config.InputError, match=r'has no images: .*0\.png'):
    load(source='folder', dir=str(tmp_path), skip_errors=True)


def test_folder_that_loses_a_class_to_skipping(tmp_path):
  for path in write_folder(tmp_path, classes=('a', 'b', 'c')):
    if path.parts[-3:-1] == ('train', 'b'):
      path.write_bytes(b'text')
  with pytest.raises(config.InputError, match=r'labels \[1\]'):
    load(source='folder', dir=str(tmp_path), skip_errors=True)


def test_file_that_is_no_image_is_not_silently_left_out(tmp_path):
  write_folder(tmp_path)
  (tmp_path / 'train' / 'dog' / 'notes.txt').write_text('hello')
  with pytest.raises(config.InputError, match=r'notes\.txt is not an image'):
    load(source='folder', dir=str(tmp_path))


def test_folder_without_test_images(tmp_path):
  write_folder(tmp_path, test='other')
  with pytest.raises(config.InputError, match='no test images') as error:
    load(source='folder', dir=str(tmp_path))
  assert f"config.data.dir='{tmp_path}'" in str(error.value)
  (tmp_path / 'test').mkdir()
  with pytest.raises(config.InputError, match='test holds no class folders'):
    load(source='folder', dir=str(tmp_path))
  for name in ('cat', 'dog'):
    (tmp_path / 'test' / name).mkdir()
  with pytest.raises(config.InputError, match='test/cat holds no images'):
    load(source='folder', dir=str(tmp_path))


def of_side(path, fraction=0.2):
  """Whether an image is for testing, by the rule in docs/data.md."""
  text = f'{path.parent.name}/{path.name}'.encode()
  return int(hashlib.sha256(text).hexdigest()[:16], 16) / 16**16 < fraction


def write_classes(root, count, classes=('cat', 'dog')):
  paths = []
  for number, name in enumerate(classes):
    (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
      path = root / name / f'{i}.png'
      pixels = np.full((6, 6, 3), 100 * number + i % 100, np.uint8)
      Image.fromarray(pixels).save(path)
      paths.append(path)
  return paths


def test_a_folder_of_classes_alone_is_split_by_names(tmp_path, caplog):
  paths = write_classes(tmp_path, 40)
  dataset = load(source='folder', dir=str(tmp_path))
  test = [path for path in paths if of_side(path)]
  assert 4 < len(test) < 30
  for split, own in (
    (dataset.test, test),
    (dataset.train, [path for path in paths if path not in test]),
  ):
    expected = [int(p.stem) + 100 * (p.parent.name == 'dog') for p in own]
    assert sorted(split.images[:, 0, 0, 0].tolist()) == sorted(expected)
    assert split.labels.sum() == sum(p.parent.name == 'dog' for p in own)
  (record,) = caplog.records
  assert f'{len(test)} of its 80 images are for testing' in record.getMessage()
  # More images: none changes its side.
  write_classes(tmp_path, 60)
  more = load(source='folder', dir=str(tmp_path), test_fraction=0.2)
  before = set(dataset.test.images[:, 0, 0, 0].tolist())
  assert before <= set(more.test.images[:, 0, 0, 0].tolist())
  assert not before & set(more.train.images[:, 0, 0, 0].tolist())


def test_a_class_that_a_split_leaves_empty_is_named(tmp_path):
  write_classes(tmp_path, 40)
  write_classes(tmp_path, 1, classes=('ant',))
  with pytest.raises(config.InputError, match=r'class ant, with 1 images,'):
    load(source='folder', dir=str(tmp_path))


def test_folder_without_train(tmp_path):
  write_folder(tmp_path)
  (tmp_path / 'train').rename(tmp_path / 'training')
  with pytest.raises(config.InputError, match='train holds no class folders'):
    load(source='folder', dir=str(tmp_path))


def test_folder_with_one_class(tmp_path):
  write_folder(tmp_path, classes=('cat',))
  with pytest.raises(config.InputError, match=r'one class only \(cat\)'):
    load(source='folder', dir=str(tmp_path))


def test_folder_with_different_classes(tmp_path):
  write_folder(tmp_path)
  (tmp_path / 'test' / 'dog').rename(tmp_path / 'test' / 'cow')
  with pytest.raises(
    config.InputError,
    match=r'cow is only in test, dog is only in train.*same class folders',
  ):
    load(source='folder', dir=str(tmp_path))


# What lies in a folder of images besides.


def fields(root, **changes):
  return {'source': 'folder', 'dir': str(root), 'image_size': 6} | changes


STREAMED = {'crop': 'resized', 'skip_errors': True}


def test_folder_with_a_named_pipe(tmp_path, caplog):
  write_folder(tmp_path)
  os.mkfifo(tmp_path / 'train' / 'cat' / 'pipe.png')
  os.mkfifo(tmp_path / 'train' / 'pipe')
  for more in ({}, {'skip_errors': True}, STREAMED):
    caplog.clear()
    with caplog.at_level(logging.WARNING, 'absl'):
      dataset = load(**fields(tmp_path, **more))
    assert len(dataset.train) == 6
    (record,) = caplog.records
    said = record.getMessage()
    assert 'left out 2: pipe (a named pipe), cat/pipe.png (a named' in said


def test_idx_file_that_is_a_named_pipe(tmp_path):
  write_mnist(tmp_path)
  name = 't10k-images-idx3-ubyte'
  (tmp_path / name).unlink()
  os.mkfifo(tmp_path / name)
  with pytest.raises(config.InputError, match=f'{name} is a named pipe'):
    load(source='idx', dir=str(tmp_path))


@pytest.mark.parametrize(
  'litter', ['@eaDir', '__MACOSX', 'lost+found', '$RECYCLE.BIN']
)
def test_folder_with_litter(tmp_path, caplog, litter):
  written = write_folder(tmp_path)
  for path in (*written, tmp_path / 'train' / 'x'):
    (path.parent / litter).mkdir(exist_ok=True)
    shutil.copy(next(iter(written)), path.parent / litter / 'thumb.jpg')
  with caplog.at_level(logging.WARNING, 'absl'):
    dataset = load(source='folder', dir=str(tmp_path))
  assert dataset.classes == ('cat', 'dog')
  assert (len(dataset.train), len(dataset.test)) == (6, 4)
  assert not caplog.records


def test_folder_of_linked_folders(tmp_path, caplog):
  write_folder(tmp_path / 'store')
  for path in (tmp_path / 'store').glob('*/*'):
    own = tmp_path / 'set' / path.relative_to(tmp_path / 'store')
    own.mkdir(parents=True)
    (own / 'of last year').symlink_to(path)
    (own / 'loop').symlink_to(own)
    (own / 'all').symlink_to(own.parent)
  with caplog.at_level(logging.WARNING, 'absl'):
    dataset = load(source='folder', dir=str(tmp_path / 'set'))
  expected = load(source='folder', dir=str(tmp_path / 'store'))
  assert_splits_equal(dataset.train, expected.train)
  assert_splits_equal(dataset.test, expected.test)
  said = [record.getMessage() for record in caplog.records]
  assert [line.count('a link to a folder') for line in said] == [4, 4]


def test_folder_with_a_broken_link(tmp_path):
  write_folder(tmp_path)
  path = tmp_path / 'train' / 'cat' / 'gone.png'
  path.symlink_to(tmp_path / 'nothing.png')
  with pytest.raises(config.InputError, match=r'gone\.png cannot be read'):
    load(source='folder', dir=str(tmp_path))
  assert load(**fields(tmp_path, skip_errors=True)).skipped == 1


def test_folder_with_a_class_that_is_a_broken_link(tmp_path):
  write_folder(tmp_path)
  for part in ('train', 'test'):
    (tmp_path / part / 'elk').symlink_to(tmp_path / 'nothing')
  with pytest.raises(config.InputError, match=r'1 images or broken .*\(elk\)'):
    load(source='folder', dir=str(tmp_path))


def test_images_beside_the_class_folders_are_not_lost(tmp_path, caplog):
  written = write_folder(tmp_path)
  (tmp_path / 'train' / 'labels.csv').write_text('file,label')
  with caplog.at_level(logging.WARNING, 'absl'):
    assert len(load(source='folder', dir=str(tmp_path)).train) == 6
  (record,) = caplog.records
  assert 'left out 1: labels.csv (no class folder)' in record.getMessage()
  for i in range(5):
    shutil.copy(next(iter(written)), tmp_path / 'train' / f'stray{i}')
  with pytest.raises(
    config.InputError, match=r'train holds 5 images .* \(stray0, .*, \.\.\.\)'
  ):
    load(source='folder', dir=str(tmp_path))


def test_class_folders_in_two_forms_of_unicode(tmp_path):
  composed, apart = 'caf\u00e9', 'cafe\u0301'
  written = write_folder(tmp_path, classes=(composed, 'dog'))
  (tmp_path / 'test' / composed).rename(tmp_path / 'test' / apart)
  dataset = load(source='folder', dir=str(tmp_path))
  assert dataset.classes == (composed, 'dog')
  last = [p for p in written if p.parts[-3:-1] == ('test', composed)]
  np.testing.assert_array_equal(
    dataset.test.images[:2], [written[p] for p in last]
  )
  shutil.copytree(tmp_path / 'train' / composed, tmp_path / 'train' / apart)
  with pytest.raises(config.InputError, match=r'twice.*cafe\\u0301.*caf\\xe9'):
    load(source='folder', dir=str(tmp_path))


@pytest.mark.parametrize('name', ['dog ', 'd\u200bog', 'dog\t', 'dog\xa0'])
def test_class_folders_that_look_alike(tmp_path, name):
  write_folder(tmp_path)
  (tmp_path / 'test' / 'dog').rename(tmp_path / 'test' / name)
  with pytest.raises(
    config.InputError, match=f'dog is only in train.*{re.escape(repr(name))} is'
  ) as error:
    load(source='folder', dir=str(tmp_path))
  assert '\n' not in str(error.value)


def test_a_class_folder_whose_name_is_no_utf8(tmp_path):
  name = os.fsdecode(b'k\xfche')
  write_folder(tmp_path, classes=(name, 'dog'))
  dataset = load(source='folder', dir=str(tmp_path))
  assert dataset.classes == ('dog', name)


def test_a_folder_called_as_an_image(tmp_path, caplog):
  written = write_folder(tmp_path)
  (tmp_path / 'train' / 'cat' / 'x.jpg').mkdir()
  with caplog.at_level(logging.WARNING, 'absl'):
    assert len(load(source='folder', dir=str(tmp_path)).train) == 6
  assert 'cat/x.jpg (an empty folder)' in caplog.records[0].getMessage()
  shutil.copy(next(iter(written)), tmp_path / 'train' / 'cat' / 'x.jpg')
  assert len(load(source='folder', dir=str(tmp_path)).train) == 7


@pytest.mark.parametrize('more', [{'skip_errors': True}, STREAMED])
@pytest.mark.parametrize(
  ('part', 'what', 'count'), [('train', 'training', 6), ('test', 'test', 4)]
)
def test_folder_of_which_one_part_does_not_decode(
  tmp_path, more, part, what, count
):
  for path in write_folder(tmp_path):
    if path.parts[-3] == part:
      path.write_bytes(b'text')
  with pytest.raises(
    config.InputError,
    match=rf'none of the {count} {what} images decodes: .*0\.png is not',
  ) as error:
    load(**fields(tmp_path, **more))
  assert '\n' not in str(error.value)


def test_a_stream_of_which_no_validation_image_decodes(tmp_path):
  written = [p for p in write_folder(tmp_path) if 'train' in p.parts]
  held = load(**fields(tmp_path, **STREAMED, validation=2)).validation
  for number in held.chosen:
    written[number].write_bytes(b'text')
  with pytest.raises(config.InputError, match='2 validation images decodes'):
    load(**fields(tmp_path, **STREAMED, validation=2))


def test_a_stream_of_which_no_measured_image_decodes(tmp_path, monkeypatch):
  written = [p for p in write_folder(tmp_path) if 'train' in p.parts]
  written[0].write_bytes(b'text')
  monkeypatch.setattr(datasets, '_MEASURED', 1)
  dataset = load(**fields(tmp_path, **STREAMED))
  with pytest.raises(
    config.InputError, match=r'1 training .*config\.data\.mean'
  ):
    dataset.mean_and_std()


@pytest.mark.parametrize('more', [{}, {'crop': 'resized'}])
def test_the_bound_on_pixels_is_a_field(tmp_path, more):
  written = write_folder(tmp_path)
  large = next(iter(written))
  Image.new('RGB', (30, 20)).save(large)
  says = rf'{re.escape(str(large))}.*30x20.*config\.data\.max_pixels=599'
  given = fields(tmp_path, max_pixels=599, **more)
  with pytest.raises(config.InputError, match=says):
    load(**given).train.sample()
  assert len(load(**given | {'max_pixels': 600}).train.sample()) == 6
  skipping = load(**given, skip_errors=True)
  assert len(skipping.train.sample()) == 5


@pytest.mark.parametrize('source', ['idx', 'folder', 'tfds'])
def test_dir_that_cannot_be(tmp_path, source):
  missing, file, empty = (tmp_path / n for n in ('missing', 'file', 'empty'))
  os.mkfifo(tmp_path / 'pipe')
  file.write_text('')
  empty.mkdir()
  for path, fault in (
    (missing, 'does not exist'),
    (file, 'is not a folder'),
    (tmp_path / 'pipe', 'is not a folder'),
    (empty, 'is empty'),
  ):
    with pytest.raises(
      config.InputError, match=rf"config\.data\.dir='{path}' {fault}; .*holds"
    ):
      load(source=source, dir=str(path), name='mnist')


@pytest.mark.parametrize('source', ['idx', 'folder'])
def test_dir_that_is_not_set(source):
  with pytest.raises(config.InputError, match=r'config\.data\.dir.*is not set'):
    load(source=source)


# TFDS, without TensorFlow.


def png(array):
  file = io.BytesIO()
  Image.fromarray(array).save(file, 'PNG')
  file.seek(0)
  return file


def prepare(root, arrays, features=None, secret=()):
  """Prepares a real TFDS set 'shapes'; example i has class i % 2.

  In the splits that `secret` names, every label is -1.
  """
  features = features or {
    'image': tfds.features.Image(shape=(None, None, None)),
    'label': tfds.features.ClassLabel(names=['disc', 'square']),
  }

  # Registered, the name would find this class instead of the files.
  class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {name: self._generate_examples(name) for name in arrays}

    def _generate_examples(self, split):
      for i, array in enumerate(arrays[split]):
        label = -1 if split in secret else i % 2
        example = {'image': png(array), 'label': label}
        yield i, {name: example[name] for name in features}

  builder = Shapes(data_dir=str(root), file_format='array_record')
  builder.download_and_prepare()


@pytest.mark.parametrize('test', ['test', 'validation'])
@pytest.mark.parametrize('channels', [1, 3])
def test_tfds(tmp_path, test, channels):
  shape = (5, 6, 3) if channels == 3 else (5, 6)
  arrays = {
    name: RNG.integers(0, 256, (count, *shape), np.uint8)
    for name, count in (('train', 9), (test, 4))
  }
  prepare(
    tmp_path,
    arrays,
    {
      'image': tfds.features.Image(shape=(5, 6, channels)),
      'label': tfds.features.ClassLabel(names=['disc', 'square']),
    },
  )
  dataset = load(source='tfds', name='shapes', dir=str(tmp_path))
  assert dataset.classes == ('disc', 'square')
  assert dataset.image_shape == (5, 6, channels)
  # TFDS shuffles as it writes: compare what is there, not the order.
  for split, name in ((dataset.train, 'train'), (dataset.test, test)):
    expected = {a.tobytes(): i % 2 for i, a in enumerate(arrays[name])}
    actual = zip(split.images, split.labels, strict=True)
    assert {a.tobytes(): label for a, label in actual} == expected
    assert len(split) == len(arrays[name])


@pytest.mark.parametrize(
  ('secret', 'tested', 'unused'),
  [((), 3, 'validation'), (('test',), 4, 'test')],
)
def test_tfds_test_images_have_classes(
  tmp_path, caplog, secret, tested, unused
):
  """As of imagenet2012, whose test images have the label -1."""
  arrays = {
    name: RNG.integers(0, 256, (count, 4, 4, 3), np.uint8)
    for name, count in (('train', 6), ('validation', 4), ('test', 3))
  }
  prepare(tmp_path, arrays, secret=secret)
  with caplog.at_level(logging.WARNING, 'absl'):
    dataset = load(source='tfds', name='shapes', dir=str(tmp_path))
  assert dataset.test.labels.min() == 0
  used = {3: 'test', 4: 'validation'}[tested]
  assert {image.tobytes() for image in dataset.test.images} == {
    image.tobytes() for image in arrays[used]
  }
  (record,) = caplog.records
  assert f"name='shapes': the splits {unused} are not used" in (
    record.getMessage()
  )


def test_tfds_set_whose_classes_are_secret(tmp_path):
  arrays = [np.zeros((4, 4, 3), np.uint8)] * 4
  prepare(tmp_path, {'train': arrays, 'test': arrays}, secret=('test',))
  with pytest.raises(
    config.InputError, match='no classes for its images of test: their labels'
  ) as error:
    load(source='tfds', name='shapes', dir=str(tmp_path))
  assert '\n' not in str(error.value)


def test_tfds_images_of_different_sizes(tmp_path):
  arrays = [np.full((6 + i, 8, 3), i, np.uint8) for i in range(6)]
  prepare(tmp_path, {'train': arrays, 'test': arrays[:3]})
  with pytest.raises(config.InputError, match=r'image_size=8 '):
    load(source='tfds', name='shapes', dir=str(tmp_path))
  dataset = load(source='tfds', name='shapes', dir=str(tmp_path), image_size=4)
  assert dataset.image_shape == (4, 4, 3)


def test_tfds_name_not_set():
  with pytest.raises(config.InputError, match=r'data\.name.*cifar10'):
    load(source='tfds')


def test_tfds_name_unknown(tmp_path):
  (tmp_path / 'something').mkdir()
  with pytest.raises(
    config.InputError, match="'sifar10' is not a set"
  ) as error:
    load(source='tfds', name='sifar10', dir=str(tmp_path))
  assert '\n' not in str(error.value)


def test_mini_imagenet_not_prepared(tmp_path):
  (tmp_path / 'something').mkdir()
  with pytest.raises(config.InputError, match='--mode=prepare --images=DIR'):
    load(source='tfds', name='mini_imagenet', dir=str(tmp_path))


def test_tfds_set_not_prepared(tmp_path):
  (tmp_path / 'something').mkdir()
  with pytest.raises(
    config.InputError,
    match=re.escape(
      f"tfds.builder('cifar10', data_dir='{tmp_path}',"
      " file_format='array_record').download_and_prepare()"
    ),
  ) as error:
    load(source='tfds', name='cifar10', dir=str(tmp_path))
  assert '\n' not in str(error.value)


def test_tfds_set_prepared_in_another_format(tmp_path):
  arrays = [np.zeros((4, 4, 3), np.uint8)] * 4
  prepare(tmp_path, {'train': arrays, 'test': arrays})
  path = tmp_path / 'shapes' / '1.0.0' / 'dataset_info.json'
  path.write_text(path.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(config.InputError, match='not prepared as ArrayRecord'):
    load(source='tfds', name='shapes', dir=str(tmp_path))


def test_tfds_set_without_test_images(tmp_path):
  prepare(tmp_path, {'train': [np.zeros((4, 4, 3), np.uint8)] * 4})
  with pytest.raises(config.InputError, match=r"splits \['train'\]; it needs"):
    load(source='tfds', name='shapes', dir=str(tmp_path))


def test_tfds_set_without_labels(tmp_path):
  arrays = [np.zeros((4, 4, 3), np.uint8)] * 4
  features = {'image': tfds.features.Image(shape=(4, 4, 3))}
  prepare(tmp_path, {'train': arrays, 'test': arrays}, features)
  with pytest.raises(config.InputError, match="no features 'image' and 'label"):
    load(source='tfds', name='shapes', dir=str(tmp_path))


def test_tfds_package_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(config.InputError, match=r'maskconnect_jax\[tfds\]'):
    load(source='tfds', name='cifar10')


def test_tfds_is_read_without_tensorflow(tmp_path):
  arrays = list(RNG.integers(0, 256, (4, 4, 4, 3), np.uint8))
  prepare(tmp_path, {'train': arrays, 'test': arrays})
  code = f"""
import sys
from maskconnect_jax import config
from maskconnect_jax.data import datasets
data = config.default().data
data.source, data.name, data.dir = 'tfds', 'shapes', {str(tmp_path)!r}
print(len(datasets.load(data).train), 'tensorflow' in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout == '4 False\n'


@pytest.mark.parametrize('crop', ['pad', 'resized'])
def test_trivialaugment_changes_training_images_alone(crop):
  data = {'image_size': 8, 'crop': crop, 'crop_scale': (1.0, 1.0)}
  plain, augmented = (load(**data, trivialaugment=on) for on in (False, True))
  assert isinstance(augmented.train, datasets.LazySplit)

  def image(i, seed):
    rng = np.random.default_rng(seed)
    return augmented.train.training_example(i, rng)[0]

  np.testing.assert_array_equal(image(0, 1), image(0, 1))
  assert image(0, 1).shape == (8, 8, 1)
  assert len({image(0, seed).tobytes() for seed in range(20)}) > 10
  test = augmented.test.evaluation_example(3)[0]
  if crop == 'pad':  # the set without it is in memory
    np.testing.assert_array_equal(test, plain.test.images[3])
