"""Data sources: digits, IDX files, image folders, tables, TFDS, Hugging Face.

A data source gives random access to its records as they are stored. Nothing is
decoded here.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import ml_collections
import numpy as np
from absl import logging

from maskconnect_jax import names
from maskconnect_jax.config import given_path
from maskconnect_jax.data import (
  class_folders,
  fingerprint,
  hugging_face,
  idx,
  splits,
  tables,
)
from maskconnect_jax.data.photographs import Record
from maskconnect_jax.errors import InputError

_HELD_OUT = ('test', 'validation')  # TFDS: the first with classes is tested on

# A class index; of a multi-label set bool [classes], whether an image has each.
Label: TypeAlias = int | np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
  """A data source: training records, followed by test records.

  Attributes:
    read: returns record i and its label; may be called from several threads.
    num_train: how many records are for training.
    num_test: how many records are for testing.
    classes: name of each class.
    channels: 1 (grey) or 3 (RGB).
    name: the data set's name in a message: the field that chose it.
    digest: see `fingerprint.Identity`.
    multi_label: whether a record has any number of the classes, not one.
    labels: the labels of all records, int [N], or bool [N, classes] if
      `multi_label`; None: they lie in the records, which must be read for them.
  """

  read: Callable[[int], tuple[Record, Label]]
  num_train: int
  num_test: int
  classes: tuple[str, ...]
  channels: int
  name: str
  digest: Callable[[], str] = str
  multi_label: bool = False
  labels: np.ndarray | None = None

  def __len__(self) -> int:
    return self.num_train + self.num_test

  @property
  def blank_label(self) -> np.ndarray:
    """A label of zeros, int32 [] or bool [classes]: the form of all labels."""
    if self.multi_label:
      return np.zeros(len(self.classes), bool)
    return np.zeros((), np.int32)

  @property
  def identity(self) -> fingerprint.Identity:
    """Tells this data set from another; holds no records."""
    return fingerprint.Identity(
      self.num_train, self.num_test, self.classes, self.name, self.digest
    )


def open_source(data: ml_collections.ConfigDict) -> Source:
  """Finds the data set that `config.data` describes.

  Args:
    data: `config.data`.

  Returns:
    The data source; nothing is decoded yet.

  Raises:
    InputError: the data is missing, or damaged in a way that shows without
      decoding. The message is one line that names the folder, file or field.
  """
  if data.source not in _SOURCES:
    raise InputError(
      f'config.data.source={data.source!r} is not one of {", ".join(_SOURCES)}'
    )
  return _SOURCES[data.source](data)


def _digits(data: ml_collections.ConfigDict) -> Source:
  """Returns scikit-learn's 1,797 digits [8, 8, 1], split 1,437 / 360."""
  import sklearn.datasets

  bunch = sklearn.datasets.load_digits()
  pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
  train, test = splits.stratified(bunch.target, 360)
  order = np.concatenate([train, test])
  return Source(
    lambda i: (pixels[order[i]], int(bunch.target[order[i]])),
    num_train=len(train),
    num_test=len(test),
    classes=tuple(map(str, bunch.target_names)),
    channels=1,
    name=_name_of(data),
    digest=fingerprint.of_arrays([pixels[order], bunch.target[order]]),
    labels=bunch.target[order],
  )


def _idx(data: ml_collections.ConfigDict) -> Source:
  """Returns MNIST's four IDX files of unsigned bytes, plain or .gz."""
  folder = _folder_of(data, 'train-images-idx3-ubyte[.gz] and the other three')
  pixels, labels = [], []
  for part in ('train', 't10k'):
    images_file = idx.path_of(folder, f'{part}-images', 3)
    labels_file = idx.path_of(folder, f'{part}-labels', 1)
    pixels.append(idx.read(images_file, 3))
    labels.append(idx.read(labels_file, 1))
    if len(pixels[-1]) != len(labels[-1]):
      raise InputError(
        f'{images_file} holds {len(pixels[-1])} images but {labels_file}'
        f' holds {len(labels[-1])} labels; both must be of the same set'
      )
  num_train, num_test = map(len, labels)

  def read(i: int) -> tuple[Record, int]:
    part, i = (0, i) if i < num_train else (1, i - num_train)
    return pixels[part][i][..., None], int(labels[part][i])

  num_classes = int(labels[0].max(initial=0)) + 1
  return Source(
    read,
    num_train=num_train,
    num_test=num_test,
    classes=tuple(map(str, range(num_classes))),
    channels=1,
    name=_name_of(data),
    digest=fingerprint.of_arrays([*pixels, *labels]),
    labels=np.concatenate(labels),
  )


