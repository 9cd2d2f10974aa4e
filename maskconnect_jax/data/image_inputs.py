"""Takes images from arrays of any library and from any iterable.

`each` takes one image at a time, so a generator is never held in memory as a
whole. Input with two possible meanings is refused, and the message says how to
make its meaning clear.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from maskconnect_jax import limits
from maskconnect_jax.errors import InputError

# An image as `images.read` takes it.
Item = str | os.PathLike[str] | Image.Image | np.ndarray

_MOST_CHANNELS = 4  # RGB and alpha
_WANTED = 'give paths, Pillow images or uint8 arrays [H, W] or [H, W, C]'


def each(given: Any, *, channels: int) -> Iterator[Item]:
  """Yields the images one by one.

  Args:
    given: one image: a path, a Pillow image, or an array [H, W] or [H, W, C]
      with C up to 4. Or several images: an array [N, H, W] or [N, H, W, C], an
      array of paths, or any iterable. An array may come from any library whose
      arrays NumPy can read.
    channels: how many channels the model takes. With 3, an array [3, H, W] has
      two meanings and is refused.

  Yields:
    A path, a Pillow image or an array, as `images.read` takes it.

  Raises:
    InputError: `given` is none of these, or its meaning would have to be
      guessed.
  """
  if isinstance(given, str | os.PathLike | Image.Image):
    yield given
    return
  array = _as_array(given, 'the images')
  if array is not None and array.dtype.kind not in 'OT':
    yield from _of_array(array, channels)
    return
  if array is not None:
    if array.ndim > 1:
      raise InputError(
        f'an array of Python objects, of shape {array.shape}, is no list of'
        f' images; {_WANTED}'
      )
    given = array.reshape(-1)
  if isinstance(given, Mapping):
    raise InputError(
      f'a {type(given).__name__} is no list of images; give its keys() or its'
      ' values()'
    )
  _refuse_bytes(given, 'the images')
  try:
    iterator = iter(given)
  except TypeError:
    raise InputError(f'{limits.shown(given)} is no image; {_WANTED}') from None
  for number in itertools.count():
    try:
      item = next(iterator)
    except StopIteration:
      return
    yield one(item, f'image {number}')


def one(item: Any, name: str = 'the image') -> Item:
  """Returns one image as `images.read` takes it.

  Args:
    item: a path, a Pillow image or an array [H, W] or [H, W, C].
    name: the image's name in a message.

  Raises:
    InputError: `item` is none of these.
  """
  if isinstance(item, str | os.PathLike | Image.Image):
    return item
  _refuse_bytes(item, name)
  array = _as_array(item, name)
  if array is None:
    raise InputError(f'{name} is {limits.shown(item)}; {_WANTED}')
  if array.ndim == 0 and isinstance(array.item(), str | os.PathLike):
    return array.item()
  if array.dtype.kind in 'OSTU':
    raise InputError(f'{name} is an array of {array.dtype}; {_WANTED}')
  if array.ndim == 3 and _channels_first(array.shape):
    raise InputError(
      f'{name}, of shape {array.shape}, has its channels first; give it'
      ' .transpose(1, 2, 0)'
    )
  return array


def _as_array(value: Any, name: str) -> np.ndarray | None:
  """Returns any library's array as NumPy's; None if `value` is no array."""
  ways: list[Callable[[Any], np.ndarray]] = []
  if isinstance(value, memoryview) or any(
    hasattr(value, way) for way in ('__array__', '__array_interface__')
  ):
    ways.append(np.asarray)
  if hasattr(value, '__dlpack__'):
    ways.append(np.from_dlpack)
  why = ''
  for way in ways:
    try:
      return way(value)
    except Exception as error:  # each library raises errors of its own
      why = why or ' '.join(str(error).split())[:120]
  if ways:
    raise InputError(
      f'{name}: a {type(value).__name__} that NumPy cannot read ({why}); give'
      ' an array in the memory of the host'
    )
  return None


def _of_array(array: np.ndarray, channels: int) -> Iterator[Item]:
  """Yields the images of an array of numbers or paths."""
  shape = array.shape
  if array.dtype.kind == 'U' and array.ndim < 2:
    yield from map(str, array.reshape(-1))
  elif array.dtype.kind in 'US':
    raise InputError(
      f'an array of {array.dtype} of shape {shape} is no list of paths; give'
      ' one axis of str'
    )
  elif array.ndim == 2 or (array.ndim == 3 and 0 < shape[2] <= _MOST_CHANNELS):
    yield array
  elif array.ndim == 3 and shape[0] == channels == 3:
    raise InputError(
      f'an array of shape {shape} is one image with its channels first, or 3'
      ' grey ones; give it .transpose(1, 2, 0), or [..., None]'
    )
  elif array.ndim == 4 and _channels_first(shape[1:]):
    raise InputError(
      f'an array of shape {shape} has its channels first; give it'
      ' .transpose(0, 2, 3, 1), [N, H, W, C]'
    )
  elif array.ndim in (3, 4) or shape == (0,):
    yield from array
  else:
    raise InputError(
      f'an array of {array.dtype} of shape {shape} is no image; give [H, W],'
      ' [H, W, C], [N, H, W] or [N, H, W, C] with C up to 4'
    )


def _channels_first(shape: tuple[int, ...]) -> bool:
  """Returns whether a shape is [C, H, W] rather than [H, W, C]."""
  return shape[0] in (1, 3, 4) and shape[2] > _MOST_CHANNELS


def _refuse_bytes(value: Any, name: str) -> None:
  if isinstance(value, bytes | bytearray):
    raise InputError(
      f'{name}: {type(value).__name__} may be a path or a file; give'
      ' os.fsdecode(path), or PIL.Image.open(io.BytesIO(content))'
    )
