"""RandAugment and TrivialAugment on Pillow images: operations at random.

Cubuk, Zoph, Shlens, Le, *RandAugment: Practical automated data augmentation
with a reduced search space*, 2020, arXiv 1909.13719. The operations and their
ranges are torchvision's: posterize keeps at least 4 bits, enhancements scale by
1 - 0.9 to 1 + 0.9. Magnitude 10 is the end of a range, as in the paper's own
code and in timm; in torchvision it is 30. Pixels that a shear, a translation or
a rotation brings in from outside the image are grey.

Müller, Hutter, *TrivialAugment: Tuning-free yet state-of-the-art data
augmentation*, 2021, arXiv 2103.10158, has the same operations in wider ranges.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from maskconnect_jax import config


def randaugment(
  image: Image.Image,
  rng: np.random.Generator,
  *,
  ops: int,
  magnitude: float,
) -> Image.Image:
  """Applies `ops` operations, drawn uniformly with replacement.

  Args:
    image: of mode L or RGB.
    rng: all randomness comes from it: the operations, and the direction of each
      operation that has one.
    ops: how many operations to apply; the paper's N.
    magnitude: the paper's M, from 0 (only autocontrast, equalize and small
      effects of rounding) to 10 (end of the ranges), or beyond.

  Returns:
    An image of the same mode and size.

  Raises:
    InputError: a negative magnitude.
  """
  if magnitude < 0:
    raise config.InputError(
      f'a RandAugment magnitude of {magnitude} makes no sense; give 0 to 10'
    )
  drawn = rng.choice(list(OPERATIONS), ops)
  signs = rng.choice((-1, 1), ops)
  for name, sign in zip(drawn, signs, strict=True):
    image = OPERATIONS[name](image, float(sign * magnitude / 10))
  return image


def trivialaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Applies one operation, drawn uniformly, at a strength drawn uniformly.

  The ranges are those of the paper's wide space, in 31 steps from 0 to the end:
  shears up to 0.99, translations up to 32 pixels, rotations up to 135 degrees,
  enhancements by 1 - 0.99 to 1 + 0.99, posterize down to 2 bits, solarize from
  0 on.

  Args:
    image: of mode L or RGB.
    rng: all randomness comes from it: operation, strength and direction.

  Returns:
    An image of the same mode and size.
  """
  name = str(rng.choice(list(OPERATIONS)))
  level = rng.choice((-1, 1)) * rng.integers(31) / 30 * _WIDER.get(name, 1)
  if name.startswith('translate'):
    side = image.width if name == 'translate_x' else image.height
    level *= 32 / (150 / 331 * side)
  return OPERATIONS[name](image, float(level))


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
  """Reads the pixel of (x, y) at `matrix` times (x, y, 1)."""
  return image.transform(
    image.size,
    Image.Transform.AFFINE,
    matrix,
    Image.Resampling.BILINEAR,
    fillcolor=_grey(image),
  )


def _rotate(image: Image.Image, level: float) -> Image.Image:
  return image.rotate(
    30 * level, Image.Resampling.BILINEAR, fillcolor=_grey(image)
  )


def _enhance(
  kind: Callable[[Image.Image], ImageEnhance._Enhance],
) -> Callable[[Image.Image, float], Image.Image]:
  # The floor keeps some of the image beyond the end of the wider range.
  return lambda image, level: kind(image).enhance(max(1 + 0.9 * level, 0.01))


def _grey(image: Image.Image) -> tuple[int, ...]:
  return (128,) * len(image.getbands())


# Name -> the operation at a signed level. Levels 1 and -1 are the ends of its
# range. An operation without a direction takes the absolute value.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
  'identity': lambda image, level: image,
  'shear_x': lambda image, level: _affine(image, 1, 0.3 * level, 0, 0, 1, 0),
  'shear_y': lambda image, level: _affine(image, 1, 0, 0, 0.3 * level, 1, 0),
  'translate_x': lambda image, level: _affine(
    image, 1, 0, 150 / 331 * level * image.width, 0, 1, 0
  ),
  'translate_y': lambda image, level: _affine(
    image, 1, 0, 0, 0, 1, 150 / 331 * level * image.height
  ),
  'rotate': _rotate,
  'brightness': _enhance(ImageEnhance.Brightness),
  'color': _enhance(ImageEnhance.Color),
  'contrast': _enhance(ImageEnhance.Contrast),
  'sharpness': _enhance(ImageEnhance.Sharpness),
  'posterize': lambda image, level: ImageOps.posterize(
    image, max(8 - round(4 * abs(level)), 1)
  ),
  'solarize': lambda image, level: ImageOps.solarize(
    image, max(round(255 * (1 - abs(level))), 0)
  ),
  'autocontrast': lambda image, level: ImageOps.autocontrast(image),
  'equalize': lambda image, level: ImageOps.equalize(image),
}

# The end of TrivialAugment's range, in ends of RandAugment's.
_WIDER = {
  'shear_x': 3.3,
  'shear_y': 3.3,
  'rotate': 4.5,
  'brightness': 1.1,
  'color': 1.1,
  'contrast': 1.1,
  'sharpness': 1.1,
  'posterize': 1.5,
}
