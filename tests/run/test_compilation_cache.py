"""The compilation cache: where it is, who may read it, and broken entries."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings

import jax
import pytest

from maskconnect_jax.run import compilation_cache

FOLDER = 'jax_compilation_cache_dir'
SECONDS = 'jax_persistent_cache_min_compile_time_secs'


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
  """No variable names a folder; JAX's settings are put back at the end."""
  from jax._src import compilation_cache as theirs

  before = {name: getattr(jax.config, name) for name in (FOLDER, SECONDS)}
  for name in before:
    monkeypatch.delenv(name.upper(), raising=False)
  show = warnings.showwarning
  yield
  warnings.showwarning = show
  for name, value in before.items():
    jax.config.update(name, value)
  theirs.reset_cache()


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home, and a folder for temporary files."""
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  return tmp_path / 'home'


def used():
  compilation_cache.use()
  return jax.config.jax_compilation_cache_dir


def mode(path):
  return stat.S_IMODE(os.stat(path).st_mode)


def test_all_programs_are_kept_in_a_folder_for_one_user(home, monkeypatch):
  monkeypatch.setenv(SECONDS.upper(), '7')
  before = getattr(jax.config, SECONDS)
  assert used() == str(home / '.cache/maskconnect_jax/xla')
  assert mode(home / '.cache/maskconnect_jax/xla') == 0o700
  assert getattr(jax.config, SECONDS) == before
  monkeypatch.delenv(SECONDS.upper())
  (home / '.cache/maskconnect_jax/xla').chmod(0o777)
  used()
  assert mode(home / '.cache/maskconnect_jax/xla') == 0o700
  assert getattr(jax.config, SECONDS) == 0


def test_without_a_home_it_is_a_private_temporary_folder(
  home, tmp_path, monkeypatch, capsys
):
  temporary = tmp_path / f'maskconnect_jax-{os.getuid()}'
  home.write_text('no folder')
  assert used() == str(temporary)
  assert mode(temporary) == 0o700
  # In a container, of a user that no file knows.
  monkeypatch.delenv('HOME')
  monkeypatch.setattr('os.path.expanduser', lambda path: path)
  assert used() == str(temporary)
  assert capsys.readouterr().err == ''


def test_a_folder_of_somebody_else_is_not_used(home, tmp_path, capsys):
  if os.getuid():
    pytest.skip('only root can give a folder away')
  home.write_text('no folder')
  other = tmp_path / f'maskconnect_jax-{os.getuid()}'
  other.mkdir()
  os.chown(other, 12345, 12345)
  assert used() is None
  said = f"the compilation cache is off: {other} is another user's\n"
  assert capsys.readouterr().err == said


@pytest.mark.parametrize('given', ['file', 'file/below', '/proc/none'])
def test_a_folder_that_cannot_be_used_is_named(
  given, tmp_path, monkeypatch, capsys
):
  (tmp_path / 'file').write_text('')
  path = tmp_path / given
  monkeypatch.setenv(FOLDER.upper(), str(path))
  assert used() is None
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'the compilation cache is off: {path} cannot be')


@pytest.fixture
def compiled(tmp_path, monkeypatch):
  """Compiles two programs with a cache; returns their entries."""
  from jax._src import compilation_cache as theirs

  monkeypatch.setenv(FOLDER.upper(), str(tmp_path))
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  jax.config.update(FOLDER, str(tmp_path))
  theirs.reset_cache()
  compilation_cache.use()

  def run():
    for number in (1.5, 2.5):

      def program(x, number=number):
        return x * number

      assert jax.jit(program)(2.0) == 2 * number
    return {path: path.read_bytes() for path in tmp_path.glob('jit_program-*')}

  return run


@pytest.mark.parametrize('how', ['empty', 'cut', 'garbage'])
def test_broken_entries_are_replaced_with_one_line(how, compiled, capsys):
  whole = compiled()
  assert len(whole) == 2
  assert capsys.readouterr().err == ''
  for path, content in whole.items():
    damage = {'empty': b'', 'cut': content[:-9], 'garbage': b'x' * 99}
    path.write_bytes(damage[how])
  assert compiled().keys() == whole.keys()
  (line,) = capsys.readouterr().err.splitlines()
  assert 'holds broken entries; they are compiled anew and replaced' in line
  for path in whole:
    assert len(path.read_bytes()) > 99
  compiled()
  assert capsys.readouterr().err == ''


def test_a_cache_that_takes_no_more_says_so_once(
  compiled, tmp_path, capsys, monkeypatch
):
  from jax._src import lru_cache

  def full(self, key, value):
    (tmp_path / f'{key}-cache').write_bytes(value[:9])  # as a full disk does
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(lru_cache.LRUCache, 'put', full)
  assert compiled() == {}
  (line,) = capsys.readouterr().err.splitlines()
  assert line.endswith('going on without')
  assert 'takes no more entries' in line
  assert 'No space left on device' in line
