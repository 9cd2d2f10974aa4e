"""Tells data sets apart, wherever they lie, without decoding an image."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar

import numpy as np

# A network drive answers each request late, but answers many at once.
_STAT_THREADS, _STAT_CHUNK = 16, 1024
_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True)
class Identity:
  """The properties that tell a data set from another, wherever it lies.

  Attributes:
    num_train: how many records are for training.
    num_test: how many records are for testing.
    classes: name of each class.
    name: the data set's name in a message.
    digest: returns a hexadecimal digest of the records in their order. It
      covers the content of records in memory; of files it covers the names and
      sizes, and of a TFDS set the sizes of its splits.
  """

  num_train: int
  num_test: int
  classes: tuple[str, ...]
  name: str
  digest: Callable[[], str]

  def record(self) -> dict[str, Any]:
    """Returns the record of it that JSON stores, without `name`."""
    return {
      'train': self.num_train,
      'test': self.num_test,
      'classes': list(self.classes),
      'digest': self.digest(),
    }


def of_parts(parts: Iterable[bytes]) -> str:
  """Returns the SHA-256 of the parts and of their lengths, in hexadecimal."""
  whole = hashlib.sha256()
  for part in parts:
    whole.update(len(part).to_bytes(8, 'little') + part)
  return whole.hexdigest()


def of_arrays(arrays: Sequence[np.ndarray]) -> Callable[[], str]:
  """Returns a function that returns the digest of the arrays.

  The digest covers dtypes, shapes and values. The function does not keep the
  arrays in memory.
  """
  value = of_parts(
    part
    for array in arrays
    for part in (
      f'{array.dtype.str}{array.shape}'.encode(),
      np.ascontiguousarray(array).tobytes(),
    )
  )
  return lambda: value


def of_files(named: Iterable[tuple[str, str]]) -> str:
  """Returns the digest of the names and sizes of some files, in their order.

  Args:
    named: a name and a path for each file. The name must not depend on where
      the data set lies.

  Returns:
    SHA-256 in hexadecimal. A file that cannot be examined has the size -1.
  """

  def parts(chunk: Sequence[tuple[str, str]]) -> list[bytes]:
    found = []
    for name, path in chunk:
      try:
        size = os.path.getsize(path)
      except OSError:  # reading the file reports it
        size = -1
      # File systems differ in the bytes of one letter, such as an umlaut.
      name = unicodedata.normalize('NFC', name)
      found.append(f'{name}\0{size}'.encode('utf-8', 'surrogateescape'))
    return found

  with futures.ThreadPoolExecutor(_STAT_THREADS) as pool:
    chunks = pool.map(parts, _chunks(named, _STAT_CHUNK))
    return of_parts(itertools.chain.from_iterable(chunks))


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
  left = iter(items)
  while chunk := list(itertools.islice(left, size)):
    yield chunk
