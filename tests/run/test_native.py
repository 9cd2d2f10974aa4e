"""How the C++ code is compiled.

Its values are tested in test_convolution.py and method/test_aggregate.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskconnect_jax import backend
from maskconnect_jax.run import native

pytestmark = pytest.mark.skipif(
  not backend.native.value, reason='no C++ compiler, or not for this system'
)

USE = """
from maskconnect_jax import backend, convolution
from maskconnect_jax.run import native
native.use()
print(backend.native.value)
"""

COMPILED = f"""{USE}
import jax, jax.numpy as jnp
print(jax.jit(convolution.conv)(
  jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 16)))[0, 1, 1, 0])
"""


def started(
  code: str, cache: Path, **environment: str
) -> tuple[list[str], str]:
  """Runs a program that has a cache of its own; returns what it prints."""
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'XDG_CACHE_HOME': str(cache), **environment},
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.split(), done.stderr


def test_it_is_compiled_once_and_its_programs_are_kept(tmp_path):
  """A program that calls it has to go through the compilation cache."""
  programs = {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'programs')}
  found = [started(COMPILED, tmp_path, **programs) for _ in range(2)]
  assert [out for out, _ in found] == [['True', '9.0']] * 2
  assert 'compiling convolutions and sums for this CPU, once' in found[0][1]
  assert 'rror' not in found[0][1] + found[1][1]
  assert 'compiling' not in found[1][1]
  (library,) = (tmp_path / 'maskconnect_jax' / 'native').iterdir()
  assert library.suffix == '.so'
  assert list((tmp_path / 'programs').glob('jit_conv-*-cache'))


@pytest.mark.parametrize(
  ('compiler', 'says'),
  [
    ('no-such-compiler', 'No such file or directory'),
    ('false', 'returned non-zero exit status 1'),
  ],
)
def test_a_bad_compiler_leaves_xlas_and_says_so(tmp_path, compiler, says):
  out, err = started(USE, tmp_path, CXX=compiler)
  assert out == ['False']
  (line,) = (line for line in err.splitlines() if 'C++ code' in line)
  assert line.startswith("XLA's convolutions and sums are used")
  assert says in line
  assert 'CXX=' in line


def test_a_library_that_cannot_be_loaded_is_not_kept(tmp_path):
  compiler = tmp_path / 'compiler'
  compiler.write_text(
    '#!/bin/sh\n[ "$1" = --version ] && exit\n'
    'for last; do :; done\necho 1 > "$last"\n'
  )
  compiler.chmod(0o755)
  out, err = started(USE, tmp_path, CXX=str(compiler))
  assert out == ['False']
  assert 'too short' in err
  assert not list((tmp_path / 'maskconnect_jax' / 'native').iterdir())


def test_a_compiler_that_is_not_needed_any_more_leaves_nothing(tmp_path):
  """As of a run whose data are not there: it ends at once."""
  compiler, told = tmp_path / 'compiler', tmp_path / 'told'
  compiler.write_text(
    f'#!/bin/sh\n[ "$1" = --version ] && exit\necho $$ > {told}\n'
    'exec sleep 60\n'
  )
  compiler.chmod(0o755)
  code = f"""
import pathlib, time
from maskconnect_jax.run import native
native.begin()
while not pathlib.Path({str(told)!r}).exists(): time.sleep(0.01)
"""
  started(code, tmp_path, CXX=str(compiler))
  assert not Path(f'/proc/{int(told.read_text())}').exists()
  assert not list((tmp_path / 'maskconnect_jax' / 'native').iterdir())


@pytest.mark.parametrize('given', [{'CXX': ''}, {'PATH': '/none'}])
def test_no_compiler_is_no_error(tmp_path, monkeypatch, given):
  monkeypatch.delenv('CXX', raising=False)
  assert started(USE, tmp_path, **given) == (['False'], '')


def test_the_cpu_has_a_name():
  assert native._cpu()
