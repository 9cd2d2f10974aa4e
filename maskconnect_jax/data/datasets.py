"""A data set: its training, validation and test images, and its classes.

Images that fit into memory are decoded once and kept (`Split`). Larger sets,
and sets that are cropped at a new scale each time, are decoded whenever they
are needed (`LazySplit`). The split into train, validation and test is fixed: it
does not depend on the seed, so runs of different seeds are measured on the same
images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import ml_collections
import numpy as np
import tqdm
from absl import logging

from maskconnect_jax import names
from maskconnect_jax.data import (
  fingerprint,
  in_memory,
  photographs,
  sources,
  splits,
)
from maskconnect_jax.data import images as images_lib
from maskconnect_jax.data.sources import Source
from maskconnect_jax.errors import InputError

_MEASURED = 1024  # images of a `LazySplit` that give mean and std
_TRIES = 100  # damaged records in a row that end the run
_UNKNOWN = fingerprint.Identity(0, 0, (), '', str)


@dataclasses.dataclass(frozen=True)
class Split:
  """Decoded images in memory, and their classes.

  Attributes:
    images: uint8 [N, H, W, C], 0..255.
    labels: int32 [N], class indices; of a multi-label set bool [N, classes].
  """

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def read_labels(self) -> np.ndarray:
    """Returns the labels; they are in memory already."""
    return self.labels

  @property
  def blank_label(self) -> np.ndarray:
    """See `Source.blank_label`."""
    return np.zeros_like(self.labels[0])

  def part(self, chosen: np.ndarray) -> Split:
    """Returns copies of the images and labels that `chosen`, int [M], names."""
    return Split(self.images[chosen], self.labels[chosen])

  def sample(self) -> np.ndarray:
    """Returns all images, uint8 [N, H, W, C]: they give mean and std."""
    return self.images


@dataclasses.dataclass(frozen=True)
class LazySplit:
  """Records of a data source, each decoded whenever it is asked for.

  Attributes:
    source: the data source that holds the records.
    chosen: int64 [N], the records' numbers in the data source.
    augment: maps a record and a random generator to uint8 [H, W, C] to train
      on.
    decode: maps a record to uint8 [H, W, C] to evaluate on.
    skip_errors: whether training replaces a damaged record by the next one,
      and evaluation leaves it out.
  """

  source: Source
  chosen: np.ndarray
  augment: Callable[[photographs.Record, np.random.Generator], np.ndarray]
  decode: Callable[[photographs.Record], np.ndarray]
  skip_errors: bool

  def __len__(self) -> int:
    return len(self.chosen)

  def read_labels(self) -> np.ndarray:
    """Returns the labels, as `Split` has them.

    Every record is read for them, unless the data source holds them in memory.

    Raises:
      InputError: a label that is read is no class.
    """
    if self.source.labels is not None:
      return self.source.labels[self.chosen].astype(self.blank_label.dtype)
    numbers = tqdm.tqdm(
      self.chosen, 'reading labels', delay=2, leave=False, disable=None
    )
    return np.array(
      [self._label(self.source.read(int(i))[1]) for i in numbers],
      self.blank_label.dtype,
    )

  @property
  def blank_label(self) -> np.ndarray:
    """See `Source.blank_label`."""
    return self.source.blank_label

  def part(self, chosen: np.ndarray) -> LazySplit:
    """Returns the records whose places in this one `chosen`, int [M], names."""
    return dataclasses.replace(self, chosen=self.chosen[chosen])

  def sample(self) -> np.ndarray:
    """Returns up to 1,024 evenly spread images, which give mean and std.

    Returns:
      uint8 [M, H, W, C]; damaged records are left out.

    Raises:
      InputError: no record decodes, or one is damaged without `skip_errors`.
    """
    count = min(len(self), _MEASURED)
    numbers = np.arange(count) * len(self) // count
    examples = map(self.evaluation_example, numbers.tolist())
    images = [image for image, _, whole in examples if whole]
    if not images:
      raise InputError(
        f'{self.source.name}: none of the {count} training images that mean and'
        ' std are measured on decodes; get the set again, or set'
        ' config.data.mean and config.data.std'
      )
    return np.stack(images)

  def check_decodes(self, what: str) -> None:
    """Raises InputError if no image decodes.

    Args:
      what: the word for the images in the message, such as 'training'.
    """
    errors = []
    for number in self.chosen.tolist():
      try:
        self.decode(self.source.read(number)[0])
      except InputError as error:
        errors.append(str(error))
      else:
        return
    raise _none_decodes(self.source, what, errors)

  def training_example(
    self, i: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray, np.int64]:
    """Reads and augments the i-th record.

    Args:
      i: from 0, counted in `chosen`.
      rng: all randomness of `augment` comes from it.

    Returns:
      The image, uint8 [H, W, C]; its label; and the number of the last damaged
      record that was skipped on the way, or -1.

    Raises:
      InputError: the record is damaged and `skip_errors` is off, or 100 records
        in a row are damaged, or the label is no class.
    """
    damaged = -1
    for number in range(i, i + _TRIES):
      number = int(self.chosen[number % len(self)])
      record, found = self.source.read(number)
      label = self._label(found)
      try:
        image = self.augment(record, rng)
      except InputError as error:
        self._complain(error)
        damaged = number
      else:
        return image, label, np.int64(damaged)
    raise InputError(
      f'{self.source.name}: {_TRIES} damaged images in a row; get the set again'
    )

  def evaluation_example(self, i: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Reads the i-th record, counted in `chosen` from 0.

    Returns:
      The image, uint8 [H, W, C]; its label; and whether the record is whole. A
      damaged record has an image of zeros.

    Raises:
      InputError: the record is damaged and `skip_errors` is off, or the label
        is no class.
    """
    record, found = self.source.read(int(self.chosen[i]))
    label = self._label(found)  # not within `try`: it is no damaged image
    try:
      return self.decode(record), label, True
    except InputError as error:
      self._complain(error)
      return np.zeros(self.image_shape, np.uint8), label, False

  @functools.cached_property
  def image_shape(self) -> tuple[int, ...]:
    """(height, width, channels) of every image, height and width in pixels."""
    square = np.zeros((8, 8, self.source.channels), np.uint8)
    return self.decode(square).shape

  def _label(self, label: sources.Label) -> np.ndarray:
    """Returns a record's label as an array, and checks that it is a class.

    Otherwise a label of -1 would train as no class at all, and one beyond the
    classes would give a loss of NaN.
    """
    count = len(self.source.classes)
    if not self.source.multi_label and not 0 <= label < count:
      raise InputError(
        f'{self.source.name} has an image with the label {label}; its'
        f' {count} classes need labels from 0 to {count - 1}'
      )
    return np.asarray(label, self.blank_label.dtype)

  def _complain(self, error: InputError) -> None:
    if not self.skip_errors:
      raise InputError(
        f'{error}, or set config.data.skip_errors=True'
      ) from error
    logging.log_first_n(logging.WARNING, 'skipped: %s', 3, error)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The images to train on, to choose settings on and to test on.

  Attributes:
    train: the training images, without the validation images.
    validation: images held out of the training images to choose settings on;
      None: none are held out.
    test: the images that the result is measured on.
    classes: name of each class.
    skipped: how many files were left out because they do not decode.
    identity: tells the set from another. It covers all records of the data
      source, also the records that are neither trained nor tested on here.
  """

  train: Split | LazySplit
  validation: Split | LazySplit | None
  test: Split | LazySplit
  classes: tuple[str, ...]
  skipped: int = 0
  identity: fingerprint.Identity = _UNKNOWN

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels), pixels."""
    if isinstance(self.train, Split):
      _, height, width, channels = self.train.images.shape
    else:
      height, width, channels = self.train.image_shape
    return height, width, channels

  def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the training images' channels.

    A `LazySplit` is measured on up to 1,024 images, spread evenly over it.

    Returns:
      Two float64 [C] on the 0..255 scale. A constant channel has std 1, so
      that dividing by it is safe.
    """
    images = self.train.sample()
    channels = images.shape[-1]
    # 256 counts per channel give both exactly. Counting widens a value to 8
    # bytes, so it goes by chunks.
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 1024):
      chunk = images[start : start + 1024]
      for channel in range(channels):
        counts[channel] += np.bincount(
          chunk[..., channel].ravel(), minlength=256
        )
    share, values = counts / counts.sum(1, keepdims=True), np.arange(256.0)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)


def load(
  data: ml_collections.ConfigDict, source: Source | None = None
) -> Dataset:
  """Makes the data set that `config.data` describes.

  Args:
    data: `config.data`.
    source: the data source; None: the one that `data` names.

  Returns:
    Images in a fixed order, all of one size. They lie in host memory if they
    take at most `data.memory_gb` and are not cropped at random scales.

  Raises:
    InputError: the data is missing, damaged or inconsistent. The message is one
      line that names the folder, file or field.
  """
  source = source or sources.open_source(data)
  for what, count in (
    ('training', source.num_train),
    ('test', source.num_test),
  ):
    if not count:
      raise InputError(
        f'{source.name} has no {what} images; both'
        ' training and test images are needed'
      )
  gigabytes = len(source) * source.channels * data.image_size**2 / 1e9
  decoded_later = (
    data.crop == 'resized' or data.trivialaugment or gigabytes > data.memory_gb
  )
  dataset = (_lazy if decoded_later else _in_memory)(source, data)
  dataset = dataclasses.replace(dataset, identity=source.identity)
  if data.validation:
    # The test images are evaluated after the last step alone. A label among
    # them that is no class must not end the run there.
    dataset.test.read_labels()
    rest, held = _evenly('validation', dataset.train, data.validation)
    dataset = dataclasses.replace(dataset, train=rest, validation=held)
  if data.train_images:
    _, drawn = _evenly('train_images', dataset.train, data.train_images)
    dataset = dataclasses.replace(dataset, train=drawn)
  for what, part in (
    ('training', dataset.train),
    ('validation', dataset.validation),
    ('test', dataset.test),
  ):
    if isinstance(part, LazySplit) and data.skip_errors:
      part.check_decodes(what)
  return dataset


def _lazy(source: Source, data: ml_collections.ConfigDict) -> Dataset:
  """Returns the data set as `LazySplit`s: each record stays in its file."""
  if not data.image_size:
    raise InputError(
      f'{source.name} is decoded as it is needed, and so needs one size for'
      ' all images; set config.data.image_size, such as 224'
    )
  if source.labels is not None:
    _check_labels(source, *np.split(source.labels, [source.num_train]))
  elif len(source.classes) < 2:  # a label that is read later is checked then
    raise InputError(
      f'{source.name} has images of one class only; at least 2 are needed'
    )
  decode = functools.partial(
    photographs.evaluation_image,
    size=data.image_size,
    resize=data.eval_resize,
    channels=source.channels,
    max_pixels=data.max_pixels,
  )
  augment: Callable[[photographs.Record, np.random.Generator], np.ndarray]
  if data.crop == 'resized':
    augment = functools.partial(
      photographs.training_image,
      size=data.image_size,
      channels=source.channels,
      scale=tuple(data.crop_scale),
      randaugment_ops=data.randaugment,
      randaugment_magnitude=data.randaugment_magnitude,
      trivial=data.trivialaugment,
      max_pixels=data.max_pixels,
    )
  else:  # cropped on the device

    def augment(
      record: photographs.Record, rng: np.random.Generator
    ) -> np.ndarray:
      pixels = decode(record)
      if not data.trivialaugment:
        return pixels
      return photographs.trivially_augmented(
        pixels, rng, channels=source.channels
      )

  train, test = (
    LazySplit(source, numbers, augment, decode, data.skip_errors)
    for numbers in np.split(np.arange(len(source)), [source.num_train])
  )
  return Dataset(train, None, test, source.classes)


def _in_memory(source: Source, data: ml_collections.ConfigDict) -> Dataset:
  """Decodes every record once, and returns the data set as `Split`s."""
  blank, side = source.blank_label, data.image_size
  labels = np.zeros((len(source), *blank.shape), blank.dtype)

  def read(i: int) -> np.ndarray:
    record, labels[i] = source.read(i)
    return images_lib.read(
      record,
      channels=source.channels,
      size=(side, side) if side else None,
      resize=data.eval_resize,
      max_pixels=data.max_pixels,
    )

  pixels, kept, errors = in_memory.read_all(
    read,
    len(source),
    name=source.name,
    memory_gb=data.memory_gb,
    skip_errors=data.skip_errors,
  )
  if errors:
    logging.warning(
      '%d images do not decode and are skipped: %s%s',
      len(errors),
      '; '.join(errors[:3]),
      '; ...' if len(errors) > 3 else '',
    )
  labels, num_train = labels[kept], int(kept[: source.num_train].sum())
  lost = source.num_train - num_train
  if not num_train:
    raise _none_decodes(source, 'training', errors[:lost])
  if num_train == len(labels):
    raise _none_decodes(source, 'test', errors[lost:])
  _check_labels(source, labels[:num_train], labels[num_train:])
  return Dataset(
    train=Split(pixels[:num_train], labels[:num_train]),
    validation=None,
    test=Split(pixels[num_train:], labels[num_train:]),
    classes=source.classes,
    skipped=len(errors),
  )


def _none_decodes(source: Source, what: str, errors: list[str]) -> InputError:
  return InputError(
    f'{source.name}: none of the {len(errors)} {what} images decodes:'
    f' {errors[0]}'
  )


def _check_labels(source: Source, train: np.ndarray, test: np.ndarray) -> None:
  """Raises InputError for a data set that no classifier can be trained on.

  Of several labels an image nothing is checked here; see
  `sources.check_several`.

  Args:
    source: the data source.
    train: int [N], the labels of the training images.
    test: int [M], those of the test images.
  """
  if source.multi_label:
    return
  known, last = np.unique(train), len(source.classes) - 1
  if known[0] < 0 or known[-1] > last:
    raise InputError(
      f'{source.name} has training labels from {known[0]} to {known[-1]};'
      f' its {last + 1} classes need labels from 0 to {last}'
    )
  if not last or len(known) < 2:
    raise InputError(
      f'{source.name} has training images of one class only'
      f' ({names.distinct(source.classes[known[0]])}); at least 2 are needed'
    )
  if len(odd := np.setdiff1d(test, known)):
    more = f' and {len(odd) - 5} more' if len(odd) > 5 else ''
    raise InputError(
      f'{source.name} has test images with labels {odd[:5].tolist()}{more}, of'
      ' which there are no training images; both need the same classes'
    )


def _evenly(
  field: str, split: Split | LazySplit, count: int
) -> tuple[Split | LazySplit, Split | LazySplit]:
  """Draws `count` images evenly from the classes; returns (the rest, drawn)."""
  labels = split.read_labels()
  if count >= len(labels):
    raise InputError(
      f'config.data.{field}={count} must be smaller'
      f' than the {len(labels)} training images'
    )
  try:
    rest, drawn = splits.stratified(labels, count)
  except ValueError as error:
    raise InputError(
      f'config.data.{field}={count} cannot be drawn evenly from the'
      f' {len(np.unique(labels))} classes of {len(labels)} training images'
      f' ({str(error).split(". ")[0]}); use another number'
    ) from error
  if labels.ndim == 2 and not labels[drawn].any():
    raise InputError(
      f'config.data.{field}={count} draws images without any label; use another'
      ' number'
    )
  return split.part(rest), split.part(drawn)