def _image_folder(data: ml_collections.ConfigDict) -> Source:
  """Returns DIR/train/<class>/* and DIR/test/<class>/* (else val/) as RGB.

  Without a folder for training and one for testing, the classes lie in DIR
  itself, and `data.test_fraction` of their images are for testing.

  With `data.val_labels` the test images lie in one folder, and the list has
  their classes.

  Every file that `image_files` finds counts as an image, with any suffix. A
  file that is no image is an error: leaving it out would silently train on less
  data.
  """
  root = _folder_of(data, 'train/<class>/*.jpg and test/<class>/*.jpg')
  train_root = root / 'train'
  test_root = next(
    (root / name for name in ('test', 'val') if (root / name).is_dir()), None
  )
  if test_root is None and train_root.is_dir():
    raise InputError(
      f'config.data.dir={data.dir!r} has no test images; it needs'
      ' test/<class>/* or val/<class>/*, or the classes beside each other'
      ' without train/'
    )
  if test_root is None:
    train_root = test_root = root
    train, test = splits.of_each_class(
      class_folders.class_files(root), data, lambda path: path.name
    )
  else:
    train = class_folders.class_files(train_root)
    if data.val_labels:
      labels = given_path(data.val_labels, 'config.data.val_labels')
      test = tables.listed(test_root, labels, train)
    else:
      test = class_folders.class_files(test_root)
  if odd := sorted(set(train) ^ set(test)):
    where = [
      f'{names.distinct(name)} is only in'
      f' {"train" if name in train else test_root.name}'
      for name in odd
    ]
    raise InputError(
      f'config.data.dir={data.dir!r}: train and test differ in classes'
      f' ({names.some(where, 5)}); both need the same class folders'
    )
  return _of_files(data, train, test, (train_root, test_root))


def _table(data: ml_collections.ConfigDict) -> Source:
  """Returns the images of a table of path, label and split as RGB."""
  path = given_path(data.dir, 'config.data.dir')
  if not path.is_file():
    raise InputError(
      f'config.data.dir={data.dir!r} is no file; config.data.source='
      "'table' needs FILE.csv or FILE.jsonl of path, label and split"
    )
  if data.multi_label:
    return _of_several_labels(data, path)
  train, test = tables.read(path)
  if not test:
    train, test = splits.of_each_class(train, data, lambda path: path.name)
  return _of_files(data, train, test, (path.parent, path.parent))


def _of_several_labels(
  data: ml_collections.ConfigDict, path: pathlib.Path
) -> Source:
  """Returns the images of a table with several labels each, read as RGB."""
  train, test, classes = tables.read_several(path)
  if not test:
    train, test = splits.of_all(
      train,
      data,
      lambda row: os.path.relpath(row[1], path.parent).replace(os.sep, '/'),
    )
  rows = [*train, *test]
  place = {name: number for number, name in enumerate(classes)}
  labels = np.zeros((len(rows), len(classes)), bool)
  for row, (names_of_it, _) in zip(labels, rows, strict=True):
    row[[place[name] for name in names_of_it]] = True
  check_several(_name_of(data), classes, *np.split(labels, [len(train)]))
  return _of_paths(
    data, [str(image) for _, image in rows], labels, len(train), classes,
    (path.parent, path.parent),
  )  # fmt: skip


def check_several(
  name: str, classes: Sequence[str], train: np.ndarray, test: np.ndarray
) -> None:
  """Raises InputError for labels that nothing can be learned or measured of.

  Args:
    name: the data set's name in the message.
    classes: name of each label.
    train: bool [N, classes], the labels of the training images.
    test: bool [M, classes], those of the test images.
  """
  for what, labels in (('training', train), ('test', test)):
    if not labels.any():
      raise InputError(f'{name}: no {what} image has a label')
  odd = np.flatnonzero(test.any(0) & ~train.any(0)).tolist()
  if odd:
    raise InputError(
      f'{name}: there are test images of'
      f' {names.some(names.distinct(classes[i]) for i in odd)}, but no'
      ' training images'
    )


