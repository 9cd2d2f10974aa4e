"""One way from a file, a PIL image or an array to uint8 [H, W, channels].

Training and inference both come through here, so that an image to predict is
converted exactly as the images the network was trained on:

- EXIF orientation is applied: the array is what a viewer shows.
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

import concurrent.futures
import io
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import tqdm
from PIL import Image, ImageOps, UnidentifiedImageError

from maskconnect_jax import config

# What is taken from a folder of images to predict; a file that is named
# itself may have any suffix.
IMAGE_SUFFIXES = frozenset({
    '.bmp', '.gif', '.jpeg', '.jpg', '.pbm', '.pgm', '.png', '.ppm', '.tif',
    '.tiff', '.webp',
})  # fmt: skip

# What Windows leaves in folders of images.
_LITTER = frozenset({'thumbs.db', 'desktop.ini'})

_MODES = {1: 'L', 3: 'RGB'}
_CHUNK = 64  # images a task reads: far more work than handing the task out
_SLOW = 5e-4  # seconds an image takes from which on threads pay


def decode(
  path_or_file: str | os.PathLike[str] | BinaryIO,
  *,
  channels: int,
  size: tuple[int, int] | None = None,
  resize: int = 0,
) -> np.ndarray:
  """Reads an image file of any kind that Pillow reads.

  Args:
    path_or_file: a path, or a binary file open for reading.
    channels: 1 (grey) or 3 (RGB).
    size: (height, width) in pixels to resize to; None leaves it as stored.
    resize: with `size`: resize the shorter side to so many pixels instead and
      take the centre, `size`; 0 for no crop.

  Returns:
    uint8 [H, W, channels], 0..255.

  Raises:
    InputError: the file is missing, truncated, or no image; names the file.
  """
  name = path_or_file
  if not isinstance(path_or_file, (str, os.PathLike)):
    name = getattr(path_or_file, 'name', 'the image')
  try:
    # Pillow opens lazily: a truncated file shows only when the pixels load.
    with Image.open(path_or_file) as image:
      image.load()
      return to_array(image, channels=channels, size=size, resize=resize)
  except config.InputError as error:
    raise config.InputError(f'{name}: {error}') from error
  except UnidentifiedImageError as error:
    raise config.InputError(
      f'{name} is not an image that Pillow can read; replace or remove it'
    ) from error
  except Exception as error:
    # Pillow's readers raise whatever their parsing runs into on damaged data:
    # OSError, SyntaxError, struct.error, EOFError, DecompressionBombError ...
    reason = ' '.join(str(error).split()) or type(error).__name__
    fault = f'is damaged or cut short ({reason})'
    if isinstance(error, OSError) and error.strerror:  # from the file system
      fault = f'cannot be read ({error.strerror})'
    raise config.InputError(f'{name} {fault}; replace or remove it') from error


def read(
  record: bytes | str | os.PathLike[str] | np.ndarray | Image.Image,
  *,
  channels: int,
  size: tuple[int, int] | None = None,
  resize: int = 0,
) -> np.ndarray:
  """Reads an image however it is given.

  Args:
    record: a file's content or path, see `decode`; or an image in memory, see
      `to_array`.
    channels: 1 (grey) or 3 (RGB).
    size: (height, width) in pixels to resize to; None leaves it as it is.
    resize: of the shorter side, before `size` is cropped; 0 for no crop.

  Returns:
    uint8 [H, W, channels], 0..255.

  Raises:
    InputError: as `decode` and `to_array`.
  """
  if isinstance(record, bytes):
    return decode(
      io.BytesIO(record), channels=channels, size=size, resize=resize
    )
  if isinstance(record, (str, os.PathLike)):
    return decode(record, channels=channels, size=size, resize=resize)
  return to_array(record, channels=channels, size=size, resize=resize)


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
    pil = _eight_bit(ImageOps.exif_transpose(image))
  pil = pil.convert(_MODES[channels])
  if size is not None and (resize or pil.size != size[::-1]):
    pil = pil.resize(
      size[::-1],
      Image.Resampling.BILINEAR,
      box=_centre(pil.size, size, resize) if resize else None,
    )
  array = np.array(pil)
  return array[:, :, None] if channels == 1 else array


def find_images(
  path: str | os.PathLike[str],
  *,
  suffixes: frozenset[str] | None = IMAGE_SUFFIXES,
) -> list[pathlib.Path]:
  """Returns the image files at `path`, sorted.

  Args:
    path: a file, returned whatever its suffix, or a folder, searched with its
      subfolders. Hidden files and folders, and what Windows leaves in them,
      are left out.
    suffixes: lower-case suffixes to take from a folder; None takes all files.

  Raises:
    InputError: `path` does not exist or is a folder without images.
  """
  root = config.given_path(path, '--images')
  if root.is_file():
    return [root]
  if not root.is_dir():
    raise config.InputError(
      f'{path} does not exist; give an image file or a folder of images'
    )
  found = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = [name for name in subfolders if name[0] != '.']
    found += [
      pathlib.Path(folder, name)
      for name in files
      if name[0] != '.' and name.lower() not in _LITTER
    ]
  if suffixes is not None:
    found = [file for file in found if file.suffix.lower() in suffixes]
  if not found:
    raise config.InputError(
      f'{path} holds no images; it needs files such as *.jpg or *.png'
    )
  return sorted(found)


def read_all(
  read: Callable[[int], np.ndarray],
  count: int,
  *,
  name: str,
  memory_gb: float,
  skip_errors: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
  """Reads many images into one array, in parallel where that helps.

  Args:
    read: called with i in [0, count), possibly from several threads and more
      than once: uint8 [H, W, C]. Raises InputError where it cannot.
    count: how many images there are.
    name: what to call all of them in a message.
    memory_gb: 1e9 bytes that the array may take.
    skip_errors: leave out what cannot be read.

  Returns:
    uint8 [M, H, W, C] in the order of i; bool [count], which M of them these
    are; the messages of the others, in order.

  Raises:
    InputError: an image cannot be read, none can, they differ in size, or they
      take more than `memory_gb`.
  """
  errors: dict[int, str] = {}

  def attempt(i: int) -> np.ndarray | None:
    try:
      return read(i)
    except config.InputError as error:
      if not skip_errors:
        raise config.InputError(
          f'{error}, or set config.data.skip_errors=True'
        ) from error
      errors[i] = str(error)
      return None

  first = next(
    (image for image in map(attempt, range(count)) if image is not None), None
  )
  if first is None:
    why = f': {errors[0]}' if errors else ''
    raise config.InputError(f'{name} has no images{why or "; put some there"}')
  gigabytes = count * math.prod(first.shape) / 1e9
  if gigabytes > memory_gb:
    raise config.InputError(
      f'config.data.memory_gb={memory_gb} is too little: the {count} images'
      f' take {gigabytes:.3g} GB decoded; allow that much or set a smaller'
      ' config.data.image_size'
    )
  pixels = np.empty((count, *first.shape), np.uint8)

  def read_chunk(start: int) -> int:
    chunk = range(start, min(start + _CHUNK, count))
    for i in chunk:
      image = attempt(i)
      if image is None:
        continue
      if image.shape != first.shape:
        # Looking at 100 of them is enough to suggest a size.
        some = map(attempt, range(0, count, -(-count // 100)))
        sides = [image.shape[:2] for image in some if image is not None]
        raise config.InputError(
          f'{name} has images of different sizes ({first.shape[0]}x'
          f'{first.shape[1]}, {image.shape[0]}x{image.shape[1]}, ...); set'
          f' config.data.image_size={round(np.median(sides))} or another'
          ' size for all'
        )
      pixels[i] = image
    return len(chunk)

  with tqdm.tqdm(
    total=count,
    desc='decoding',
    unit=' images',
    delay=2,
    leave=False,
    disable=None,
  ) as progress:
    # Pillow decodes without the GIL but parses headers with it: two threads
    # speed photographs up by a third and slow 32x32 thumbnails down by a half
    # (measured). So the first chunk is timed and decides.
    began = time.perf_counter()
    done = read_chunk(0)
    slow = (time.perf_counter() - began) / done > _SLOW
    progress.update(done)
    with concurrent.futures.ThreadPoolExecutor(
      os.cpu_count() if slow else 1
    ) as pool:
      for done in pool.map(read_chunk, range(_CHUNK, count, _CHUNK)):
        progress.update(done)
  kept = np.ones(count, bool)
  kept[list(errors)] = False
  return (
    pixels[kept] if errors else pixels,
    kept,
    [errors[i] for i in sorted(errors)],
  )


def _centre(
  original: tuple[int, int], size: tuple[int, int], resize: int
) -> tuple[float, float, float, float]:
  """Returns what part of an image a centre crop after resizing shows.

  Rounded as by torchvision's Resize and CenterCrop. Pillow's filter reads
  beyond the box that it resizes, so that resizing the box alone gives the
  pixels that resizing everything and cropping gives.

  Args:
    original: width and height of the image.
    size: height and width of the crop.
    resize: the shorter side, resized.

  Returns:
    left, top, right and bottom in pixels of the image.
  """
  if resize < max(size):
    raise config.InputError(
      f'a crop of {size[0]}x{size[1]} pixels does not fit in images resized to'
      f' {resize}; give at least {max(size)}'
    )
  sides = [side * resize // min(original) for side in original]
  starts = [
    round((side - cropped) / 2)
    for side, cropped in zip(sides, size[::-1], strict=True)
  ]
  left, right, top, bottom = (
    edge * whole / side
    for start, cropped, whole, side in zip(
      starts, size[::-1], original, sides, strict=True
    )
    for edge in (start, start + cropped)
  )
  return left, top, right, bottom


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
