"""Converts a file, a PIL image or an array to uint8 [H, W, channels].

Training and inference both use this module, so an image to predict is converted
exactly as the images that the network was trained on:

- EXIF orientation is applied: the array is upright, as a viewer shows the
  image. EXIF that makes no sense turns nothing.
- Alpha is dropped, not composited. The stored colours are kept, as by the
  loaders of torchvision and Keras.
- 16 bits become 8: the high byte is kept, as Pillow itself does with 16-bit
  RGB. Pillow's convert() would instead clip 16-bit grey at 255, which gives an
  all-white image.
- Grey from colour is ITU-R 601-2 luma. No profile is applied to CMYK. The
  first frame of an animation is taken.
- Resizing is bilinear with antialiasing, to exactly the size asked for. Only a
  centre crop, which `resize` asks for, keeps the aspect ratio.
"""

from __future__ import annotations

import io
import math
import os
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from maskconnect_jax import config, names
from maskconnect_jax.data import image_headers

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {  # the tag's value -> the transposition that turns it upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

_MODES = {1: 'L', 3: 'RGB'}
_WHOLE = 2**24  # pixels up to which an image is resized before its crop


class Content(bytes):
  """The content of an image file.

  Attributes:
    name: the image's name in a message.
  """

  name: str = 'the image'


class _File(io.BytesIO):
  def __init__(self, content: bytes) -> None:
    super().__init__(content)
    self.name = getattr(content, 'name', Content.name)


def decode(
  path_or_file: str | os.PathLike[str] | BinaryIO,
  *,
  channels: int,
  size: tuple[int, int] | None = None,
  resize: int = 0,
  max_pixels: int = image_headers.MAX_PIXELS,
) -> np.ndarray:
  """Reads an image file of any format that Pillow reads.

  Args:
    path_or_file: a path, or a binary file open for reading.
    channels: 1 (grey) or 3 (RGB).
    size: (height, width) in pixels of the result; None keeps the stored size.
    resize: with `size`: pixels to resize the shorter side to before the centre
      is cropped to `size`; 0 resizes to `size` without a crop.
    max_pixels: width times height of the largest image to decode.

  Returns:
    uint8 [H, W, channels], 0..255.

  Raises:
    InputError: the file is missing, no regular file, truncated, no image, or
      too large (`image_headers.TooLargeError`). The message names the file.
  """
  if isinstance(path_or_file, (str, os.PathLike)):
    name = names.one_line(path_or_file)
  else:
    name = names.one_line(str(getattr(path_or_file, 'name', 'the image')))
  try:
    if not isinstance(path_or_file, (str, os.PathLike)):
      return _decode(path_or_file, channels, size, resize, max_pixels)
    if kind := image_headers.kind_of(path_or_file):
      raise config.InputError(
        f'this is {kind}, not a file; replace or remove it'
      )
    with open(path_or_file, 'rb') as file:
      return _decode(file, channels, size, resize, max_pixels)
  except config.InputError as error:
    raise type(error)(f'{name}: {error}') from error
  except UnidentifiedImageError as error:
    raise config.InputError(
      f'{name} is not an image that Pillow can read; replace or remove it'
    ) from error
  except Image.DecompressionBombError as error:  # an image inside the file
    raise image_headers.TooLargeError(
      f'{name}: {image_headers.too_large("an image in it", max_pixels)}'
    ) from error
  except Exception as error:
    # On damaged data Pillow's readers raise errors of many types: OSError,
    # SyntaxError, struct.error, EOFError ...
    reason = ' '.join(str(error).split()) or type(error).__name__
    fault = f'is damaged or cut short ({reason})'
    if isinstance(error, OSError) and error.strerror:  # from the file system
      fault = f'cannot be read ({error.strerror})'
    raise config.InputError(f'{name} {fault}; replace or remove it') from error


def _decode(
  file: BinaryIO,
  channels: int,
  size: tuple[int, int] | None,
  resize: int,
  max_pixels: int,
) -> np.ndarray:
  # Pillow opens lazily: a truncated file shows only when the pixels load.
  with image_headers.open_header(file, max_pixels=max_pixels) as image:
    image.load()
    return to_array(image, channels=channels, size=size, resize=resize)


def read(
  record: bytes | str | os.PathLike[str] | np.ndarray | Image.Image,
  *,
  channels: int,
  size: tuple[int, int] | None = None,
  resize: int = 0,
  max_pixels: int = image_headers.MAX_PIXELS,
) -> np.ndarray:
  """Reads an image from a file, from a file's content or from memory.

  Args:
    record: a file's content, which may be a `Content` with a name, or its path,
      as for `decode`; or an image in memory, as for `to_array`.
    channels: 1 (grey) or 3 (RGB).
    size: (height, width) in pixels of the result; None keeps the image's size.
    resize: with `size`: pixels to resize the shorter side to before the centre
      is cropped to `size`; 0 resizes to `size` without a crop.
    max_pixels: width times height of the largest file to decode. An image in
      memory may be of any size.

  Returns:
    uint8 [H, W, channels], 0..255.

  Raises:
    InputError: see `decode` and `to_array`.
  """
  if not isinstance(record, (bytes, str, os.PathLike)):
    return to_array(record, channels=channels, size=size, resize=resize)
  return decode(
    _File(record) if isinstance(record, bytes) else record,
    channels=channels,
    size=size,
    resize=resize,
    max_pixels=max_pixels,
  )


def to_array(
  image: np.ndarray | Image.Image,
  *,
  channels: int,
  size: tuple[int, int] | None = None,
  resize: int = 0,
) -> np.ndarray:
  """Converts an image in memory the way `decode` converts a file.

  Args:
    image: a PIL image of any mode, or an array [H, W] or [H, W, C]: uint8
      0..255, uint16 0..65535 or bool. C is 1 (grey), 2 (grey, alpha), 3 (RGB)
      or 4 (RGB, alpha).
    channels: 1 (grey) or 3 (RGB).
    size: (height, width) in pixels of the result; None keeps the image's size.
    resize: with `size`: pixels to resize the shorter side to before the centre
      is cropped to `size`; 0 resizes to `size` without a crop.

  Returns:
    uint8 [H, W, channels], 0..255; `image` itself where nothing changes.

  Raises:
    InputError: the meaning of the values or of the shape would have to be
      guessed, `channels` is neither 1 nor 3, or `resize` is smaller than
      `size`.
  """
  if channels not in _MODES:
    raise config.InputError(
      f'images of {channels} channels are not supported;'
      ' use 1 (grey) or 3 (RGB)'
    )
  if isinstance(image, np.ndarray):
    if (
      image.dtype == np.uint8
      and image.size
      and image.ndim == 3
      and image.shape[2] == channels
      and size in (None, image.shape[:2])
      and not resize
    ):
      return image
    pil = _from_array(image)
  else:
    image.load()  # while loading a TIFF, Pillow turns its pixels
    pil = _eight_bit(upright(image, turn_of(image)))
  pil = pil.convert(_MODES[channels])
  if size is not None and resize:
    pil = _centre(pil, size, resize)
  elif size is not None and pil.size != size[::-1]:
    pil = pil.resize(size[::-1], Image.Resampling.BILINEAR)
  array = np.array(pil)
  return array[:, :, None] if channels == 1 else array


def turn_of(image: Image.Image) -> Image.Transpose | None:
  """Returns the transposition that EXIF asks for; None: it asks for none."""
  try:
    return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
  except Exception:
    return None  # EXIF that makes no sense; the pixels are whole


def upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
  """Returns the image turned by `turn`; the image itself for None."""
  return image if turn is None else image.transpose(turn)


def _centre(
  image: Image.Image, size: tuple[int, int], resize: int
) -> Image.Image:
  """Resizes the shorter side and crops the centre, as torchvision does.

  The whole image is resized, which gives the pixels of torchvision's Resize and
  CenterCrop. A long, thin image might then have more than `_WHOLE` pixels, and
  more than before: of it, only the centre is resized. Pillow keeps the centre's
  position in single precision, so a value may be one grey level off.

  Args:
    image: of mode L or RGB.
    size: (height, width) of the crop in pixels.
    resize: the shorter side in pixels before the crop.
  """
  if resize < max(size):
    raise config.InputError(
      f'a crop of {size[0]}x{size[1]} pixels does not fit in images resized to'
      f' {resize}; give at least {max(size)}'
    )
  sides = [side * resize // min(image.size) for side in image.size]
  crop = size[::-1]
  left, top = (
    round((side - cropped) / 2)
    for side, cropped in zip(sides, crop, strict=True)
  )
  box = (left, top, left + crop[0], top + crop[1])
  if math.prod(sides) <= max(_WHOLE, math.prod(image.size)):
    whole = image.resize(sides, Image.Resampling.BILINEAR)
    return whole.crop(box)
  across, down = (
    original / side for original, side in zip(image.size, sides, strict=True)
  )
  return image.resize(
    crop,
    Image.Resampling.BILINEAR,
    box=(box[0] * across, box[1] * down, box[2] * across, box[3] * down),
  )


def _from_array(array: np.ndarray) -> Image.Image:
  """Returns an array of any accepted shape and dtype as an 8-bit PIL image."""
  if array.dtype == np.uint16:
    array = (array >> 8).astype(np.uint8)
  elif array.dtype == np.bool_:
    array = array.astype(np.uint8) * 255
  elif array.dtype != np.uint8:
    raise config.InputError(
      f'an image of dtype {array.dtype} has no fixed range; give uint8, 0..255'
    )
  if array.ndim == 3 and array.shape[2] == 1:
    array = array[:, :, 0]
  if array.size == 0 or (
    array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (2, 3, 4))
  ):
    raise config.InputError(
      f'an array of shape {array.shape} is not an image;'
      ' give [H, W] or [H, W, C] with C from 1 to 4'
    )
  return Image.fromarray(np.ascontiguousarray(array))


def _eight_bit(image: Image.Image) -> Image.Image:
  """Returns a PIL image in a mode that convert() takes to grey and RGB."""
  if image.mode.startswith('I'):
    # Mode 'I' has 32 bits, but Pillow also uses it for the 16 bits of grey of
    # PGM and older PNG files.
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
      raise config.InputError(
        '32-bit grey has no fixed range; save it with 8 or 16 bits'
      )
    return _from_array(values.astype(np.uint16))
  if image.mode == 'F':
    raise config.InputError(
      'floating-point grey has no fixed range; save it with 8 or 16 bits'
    )
  if image.mode in ('P', 'PA'):
    # Converting a palette with transparency straight to RGB makes Pillow warn.
    return image.convert('RGBA')
  return image
