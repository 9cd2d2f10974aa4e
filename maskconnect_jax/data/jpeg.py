"""Decodes JPEGs and resizes crops, by OpenCV where there is one, or by Pillow.

Both decode with libjpeg-turbo, and give the same pixels, bit by bit. Of a JPEG
that is decoded at 1/n, libjpeg computes only the DCT coefficients that this
size needs. Their resized crops differ a little; docs/data.md says by how much,
and what OpenCV saves.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

REDUCTIONS = (1, 2, 4, 8)  # n: a JPEG can be decoded at 1 / n


@dataclasses.dataclass(frozen=True)
class Library:
  """A way to read photographs.

  Attributes:
    name: 'opencv' or 'pillow'.
    decode: maps the content of an ordinary JPEG, grey or RGB, and n, one of
      `REDUCTIONS`, to uint8 [ceil(height / n), ceil(width / n), 3]. EXIF does
      not turn it. None if the library cannot decode it.
    resize: maps uint8 [H, W, 3] and a size S to uint8 [S, S, 3], bilinearly and
      antialiased.
  """

  name: str
  decode: Callable[[bytes, int], np.ndarray | None]
  resize: Callable[[np.ndarray, int], np.ndarray]


def _decode_by_pillow(content: bytes, n: int) -> np.ndarray | None:
  try:
    # The header was read before, within the bound on pixels.
    image = Image.open(io.BytesIO(content), formats=('JPEG',))
    if n > 1:
      image.draft(None, (image.width // n, image.height // n))
    return np.array(image.convert('RGB'))
  except Exception:  # of many types; `images.decode` reports them
    return None


def _resize_by_pillow(pixels: np.ndarray, size: int) -> np.ndarray:
  image = Image.fromarray(pixels)
  return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def _of_opencv(cv2: Any) -> Library:
  # As many images are read at once as there are cores. By default each call
  # would have as many threads again.
  cv2.setNumThreads(1)
  # REDUCED_GRAYSCALE sets no colour bit and is joined with IMREAD_COLOR_RGB;
  # REDUCED_COLOR would mean BGR.
  reduced = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
  }
  always = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION

  def decode(content: bytes, n: int) -> np.ndarray | None:
    try:
      return cv2.imdecode(np.frombuffer(content, np.uint8), reduced[n] | always)
    except cv2.error:  # more pixels than OpenCV allows, for example
      return None

  def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resizes as Pillow's filter nearly does, up to a shrinking by s = 2.

    It takes a third of the time; beyond, Pillow resizes. Pillow's antialiased
    bilinear filter is a triangle of variance s^2 / 6. Ordinary bilinear
    interpolation has the variance 1 / 6 on average. So a filter of three taps
    (q, 1 - 2q, q) adds the missing variance, 2q = (s^2 - 1) / 6, before an
    ordinary resize.
    """
    shrinking = np.divide(pixels.shape[:2], size)
    if shrinking.max() > 2:
      return _resize_by_pillow(pixels, size)
    if shrinking.max() > 1:
      # A Gaussian of 3 taps with exp(-1 / (2 sigma^2)) = q / (1 - 2q). A side
      # that does not shrink gets a q just above 0, because OpenCV takes sigma 0
      # for a request to choose its own.
      q = (np.maximum(shrinking, 1.001) ** 2 - 1) / 12
      sigma_y, sigma_x = np.sqrt(-0.5 / np.log(q / (1 - 2 * q)))
      pixels = cv2.GaussianBlur(
        pixels, (3, 3), sigma_x, sigmaY=sigma_y, borderType=cv2.BORDER_REPLICATE
      )
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)

  return Library('opencv', decode, resize)


def _find_opencv() -> Library | None:
  """Returns OpenCV 4.11 or newer, under any of its packages' names."""
  try:
    import cv2
  except ImportError:
    return None
  return _of_opencv(cv2) if hasattr(cv2, 'IMREAD_COLOR_RGB') else None


PILLOW = Library('pillow', _decode_by_pillow, _resize_by_pillow)
OPENCV = _find_opencv()
chosen = OPENCV or PILLOW