def _of_files(
  data: ml_collections.ConfigDict,
  train: tables.ByClass,
  test: tables.ByClass,
  folders: tuple[pathlib.Path, pathlib.Path],
) -> Source:
  """Returns a data source of image files, read as RGB.

  Args:
    data: `config.data`.
    train: the training images of each class.
    test: the test images of the same classes.
    folders: of the training and of the test images, which may be moved.
  """
  found = [*train.values(), *test.values()]
  labels = np.repeat(
    np.tile(np.arange(len(train)), 2), [len(files) for files in found]
  )
  return _of_paths(
    data,
    [str(path) for files in found for path in files],
    labels,
    sum(map(len, train.values())),
    tuple(train),
    folders,
  )


def _of_paths(
  data: ml_collections.ConfigDict,
  paths: Sequence[str],
  labels: np.ndarray,
  num_train: int,
  classes: tuple[str, ...],
  folders: tuple[pathlib.Path, pathlib.Path],
) -> Source:
  """Returns a data source of image files, read as RGB.

  Args:
    data: `config.data`.
    paths: of N images, those for training first.
    labels: int [N], or bool [N, classes].
    num_train: how many of them are for training.
    classes: name of each class.
    folders: see `_of_files`.
  """
  bases = [str(folder) for folder in folders]
  several = labels.ndim == 2

  def named(i: int) -> tuple[str, str]:
    part = int(i >= num_train)
    below = paths[i].removeprefix(bases[part]).replace(os.sep, '/')
    return ('train', 'test')[part] + below, paths[i]

  def digest() -> str:
    files = fingerprint.of_files(map(named, range(len(paths))))
    if not several:  # the order of the files tells their classes
      return files
    return fingerprint.of_parts([files.encode(), labels.tobytes()])

  return Source(
    lambda i: (paths[i], labels[i] if several else int(labels[i])),
    num_train=num_train,
    num_test=len(paths) - num_train,
    classes=classes,
    channels=3,
    name=_name_of(data),
    digest=digest,
    multi_label=several,
    labels=labels,
  )


def _tfds_builder(
  tfds: Any, data: ml_collections.ConfigDict, folder: pathlib.Path | None
) -> Any:
  try:
    return tfds.builder(data.name, data_dir=folder)
  except ValueError as error:
    remedy = (
      'python -m maskconnect_jax.main --mode=prepare --images=DIR prepares it'
      if data.name == 'mini_imagenet'
      else 'https://www.tensorflow.org/datasets/catalog lists them'
    )
    raise InputError(
      f'config.data.name={data.name!r} is not a set that TFDS knows or finds in'
      f' config.data.dir={data.dir!r}; {remedy}'
    ) from error


def _tfds(data: ml_collections.ConfigDict) -> Source:
  """Returns a TFDS set prepared as ArrayRecord, read without TensorFlow."""
  if not data.name:
    raise InputError(
      'config.data.name is empty; config.data.source='
      "'tfds' needs the name of a set, such as 'cifar10'"
    )
  folder = _folder_of(data, 'the prepared TFDS sets') if data.dir else None
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise InputError(
      f"config.data.source='tfds' needs a package ({error}); pip install"
      " 'maskconnect_jax[tfds]'"
    ) from error
  name = f'config.data.name={data.name!r}'
  builder = _tfds_builder(tfds, data, folder)
  known = set(builder.info.splits)
  # A set that is not prepared has no splits yet.
  held_out = [each for each in _HELD_OUT if each in known or not known]
  if known and not (held_out and 'train' in known):
    raise InputError(
      f'{name} has the splits {sorted(known)}; it needs'
      ' train, and test or validation'
    )
  features = builder.info.features
  if not {'image', 'label'} <= set(features) or not hasattr(
    features['label'], 'names'
  ):
    raise InputError(
      f'{name} is not a set of classified images: it has'
      " no features 'image' and 'label'"
    )
  try:
    train, *tests = (
      builder.as_data_source(
        split, decoders={'image': tfds.decode.SkipDecoding()}
      )
      for split in ('train', *held_out)
    )
  except (AssertionError, NotImplementedError, ValueError) as error:
    # Reading a set needs no TensorFlow, but preparing it does.
    where = f', data_dir={data.dir!r}' if data.dir else ''
    raise InputError(
      f'{name} is not prepared as ArrayRecord; once, where tensorflow is'
      ' installed too: python -c "import tensorflow_datasets as tfds;'
      f" tfds.builder({data.name!r}{where}, file_format='array_record')"
      '.download_and_prepare()"'
    ) from error

  chosen, test = _labelled(name, dict(zip(held_out, tests, strict=True)))
  if unused := sorted(known - {'train', chosen}):
    logging.warning(
      '%s: the splits %s are not used; config.data.validation holds out'
      ' training images',
      name,
      ', '.join(map(names.one_line, unused)),
    )
  infos = [builder.info.splits[split] for split in ('train', chosen)]
  described = [
    f'{info.shard_lengths} {info.num_bytes}'.encode() for info in infos
  ]

  def read(i: int) -> tuple[Record, int]:
    example = train[i] if i < len(train) else test[i - len(train)]
    return example['image'], int(example['label'])

  return Source(
    read,
    num_train=len(train),
    num_test=len(test),
    classes=tuple(features['label'].names),
    channels=1 if features['image'].shape[-1] == 1 else 3,
    name=_name_of(data),
    digest=lambda: fingerprint.of_parts(described),
  )


