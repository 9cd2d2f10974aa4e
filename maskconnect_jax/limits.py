"""What a network and its images may be at most, and the checks against it.

A bound is where a number is a slip or an attack rather than a network: a few
bytes of a model.json, or a digit too many on the command line, would otherwise
take hours or all memory before anything complains.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from typing import Any

from maskconnect_jax.errors import InputError

MAX_BLOCKS = 1_000  # of which a learned mask has a million entries
MAX_WIDTH = 8_192  # channels of the first stage
MAX_WEIGHTS = 10_000_000_000  # 40 GB
MAX_CHANNELS = 1_024  # of an image
MAX_CLASSES = 1_000_000
MAX_SIDE = 8_192  # pixels of a side of what the network takes
MAX_FAN_IN = 2**31 - 1  # a block with fewer sources takes all it has


def whole(name: str, value: Any, least: int, most: int) -> int:
  """Returns a whole number in [least, most].

  Args:
    name: what to call it in the message.
    value: an int, or what NumPy and others have for one; True is none.
    least: the smallest that is allowed.
    most: the largest that is allowed.

  Raises:
    InputError: it is another number, or none.
  """
  try:
    index = None if isinstance(value, bool) else operator.index(value)
  except TypeError:  # np.bool, too
    index = None
  if index is None:
    raise InputError(f'{name}={shown(value)} must be a whole number')
  if index < least:
    raise InputError(f'{name}={shown(value)} must be at least {least:,}')
  if index > most:
    raise InputError(f'{name}={shown(value)} must be at most {most:,}')
  return index


def number(
  name: str, value: Any, least: float, most: float = math.inf
) -> float:
  """Returns a finite number in [least, most].

  Raises:
    InputError: it is another number, or none.
  """
  try:
    plain = isinstance(value, numbers.Real) and not isinstance(value, bool)
    given = float(value) if plain else math.nan
  except OverflowError:
    given = math.nan
  if not least <= given <= most or math.isinf(given):
    raise InputError(
      f'{name}={shown(value)} must be a number'
      + (f' in [{least:g}, {most:g}]' if most < math.inf else f' >= {least:g}')
    )
  return given


def choice(name: str, value: Any, known: tuple[str, ...]) -> str:
  """Returns one of the known names. Raises InputError for anything else."""
  if not isinstance(value, str) or value not in known:
    raise InputError(f'{name}={shown(value)} is not one of {", ".join(known)}')
  return value


def flag(name: str, value: Any) -> bool:
  """Returns True or False. Raises InputError for anything else."""
  if not isinstance(value, bool):
    raise InputError(f'{name}={shown(value)} must be True or False')
  return value


def shown(value: Any) -> str:
  """Returns a value as Python writes it, on one line and not too long."""
  return ' '.join(reprlib.repr(value).split())
