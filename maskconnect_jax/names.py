"""How names of files and classes are written in a line of text.

A file's name may be any bytes but 0 and '/': no UTF-8, a line break, what a
terminal takes for a command. Shown here it is one line that any output takes.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable

# What ends a line, steers a terminal, or cannot be encoded.
_ESCAPED = ('Cc', 'Cs', 'Zl', 'Zp')


def encodable(name: str | os.PathLike[str]) -> str:
  r"""Returns a name with its bytes that are no UTF-8 written as '\xe9'.

  Python holds such bytes as halves of surrogate pairs, which neither a strict
  output nor another program's JSON reader takes.
  """
  text = os.fspath(name)
  try:
    return os.fsencode(text).decode('utf-8', 'backslashreplace')
  except UnicodeEncodeError:  # a surrogate that stands for no byte
    return text.encode('utf-8', 'backslashreplace').decode()


def one_line(name: str | os.PathLike[str]) -> str:
  r"""Returns a name as text of one line: 'a\tb' for a tab, '\xe9' as above.

  Every name without control characters stays as it is.
  """
  return ''.join(
    repr(character)[1:-1]
    if unicodedata.category(character) in _ESCAPED
    else character
    for character in encodable(name)
  )


def distinct(name: str) -> str:
  """Returns a name as it is, or quoted where that would not show all of it.

  A space at the end, for one, or a character that has no shape of its own.
  """
  plain = name == name.strip() and name.isprintable()
  return name if plain else repr(name)


def some(named: Iterable[str], most: int = 3) -> str:
  """Returns the first few, separated by commas, and dots for the others."""
  listed = list(named)
  return ', '.join(listed[:most]) + ', ...' * (len(listed) > most)
