"""What a data set is, wherever it lies: told without decoding an image."""

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

# A network drive answers each request late, but many at once.
_STAT_THREADS, _STAT_CHUNK = 16, 1024
_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True)
class Identity:
  """What tells a data set from another, wherever it lies.

  Attributes:
    num_train: how many records are for training.
    num_test: how many are for testing.
    classes: name of each class.
    name: what to call it in a message.
    digest: returns one of the records in their order, as hexadecimal: of what
      they hold where that is in memory, else of their names and sizes.
  """

  num_train: int
  num_test: int
  classes: tuple[str, ...]
  name: str
  digest: Callable[[], str]

  def record(self) -> dict[str, Any]:
    """Returns it as JSON keeps it."""
    return {
      'train': self.num_train,
      'test': self.num_test,
      'classes': list(self.classes),
      'digest': self.digest(),
    }


def of_parts(parts: Iterable[bytes]) -> str:
  """Returns a SHA-256, in hexadecimal, of parts whose borders count."""
  whole = hashlib.sha256()
  for part in parts:
    whole.update(len(part).to_bytes(8, 'little') + part)
  return whole.hexdigest()


def of_arrays(arrays: Sequence[np.ndarray]) -> Callable[[], str]:
  """Returns the digest of arrays, which it does not keep in memory."""
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
    named: for each what to call it, which must not depend on where the data
      set lies, and its path.
  """

  def parts(chunk: Sequence[tuple[str, str]]) -> list[bytes]:
    found = []
    for name, path in chunk:
      try:
        size = os.path.getsize(path)
      except OSError:  # it is named when it is read
        size = -1
      # File systems differ in how they write one letter, such as an umlaut.
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
