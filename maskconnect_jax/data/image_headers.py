"""What a file is before it is decoded: an image or not, and how large.

Kinds of images are those that Pillow decodes itself, for training and for
prediction alike.
"""

from __future__ import annotations

import functools
import io
import math
import os
import stat
import struct
from collections.abc import Sequence
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from maskconnect_jax import config

# Pixels of an image as it is stored, width times height: more are refused
# before they are decoded. As RGB these take 384 MB.
MAX_PIXELS = 128_000_000

# What Pillow names but does not decode itself: to others it leaves these, and
# a PostScript file is a program, which it has run.
_NOT_DECODED = frozenset({'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'})

# What stat says of a file that is no regular one.
_TYPES = {
  stat.S_IFIFO: 'a named pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
  stat.S_IFDIR: 'a folder',
}


def open_header(
  file: BinaryIO,
  *,
  formats: Sequence[str] = (),
  max_pixels: int = MAX_PIXELS,
) -> Image.Image:
  """Opens an image without decoding it: its size, mode and metadata are known.

  This is `Image.open` with a bound of one's own. Pillow's holds for the whole
  process, prints a warning below it, and cannot be lowered or raised for one
  image.

  Args:
    file: open for reading.
    formats: Pillow's names of those to try; none for all that are read.
    max_pixels: width times height of the largest image to open.

  Raises:
    UnidentifiedImageError: it is none of these.
    InputError: the image is larger.
  """
  Image.preinit()
  # Some readers look once more at the size, with Pillow's bound.
  if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
  try:
    file.seek(0)
  except (AttributeError, OSError):  # no file of a disk
    file = io.BytesIO(file.read())
  prefix = file.read(16)
  for name in formats or all_formats():
    factory, accept = Image.OPEN[name]
    try:
      accepted = accept is None or accept(prefix)
      if not accepted or isinstance(accepted, str):  # str: built without it
        continue
      file.seek(0)
      image = factory(file, '')
    except (SyntaxError, IndexError, TypeError, struct.error):
      continue  # as Image.open does: another format may be meant
    if math.prod(image.size) > max_pixels:
      width, height = image.size
      image.close()
      raise config.InputError(
        too_large(f'its {width}x{height} pixels', max_pixels)
      )
    return image
  raise UnidentifiedImageError


def too_large(what: str, max_pixels: int) -> str:
  """Returns the message for an image beyond the bound on pixels."""
  return (
    f'{what} are more than config.data.max_pixels={max_pixels}; save it'
    ' smaller, or allow more'
  )


@functools.cache
def all_formats() -> tuple[str, ...]:
  """Returns Pillow's names of what it decodes, the common ones first."""
  Image.preinit()  # these are tried first
  Image.init()  # imports all readers: 0.15 s, the first time
  return tuple(name for name in Image.ID if name not in _NOT_DECODED)


@functools.cache
def _suffixes() -> frozenset[str]:
  """Returns the suffixes of what is decoded, in lower case."""
  known, registered = all_formats(), Image.registered_extensions()
  return frozenset(
    suffix for suffix, name in registered.items() if name in known
  ) | {'.mpo'}  # read as JPEG


def kind_of(path: str | os.PathLike[str]) -> str | None:
  """Returns what a path is if it is no regular file, such as 'a named pipe'.

  Links are followed. What does not exist is None too: opening it says so.
  """
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return None
  if stat.S_ISREG(mode):
    return None
  return _TYPES.get(stat.S_IFMT(mode), 'a special file')


def has_suffix(path: str | os.PathLike[str]) -> bool:
  """Whether a file's name says that it is an image."""
  return os.path.splitext(path)[1].lower() in _suffixes()


def is_image(path: str | os.PathLike[str]) -> bool:
  """Whether a regular file's content says that it is an image.

  Nothing is decoded: the image may be damaged all the same. Formats that do
  not begin with a mark of their own are known by their suffixes alone.
  """
  if kind_of(path):
    return False
  marked = [name for name in all_formats() if Image.OPEN[name][1] is not None]
  try:
    with open(path, 'rb') as file:
      open_header(file, formats=marked)
  except config.InputError:
    return True  # too large an image
  except Exception:
    return False
  return True
