"""How a command begins and ends: signals, and streams that take no output.

Most run a small program of their own after `command.begin()`, as each command
does, since importing JAX takes seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BEGIN = 'from maskconnect_jax import command; command.begin(); import sys\n'
RESULTS = f'{BEGIN}with command.results():\n  '


def start(code, *, redirect='', ignored=(), **environment):
  """Starts Python; `redirect` is a shell's."""
  inherited = ''.join(
    f'signal.signal({number}, signal.{how});'
    for number in (1, 2, 15)
    for how in ['SIG_IGN' if number in ignored else 'SIG_DFL']
  )
  arguments = [sys.executable, '-c', f'import signal; {inherited}\n{code}']
  if redirect:
    arguments = ['bash', '-c', f'exec "$0" "$@" {redirect}', *arguments]
  return subprocess.Popen(
    arguments,
    cwd=ROOT,
    env=os.environ | environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def finish(process):
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


NUMBERS = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize('number', NUMBERS)
@pytest.mark.parametrize(
  'work',
  [
    'import time; time.sleep(60)',
    # No handler of Python's runs while C computes.
    'pow(7, 10**9)',
    # An exception would be lost here.
    'import gc\nclass A:\n  def __del__(self):\n    while True: pass\nA()',
  ],
  ids=['python', 'c', 'finalizer'],
)
def test_a_signal_ends_in_one_line(number, work):
  process = start(f'{BEGIN}print("ready", flush=True)\n{work}')
  assert process.stdout.readline() == b'ready\n'
  time.sleep(0.1)
  process.send_signal(number)
  code, _, err = finish(process)
  assert code == 128 + number
  assert err.decode() == (
    f'{number.name}: stopped; a run goes on from its newest checkpoint\n'
  )


@pytest.mark.parametrize('number', NUMBERS)
def test_what_is_ignored_stays_so(number):
  """As nohup does; also where a run or a sweep catches signals."""
  code = (
    f'{BEGIN}import os, signal\nfrom maskconnect_jax import signals\n'
    f'os.kill(os.getpid(), {int(number)})\n'
    'with signals.caught(lambda *given: print(given)):\n'
    f'  os.kill(os.getpid(), {int(number)})\n'
    'print("here")'
  )
  assert finish(start(code, ignored=[number])) == (0, b'here\n', b'')


def test_a_signal_during_the_imports_of_the_program():
  process = subprocess.Popen(
    [sys.executable, '-v', '-m', 'maskconnect_jax.main', '--mode=describe'],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  with process:
    for line in process.stderr:
      if line.startswith(b"import 'jax._src"):
        break
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
  assert process.returncode == 128 + signal.SIGTERM
  # Python's own lines about imports may follow before the process is gone.
  assert b'SIGTERM: stopped; ' in said
  assert b'Traceback' not in said


def test_a_forked_child_ends_alone():
  code = (
    f'{BEGIN}import os, signal, time\nchild = os.fork()\n'
    'if not child:\n  time.sleep(60)\n'
    'time.sleep(0.1)\nos.kill(child, signal.SIGTERM)\n'
    'print(os.waitpid(child, 0)[1])\ntime.sleep(0.3)\nprint("here")'
  )
  assert finish(start(code)) == (0, b'15\nhere\n', b'')


def test_characters_that_an_encoding_lacks():
  code = (
    f'{RESULTS}print("\\xe9 \\xb1 \\udce9"); print("\\u65e5", file=sys.stderr)'
  )
  for environment in (
    {'PYTHONIOENCODING': 'ascii'},
    {'LC_ALL': 'POSIX', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
  ):
    said = finish(start(code, **environment))
    assert said == (0, b'\\xe9 \\xb1 \\udce9\n', b'\\u65e5\n')
  code, out, _ = finish(start(code, PYTHONIOENCODING='utf-8'))
  assert (code, out.decode()) == (0, 'é ± \\udce9\n')


@pytest.mark.parametrize(
  ('redirect', 'says'),
  [
    ('>/dev/full', 'No space left on device'),
    ('>&-', 'Bad file descriptor'),
  ],
)
def test_results_that_cannot_be_written(redirect, says):
  for work in ('print("x" * 100000)', 'print("x")', 'print(1); sys.exit(0)'):
    code, out, err = finish(start(RESULTS + work, redirect=redirect))
    assert (code, out) == (2, b'')
    assert err.decode() == f'error: the output cannot be written ({says})\n'


def test_a_reader_that_has_gone():
  for work in ('print("x" * 100000)', 'print("x")'):
    process = start(f'{RESULTS}sys.stdin.read(1); {work}')
    process.stdout.close()
    process.stdin.write(b'x')
    process.stdin.close()
    with process:
      assert process.stderr.read() == b''
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize('redirect', ['2>&-', '2>/dev/full', '<&- 2>&-'])
def test_messages_that_cannot_be_written(redirect):
  code = (
    f'{RESULTS}print("x", file=sys.stderr, flush=True)\n'
    '  sys.stdin.read(); sys.stderr.isatty(); command.tell("table")'
  )
  assert finish(start(code, redirect=redirect)) == (0, b'table\n', b'')


def test_what_files_say_too_need_not_be_printed():
  code = f'{RESULTS}command.tell("table"); print("no more", file=sys.stderr)'
  for redirect in ('>&-', '>/dev/full'):
    assert finish(start(code, redirect=redirect)) == (0, b'', b'no more\n')


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
  code = f'{BEGIN}file = open({str(tmp_path / "file")!r}, "w")\n' + (
    'print("message", file=sys.stderr, flush=True)\n'
    'import os; os.write(2, b"of a library")\n'
    'command.tell("table"); file.close()'
  )
  assert finish(start(code, redirect='<&- >&- 2>&-'))[0] == 0
  assert (tmp_path / 'file').read_text() == ''


def test_without_what_windows_lacks():
  """Its names are taken away; what else differs there is not tried."""
  gone = 'os.register_at_fork, os.getuid'
  code = (
    f'import os, signal; del signal.SIGHUP, signal.SIGPIPE, {gone}\n{RESULTS}'
    'print("ready", flush=True); import time; time.sleep(60)'
  )
  process = start(code)
  assert process.stdout.readline() == b'ready\n'
  process.send_signal(signal.SIGTERM)
  code, _, err = finish(process)
  assert code == 128 + signal.SIGTERM
  assert err.startswith(b'SIGTERM: stopped; ')


def test_the_command_begins_before_jax_is_imported():
  code = (
    'import sys; from maskconnect_jax import command\n'
    'command.begin = lambda: sys.exit("jax" in sys.modules)\n'
    'from maskconnect_jax import __main__; __main__.main()'
  )
  assert finish(start(code)) == (0, b'', b'')


def test_the_collector_works_once_everything_is_imported():
  code = BEGIN + (
    'import gc; print(gc.isenabled())\n'
    'from maskconnect_jax import main\n'
    'main.app.run = lambda *_, **__: print(gc.isenabled())\n'
    'main.run()'
  )
  assert finish(start(code)) == (0, b'False\nTrue\n', b'')
