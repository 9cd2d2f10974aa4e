"""Files are replaced whole or not at all."""

import json
import os

import pytest

from maskconnect_jax import files


def test_a_file_is_replaced(tmp_path):
  path = tmp_path / 'new/folder/file'
  files.write_text(path, 'one')
  assert path.read_text() == 'one'
  with files.replacing(path) as temporary:
    assert temporary.parent == path.parent  # os.replace needs one file system
    temporary.write_text('two')
    assert path.read_text() == 'one'
  assert path.read_text() == 'two'
  assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_old_file(tmp_path):
  path = tmp_path / 'file'
  path.write_text('old')

  def fail():
    with files.replacing(path) as temporary:
      temporary.write_text('half')
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    fail()
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced(tmp_path):
  path = tmp_path / 'folder'
  for name in ('one', 'two'):
    with files.replacing(path) as temporary:
      temporary.mkdir()
      (temporary / name).write_text(name)
  assert [child.name for child in path.iterdir()] == ['two']
  assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_folder(tmp_path):
  path = tmp_path / 'folder'
  path.mkdir()
  (path / 'old').write_text('old')

  def fail():
    with files.replacing(path) as temporary:
      temporary.mkdir()
      (temporary / 'new').write_text('half')
      raise ValueError('x')

  with pytest.raises(ValueError, match='x'):
    fail()
  assert [child.name for child in path.iterdir()] == ['old']
  assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_not_in_the_way(tmp_path):
  path = tmp_path / 'folder'
  with files.replacing(path) as leftover:
    leftover.mkdir()
  leftover.mkdir()
  (leftover / 'half').write_text('')
  with files.replacing(path) as temporary:
    temporary.mkdir()
    (temporary / 'whole').write_text('')
  assert [child.name for child in path.iterdir()] == ['whole']
  assert list(tmp_path.iterdir()) == [path]


def test_json(tmp_path):
  path = tmp_path / 'file.json'
  files.write_json(path, {'a': [1, 2.5], 'b': None})
  assert json.loads(path.read_text()) == {'a': [1, 2.5], 'b': None}
  for bad in (float('nan'), float('inf')):
    with pytest.raises(ValueError, match='not JSON compliant'):
      files.write_json(path, {'a': bad})
  assert json.loads(path.read_text())['a'] == [1, 2.5]


def test_a_name_that_is_no_utf8_is_escaped(tmp_path):
  files.write_text(tmp_path / 'a', os.fsdecode(b'\xc3\xa9 \xe9'))
  assert (tmp_path / 'a').read_bytes() == b'\xc3\xa9 \\udce9'
