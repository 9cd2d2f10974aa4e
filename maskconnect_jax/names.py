"""Writes the names of files and classes into a line of text.

A file's name may hold any bytes except 0 and '/': bytes that are no UTF-8, a
line break, or a terminal's commands. `encodable` returns text that any output
can encode; the text of `one_line` and `distinct` also fits in one line.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable

# Unicode categories that end a line, steer a terminal or cannot be encoded.
_ESCAPED = ('Cc', 'Cs', 'Zl', 'Zp')


def encodable(name: str | os.PathLike[str]) -> str:
  r"""Returns a name in which bytes that are no UTF-8 are written as '\xe9'.

  Python represents these bytes by lone surrogates. Neither a strict output nor
  another program's JSON reader accepts lone surrogates.
  """
  text = os.fspath(name)
  try:
    return os.fsencode(text).decode('utf-8', 'backslashreplace')
  except UnicodeEncodeError:  # a surrogate that stands for no byte
    return text.encode('utf-8', 'backslashreplace').decode()


def one_line(name: str | os.PathLike[str]) -> str:
  r"""Returns a name as text of one line: a tab becomes '\t'.

  Bytes that are no UTF-8 become '\xe9', as by `encodable`. Every other name
  without control characters stays the same.
  """
  return ''.join(
    repr(character)[1:-1]
    if unicodedata.category(character) in _ESCAPED
    else character
    for character in encodable(name)
  )


def distinct(name: str) -> str:
  """Returns a name unchanged, or quoted if parts of it would be invisible.

  A space at the end is invisible, and so is a character without a shape.
  """
  plain = name == name.strip() and name.isprintable()
  return name if plain else repr(name)


def some(named: Iterable[str], most: int = 3) -> str:
  """Returns the first `most` names, separated by commas, and dots for more."""
  listed = list(named)
  return ', '.join(listed[:most]) + ', ...' * (len(listed) > most)
