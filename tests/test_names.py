"""Names are shown in one line that any output takes."""

import json
import os

import pytest

from maskconnect_jax import names

LATIN = os.fsdecode(b'caf\xe9.png')


@pytest.mark.parametrize(
  ('name', 'shown'),
  [
    ('plain name.png', 'plain name.png'),
    ('été 東京 \N{GRINNING FACE}.png', 'été 東京 \N{GRINNING FACE}.png'),
    # What macOS puts into the names of screenshots.
    ('9.41\u202fAM.png', '9.41\u202fAM.png'),
    (LATIN, r'caf\xe9.png'),
    ('a\nb\tc\rd', r'a\nb\tc\rd'),
    ('\x1b[31mred\x07', r'\x1b[31mred\x07'),
    ('\x85\u2028\u2029\x9b', r'\x85\u2028\u2029\x9b'),
    ('half\ud800', r'half\ud800'),
  ],
)
def test_one_line(name, shown):
  assert names.one_line(name) == shown
  assert len(shown.splitlines()) == 1
  shown.encode('utf-8')


def test_encodable_leaves_what_json_escapes_itself():
  assert names.encodable('a\nb.png') == 'a\nb.png'
  assert names.encodable(LATIN) == r'caf\xe9.png'
  json.dumps(names.encodable(LATIN), ensure_ascii=False).encode('utf-8')


def test_distinct_quotes_what_cannot_be_seen():
  for name in ('cat', 'black cat', 'é', 'кошка'):
    assert names.distinct(name) == name
  assert names.distinct('cat ') == "'cat '"
  assert names.distinct('кошка\xa0') == r"'кошка\xa0'"
  assert names.distinct('ca\u200bt') == r"'ca\u200bt'"
  assert names.distinct(LATIN) == r"'caf\udce9.png'"


def test_some():
  assert names.some(['a']) == 'a'
  assert names.some('abc') == 'a, b, c'
  assert names.some('abcd') == 'a, b, c, ...'
