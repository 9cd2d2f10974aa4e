"""Each operation of RandAugment beside its formula in NumPy."""

import collections

import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import config
from maskconnect_jax.data.randaugment import (
  OPERATIONS,
  randaugment,
  trivialaugment,
)

RNG = np.random.default_rng(0)
# Smooth, so that interpolation can be told from the formula; no 0 and no 255.
SMOOTH = np.asarray(
  Image.fromarray(RNG.integers(20, 200, (4, 5, 3), np.uint8)).resize(
    (40, 32), Image.Resampling.BICUBIC
  )
)
Y, X = np.mgrid[:32, :40]
LUMA = np.array([0.299, 0.587, 0.114])


def apply(name, level, array=SMOOTH):
  return np.asarray(OPERATIONS[name](Image.fromarray(array), level))


def sampled(x, y):
  """SMOOTH at real coordinates, bilinear; what is outside is grey."""
  left, top = np.floor(x).astype(int), np.floor(y).astype(int)
  u, v = (x - left)[..., None], (y - top)[..., None]
  padded = np.pad(SMOOTH.astype(float), ((0, 1), (0, 1), (0, 0)), 'edge')
  a, b = np.clip(left, 0, 39), np.clip(top, 0, 31)
  row0 = padded[b, a] * (1 - u) + padded[b, a + 1] * u
  row1 = padded[b + 1, a] * (1 - u) + padded[b + 1, a + 1] * u
  outside = (x < 0) | (x > 39) | (y < 0) | (y > 31)
  return np.where(outside[..., None], 128, row0 * (1 - v) + row1 * v)


def rotated(x, y, degrees):
  turn = np.deg2rad(degrees)
  x, y = x - 19.5, y - 15.5
  # The image's y points down: what is seen turns counterclockwise.
  return (
    np.cos(turn) * x - np.sin(turn) * y + 19.5,
    np.sin(turn) * x + np.cos(turn) * y + 15.5,
  )


@pytest.mark.parametrize('level', [-1.0, -0.3, 0.5, 0.9])
@pytest.mark.parametrize(
  ('name', 'source'),
  [
    # Pixel centres are at 0.5.
    ('shear_x', lambda s: (X + 0.3 * s * (Y + 0.5), Y)),
    ('shear_y', lambda s: (X, Y + 0.3 * s * (X + 0.5))),
    ('translate_x', lambda s: (X + 150 / 331 * s * 40, Y)),
    ('translate_y', lambda s: (X, Y + 150 / 331 * s * 32)),
    ('rotate', lambda s: rotated(X, Y, 30 * s)),
  ],
)
def test_geometry(name, source, level):
  x, y = source(level)
  # At the border itself the definitions of outside differ by half a pixel.
  clear = np.minimum(np.abs(x - 19.5), 60) - 20, np.abs(y - 15.5) - 16
  clear = (np.abs(clear[0]) > 1) & (np.abs(clear[1]) > 1)
  assert clear.mean() > 0.5
  result = apply(name, level)
  expected = sampled(x * 1.0, y * 1.0)
  np.testing.assert_allclose(result[clear], expected[clear], atol=2)
  assert ((result == 128).all(2)).any()  # grey came in


def blend(degenerate, level):
  factor = 1 + 0.9 * level
  blended = degenerate + factor * (SMOOTH - degenerate)
  return np.clip(blended, 0, 255)


@pytest.mark.parametrize('level', [-1.0, -0.4, 0.7, 1.0])
@pytest.mark.parametrize(
  ('name', 'degenerate'),
  [
    ('brightness', np.zeros(SMOOTH.shape)),
    ('color', np.repeat((SMOOTH @ LUMA)[..., None], 3, 2)),
    ('contrast', np.full(SMOOTH.shape, (SMOOTH @ LUMA).mean())),
  ],
)
def test_enhancements_go_from_or_to_the_degenerate(name, degenerate, level):
  np.testing.assert_allclose(
    apply(name, level), blend(degenerate, level), atol=2
  )


@pytest.mark.parametrize('level', [-0.8, 0.8])
def test_sharpness(level):
  around = [
    SMOOTH[1 + i : 31 + i, 1 + j : 39 + j].astype(float)
    for i in (-1, 0, 1)
    for j in (-1, 0, 1)
  ]
  smoothed = (sum(around) + 4 * around[4]) / 13
  expected = smoothed + (1 + 0.9 * level) * (around[4] - smoothed)
  np.testing.assert_allclose(
    apply('sharpness', level)[1:-1, 1:-1], np.clip(expected, 0, 255), atol=2
  )


