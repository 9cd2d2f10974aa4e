"""Which images of a set are for training, and which are held out of it."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from typing import TypeVar

import ml_collections
import numpy as np
from absl import logging

from maskconnect_jax import names
from maskconnect_jax.errors import InputError

_T = TypeVar('_T')


def stratified(
  labels: np.ndarray, held_out: int
) -> tuple[np.ndarray, np.ndarray]:
  """Splits indices in two parts with equal shares of each class.

  The split is the same every time. Images of several labels are drawn without
  regard to them.

  Args:
    labels: int [N], class indices; or bool [N, classes].
    held_out: how many indices the second part has.

  Returns:
    Two sorted int arrays: the rest, and the indices held out.

  Raises:
    ValueError: the classes are too few or too small for this split.
  """
  import sklearn.model_selection

  rest, held = sklearn.model_selection.train_test_split(
    np.arange(len(labels)),
    test_size=held_out,
    random_state=0,
    stratify=labels if labels.ndim == 1 else None,
  )
  return np.sort(rest), np.sort(held)


def of_each_class(
  images: dict[str, list[_T]],
  data: ml_collections.ConfigDict,
  name_of: Callable[[_T], str],
) -> tuple[dict[str, list[_T]], dict[str, list[_T]]]:
  """Returns the training and the test images of each class.

  An image is for testing if `_place` of 'class/image name' is below
  `data.test_fraction`. So an image keeps its side when others are added.

  Args:
    images: all images of each class.
    data: `config.data`.
    name_of: returns the name of an image.

  Raises:
    InputError: a class has no image on one side.
  """
  train: dict[str, list[_T]] = {}
  test: dict[str, list[_T]] = {}
  for name, own in images.items():
    sides: tuple[list[_T], list[_T]] = ([], [])
    for image in own:
      place = _place(f'{name}/{name_of(image)}')
      sides[place < data.test_fraction].append(image)
    if not all(sides):
      raise InputError(
        f'config.data.dir={data.dir!r} has no test images, and'
        f' config.data.test_fraction={data.test_fraction:g} leaves the class'
        f' {names.distinct(name)}, with {len(own)} images, without'
        f' {"training" if sides[1] else "test"} images; add images to it, or'
        ' split the set into train and test'
      )
    train[name], test[name] = sides
  count, all_of_them = (sum(map(len, s.values())) for s in (test, images))
  _tell(data, count, all_of_them)
  return train, test


def of_all(
  images: list[_T],
  data: ml_collections.ConfigDict,
  name_of: Callable[[_T], str],
) -> tuple[list[_T], list[_T]]:
  """Returns the training and the test images of a set without classes.

  Args:
    images: all images.
    data: `config.data`.
    name_of: returns the name of an image.

  Raises:
    InputError: one side has no image.
  """
  sides: tuple[list[_T], list[_T]] = ([], [])
  for image in images:
    sides[_place(name_of(image)) < data.test_fraction].append(image)
  train, test = sides
  if not (train and test):
    raise InputError(
      f'config.data.dir={data.dir!r} has no split, and'
      f' config.data.test_fraction={data.test_fraction:g} leaves no'
      f' {"training" if test else "test"} images; give it a column split'
    )
  _tell(data, len(test), len(images))
  return train, test


def _place(name: str) -> float:
  """Returns a number in [0, 1], from the SHA-256 of a name."""
  text = unicodedata.normalize('NFC', name)
  digest = hashlib.sha256(text.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def _tell(
  data: ml_collections.ConfigDict, count: int, all_of_them: int
) -> None:
  logging.warning(
    '%s has no test images: %d of its %d images are for testing, chosen by'
    ' their names (config.data.test_fraction=%g)',
    data.dir,
    count,
    all_of_them,
    data.test_fraction,
  )
