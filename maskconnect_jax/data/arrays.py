"""A data source of arrays in memory, as a notebook has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from maskconnect_jax import limits
from maskconnect_jax.data import fingerprint, sources
from maskconnect_jax.data.sources import Source
from maskconnect_jax.errors import InputError

_NEEDS = (
  'data=(images, labels, test_images, test_labels): uint8 images [N, H, W],'
  ' [N, H, W, 1] or [N, H, W, 3], and as many labels'
)


def of(data: Sequence[Any], *, multi_label: bool = False) -> Source:
  """Returns a data source of arrays.

  Args:
    data: images, labels, test images and test labels. Images are uint8
      [N, H, W, C] with C = 1 (grey) or 3 (RGB), or [N, H, W]. Labels are whole
      numbers from 0, or names, [N].
    multi_label: see `config.data`. Labels are then bool, or whole numbers 0 and
      1, [N, classes].

  Raises:
    InputError: the arrays are of other shapes or types, or do not fit together.
  """
  if not isinstance(data, list | tuple) or len(data) != 4:
    raise InputError(f'give {_NEEDS}')
  images, labels, test_images, test_labels = map(np.asarray, data)
  pixels = [_pixels(images, 'images'), _pixels(test_images, 'test_images')]
  if pixels[0].shape[-1] != pixels[1].shape[-1]:
    raise InputError(
      f'images have {pixels[0].shape[-1]} channels and test_images'
      f' {pixels[1].shape[-1]}; give {_NEEDS}'
    )
  num_train = len(pixels[0])
  if multi_label:
    several = _several(labels, test_labels, num_train, len(pixels[1]))
    return Source(
      lambda i: (
        pixels[0][i] if i < num_train else pixels[1][i - num_train],
        several[i],
      ),
      num_train=num_train,
      num_test=len(pixels[1]),
      classes=tuple(map(str, range(several.shape[1]))),
      channels=pixels[0].shape[-1],
      name='data',
      digest=fingerprint.of_arrays([*pixels, several]),
      multi_label=True,
      labels=several,
    )
  for name, own, of_them in (
    ('labels', labels, pixels[0]),
    ('test_labels', test_labels, pixels[1]),
  ):
    if own.shape != (len(of_them),) or own.dtype.kind not in 'iuU':
      raise InputError(
        f'{name} are {own.dtype} {list(own.shape)}, but there are'
        f' {len(of_them)} images; give {_NEEDS}'
        + (
          ', or set config.data.multi_label=True'
          if own.ndim == 2 and own.dtype.kind in 'biu'
          else ''
        )
      )
  if (labels.dtype.kind == 'U') != (test_labels.dtype.kind == 'U'):
    raise InputError('labels and test_labels must both be numbers or names')
  numbers = [labels, test_labels]
  if labels.dtype.kind != 'U':
    if (largest := int(labels.max(initial=0))) >= limits.MAX_CLASSES:
      raise InputError(
        f'labels go up to {largest}; there may be {limits.MAX_CLASSES:,}'
        ' classes, numbered from 0'
      )
    classes = tuple(map(str, range(largest + 1)))
  else:
    classes = tuple(np.unique(labels).tolist())
    if odd := sorted(set(test_labels.tolist()) - set(classes)):
      raise InputError(
        f'test_labels have {odd[0]!r}, of which there are no training images'
      )
    numbers = [np.searchsorted(classes, own) for own in numbers]

  def read(i: int) -> tuple[np.ndarray, int]:
    part, i = (0, i) if i < num_train else (1, i - num_train)
    return pixels[part][i], int(numbers[part][i])

  return Source(
    read,
    num_train=num_train,
    num_test=len(pixels[1]),
    classes=classes,
    channels=pixels[0].shape[-1],
    name='data',
    digest=fingerprint.of_arrays([*pixels, *numbers]),
    # uint64 beside int64 would become float64.
    labels=np.concatenate([own.astype(np.int64) for own in numbers]),
  )


def _several(
  labels: np.ndarray, test_labels: np.ndarray, num_train: int, num_test: int
) -> np.ndarray:
  """Returns the labels of all images, bool [N, classes]."""
  count = labels.shape[-1] if labels.ndim == 2 else 0
  for name, own, images in (
    ('labels', labels, num_train),
    ('test_labels', test_labels, num_test),
  ):
    if (
      own.shape != (images, count)
      or not count
      or own.dtype.kind not in 'biu'
      or not np.isin(own, (0, 1)).all()
    ):
      raise InputError(
        f'{name} are {own.dtype} {list(own.shape)}, of {images} images; with'
        ' config.data.multi_label=True give bool, or whole numbers 0 and 1,'
        ' [N, classes], with as many classes in test_labels'
      )
  both = [own.astype(bool) for own in (labels, test_labels)]
  classes = [str(number) for number in range(count)]
  sources.check_several('data', classes, *both)
  return np.concatenate(both)


def _pixels(images: np.ndarray, name: str) -> np.ndarray:
  if images.ndim == 3:
    images = images[..., None]
  if (
    images.dtype != np.uint8
    or images.ndim != 4
    or images.shape[-1] not in (1, 3)
  ):
    raise InputError(
      f'{name} are {images.dtype} {list(images.shape)}; give {_NEEDS}'
    )
  return images
