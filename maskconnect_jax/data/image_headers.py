"""Tells whether a file is an image, and how large, before it is decoded.

A file is an image if Pillow itself decodes its format. This holds for training
and for prediction alike.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from maskconnect_jax import config

# Width times height of a stored image. Larger images are refused before they
# are decoded. As RGB, so many pixels take 384 MB.
MAX_PIXELS = 128_000_000

# Formats that Pillow names but leaves to other programs. A PostScript file is
# itself a program, which Pillow would have run.
_NOT_DECODED = frozenset({'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'})

# The kinds of files, by their mode in stat, that are not regular files.
_TYPES = {
  stat.S_IFIFO: 'a named pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
  stat.S_IFDIR: 'a folder',
}


class TooLargeError(config.InputError):
  """An image has more pixels than are allowed; it was not decoded."""


def open_header(
  file: BinaryIO,
  *,
  formats: Sequence[str] = (),
  max_pixels: int = MAX_PIXELS,
) -> Image.Image:
  """Opens an image without decoding it: reads its size, mode and metadata.

  This is `Image.open` with a bound for each call. Pillow's own bound holds for
  the whole process and cannot change for one image. Pillow also warns from half
  its bound on.

  Args:
    file: a binary file, open for reading.
    formats: Pillow's names of the formats to try; () for all of `all_formats`.
    max_pixels: width times height of the largest image to open.

  Returns:
    The image; its pixels are not loaded yet.

  Raises:
    UnidentifiedImageError: the file is an image of none of the formats.
    TooLargeError: the image has more than `max_pixels`.
  """
  Image.preinit()
  # Some of Pillow's readers check the size again, against Pillow's bound.
  if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
  try:
    file.seek(0)
  except (AttributeError, OSError):  # the file cannot seek
    file = io.BytesIO(file.read())
  prefix = file.read(16)
  for name in formats or all_formats():
    factory, accept = Image.OPEN[name]
    try:
      accepted = accept is None or accept(prefix)
      if not accepted or isinstance(accepted, str):  # str: not built in
        continue
      file.seek(0)
      image = factory(file, '')
    except (SyntaxError, IndexError, TypeError, struct.error):
      continue  # like Image.open: another format may fit
    if math.prod(image.size) > max_pixels:
      width, height = image.size
      image.close()
      raise TooLargeError(too_large(f'its {width}x{height} pixels', max_pixels))
    return image
  raise UnidentifiedImageError


def too_large(what: str, max_pixels: int) -> str:
  """Returns the message for an image beyond the bound on pixels.

  Args:
    what: the subject of the message, such as 'its 9x9 pixels'.
    max_pixels: the bound, width times height.
  """
  return (
    f'{what} are more than config.data.max_pixels={max_pixels}; save it'
    ' smaller, or allow more'
  )


@contextlib.contextmanager
def lower_bound_of_pillow(max_pixels: int) -> Iterator[None]:
  """Lowers Pillow's own bound, which holds for the whole process.

  Pillow decodes the image inside an icon while it reads the icon's header. It
  refuses one of more than twice its own bound, and nothing else does.

  Args:
    max_pixels: the bound; one that is lower stays.
  """
  before = Image.MAX_IMAGE_PIXELS
  Image.MAX_IMAGE_PIXELS = min(before or max_pixels, max_pixels)
  try:
    yield
  finally:
    Image.MAX_IMAGE_PIXELS = before


@functools.cache
def all_formats() -> tuple[str, ...]:
  """Returns Pillow's names of the formats it decodes, common ones first."""
  Image.preinit()  # registers the common formats first
  Image.init()  # imports all readers, which takes 0.15 s the first time
  return tuple(name for name in Image.ID if name not in _NOT_DECODED)


@functools.cache
def _suffixes() -> frozenset[str]:
  """Returns the suffixes of all formats that are decoded, in lower case."""
  known, registered = all_formats(), Image.registered_extensions()
  return frozenset(
    suffix for suffix, name in registered.items() if name in known
  ) | {'.mpo'}  # read as JPEG


def kind_of(path: str | os.PathLike[str]) -> str | None:
  """Returns the kind of a path that is no regular file, as 'a named pipe'.

  Links are followed.

  Returns:
    The kind; None for a regular file, and for a path that does not exist, since
    opening it reports that.
  """
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return None
  if stat.S_ISREG(mode):
    return None
  return _TYPES.get(stat.S_IFMT(mode), 'a special file')


def has_suffix(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file's name has the suffix of an image format."""
  return os.path.splitext(path)[1].lower() in _suffixes()


def is_image(path: str | os.PathLike[str]) -> bool:
  """Returns whether a regular file's content begins as an image's does.

  Nothing is decoded, so the image may still be damaged. A format whose files do
  not begin with a mark of their own is known by its suffix alone: for such a
  file this returns False.
  """
  if kind_of(path):
    return False
  marked = [name for name in all_formats() if Image.OPEN[name][1] is not None]
  try:
    with open(path, 'rb') as file:
      open_header(file, formats=marked)
  except config.InputError:
    return True  # an image, if too large a one
  except Exception:
    return False
  return True
