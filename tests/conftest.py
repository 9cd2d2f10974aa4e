"""What must be set before the first `import jax`, and fixtures for all tests.

The suite runs on eight CPU devices, also where there is a GPU, unless
JAX_PLATFORMS says otherwise. Programs that a test starts inherit all of it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

from absl import flags

assert 'jax' not in sys.modules, 'jax was imported before conftest.py'

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

_DEVICES = '--xla_force_host_platform_device_count'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}=8'.lstrip()
  )

# Compiled programs are shared within one run of the suite, as by the several
# runs of a resume test, but never taken from an earlier run of it, whose
# entries a killed process may have cut short. Nor is the user's own folder
# touched. To reuse them between runs all the same, set this variable.
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
_own_cache = None
if _CACHE not in os.environ:
  _own_cache = tempfile.mkdtemp(prefix='maskconnect-test-cache-')
  os.environ[_CACHE] = _own_cache

# Grain's worker processes read absl flags, which pytest does not parse.
flags.FLAGS.mark_as_parsed()


def pytest_unconfigure() -> None:
  """Removes the compiled programs of this run."""
  if _own_cache:
    shutil.rmtree(_own_cache, ignore_errors=True)


def pytest_report_header() -> str:
  """Names the versions that decide what was tested."""
  import flax
  import jax

  return (
    f'jax {jax.__version__}, flax {flax.__version__}, '
    f'{jax.device_count()} {jax.default_backend()} devices'
  )
