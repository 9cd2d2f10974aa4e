"""What must be set before the first `import jax`, and fixtures for all tests.

The suite runs on four CPU devices, also where there is a GPU, unless
JAX_PLATFORMS says otherwise. Programs that a test starts inherit all of it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

assert 'jax' not in sys.modules, 'jax was imported before conftest.py'

os.environ.setdefault('JAX_PLATFORMS', 'cpu')


def _works(xla_flags: str) -> bool:
  """Whether XLA takes the flags; it ends a process at one it does not know."""
  started = subprocess.run(
    [sys.executable, '-c', 'import jax; jax.devices("cpu")'],
    env={**os.environ, 'XLA_FLAGS': xla_flags},
    capture_output=True,
    check=False,
  )
  return started.returncode == 0


_given = os.environ.get('XLA_FLAGS', '')
if 'xla_force_host_platform_device_count' not in _given:
  _given = f'{_given} --xla_force_host_platform_device_count=4'.lstrip()
if 'xla_cpu_use_fusion_emitters' not in _given:
  # Another way from a fusion to LLVM compiles in half the time, as long as LLVM
  # optimizes nothing. Newer jaxlibs refuse it. Workers inherit what was found.
  _quicker = f'{_given} --xla_cpu_use_fusion_emitters=false'
  if 'PYTEST_XDIST_WORKER' not in os.environ and _works(_quicker):
    _given = _quicker
os.environ['XLA_FLAGS'] = _given

# The suite compiles far more than it computes, and LLVM's optimizations are a
# third of that. XLA's own passes run all the same, on which sharding,
# FLOPs and memory depend.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

# Compiled programs are shared within one run of the suite, as by the several
# runs of a resume test, but never taken from an earlier run of it, whose
# entries a killed process may have cut short. Nor is the user's own folder
# touched. To reuse them between runs all the same, set this variable.
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
_own_cache = None
if _CACHE not in os.environ:
  _own_cache = tempfile.mkdtemp(prefix='maskconnect-test-cache-')
  os.environ[_CACHE] = _own_cache
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

# Grain's worker processes read absl flags, which pytest does not parse.
flags.FLAGS.mark_as_parsed()


def pytest_configure() -> None:
  """Compiles the convolutions first: later tests would compute other bits."""
  from maskconnect_jax.run import native

  native.use()


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


# A whole run in a few seconds. Its real mask starts from noise, with a seed
# that leaves block 2 without a reader, so that there is something to prune.
TINY = """
from maskconnect_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.seed = 6
  config.duration = '24 steps'
  config.batch_size = 64
  config.eval_batch_size = 200
  config.evaluate_every = '8 steps'
  config.checkpoint_every = '4 steps'
  config.keep_checkpoints = 100
  config.log_every = '2 steps'
  config.model.name = 'resnet8'
  config.model.width = 8
  config.connectivity.learner = 'draws'
  config.connectivity.fan_in = 2
  config.connectivity.phase = '50%'
  config.connectivity.gradient = 'all'
  config.connectivity.temperature = 1.0
  config.connectivity.initial_spread = 0.5
  config.connectivity.batchnorm_batches = 4
  config.masks.learning_rate = 0.1
  config.optimizer.schedule = 'cosine'
  config.data.pad = 1
  config.data.flip = False
  return config
"""


# Compiled programs are memory maps, of which Linux grants a process 65,530;
# XLA crashes where it gets no more. Gigabytes, too.
_MAPS = 20_000
_BYTES = 3 << 30


def _many_programs() -> bool:
  """Whether this process holds much of what a process may; True if unknown."""
  try:
    maps = Path('/proc/self/maps').read_bytes().count(b'\n')
    pages = int(Path('/proc/self/statm').read_text().split()[1])
  except OSError:
    return True
  return maps > _MAPS or pages * os.sysconf('SC_PAGE_SIZE') > _BYTES


@pytest.fixture(autouse=True, scope='module')
def forget_programs() -> Iterator[None]:
  """Lets go of compiled programs at the end of a file, if they are many.

  Until then files share them: to build a network takes fifty small ones.
  """
  import jax

  yield
  if _many_programs():
    jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class Finished:
  """A run that went through without a cut."""

  workdir: Path
  summary: dict[str, Any]
  stderr: str


@dataclasses.dataclass(frozen=True)
class Ran:
  """What a command line gave."""

  code: int
  out: str
  err: str


@pytest.fixture(scope='session')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The config file of the tiny run."""
  path = tmp_path_factory.mktemp('config') / 'tiny.py'
  path.write_text(TINY)
  return path


@pytest.fixture
def tiny_config(tiny: Path) -> Any:
  """Its config, to be changed at will."""
  return runpy.run_path(str(tiny))['get_config']()


@pytest.fixture(scope='session')
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
  """The tiny run, done once for all tests; they must not change it."""
  import contextlib
  import io

  from maskconnect_jax.run import train

  workdir = tmp_path_factory.mktemp('finished') / 'run'
  config = runpy.run_path(str(tiny))['get_config']()
  with contextlib.redirect_stderr(io.StringIO()) as stderr:
    result = train.train(config, workdir)
  return Finished(workdir, result.summary, stderr.getvalue())


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
  """Runs the command line in this process, as main.py would."""
  from maskconnect_jax import main

  def run(*arguments: object) -> Ran:
    capsys.readouterr()
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
      patch.setattr(sys, 'argv', ['main.py', *map(str, arguments)])
      with pytest.raises(SystemExit) as exited:
        main.run()
    code = exited.value.code or 0
    assert isinstance(code, int)
    captured = capsys.readouterr()
    return Ran(code, captured.out, captured.err)

  return run


