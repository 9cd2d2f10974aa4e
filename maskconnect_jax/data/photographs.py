"""Reads photographs for training and evaluation as uint8 [S, S, C].

A random crop is chosen from the header alone, before anything is decoded. If
the crop is at least 2, 4 or 8 times larger than the image to return, a JPEG is
decoded at 1/2, 1/4 or 1/8 of its size: libjpeg then computes only the DCT
coefficients that this size needs. The crop's edges are rounded to the pixels of
the decoded image.

`jpeg` decodes JPEGs and resizes crops, by OpenCV or by Pillow. `images.decode`
reads every other format, and every JPEG that these refuse, so that its error
messages serve all files. Flips and normalisation are left to the device.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from maskconnect_jax.data import image_headers, images, jpeg
from maskconnect_jax.data.randaugment import randaugment, trivialaugment

# An encoded file's content, its path, or decoded uint8 [H, W, C].
Record = bytes | str | os.PathLike[str] | np.ndarray

_ON_ITS_SIDE = (
  Image.Transpose.TRANSPOSE,
  Image.Transpose.ROTATE_270,
  Image.Transpose.TRANSVERSE,
  Image.Transpose.ROTATE_90,
)


def training_image(
  record: Record,
  rng: np.random.Generator,
  *,
  size: int,
  channels: int = 3,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  randaugment_ops: int = 0,
  randaugment_magnitude: float = 9.0,
  trivial: bool = False,
  max_pixels: int = image_headers.MAX_PIXELS,
) -> np.ndarray:
  """Returns a random crop of an image, resized and, if asked for, augmented.

  Args:
    record: the content of an image file, its path, or uint8 [H, W, C].
    rng: all randomness comes from it.
    size: S, height and width of the result in pixels.
    channels: C of the result, 1 (grey) or 3 (RGB).
    scale: smallest and largest area of the crop, as a share of the image's.
    ratio: smallest and largest width / height of the crop.
    randaugment_ops: how many operations of RandAugment to apply.
    randaugment_magnitude: strength of the operations, 0 to 10.
    trivial: whether to apply TrivialAugment.
    max_pixels: width times height of the largest image to decode.

  Returns:
    uint8 [size, size, channels], 0..255.

  Raises:
    InputError: the record is missing, damaged, too large or no image. The
      message names the file.
  """
  (height, width), decode = _open(record, max_pixels)
  top, left, tall, wide = random_box(
    height, width, rng, scale=scale, ratio=ratio
  )
  reduction = max(
    n for n in jpeg.REDUCTIONS if n == 1 or n * size <= min(tall, wide)
  )
  pixels = decode(reduction)[
    round(top / reduction) : round((top + tall) / reduction),
    round(left / reduction) : round((left + wide) / reduction),
  ]
  pixels = jpeg.chosen.resize(pixels, size)
  if trivial:
    return trivially_augmented(pixels, rng, channels=channels)
  if randaugment_ops:
    augmented = randaugment(
      Image.fromarray(pixels),
      rng,
      ops=randaugment_ops,
      magnitude=randaugment_magnitude,
    )
    return images.to_array(augmented, channels=channels)
  return images.to_array(pixels, channels=channels)


def trivially_augmented(
  pixels: np.ndarray, rng: np.random.Generator, *, channels: int
) -> np.ndarray:
  """Returns an image after TrivialAugment, uint8 [H, W, channels].

  Args:
    pixels: uint8 [H, W, 3], or [H, W, 1] for a grey image.
    rng: all randomness comes from it.
    channels: C of the result, 1 (grey) or 3 (RGB).
  """
  grey = pixels.shape[-1] == 1
  image = Image.fromarray(pixels[..., 0] if grey else pixels)
  return images.to_array(trivialaugment(image, rng), channels=channels)


def evaluation_image(
  record: Record,
  *,
  size: int,
  resize: int,
  channels: int = 3,
  max_pixels: int = image_headers.MAX_PIXELS,
) -> np.ndarray:
  """Returns the centre of an image, as `images.decode` does but sooner.

  Args:
    record: the content of an image file, its path, or uint8 [H, W, C].
    size: S, height and width of the result in pixels.
    resize: pixels to resize the shorter side to before the crop; 0 resizes to
      size x size without a crop.
    channels: C of the result, 1 (grey) or 3 (RGB).
    max_pixels: width times height of the largest image to decode.

  Returns:
    uint8 [size, size, channels], 0..255.

  Raises:
    InputError: the record is missing, damaged, too large or no image, and the
      message names the file; or 0 < resize < size.
  """
  _, decode = _open(record, max_pixels)
  return images.to_array(
    decode(1), channels=channels, size=(size, size), resize=resize
  )


def random_box(
  height: int,
  width: int,
  rng: np.random.Generator,
  *,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Draws a crop: its area uniform, its aspect ratio log-uniform.

  The crop is that of Szegedy et al., *Going deeper with convolutions*, arXiv
  1409.4842, section 6, drawn as by torchvision's RandomResizedCrop. A crop that
  does not fit into the image is drawn again. After ten draws the crop is the
  largest centre crop of an allowed ratio.

  Args:
    height: of the image, in pixels.
    width: of the image, in pixels.
    rng: all randomness comes from it.
    scale: smallest and largest area of the crop, as a share of the image's.
    ratio: smallest and largest width / height of the crop.

  Returns:
    (top, left, height, width) of the crop in pixels, within the image.
  """
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    tall = round(math.sqrt(area / aspect))
    wide = round(math.sqrt(area * aspect))
    if 0 < tall <= height and 0 < wide <= width:
      top = int(rng.integers(height - tall + 1))
      left = int(rng.integers(width - wide + 1))
      return top, left, tall, wide
  tall = min(height, max(round(width / ratio[0]), 1))
  wide = min(width, max(round(height * ratio[1]), 1))
  return (height - tall) // 2, (width - wide) // 2, tall, wide


