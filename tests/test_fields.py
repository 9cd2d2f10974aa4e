"""Kinds of fields: paths as users write them."""

import os
from pathlib import Path

import pytest

from maskconnect_jax import fields


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home directory of its own, and an empty current directory."""
  for name in ('home', 'here'):
    (tmp_path / name).mkdir()
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.chdir(tmp_path / 'here')
  return tmp_path / 'home'


def test_a_tilde_is_the_home_directory(home):
  assert fields.expanded('~') == home
  assert fields.expanded('~/a/b') == home / 'a/b'
  assert fields.expanded(Path('~/a')) == home / 'a'
  root = Path(os.path.expanduser('~root'))
  if root != Path('~root'):
    assert fields.expanded('~root/x') == root / 'x'


@pytest.mark.parametrize(
  'text', ['a', 'a/~', '/x/~/y', 'a~', '.', 'a b/é', '..']
)
def test_other_paths_stay_as_they_are(text, home):
  assert fields.expanded(text) == Path(text)


def test_a_folder_that_is_called_tilde(home):
  once = fields.expanded('./~')
  assert once == Path.cwd() / '~'
  assert fields.expanded(once) == once


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ('a\0b', 'NUL'),
    ('x/' + 'y' * 256, 'a name of 256 bytes'),
    ('é' * 128, 'a name of 256 bytes'),  # bytes, not characters
    ('x/' * 3000, 'too long'),
    ('gs://bucket/run', 'an address, not a path; mount the bucket'),
    ('s3://bucket/run', 'an address'),
    ('~nobody of this name/x', 'home directory ~nobody of this name,'),
  ],
)
def test_what_is_no_path(text, says, home):
  with pytest.raises(ValueError, match=says) as error:
    fields.expanded(text)
  assert '\n' not in str(error.value)


def test_without_a_home(monkeypatch):
  monkeypatch.delenv('HOME', raising=False)
  monkeypatch.setattr(os, 'getuid', lambda: 2**31 - 5)  # as in a container
  with pytest.raises(ValueError, match=r'not known here; \./~'):
    fields.expanded('~/x')


def test_shown_is_one_short_line():
  assert fields.shown('a\nb') == r"'a\nb'"
  assert fields.shown((1, 'x')) == "(1, 'x')"
  for value in (10**6000, -(10**6000), 'x' * 6000):
    assert len(fields.shown(value)) < 200
