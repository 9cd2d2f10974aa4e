"""One process at a time, whatever the file system, and after any kill."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from maskconnect_jax import config
from maskconnect_jax.run import locks

# Another program that takes a lock by the library alone, and waits.
HOLDER = """
import sys, time, filelock
lock = getattr(filelock, sys.argv[1])(sys.argv[2], timeout=0)
lock.acquire()
print('taken', flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder():
  """Starts a process that holds a lock; it is killed at the end."""
  started = []

  def start(kind, path):
    process = subprocess.Popen(
      [sys.executable, '-c', HOLDER, kind, str(path)],
      stdout=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    assert process.stdout.readline() == 'taken\n'
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
  monkeypatch.setattr(locks, 'PATIENCE', 0.0)


def refused(folder):
  with (
    pytest.raises(config.InputError, match='by another process') as raised,
    locks.locked(folder),
  ):
    pass
  assert str(folder) in str(raised.value)
  assert '\n' not in str(raised.value)
  return str(raised.value)


def test_the_second_is_refused(tmp_path):
  with locks.locked(tmp_path):
    refused(tmp_path)
    with (
      (tmp_path / locks.NAME).open('r+') as file,
      pytest.raises(BlockingIOError),
    ):
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locks.locked(tmp_path, enabled=False):
      pass  # another process of the same run
  with locks.locked(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == []


def test_a_kill_ends_it(tmp_path, holder):
  process = holder('FileLock', tmp_path / locks.NAME)
  refused(tmp_path)
  process.kill()
  process.wait()
  with locks.locked(tmp_path):
    pass


def test_a_process_that_ends_is_waited_for(tmp_path, holder, monkeypatch):
  process = holder('FileLock', tmp_path / locks.NAME)
  monkeypatch.setattr(locks, 'PATIENCE', 60.0)
  timer = threading.Timer(0.3, process.kill)
  timer.start()
  with locks.locked(tmp_path):
    timer.join()


def test_folders_that_stay_empty_go(tmp_path):
  folder = tmp_path / 'new/run'
  with locks.locked(folder):
    assert folder.is_dir()
  assert list(tmp_path.iterdir()) == []
  with locks.locked(folder):
    (folder / 'file').touch()
  assert list(folder.iterdir()) == [folder / 'file']


@pytest.mark.parametrize(
  'number',
  [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO],
)
def test_a_file_system_without_locks(
  number, tmp_path, monkeypatch, caplog, holder
):
  def flock(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'flock', flock)
  with locks.locked(tmp_path):
    (warning,) = caplog.messages
    assert str(tmp_path) in warning
    assert f'has no locks ({os.strerror(number)})' in warning
    assert f'remove {tmp_path / locks.SOFT_NAME}' in refused(tmp_path)
  assert list(tmp_path.iterdir()) == []
  process = holder('SoftFileLock', tmp_path / locks.SOFT_NAME)
  refused(tmp_path)
  process.kill()
  process.wait()
  with locks.locked(tmp_path):
    pass


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs /proc')
def test_a_folder_that_takes_no_files():
  """Root may write anywhere else."""
  for folder, what in (
    (f'/proc/{os.getpid()}/fdinfo', 'cannot be written'),
    (f'/proc/{os.getpid()}/run', 'cannot be made'),
  ):
    with (
      pytest.raises(config.InputError, match=f'{folder} {what} '),
      locks.locked(locks.Path(folder)),
    ):
      pass
