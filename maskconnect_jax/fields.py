"""Kinds of config fields: each checks values and describes the allowed ones.

`noun` names the allowed values. `wrong(value)` returns '' for an allowed value,
else the end of the sentence "config.FIELD=VALUE ...".
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any, Protocol

# Steps are int32, as are most of the integers that JAX gets.
MOST = 2**31 - 1
LARGEST_FLOAT32 = 3.4028234663852886e38

LONGEST_NAME = 255  # bytes of a file's name, on most file systems
# Linux allows paths of 4,095 bytes. A folder's path leaves 512 to its files.
LONGEST_PATH = 4095 - 512

_DURATION = re.compile(
  r'\s*([0-9]*\.?[0-9]+(?:e[0-9]{1,2})?)\s*(%|steps?|epochs?|examples?)\s*'
)


class Field(Protocol):
  """The kind of a config field: which values it allows."""

  @property
  def noun(self) -> str:
    """The allowed values in words, such as 'a number in [0, 1]'."""

  def wrong(self, value: Any) -> str:
    """Returns '' for an allowed value, else the end of a sentence."""


@dataclasses.dataclass(frozen=True)
class Number:
  """A number in an interval; never a bool, NaN or infinity.

  Attributes:
    low: the lower end of the interval.
    high: the upper end of the interval, at most the largest float32.
    whole: whether the number must be an int.
    open: the ends that the interval excludes: '(', ')', '()' or ''.
  """

  low: float
  high: float
  whole: bool = False
  open: str = ''

  @property
  def noun(self) -> str:
    """Such as 'a whole number in [0, 10]'."""
    left = '(' if '(' in self.open else '['
    right = ')' if ')' in self.open else ']'
    kind = 'a whole number' if self.whole else 'a number'
    return f'{kind} in {left}{self.low}, {self.high}{right}'

  def wrong(self, value: Any) -> str:
    """See `Field`."""
    kinds = (int,) if self.whole else (int, float)
    if isinstance(value, kinds) and not isinstance(value, bool):
      above = value > self.low if '(' in self.open else value >= self.low
      below = value < self.high if ')' in self.open else value <= self.high
      if above and below:
        return ''
    return f'must be {self.noun}'


def whole(low: int, high: int = MOST) -> Number:
  """Returns the kind of the whole numbers from `low` to `high`."""
  return Number(low, high, whole=True)


@dataclasses.dataclass(frozen=True)
class Switch:
  """True or False."""

  noun: str = 'true or false'

  def wrong(self, value: Any) -> str:
    """See `Field`."""
    return '' if isinstance(value, bool) else f'must be {self.noun}'


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of a few words.

  Attributes:
    values: the words.
  """

  values: tuple[str, ...]

  @property
  def noun(self) -> str:
    """Such as 'one of pad, resized'."""
    return f'one of {", ".join(self.values)}'

  def wrong(self, value: Any) -> str:
    """See `Field`."""
    known = isinstance(value, str) and value in self.values
    return '' if known else f'is not {self.noun}'


@dataclasses.dataclass(frozen=True)
class Text:
  """Text without a NUL character; '' is allowed."""

  noun: str = 'text'

  def wrong(self, value: Any) -> str:
    """See `Field`."""
    if not isinstance(value, str):
      return f'must be {self.noun}'
    return 'holds a NUL character' if '\0' in value else ''


@dataclasses.dataclass(frozen=True)
class File:
  """The path of a file or folder, or ''."""

  noun: str = 'a path'

  def wrong(self, value: Any) -> str:
    """See `Field`."""
    if not isinstance(value, str):
      return f'must be {self.noun}'
    try:
      expanded(value)
    except ValueError as error:
      return str(error)
    return ''


@dataclasses.dataclass(frozen=True)
class Duration:
  """A duration, such as '60 epochs'.

  Attributes:
    part: whether it may be a percentage of another duration.
  """

  part: bool = True

  @property
  def noun(self) -> str:
    """The allowed values in words, with an example of each unit."""
    last = "'1e6 examples' or '50%'" if self.part else "'1e6 examples'"
    return f"a duration; write '60 epochs', '400 steps', {last}"

  def wrong(self, value: Any) -> str:
    """See `Field`."""
    parsed = parse_duration(value)
    if parsed is None:
      return f'is not {self.noun}'
    if parsed[1] == '%' and not self.part:
      return (
        "needs a unit of its own: '60 epochs', '400 steps' or '1e6 examples'"
      )
    return ''


@dataclasses.dataclass(frozen=True)
class Several:
  """A tuple of values of one kind, or a list, which JSON has instead.

  Attributes:
    of: the kind of each value.
    counts: the allowed numbers of values; () for any number.
  """

  of: Field
  counts: tuple[int, ...] = ()

  @property
  def noun(self) -> str:
    """Such as '(), 1 or 3 values, each a number in [0, 255]'."""
    if not self.counts:
      return f'() or several values, each {self.of.noun}'
    *others, last = [str(count) if count else '()' for count in self.counts]
    some = f'{", ".join(others)} or {last}' if others else last
    return f'{some} values, each {self.of.noun}'

  def wrong(self, value: Any) -> str:
    """See `Field`."""
    if (
      isinstance(value, list | tuple)
      and (not self.counts or len(value) in self.counts)
      and not any(self.of.wrong(one) for one in value)
    ):
      return ''
    return f'must be {self.noun}'


def parse_duration(value: Any) -> tuple[float, str] | None:
  """Splits '60 epochs' into (60.0, 'epochs'); None if it is no duration."""
  match = _DURATION.fullmatch(value) if isinstance(value, str) else None
  if match is None or not math.isfinite(float(match[1])):
    return None
  unit = match[2] if match[2].endswith(('%', 's')) else match[2] + 's'
  return float(match[1]), unit


def expanded(path: str | os.PathLike[str]) -> Path:
  """Returns a path that a user gave; a ~ at its beginning is a home directory.

  Only this function gives ~ a meaning. The result never begins with ~, so
  expanding it again changes nothing.

  Raises:
    ValueError: no file can have this path. The message is the end of a
      sentence, such as 'is too long ...'.
  """
  given = os.fspath(path)
  text = os.path.expanduser(given)
  if '\0' in text:
    raise ValueError('holds a NUL character')
  if re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', text):
    # `Path` would make a local folder gs:/ of it.
    raise ValueError(
      'is an address, not a path; mount the bucket (gcsfuse, mountpoint-s3) and'
      ' give a folder of the mount'
    )
  if text.startswith('~'):
    home = Path(text).parts[0]
    raise ValueError(
      f'names the home directory {home}, which is not known here; ./{home} is'
      ' a file of that name'
    )
  if len(os.fsencode(os.path.abspath(text))) > LONGEST_PATH:
    raise ValueError(f'is too long; a path has at most {LONGEST_PATH} bytes')
  result = Path(text)
  for part in result.parts:
    if len(os.fsencode(part)) > LONGEST_NAME:
      raise ValueError(
        f'holds a name of {len(os.fsencode(part))} bytes; a file or folder has'
        f' at most {LONGEST_NAME}'
      )
  if str(result).startswith('~'):  # the path was ./~
    return Path(os.path.abspath(text))
  return result


def shown(value: Any) -> str:
  """Returns a value's repr on one line, of at most 200 characters."""
  try:
    text = repr(value)
  except ValueError:  # Python refuses to write very long ints in decimal
    text = f'{"-" if value < 0 else ""}0x{abs(value):x}'
  text = ' '.join(text.split())
  return text if len(text) <= 200 else f'{text[:150]}...{text[-20:]}'
