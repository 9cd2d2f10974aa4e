"""Upper bounds of a network and its images, and checks of numbers.

A number beyond a bound is a slip or an attack, not a network. Without the
bounds, a few bytes of a model.json or one digit too many on the command line
would take hours or all memory before an error appears.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from typing import Any

from maskconnect_jax.errors import InputError

MAX_BLOCKS = 1_000  # a learned mask then has a million entries
MAX_WIDTH = 8_192  # channels of the first stage
MAX_WEIGHTS = 10_000_000_000  # 40 GB
MAX_CHANNELS = 1_024  # of an image
MAX_CLASSES = 1_000_000
MAX_SIDE = 8_192  # pixels of height or width of the network's input
MAX_PIXELS = 1_000_000_000  # that an image may have which a model decodes
MAX_FAN_IN = 2**31 - 1  # a block with fewer sources takes all of them


def whole(name: str, value: Any, least: int, most: int) -> int:
  """Returns `value` as an int if it is a whole number in [least, most].

  Args:
    name: the number's name in the message.
    value: an int, or an integer of NumPy or another library; no bool.
    least: the smallest allowed number.
    most: the largest allowed number.

  Raises:
    InputError: `value` is no whole number, or out of range.
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
  """Returns `value` as a float if it is a finite number in [least, most].

  Args:
    name: the number's name in the message.
    value: a real number; no bool.
    least: the smallest allowed number.
    most: the largest allowed number.

  Raises:
    InputError: `value` is no finite number, or out of range.
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
  """Returns `value` if it is one of `known`, else raises InputError."""
  if not isinstance(value, str) or value not in known:
    raise InputError(f'{name}={shown(value)} is not one of {", ".join(known)}')
  return value


def flag(name: str, value: Any) -> bool:
  """Returns `value` if it is True or False, else raises InputError."""
  if not isinstance(value, bool):
    raise InputError(f'{name}={shown(value)} must be True or False')
  return value


def shown(value: Any) -> str:
  """Returns a value's repr on one line, shortened if it is long."""
  return ' '.join(reprlib.repr(value).split())
