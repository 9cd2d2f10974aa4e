"""Exports, run without this package: by JAX alone, and by onnxruntime."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import maskconnect_jax
from maskconnect_jax import backend
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import wiring
from maskconnect_jax.run import export, inference

OLD = Path(__file__).parents[1] / 'golden/old'
EXPECTED = json.loads((OLD / 'expected.json').read_text())
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)

# Batches of two sizes; only JAX and NumPy are imported.
BY_JAX = """
import sys
for name in ('flax', 'orbax', 'maskconnect_jax'):
  sys.modules[name] = None
import jax, numpy as np
from jax import export
images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
for path in sys.argv[1:]:
  exported = export.deserialize(bytearray(open(path, 'rb').read()))
  print(*exported.platforms)
  np.save(path + '.4.npy', exported.call(images))
  np.save(path + '.1.npy', exported.call(images[:1]))
"""


def test_stablehlo_runs_where_only_jax_is(cli, tmp_path):
  """Of both levels; the logits are those that version 0.1.0 gave."""
  paths = {level: tmp_path / f'{level}.bin' for level in ('block', 'branch')}
  for level, path in paths.items():
    ran = cli('--mode=export', f'--workdir={OLD / level}', f'--output={path}')
    assert (ran.code, ran.out, ran.err) == (0, f'{path}\n', '')
  ran = subprocess.run(
    [sys.executable, '-c', BY_JAX, *map(str, paths.values())],
    capture_output=True, text=True, check=False, cwd=tmp_path,
    env=os.environ | {'XLA_FLAGS': ''},
  )  # fmt: skip
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout == 'cpu cuda tpu\n' * 2
  for level, path in paths.items():
    for count in (4, 1):
      np.testing.assert_allclose(
        np.load(f'{path}.{count}.npy'),
        EXPECTED[level][:count],
        rtol=1e-4,
        atol=1e-5,
      )


def test_a_program_without_platforms_has_none():
  """Also where the same shapes were traced with them before."""
  x = np.ones((1, 4, 4, 8), np.float32)
  kernel = np.ones((3, 3, 8, 8), np.float32)
  from maskconnect_jax import convolution

  run = jax.jit(convolution.conv)
  assert 'platform_index' in str(jax.make_jaxpr(run)(x, kernel))
  with backend.without_platforms():
    assert 'platform_index' not in str(jax.make_jaxpr(run)(x, kernel))
  assert 'platform_index' in str(jax.make_jaxpr(run)(x, kernel))


def test_a_missing_package_is_named(monkeypatch, tmp_path):
  model = maskconnect_jax.load(OLD / 'block')
  monkeypatch.setitem(sys.modules, 'jax2onnx', None)
  with pytest.raises(InputError, match=r"pip install 'maskconnect_jax\[onnx\]"):
    export.write(model, 'onnx', tmp_path / 'model.onnx')
  with pytest.raises(InputError, match='is a folder; give the name of a file'):
    export.write(model, 'stablehlo', tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_converter_for_another_jax_is_named(monkeypatch, tmp_path):
  """As jax2onnx 0.13 fails with JAX 0.12."""

  def to_onnx(*_, **__):
    raise AttributeError(
      "module 'jax._src.core' has no attribute 'ClosedJaxpr'"
    )

  model = maskconnect_jax.load(OLD / 'block')
  monkeypatch.setitem(
    sys.modules, 'jax2onnx', types.SimpleNamespace(to_onnx=to_onnx)
  )
  with pytest.raises(
    InputError, match=r'with JAX [\d.]+ \(module .*\); make a'
  ):
    export.write(model, 'onnx', tmp_path / 'model.onnx')
  assert not list(tmp_path.iterdir())


def saved(folder, name, shape, **options):
  """Returns a model with weights of a seed, pruned, saved and loaded."""
  options |= {'name': name, 'num_classes': 10, 'in_channels': shape[-1]}
  model = maskconnect_jax.create_model(**options)
  inference.save(
    folder,
    wiring.prune(wiring.freeze(model)),
    architecture={
      name: options[name]
      for name in ('name', 'num_classes', 'in_channels', 'width')
    },
    classes=[f'n{i}' for i in range(10)],
    image_shape=shape,
    resize=0,
    mean=[110.0, 120.0, 130.0],
    std=[60.0, 50.0, 70.0],
  )
  return inference.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['stablehlo', 'onnx'])
@pytest.mark.parametrize(
  ('name', 'shape', 'options'),
  [
    ('resnet8', (9, 7, 3), {'width': 8, 'rule': 'fixed_all'}),
    ('resnet50', (64, 64, 3), {'width': 8, 'rule': 'fixed_all'}),
    ('resnet50', (224, 224, 3), {'width': 64, 'fan_in': 3}),
    (
      'resnext50_32x4d',
      (64, 64, 3),
      {'width': 64, 'level': 'branch', 'rule': 'fixed_random', 'fan_in': 2},
    ),
  ],
  ids=['odd', 'narrow', 'resnet50', 'branch'],
)
def test_large_networks(kind, name, shape, options, tmp_path):
  model = saved(tmp_path / 'model', name, shape, **options)
  images = np.random.default_rng(1).integers(0, 256, (3, *shape), np.uint8)
  expected = model.logits(images)
  path = tmp_path / 'exported'
  export.write(model, kind, path)
  if kind == 'onnx':
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(path)

    def run(images):
      return session.run(['logits'], {'images': images})[0]

  else:
    run = jax.export.deserialize(bytearray(path.read_bytes())).call
  scale = np.abs(expected).max()
  for count in (1, 3):
    np.testing.assert_allclose(
      run(images[:count]), expected[:count], atol=1e-4 * max(scale, 1)
    )


@pytest.mark.slow
@pytest.mark.parametrize('level', ['block', 'branch'])
def test_onnx_gives_what_the_first_version_gave(level, cli, tmp_path):
  onnxruntime = pytest.importorskip('onnxruntime')
  path = tmp_path / 'model.onnx'
  ran = cli(
    '--mode=export', '--format=onnx', f'--workdir={OLD / level}',
    f'--output={path}',
  )  # fmt: skip
  assert (ran.code, ran.out, ran.err) == (0, f'{path}\n', '')
  session = onnxruntime.InferenceSession(path)
  (images,) = session.get_inputs()
  assert (images.name, images.type) == ('images', 'tensor(uint8)')
  assert images.shape == ['N', 8, 8, 1]
  for count in (4, 1):
    (found,) = session.run(['logits'], {'images': IMAGES[:count]})
    np.testing.assert_allclose(found, EXPECTED[level][:count], atol=1e-4)
