"""convolution.cc against NumPy, where it is taken, and how it is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax import convolution
from maskconnect_jax.run import distributed, native

pytestmark = pytest.mark.skipif(
  not convolution.native.value, reason='no C++ compiler, or not for this system'
)

# Images, height, width, channels, groups, channels out, kernel, stride.
SHAPES = [
  (3, 8, 8, 3, 1, 16, 3, 1),
  (2, 5, 7, 16, 1, 48, 3, 1),
  (2, 8, 6, 16, 1, 32, 3, 2),
  (2, 7, 9, 5, 1, 16, 3, 2),
  (2, 9, 11, 3, 1, 64, 7, 2),
  (2, 6, 6, 32, 1, 16, 5, 1),
  (2, 5, 6, 32, 8, 32, 3, 1),  # bundles of 16 channels
  (2, 6, 5, 96, 3, 96, 3, 1),
  (2, 6, 6, 32, 8, 32, 3, 2),
]


def numpys(x, kernel, dy, groups, stride):
  """The convolution and its gradients by windows, in float64."""
  size, _, inputs, outputs = kernel.shape
  pad, per = size // 2, outputs // groups
  around = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = np.pad(x, around)
  views = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
  views = views[:, ::stride, ::stride]  # n h w c i j
  y, dkernel = np.zeros_like(dy), np.zeros_like(kernel)
  back = np.zeros_like(padded)
  for g in range(groups):
    own = slice(g * inputs, (g + 1) * inputs)
    out = slice(g * per, (g + 1) * per)
    y[..., out] = np.einsum(
      'nhwcij,ijco->nhwo', views[..., own, :, :], kernel[..., out]
    )
    dkernel[..., out] = np.einsum(
      'nhwcij,nhwo->ijco', views[..., own, :, :], dy[..., out]
    )
    for n, h, w in np.ndindex(dy.shape[:3]):
      at = (slice(h * stride, h * stride + size),)
      at += (slice(w * stride, w * stride + size), own)
      back[n][at] += np.einsum(
        'ijco,o->ijc', kernel[..., out], dy[n, h, w, out]
      )
  return y, back[:, pad : pad + x.shape[1], pad : pad + x.shape[2]], dkernel


def drawn(shape):
  n, height, width, inputs, groups, outputs, size, stride = shape
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(n, height, width, inputs)),
    rng.normal(size=(size, size, inputs // groups, outputs)),
    rng.normal(size=(n, -(-height // stride), -(-width // stride), outputs)),
  )


def pulled(x, kernel, dy, stride):
  """Value and gradients in float32."""
  y, pull = jax.vjp(
    lambda x, kernel: convolution.conv(x, kernel, stride),
    jnp.asarray(x, jnp.float32),
    jnp.asarray(kernel, jnp.float32),
  )
  return y, *pull(jnp.asarray(dy, jnp.float32))


def assert_close(actual, expected):
  """Compares within the rounding of sums in float32."""
  largest = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-6 * largest)


@pytest.mark.parametrize('shape', SHAPES)
def test_values_and_gradients_are_numpys(shape):
  x, kernel, dy = drawn(shape)
  expected = numpys(x, kernel, dy, shape[4], shape[-1])
  for actual, value in zip(
    pulled(x, kernel, dy, shape[-1]), expected, strict=True
  ):
    assert_close(actual, value)


@pytest.mark.parametrize('outputs', [16, 32])
def test_every_width_of_a_tile(outputs):
  """A row of pixels is split into tiles of up to 16, and what is left."""
  for width in (*range(3, 16), 19, 33):
    x, kernel, dy = drawn((1, 3, width, 2, 1, outputs, 3, 1))
    for actual, value in zip(
      pulled(x, kernel, dy, 1), numpys(x, kernel, dy, 1, 1), strict=True
    ):
      assert_close(actual, value)


def test_threads_change_no_bit():
  """Parts of a batch, and of a large image, equal each image by itself."""
  x, kernel, _ = drawn((6, 64, 64, 16, 1, 32, 3, 1))
  x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  whole = convolution.conv(x, kernel)
  for n in range(6):
    np.testing.assert_array_equal(
      convolution.conv(x[n : n + 1], kernel)[0], whole[n]
    )
    rows = convolution.conv(x[n : n + 1, :4], kernel)[0, :3]
    np.testing.assert_array_equal(rows, whole[n, :3])


def text_of(platform, channels, dtype=jnp.float32, stride=1):
  def everything(x, kernel):
    y, pull = jax.vjp(lambda *own: convolution.conv(*own, stride), x, kernel)
    return y, pull(y)

  traced = jax.jit(everything).trace(
    jnp.zeros((1, 6, 6, channels), dtype),
    jnp.zeros((3, 3, channels, channels), dtype),
  )
  return traced.lower(lowering_platforms=(platform,)).as_text()


def test_who_takes_it():
  assert text_of('cpu', 16).count('@maskconnect_conv') == 3
  # The input's gradient with a stride is XLA's.
  assert text_of('cpu', 16, stride=2).count('@maskconnect_conv') == 2
  for other in (
    text_of('cuda', 16),
    text_of('tpu', 16),
    text_of('cpu', 12),
    text_of('cpu', 16, jnp.bfloat16),
  ):
    assert 'maskconnect' not in other
  with jax.enable_x64(True):
    assert 'maskconnect' not in text_of('cpu', 16, jnp.float64)
  with convolution.native(False):
    assert 'maskconnect' not in text_of('cpu', 16)
  assert text_of('cpu', 16).count('@maskconnect_conv') == 3


@pytest.mark.parametrize('groups', [1, 8])
def test_devices_share_a_batch_and_add_a_gradient_once(groups):
  mesh = distributed.make_mesh()
  x, kernel, _ = drawn((16, 6, 6, 32, groups, 32, 3, 1))

  def loss(kernel, x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return (convolution.conv(x, kernel) ** 2).sum()

  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  own = (jnp.asarray(kernel, jnp.float32), jnp.asarray(x, jnp.float32))
  shared = jax.device_put(
    own, (distributed.replicated(mesh), distributed.sharded(mesh))
  )
  compiled = step.lower(*shared).compile()
  text = compiled.as_text()
  assert text.count(' all-reduce(') == 1
  assert 'all-gather' not in text
  with convolution.native(False):
    alone = step(*own)
  for actual, expected in zip(
    jax.tree.leaves(compiled(*shared)), jax.tree.leaves(alone), strict=True
  ):
    assert_close(actual, expected)


@pytest.mark.parametrize('stride', [1, 2])
def test_it_can_be_derived_twice(stride):
  x, kernel, _ = drawn((2, 6, 6, 16, 1, 16, 3, stride))

  def slope(x, kernel):
    def loss(x, kernel):
      return jnp.sin(convolution.conv(x, kernel, stride) / 10).sum()

    dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
    return (dx**2).sum() + (dkernel**2).sum()

  own = (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
  twice = jax.jit(jax.grad(slope, (0, 1)))
  with convolution.native(False), jax.enable_x64(True):
    expected = twice(jnp.asarray(x), jnp.asarray(kernel))
  for actual, value in zip(twice(*own), expected, strict=True):
    assert_close(actual, value)


def test_a_mapped_convolution():
  x, kernel, _ = drawn((3, 5, 5, 4, 1, 16, 3, 1))
  found = jax.vmap(lambda image: convolution.conv(image[None], kernel)[0])(
    jnp.asarray(x, jnp.float32)
  )
  assert_close(found, convolution.conv(jnp.asarray(x, jnp.float32), kernel))


USE = """
import sys
from maskconnect_jax import convolution
from maskconnect_jax.run import native
native.use()
print(convolution.native.value)
"""

COMPILED = f"""{USE}
import jax, jax.numpy as jnp
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
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
  assert 'compiling convolutions for this CPU, once' in found[0][1]
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
  (line,) = (line for line in err.splitlines() if 'convolution.cc' in line)
  assert line.startswith("XLA's convolutions are used")
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


@pytest.mark.parametrize('given', [{'CXX': ''}, {'PATH': '/none'}])
def test_no_compiler_is_no_error(tmp_path, monkeypatch, given):
  monkeypatch.delenv('CXX', raising=False)
  assert started(USE, tmp_path, **given) == (['False'], '')


def test_the_cpu_has_a_name():
  assert native._cpu()
