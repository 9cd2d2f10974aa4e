"""Compiles C++ for the CPU of this machine, and hands it to JAX.

The files are convolution.cc and method/aggregate.cc. Without them a step takes
1.1 to 2.6 times as long (docs/performance.md, "On two CPU cores"). A compiler
makes code for the vector registers of this very CPU, once in 4 seconds. The
library stays in the user's cache.
"""

from __future__ import annotations

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


def use() -> None:
  """Lets a CPU take the compiled convolutions and sums from now on.

  It does nothing without a C++ compiler: c++, g++, clang++, or what CXX names;
  CXX= turns the library off. XLA's forms then remain. It does nothing on
  other systems than Linux on x86-64, where nobody has tried it. If the library
  cannot be compiled or loaded, a line on stderr says why.
  """
  if backend.native.value:
    return
  if (sys.platform, platform.machine()) != ('linux', 'x86_64'):
    return
  compiler = _compiler()
  if not compiler:
    return
  try:
    library = ctypes.CDLL(str(_library(compiler)))
    for name in convolution.NATIVE + aggregate.NATIVE:
      handler = jax.ffi.pycapsule(getattr(library, name))
      jax.ffi.register_ffi_target(name, handler, platform='cpu')
  except (OSError, AttributeError, subprocess.SubprocessError) as error:
    print(
      "XLA's convolutions and sums are used, as the C++ code was not compiled:"
      f' {_first_line(error)}; mend {shlex.join(compiler)}, or set CXX= to go'
      ' on without it',
      file=sys.stderr,
    )
    return
  backend.native.set_global(True)


def _compiler() -> list[str]:
  """Returns the command of the C++ compiler; [] without one."""
  if 'CXX' in os.environ:
    return shlex.split(os.environ['CXX'])
  found = filter(None, map(shutil.which, ('c++', 'g++', 'clang++')))
  first = next(found, None)
  return [first] if first else []


def _library(compiler: list[str]) -> Path:
  """Returns the compiled library, which is made if it is not there.

  Raises:
    OSError: there is no compiler, or no folder for the library.
    subprocess.SubprocessError: the compiler failed.
  """
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
  path = _folder() / f'maskconnect-{key}.so'
  if path.exists():
    return path
  print('compiling convolutions and sums for this CPU, once', file=sys.stderr)
  with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
    made = Path(temporary) / path.name
    subprocess.run(
      [*command, *_FILES, '-o', str(made)],
      capture_output=True,
      check=True,
      timeout=_SECONDS,
    )
    ctypes.CDLL(str(made))  # a library that cannot be loaded is not kept
    made.replace(path)
  return path


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
