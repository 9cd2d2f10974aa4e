"""Files are replaced whole or not at all."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskconnect_jax import config, files
from maskconnect_jax.errors import InputError


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


ROOT = Path(__file__).parents[1]
# Begins to write and tells so; then writes one file over and over, or waits.
WRITER = """
import sys, time
from pathlib import Path
from maskconnect_jax import files

path, letter = Path(sys.argv[1]), sys.argv[2]
with files.replacing(path) as temporary:
  temporary.write_text('half')
  print(temporary, flush=True)
  sys.stdin.readline()
until = time.monotonic() + 0.5
while time.monotonic() < until:
  files.write_text(path, letter * 200_000)
"""


def writer(path, letter):
  process = subprocess.Popen(
    [sys.executable, '-c', WRITER, str(path), letter],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  return process, Path(process.stdout.readline().strip())


def test_two_processes_write_one_file(tmp_path):
  path = tmp_path / 'report.html'
  (one, first), (other, second) = writer(path, 'a'), writer(path, 'b')
  assert first.exists()
  assert second.exists()
  for process in (one, other):
    process.stdin.write('\n')
    process.stdin.flush()
  seen = set()
  while one.poll() is None or other.poll() is None:
    if path.exists() and (text := path.read_text()) != 'half':
      assert text in ('a' * 200_000, 'b' * 200_000)
      seen.add(text[0])
  for process in (one, other):
    process.communicate()
  assert (one.returncode, other.returncode) == (0, 0)
  assert seen == {'a', 'b'}
  assert list(tmp_path.iterdir()) == [path]


def test_leftovers_are_those_of_processes_that_are_gone(tmp_path):
  path = tmp_path / 'table.csv'
  (alive, kept), (killed, left) = writer(path, 'a'), writer(path, 'b')
  killed.kill()
  killed.communicate()
  other = [
    tmp_path / f'.table.csv.{"0" * 8}-{number}-0.tmp' for number in (1, 2)
  ]  # of another machine
  for file in other:
    file.touch()
  os.utime(other[0], (time.time() - 90_000,) * 2)
  mine = tmp_path / f'.other.csv.{left.name.rpartition(".csv.")[2]}'
  mine.touch()
  (tmp_path / '.table.csv.tmp').touch()  # of an earlier version
  files.remove_leftovers(tmp_path, lambda name: name == 'table.csv')
  assert {*tmp_path.iterdir()} == {kept, other[1], mine}
  files.write_text(path, 'c')
  assert {*tmp_path.iterdir()} == {path, kept, other[1], mine}
  alive.send_signal(signal.SIGKILL)
  alive.communicate()
  files.write_text(path, 'd')
  assert {*tmp_path.iterdir()} == {path, other[1], mine}


def test_outputs_that_can_be(tmp_path):
  (tmp_path / 'old').write_text('')
  for name in ('new', 'old', 'a/b/new'):
    files.check_output(tmp_path / name)
  assert [path.name for path in tmp_path.iterdir()] == ['old']


def test_outputs_that_cannot_be(tmp_path):
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'file').write_text('')
  for name, says in (
    ('folder', 'is a folder; give the name of a file'),
    ('file/below', 'file is not a folder'),
    ('file/a/b/c', 'file is not a folder'),
  ):
    with pytest.raises(InputError, match=says) as error:
      files.check_output(tmp_path / name)
    assert str(error.value).startswith(f'{tmp_path / name} ')


def test_json(tmp_path):
  path = tmp_path / 'file.json'
  files.write_json(path, {'a': [1, 2.5], 'b': None})
  assert json.loads(path.read_text()) == {'a': [1, 2.5], 'b': None}
  for bad in (float('nan'), float('inf')):
    with pytest.raises(ValueError, match='not JSON compliant'):
      files.write_json(path, {'a': bad})
  assert json.loads(path.read_text())['a'] == [1, 2.5]


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'empty'),
    (b' \n', 'empty'),
    (b'{', 'line 1 column 2'),
    (b'{"a": 1} x', 'Extra data'),
    (b'\xff\xfe{\x00}\x00', 'utf-8'),
    (b'\xef\xbb\xbf{}', 'BOM'),
    (b'{"a": "caf\xe9"}', 'utf-8'),
    (b'{"a": NaN}', 'NaN is no finite number'),
    (b'[-Infinity]', '-Infinity is no finite number'),
    (b'[1e999]', '1e999 is no finite number'),
    (b'[' + b'9' * 5000 + b']', 'digits'),
    (b'[' * 100_000 + b']' * 100_000, 'nested too deep'),
    (b'{"a":' * 100_000, 'nested too deep'),
    (b'{"b": {"a": 1, "a": 2}}', "'a' stands twice"),
    (b'[' + b' ' * (1 << 26), 'more than 64 MiB'),
  ],
  ids=range(15),
)
def test_json_that_is_none_is_one_line(content, message, tmp_path):
  path = tmp_path / 'some.json'
  path.write_bytes(content)
  with pytest.raises(InputError, match=message) as error:
    files.read_json(path, remedy='give another')
  said = str(error.value)
  assert said.startswith(f'{path} is damaged: ')
  assert said.endswith('; give another')
  assert '\n' not in said
  assert len(said) < 300 + len(str(path))


def test_json_that_cannot_be_read_is_one_line(tmp_path):
  for name, make, message in (
    ('none.json', lambda path: None, 'is not there'),
    ('folder.json', lambda path: path.mkdir(), 'is no file'),
    ('pipe.json', os.mkfifo, 'is no file'),
    ('loop.json', lambda path: path.symlink_to(path), 'loop.json '),
    ('x' * 300, lambda path: None, 'cannot be read'),
  ):
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError, match=message) as error:
      files.read_json(path, remedy='give another')
    assert '\n' not in str(error.value)


def test_json_is_read_as_it_was_written(tmp_path):
  record = {'name \udcff\n': ['é', -1, 0.1, True, None, 2**53 + 1]}
  path = tmp_path / 'some.json'
  files.write_json(path, record)
  assert files.read_json(path, remedy='') == record


def test_a_schema_says_where_it_is_broken(tmp_path):
  path = tmp_path / 'some.json'
  path.write_text('{"a": [[1, 2], [3, true]]}')
  with pytest.raises(
    InputError, match=r'damaged: \[...\]\[1\]\[1\]: .*bool; x'
  ):
    files.read_json(path, dict[str, list[list[int]]], remedy='x')


def test_what_is_not_finite_is_null():
  record = {'a': math.nan, 'b': [math.inf, (1.5, -math.inf)], 'c': 'NaN'}
  assert files.finite(record) == {
    'a': None,
    'b': [None, [1.5, None]],
    'c': 'NaN',
  }
  assert files.finite(math.nan) is None
  assert files.finite(3) == 3


def test_a_full_disk(small_disk):
  path = small_disk('64k') / 'summary.json'
  files.write_text(path, 'old')
  with pytest.raises(config.InputError, match='No space left') as error:
    files.write_text(path, 'é' * 500_000)
  assert str(error.value).startswith(f'{path} cannot be written')
  assert '1,000,000 bytes are needed' in str(error.value)
  assert '\n' not in str(error.value)
  assert path.read_text() == 'old'
  assert list(path.parent.iterdir()) == [path]


def test_what_is_in_the_way_is_named(tmp_path):
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(config.InputError, match='file is a file, not a folder'):
    files.write_text(tmp_path / 'file/deep/table.csv', 'x')
  (tmp_path / 'folder').mkdir()
  with pytest.raises(config.InputError, match='folder cannot be written: Is a'):
    files.write_text(tmp_path / 'folder', 'x')
  assert (tmp_path / 'file').read_text() == 'mine'
  assert {p.name for p in tmp_path.iterdir()} == {'file', 'folder'}


def test_a_folder_that_is_a_link_is_replaced(tmp_path):
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'elsewhere/kept').write_text('')
  path = tmp_path / 'model'
  path.symlink_to('elsewhere')
  with files.replacing(path) as temporary:
    temporary.mkdir()
  assert not path.is_symlink()
  assert (tmp_path / 'elsewhere/kept').exists()
  assert {p.name for p in tmp_path.iterdir()} == {'elsewhere', 'model'}


@pytest.mark.parametrize('call', [1, 2])
def test_an_interrupt_between_the_renames(call, tmp_path, monkeypatch):
  path, rename, calls = tmp_path / 'folder', os.rename, []
  path.mkdir()
  (path / 'old').write_text('')

  def interrupted(*names):
    calls.append(names)
    if len(calls) == call:
      raise KeyboardInterrupt
    rename(*names)

  def write():
    with files.replacing(path) as temporary:
      temporary.mkdir()
      monkeypatch.setattr(os, 'rename', interrupted)

  with pytest.raises(KeyboardInterrupt):
    write()
  assert [child.name for child in path.iterdir()] == ['old']
  assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_no_utf8_is_escaped(tmp_path):
  files.write_text(tmp_path / 'a', os.fsdecode(b'\xc3\xa9 \xe9'))
  assert (tmp_path / 'a').read_bytes() == b'\xc3\xa9 \\udce9'
