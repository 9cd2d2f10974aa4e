"""Reads many images into one array, in parallel if that is faster."""

from __future__ import annotations

import concurrent.futures
import math
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import tqdm

from maskconnect_jax.errors import InputError

_CHUNK = 64  # images per task: reading them takes far longer than handing out
_SLOW = 5e-4  # seconds per image above which threads are faster


def read_all(
  read: Callable[[int], np.ndarray],
  count: int,
  *,
  name: str,
  memory_gb: float,
  skip_errors: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
  """Reads many images into one array.

  Args:
    read: returns image i in [0, count) as uint8 [H, W, C], or raises
      InputError. It may be called from several threads, and more than once for
      an image.
    count: how many images there are.
    name: the name of the whole set in a message.
    memory_gb: size that the array may have, in units of 1e9 bytes.
    skip_errors: whether to leave out images that cannot be read.

  Returns:
    The M images that were read, uint8 [M, H, W, C], in the order of i; bool
    [count], True for those M; and the other images' messages, in order.

  Raises:
    InputError: an image cannot be read and `skip_errors` is off, no image can
      be read, images differ in size, or they take more than `memory_gb`.
  """
  errors: dict[int, str] = {}

  def attempt(i: int) -> np.ndarray | None:
    try:
      return read(i)
    except InputError as error:
      if not skip_errors:
        raise InputError(
          f'{error}, or set config.data.skip_errors=True'
        ) from error
      errors[i] = str(error)
      return None

  first = next(
    (image for image in map(attempt, range(count)) if image is not None), None
  )
  if first is None:
    why = f': {errors[0]}' if errors else ''
    raise InputError(f'{name} has no images{why or "; put some there"}')
  _check_memory(count, first.shape, memory_gb)
  pixels = np.empty((count, *first.shape), np.uint8)

  def read_chunk(start: int) -> int:
    chunk = range(start, min(start + _CHUNK, count))
    for i in chunk:
      image = attempt(i)
      if image is not None and image.shape != first.shape:
        # 100 images are enough to suggest a size.
        some = map(attempt, range(0, count, -(-count // 100)))
        raise _differing(name, first, image, some)
      if image is not None:
        pixels[i] = image
    return len(chunk)

  _in_chunks(read_chunk, count)
  kept = np.ones(count, bool)
  kept[list(errors)] = False
  return (
    pixels[kept] if errors else pixels,
    kept,
    [errors[i] for i in sorted(errors)],
  )


def _check_memory(count: int, shape: tuple[int, ...], memory_gb: float) -> None:
  gigabytes = count * math.prod(shape) / 1e9
  if gigabytes > memory_gb:
    raise InputError(
      f'config.data.memory_gb={memory_gb} is too little: the {count} images'
      f' take {gigabytes:.3g} GB decoded; allow that much or set a smaller'
      ' config.data.image_size'
    )


def _differing(
  name: str,
  first: np.ndarray,
  other: np.ndarray,
  some: Iterator[np.ndarray | None],
) -> InputError:
  sides = [image.shape[:2] for image in some if image is not None]
  return InputError(
    f'{name} has images of different sizes ({first.shape[0]}x'
    f'{first.shape[1]}, {other.shape[0]}x{other.shape[1]}, ...); set'
    f' config.data.image_size={round(np.median(sides))} or another'
    ' size for all'
  )


def _in_chunks(read_chunk: Callable[[int], int], count: int) -> None:
  """Calls read_chunk(0), read_chunk(64), ..., and shows the progress.

  Pillow decodes without the GIL but parses headers with it. Two threads were
  measured to speed photographs up by a third, and to slow 32x32 thumbnails down
  by a half. So the time of the first chunk decides how many threads to use.
  """
  with tqdm.tqdm(
    total=count,
    desc='decoding',
    unit=' images',
    delay=2,
    leave=False,
    disable=None,
  ) as progress:
    began = time.perf_counter()
    done = read_chunk(0)
    slow = (time.perf_counter() - began) / done > _SLOW
    progress.update(done)
    with concurrent.futures.ThreadPoolExecutor(
      os.cpu_count() if slow else 1
    ) as pool:
      for done in pool.map(read_chunk, range(_CHUNK, count, _CHUNK)):
        progress.update(done)