def _labelled(name: str, parts: dict[str, Any]) -> tuple[str, Any]:
  """Returns the first split whose classes are known, and its name.

  TFDS gives the label -1 to every image of a split whose classes are secret,
  such as `test` of imagenet2012.

  Args:
    name: the set's name in a message.
    parts: the records of each split that could be tested on, by its name.

  Raises:
    InputError: there is no such split.
  """
  for split, records in parts.items():
    label = records[0].get('label') if len(records) else 0
    if label is not None and int(label) >= 0:
      return split, records
  raise InputError(
    f'{name} has no classes for its images of {" and ".join(parts)}: their'
    ' labels are -1; prepare a set whose test or validation images have classes'
  )


def _hugging_face(data: ml_collections.ConfigDict) -> Source:
  """Returns a set that the package `datasets` saved, as RGB or stored as grey.

  Of a set with one split, `data.test_fraction` of the images are for testing.
  """
  saved = hugging_face.read(
    _folder_of(data, 'a data set that datasets.save_to_disk wrote'),
    name=_name_of(data),
    image_column=data.image_column,
    label_column=data.label_column,
  )
  train, test = saved.train, saved.test
  if test is None:
    keys, labels = train.keys(), train.labels
    by_class = {
      name: np.flatnonzero(labels == label).tolist()
      for label, name in enumerate(saved.classes)
      if label in labels
    }
    train, test = (
      saved.train.part([i for own in side.values() for i in own])
      for side in splits.of_each_class(by_class, data, lambda i: keys[i])
    )
  parts = {'train': train, 'test': test}

  def read(i: int) -> tuple[Record, int]:
    part, i = (train, i) if i < len(train) else (test, i - len(train))
    return part.read(i), int(part.labels[i])

  return Source(
    read,
    num_train=len(train),
    num_test=len(test),
    classes=saved.classes,
    channels=saved.channels,
    name=_name_of(data),
    digest=lambda: fingerprint.of_parts(
      f'{side}/{name}\0{size}\0{label}'.encode('utf-8', 'surrogateescape')
      for side, part in parts.items()
      for (name, size), label in zip(
        part.described(), part.labels.tolist(), strict=True
      )
    ),
    labels=np.concatenate([train.labels, test.labels]),
  )


def _arrays(data: ml_collections.ConfigDict) -> Source:
  raise InputError(
    f'config.data.source={data.source!r} is for Python: train(config, workdir,'
    ' data=(images, labels, test_images, test_labels))'
  )


_SOURCES: dict[str, Callable[[ml_collections.ConfigDict], Source]] = {
  'digits': _digits,
  'idx': _idx,
  'arrays': _arrays,
  'folder': _image_folder,
  'table': _table,
  'tfds': _tfds,
  'hf': _hugging_face,
}


def _folder_of(data: ml_collections.ConfigDict, needs: str) -> pathlib.Path:
  """Returns `data.dir`, which must be a folder with something in it."""
  path = given_path(data.dir, 'config.data.dir')
  if not data.dir:
    fault = 'is not set'
  elif not path.is_dir():
    fault = 'is not a folder' if path.exists() else 'does not exist'
  elif not any(path.iterdir()):
    fault = 'is empty'
  else:
    return path
  raise InputError(
    f'config.data.dir={data.dir!r} {fault}; it must be the folder that holds'
    f' {needs}'
  )


def _name_of(data: ml_collections.ConfigDict) -> str:
  """Returns the data set's name in a message: the field that chose it."""
  field = 'dir' if data.dir else 'name' if data.name else 'source'
  return f'config.data.{field}={data[field]!r}'
