"""Compiles C++ for the CPU of this machine, and hands it to JAX.

The files are convolution.cc and method/aggregate.cc. Without them a step takes
1.1 to 2.6 times as long (docs/performance.md, "On two CPU cores"). A compiler
makes code for the vector registers of this very CPU, once in 4 seconds. The
library stays in the user's cache.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from maskconnect_jax import backend, convolution
from maskconnect_jax.method import aggregate
from maskconnect_jax.run import compilation_cache

_SOURCES = (
  Path(convolution.__file__).with_suffix('.cc'),
  Path(aggregate.__file__).with_suffix('.cc'),
)
# As one unit, since XLA's headers take a second and a half each time.
_FILES = ('-include', *map(str, _SOURCES))
_HEADER = Path(backend.__file__).with_name('native.h')
_OPTIONS = (
  '-std=gnu++17', '-O3', '-march=native', '-ffp-contract=fast', '-w',
  '-shared', '-fPIC',
)  # fmt: skip
_SECONDS = 120  # after which the compiler is given up


def begin() -> None:
  """Lets a CPU take the compiled convolutions and sums; `wait` ends it.

  It does nothing without a C++ compiler: c++, g++, clang++, or what CXX names;
  CXX= turns the library off. XLA's forms then remain. It does nothing on
  other systems than Linux on x86-64, where nobody has tried it. If the library
  cannot be compiled or loaded, a line on stderr says why.

  The compiler works beside this process, for seconds. `wait` must be called
  before JAX traces anything that computes a convolution or a sum.
  """
  if backend.native.value or _begun:
    return
  if (sys.platform, platform.machine()) != ('linux', 'x86_64'):
    return
  compiler = _compiler()
  if compiler:
    with _telling(compiler):
      _begun.append(_Library(compiler))


def wait() -> None:
  """Waits for the compiler that `begin` has started, if it has."""
  while _begun:
    library = _begun.pop()
    with _telling(library.compiler):
      library.load()
      backend.native.set_global(True)


def use() -> None:
  """Calls `begin` and `wait`."""
  begin()
  wait()


@contextlib.contextmanager
def _telling(compiler: list[str]) -> Iterator[None]:
  """Prints a line if the library cannot be had."""
  try:
    yield
  except (OSError, AttributeError, subprocess.SubprocessError) as error:
    print(
      "XLA's convolutions and sums are used, as the C++ code was not compiled:"
      f' {_first_line(error)}; mend {shlex.join(compiler)}, or set CXX= to go'
      ' on without it',
      file=sys.stderr,
    )


def _compiler() -> list[str]:
  """Returns the command of the C++ compiler; [] without one."""
  if 'CXX' in os.environ:
    return shlex.split(os.environ['CXX'])
  found = filter(None, map(shutil.which, ('c++', 'g++', 'clang++')))
  first = next(found, None)
  return [first] if first else []


class _Library:
  """The compiled library, which is made if it is not there."""

  def __init__(self, compiler: list[str]) -> None:
    """Starts the compiler, unless the library is there.

    Raises:
      OSError: there is no compiler, or no folder for the library.
      subprocess.SubprocessError: the compiler cannot tell its version.
    """
    self.compiler = compiler
    command = [*compiler, *_OPTIONS, f'-I{jax.ffi.include_dir()}']
    version = subprocess.run(
      [*compiler, '--version'],
      capture_output=True,
      check=True,
      timeout=_SECONDS,
    ).stdout
    parts = (
      *(path.read_bytes() for path in (*_SOURCES, _HEADER)), version,
      os.fsencode(shlex.join(command)), _cpu(),
      importlib.metadata.version('jaxlib').encode(),
    )  # fmt: skip
    key = hashlib.sha256(b'\0'.join(parts)).hexdigest()[:16]
    self._path = _folder() / f'maskconnect-{key}.so'
    self._making: _Making | None = None
    if not self._path.exists():
      self._making = _Making(command, self._path)

  def load(self) -> None:
    """Waits for the compiler, and gives the library to JAX.

    Raises:
      OSError: the library cannot be loaded; then it is not kept.
      AttributeError: it lacks a function.
      subprocess.SubprocessError: the compiler failed.
    """
    if self._making:
      self._making.finish()
    library = ctypes.CDLL(str(self._path))
    for name in convolution.NATIVE + aggregate.NATIVE:
      handler = jax.ffi.pycapsule(getattr(library, name))
      jax.ffi.register_ffi_target(name, handler, platform='cpu')


class _Making:
  """A compiler at work; it ends with this process."""

  def __init__(self, command: list[str], path: Path) -> None:
    print('compiling convolutions and sums for this CPU, once', file=sys.stderr)
    self._path = path
    self._folder = tempfile.TemporaryDirectory(dir=path.parent)
    self._made = Path(self._folder.name) / path.name
    self._process = subprocess.Popen(
      [*command, *_FILES, '-o', str(self._made)],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    atexit.register(self._stop)

  def finish(self) -> None:
    """Waits, and moves the library to its path. For errors see `load`."""
    try:
      _, said = self._process.communicate(timeout=_SECONDS)
      if status := self._process.returncode:
        raise subprocess.CalledProcessError(
          status, self._process.args, stderr=said
        )
      ctypes.CDLL(str(self._made))  # what cannot be loaded is not kept
      self._made.replace(self._path)
    finally:
      self._stop()

  def _stop(self) -> None:
    atexit.unregister(self._stop)
    self._process.kill()
    self._process.wait()
    self._folder.cleanup()


_begun: list[_Library] = []  # at most one


def _folder() -> Path:
  """Returns a folder of this user alone. Raises OSError."""
  for parent in compilation_cache.user_folders():
    folder = parent / 'native'
    problem = compilation_cache.private(folder)
    if not problem:
      return folder
  raise OSError(problem)


def _cpu() -> bytes:
  """Returns what tells this CPU from others: a home may be on several."""
  with contextlib.suppress(OSError):
    lines = Path('/proc/cpuinfo').read_bytes().split(b'\n\n')[0].splitlines()
    names = (b'model name', b'flags')
    return b'\n'.join(line for line in lines if line.startswith(names))
  return b''


def _first_line(error: Exception) -> str:
  """Returns what a compiler or the loader says, on one line."""
  text = getattr(error, 'stderr', None) or str(error).encode()
  return text.decode(errors='replace').strip().partition('\n')[0]