@pytest.mark.parametrize(
  ('level', 'bits'), [(0.0, 8), (0.25, 7), (-0.5, 6), (0.9, 4), (1.0, 4)]
)
def test_posterize_keeps_the_high_bits(level, bits):
  step = 2 ** (8 - bits)
  np.testing.assert_array_equal(
    apply('posterize', level), SMOOTH // step * step
  )


@pytest.mark.parametrize(
  ('level', 'threshold'), [(0.2, 204), (-0.6, 102), (1.0, 0)]
)
def test_solarize_inverts_from_a_threshold_on(level, threshold):
  np.testing.assert_array_equal(
    apply('solarize', level),
    np.where(threshold > SMOOTH, SMOOTH, 255 - SMOOTH),
  )


def test_autocontrast_stretches_each_channel():
  low, high = SMOOTH.min((0, 1)), SMOOTH.max((0, 1))
  np.testing.assert_allclose(
    apply('autocontrast', 0.3), (SMOOTH - low) * (255.0 / (high - low)), atol=1
  )


def test_equalize_spreads_the_ranks():
  dark = (RNG.random((256, 256)) ** 3 * 200).astype(np.uint8)
  below = np.searchsorted(np.sort(dark.ravel()), dark)
  brightest = (dark == dark.max()).sum()
  np.testing.assert_allclose(
    apply('equalize', 0.3, dark),
    255 * below / (dark.size - brightest),
    atol=2,
  )


def test_operations_are_the_papers_drawn_evenly_in_both_directions(monkeypatch):
  assert len(OPERATIONS) == 14
  drawn = collections.Counter()
  levels = collections.Counter()
  for name in OPERATIONS:

    def record(image, level, name=name):
      drawn[name] += 1
      levels[level] += 1
      return image

    monkeypatch.setitem(OPERATIONS, name, record)
  rng = np.random.default_rng(0)
  image = Image.fromarray(SMOOTH)
  for _ in range(1400):
    randaugment(image, rng, ops=2, magnitude=9)
  assert set(levels) == {-0.9, 0.9}
  assert abs(levels[0.9] - 1400) < 5 * 700**0.5
  np.testing.assert_allclose(
    [drawn[name] for name in OPERATIONS], 200, atol=5 * 200**0.5
  )


def test_trivialaugment_draws_one_operation_of_any_strength(monkeypatch):
  """The ends of the wide space: table 1 of the paper, on 40 x 32 pixels."""
  levels = {name: [] for name in OPERATIONS}
  for name in OPERATIONS:

    def record(image, level, name=name):
      levels[name].append(level)
      return image

    monkeypatch.setitem(OPERATIONS, name, record)
  rng = np.random.default_rng(0)
  image = Image.fromarray(SMOOTH)
  for _ in range(5600):
    trivialaugment(image, rng)
  counts = [len(drawn) for drawn in levels.values()]
  np.testing.assert_allclose(counts, 400, atol=5 * 400**0.5)
  ends = {
    'shear_x': 0.99 / 0.3, 'shear_y': 0.99 / 0.3, 'rotate': 135 / 30,
    'translate_x': 32 / (150 / 331 * 40), 'translate_y': 32 / (150 / 331 * 32),
    'brightness': 0.99 / 0.9, 'color': 0.99 / 0.9, 'contrast': 0.99 / 0.9,
    'sharpness': 0.99 / 0.9, 'posterize': (8 - 2) / 4,
  }  # fmt: skip
  for name, drawn in levels.items():
    steps = np.array(drawn) / ends.get(name, 1) * 30
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
    assert {*np.abs(np.round(steps))} == set(range(31))
    assert abs(np.mean(steps)) < 5 * 17.9 / 400**0.5  # both directions


def test_the_ends_of_the_wide_space_are_reached():
  dark, bright = (
    np.asarray(apply('brightness', s * 1.1), int) for s in (-1, 1)
  )
  np.testing.assert_allclose(dark, 0.01 * SMOOTH, atol=1)
  np.testing.assert_allclose(bright, np.minimum(1.99 * SMOOTH, 255), atol=1)
  np.testing.assert_array_equal(apply('posterize', -1.5), SMOOTH // 64 * 64)


@pytest.mark.parametrize('magnitude', [0, 9, 30])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_mode_and_size_are_kept(mode, magnitude):
  image = Image.fromarray(SMOOTH).convert(mode)
  for name in OPERATIONS:
    for level in (-magnitude / 10, magnitude / 10):
      result = OPERATIONS[name](image, level)
      assert (result.mode, result.size) == (mode, (40, 32)), name


def test_a_negative_magnitude_is_refused():
  with pytest.raises(config.InputError, match='-1.*0 to 10'):
    randaugment(
      Image.fromarray(SMOOTH), np.random.default_rng(0), ops=1, magnitude=-1
    )
