"""One way from a file, a PIL image or an array to uint8 [H, W, channels].

Training and inference both come through here, so that an image to predict is
converted exactly as the images the network was trained on:

- EXIF orientation is applied: the array is what a viewer shows. EXIF that
  makes no sense turns nothing.
- Alpha is dropped, not composited: the stored colours are kept, as by
  torchvision's and Keras' loaders.
- 16 bits become 8 by taking the high byte, as Pillow itself does with 16-bit
  RGB. Pillow's convert() would clip 16-bit grey at 255 instead: an all-white
  image.
- Grey from colour is ITU-R 601-2 luma; CMYK has no profile applied; of an
  animation the first frame is taken.
- Resizing is bilinear with antialiasing to exactly the size asked for. The
  aspect ratio is kept only where a centre crop is asked for, with `resize`.
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
_TURNS = {  # its value -> what makes the image upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

_MODES = {1: 'L', 3: 'RGB'}
_WHOLE = 2**24  # pixels that a crop's image may be resized to


def decode(
  path_or_file: str | os.PathLike[str] | BinaryIO,
  *,
  channels: int,
  size: tuple[int, int] | None = None,
  resize: int = 0,
  max_pixels: int = image_headers.MAX_PIXELS,
) -> np.ndarray:
  """Reads an image file of any kind that Pillow reads.

  Args:
    path_or_file: a path, or a binary file open for reading.
    channels: 1 (grey) or 3 (RGB).
    size: (height, width) in pixels to resize to; None leaves it as stored.
    resize: with `size`: resize the shorter side to so many pixels instead and
      take the centre, `size`; 0 for no crop.
    max_pixels: width times height of the largest image to decode.

  Returns:
    uint8 [H, W, channels], 0..255.

  Raises:
    InputError: the file is missing, no regular file, truncated, no image, or
      too large; names the file.
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
    raise config.InputError(f'{name}: {error}') from error
  except UnidentifiedImageError as error:
    raise config.InputError(
      f'{name} is not an image that Pillow can read; replace or remove it'
    ) from error
  except Image.DecompressionBombError as error:  # an image within the image
    raise config.InputError(
      f'{name}: {image_headers.too_large("an image in it", max_pixels)}'
    ) from error
  except Exception as error:
    # Pillow's readers raise whatever their parsing runs into on damaged data:
    # OSError, SyntaxError, struct.error, EOFError ...
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
  """Reads an image however it is given.

  Args:
    record: a file's content or path, see `decode`; or an image in memory, see
      `to_array`.
    channels: 1 (grey) or 3 (RGB).
    size: (height, width) in pixels to resize to; None leaves it as it is.
    resize: of the shorter side, before `size` is cropped; 0 for no crop.
    max_pixels: of a file or its content; what is in memory is of any size.

  Returns:
    uint8 [H, W, channels], 0..255.

  Raises:
    InputError: as `decode` and `to_array`.
  """
  if not isinstance(record, (bytes, str, os.PathLike)):
    return to_array(record, channels=channels, size=size, resize=resize)
  return decode(
    io.BytesIO(record) if isinstance(record, bytes) else record,
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
      0..255, uint16 0..65535 or bool, C being 1 (grey), 2 (grey, alpha), 3
      (RGB) or 4 (RGB, alpha).
    channels: 1 (grey) or 3 (RGB).
    size: (height, width) in pixels to resize to; None leaves it as it is.
    resize: with `size`: resize the shorter side to so many pixels instead and
      take the centre, `size`; 0 for no crop.

  Returns:
    uint8 [H, W, channels], 0..255; `image` itself where nothing changes.

  Raises:
    InputError: values or a shape whose meaning would have to be guessed; a
      `resize` smaller than `size`.
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
    image.load()  # of a TIFF, Pillow turns the pixels then
    pil = _eight_bit(upright(image, turn_of(image)))
  pil = pil.convert(_MODES[channels])
  if size is not None and resize:
    pil = _centre(pil, size, resize)
  elif size is not None and pil.size != size[::-1]:
    pil = pil.resize(size[::-1], Image.Resampling.BILINEAR)
  array = np.array(pil)
  return array[:, :, None] if channels == 1 else array


def turn_of(image: Image.Image) -> Image.Transpose | None:
  """Returns what makes an image upright by its EXIF; None for nothing."""
  try:
    return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
  except Exception:
    return None  # EXIF that makes no sense; the pixels are whole


def upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
  """Returns an image turned; itself where there is nothing to turn."""
  return image if turn is None else image.transpose(turn)


def _centre(
  image: Image.Image, size: tuple[int, int], resize: int
) -> Image.Image:
  """Resizes the shorter side and crops the centre, as torchvision does.

  The whole image is resized, which gives the pixels of torchvision's Resize and
  CenterCrop. Of an image so long and thin that this would take more than
  `_WHOLE` pixels and more than it has itself, only the centre is resized;
  Pillow keeps its position in single precision, by which a value may be one
  grey level off.

  Args:
    image: of mode L or RGB.
    size: height and width of the crop.
    resize: the shorter side, resized.
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
    # 'I' is 32 bits wide, but what Pillow reads into it from PGM and older
    # PNG is 16 bits of grey.
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
    # Straight to RGB, Pillow warns when the palette has transparency.
    return image.convert('RGBA')
  return image