def _open(
  record: Record, max_pixels: int = image_headers.MAX_PIXELS
) -> tuple[tuple[int, int], Callable[[int], np.ndarray]]:
  """Returns an image's (height, width), and a function that decodes it.

  The function takes n, one of `jpeg.REDUCTIONS`. It decodes the image at 1 / n
  and returns uint8 [ceil(height / n), ceil(width / n), 3].
  """
  if ordinary := _read_jpeg(record, max_pixels):
    content, (width, height), turn = ordinary

    def decode(n: int) -> np.ndarray:
      pixels = jpeg.chosen.decode(content, n)
      if pixels is None:  # cut short, for example
        return _reduce(_decode_any(record, max_pixels), n)
      if turn is None:
        return pixels
      return np.array(images.upright(Image.fromarray(pixels), turn))

    on_its_side = turn in _ON_ITS_SIDE
    return (width, height) if on_its_side else (height, width), decode
  pixels = _decode_any(record, max_pixels)
  return pixels.shape[:2], lambda n: _reduce(pixels, n)


def _read_jpeg(
  record: Record, max_pixels: int
) -> tuple[bytes, tuple[int, int], Image.Transpose | None] | None:
  """Returns an ordinary JPEG's content, (width, height) and EXIF turn.

  Returns None for any other record; `images.decode` then reports its faults.
  """
  if isinstance(record, np.ndarray):
    return None
  try:
    if not isinstance(record, bytes) and image_headers.kind_of(record):
      return None
    with (
      io.BytesIO(record)
      if isinstance(record, bytes)
      else pathlib.Path(record).open('rb')
    ) as file:
      header = image_headers.open_header(
        file, formats=('JPEG',), max_pixels=max_pixels
      )
      if header.mode not in ('L', 'RGB'):  # CMYK
        return None
      file.seek(0)
      return file.read(), header.size, images.turn_of(header)
  except Exception:
    return None


def _decode_any(record: Record, max_pixels: int) -> np.ndarray:
  return images.read(record, channels=3, max_pixels=max_pixels)


def _reduce(pixels: np.ndarray, n: int) -> np.ndarray:
  """Averages n x n pixels, nearly as decoding a JPEG at 1 / n does."""
  return pixels if n == 1 else np.array(Image.fromarray(pixels).reduce(n))