@pytest.fixture(scope='session')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A wheel of the package, built without the network."""
  # From 70.1 on setuptools makes wheels by itself.
  pytest.importorskip('setuptools', minversion='70.1')
  root = Path(__file__).parents[1]
  source = tmp_path_factory.mktemp('source')  # building leaves files in it
  for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(root / name, source)
  for name in ('configs', 'maskconnect_jax'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(root / name, source / name, ignore=ignored)
  built = tmp_path_factory.mktemp('built')
  subprocess.run(
    [
      sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps',
      '--no-index', '--no-build-isolation', f'--wheel-dir={built}', source,
    ],
    check=True, cwd=source,
  )  # fmt: skip
  (path,) = built.glob('*.whl')
  return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
  """Mounts a file system of the size given, such as '300k'."""
  import contextlib

  with contextlib.ExitStack() as stack:

    def mount(size: str) -> Path:
      folder = tmp_path / 'disk'
      folder.mkdir()
      command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder]
      try:
        subprocess.run(command, check=True, capture_output=True)
      except (OSError, subprocess.CalledProcessError):
        pytest.skip('no right to mount a file system')
      unmount = ['umount', '--lazy', folder]
      stack.callback(subprocess.run, unmount, check=True)
      return folder

    yield mount


@pytest.fixture(scope='session')
def write_tfds() -> Callable[..., None]:
  """Writes a set as TFDS lays it out, in ArrayRecord, without TFDS."""
  from array_record.python import array_record_module

  def number(value: int) -> bytes:  # a varint of protocol buffers
    out = b''
    while value > 127:
      out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])

  def field(index: int, payload: bytes) -> bytes:
    return bytes([index << 3 | 2]) + number(len(payload)) + payload

  def feature(name: bytes, value: bytes) -> bytes:
    return field(1, field(1, name) + field(2, value))

  def write(
    data_dir: Path,
    name: str,
    image: Callable[[str, int], Image.Image],
    *,
    num_train: int,
    num_test: int,
    classes: Sequence[str],
    side: int = -1,
  ) -> None:
    root = data_dir / name / '1.0.0'
    root.mkdir(parents=True)
    kind = 'jpeg' if side < 0 else 'png'
    splits = []
    for split, count in (('train', num_train), ('test', num_test)):
      writer = array_record_module.ArrayRecordWriter(
        str(root / f'{name}-{split}.array_record-00000-of-00001'),
        'group_size:1',
      )
      for i in range(count):
        file = io.BytesIO()
        image(split, i).save(file, kind)
        example = feature(b'image', field(1, field(1, file.getvalue())))
        label = number(i % len(classes))
        example += feature(b'label', field(3, field(1, label)))
        writer.write(field(1, example))
      writer.close()
      splits.append(
        {
          'name': split,
          'shardLengths': [str(count)],
          'numBytes': '1',
          'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        }
      )
    info = {'name': name, 'version': '1.0.0', 'fileFormat': 'array_record'}
    module = 'tensorflow_datasets.core.features'
    shape = {'dimensions': [str(side), str(side), '3']}
    features = {
      'image': {
        'pythonClassName': f'{module}.image_feature.Image',
        'image': {'shape': shape, 'dtype': 'uint8', 'encodingFormat': kind},
      },
      'label': {
        'pythonClassName': f'{module}.class_label_feature.ClassLabel',
        'classLabel': {'numClasses': str(len(classes))},
      },
    }
    for file_name, record in (
      ('dataset_info.json', info | {'splits': splits}),
      (
        'features.json',
        {
          'pythonClassName': f'{module}.features_dict.FeaturesDict',
          'featuresDict': {'features': features},
        },
      ),
    ):
      (root / file_name).write_text(json.dumps(record))
    (root / 'label.labels.txt').write_text('\n'.join(classes) + '\n')

  return write


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> None:
  """The registry with one block per stage, of the same kinds."""
  from maskconnect_jax.networks import architectures

  for name, own in list(architectures.REGISTRY.items()):
    monkeypatch.setitem(
      architectures.REGISTRY,
      name,
      dataclasses.replace(
        own,
        blocks_per_stage=(1,) * len(own.blocks_per_stage),
        cardinality=min(own.cardinality, 8),
      ),
    )


@pytest.fixture
def by_xla() -> Iterator[None]:
  """Without C++: with it, `describe` compiles a second step, to count FLOPs."""
  from maskconnect_jax import backend

  with backend.native(False):
    yield


@pytest.fixture(scope='session')
def arrays_in() -> Callable[[Path], dict[str, np.ndarray]]:
  """Reads a folder of arrays with TensorStore alone, without Orbax."""
  import tensorstore

  def read(folder: Path) -> dict[str, np.ndarray]:
    base = {'driver': 'file', 'path': f'{folder.absolute()}/'}
    store = {'driver': 'ocdbt', 'base': base}
    keys = tensorstore.KvStore.open(store).result().list().result()
    names = [key.decode().removesuffix('/zarr.json') for key in keys]
    opened = {
      name: tensorstore.open(
        {'driver': 'zarr3', 'kvstore': store | {'path': f'{name}/'}}
      )
      for name, key in zip(names, keys, strict=True)
      if key.endswith(b'/zarr.json')
    }
    return {
      name: np.asarray(array.result().read().result())
      for name, array in sorted(opened.items())
    }

  return read
