"""IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import pathlib
import zlib

import numpy as np

from maskconnect_jax.data import image_headers
from maskconnect_jax.errors import InputError


def path_of(folder: pathlib.Path, stem: str, rank: int) -> pathlib.Path:
  """Returns the file of a name in either spelling, plain or .gz.

  Raises:
    InputError: there is none, or something else has its name.
  """
  for name in (f'{stem}-idx{rank}-ubyte', f'{stem}.idx{rank}-ubyte'):
    for path in (folder / name, folder / f'{name}.gz'):
      if path.is_file():
        return path
      if kind := image_headers.kind_of(path):
        raise InputError(f'{path} is {kind}, not a file; put the file there')
  raise InputError(
    f'config.data.dir={str(folder)!r} has no'
    f' {stem}-idx{rank}-ubyte, plain or .gz'
  )


def read(path: pathlib.Path, rank: int) -> np.ndarray:
  """Returns the uint8 array of `rank` dimensions in an IDX file.

  Raises:
    InputError: the file is of another kind, damaged or cut short.
  """
  content, whole = bytearray(), True
  with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
    try:
      # At a damaged place, read() would lose the bytes before it.
      while block := file.read1(1 << 20):
        content += block
    except (EOFError, gzip.BadGzipFile, zlib.error):
      whole = False
  header = np.frombuffer(
    content[: 4 + 4 * rank].ljust(4 + 4 * rank, b'\0'), '>u4'
  ).tolist()
  # A header begins with two zero bytes, 8 for unsigned bytes, and the rank.
  if len(content) >= 4 and header[0] != 0x0800 + rank:
    raise InputError(
      f'{path} is not an IDX file of {rank} dimensions: it begins with'
      f' {header[0]:#010x}, not {0x0800 + rank:#010x};'
      ' get it again'
    )
  expected = 4 + 4 * rank
  if len(content) >= expected:
    size = 1
    for dimension in header[1:]:
      size *= dimension  # Python's integers: a damaged header cannot overflow
    expected += size
  if len(content) != expected or not whole:
    raise InputError(
      f'{path} is damaged or cut short: {expected} bytes expected,'
      f' {len(content)} found; get it again'
    )
  return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(
    header[1:]
  )
