"""Crop, flip and normalisation against NumPy."""

import jax
import numpy as np
import pytest

from maskconnect_jax.run import augment

RNG = np.random.default_rng(0)
COUNT, HEIGHT, WIDTH, PAD = 5000, 5, 6, 2
IMAGES = RNG.normal(size=(COUNT, HEIGHT, WIDTH, 2)).astype(np.float32)


def assert_uniform(counts):
  """Each count within five standard deviations of the binomial's mean."""
  p = 1 / len(counts)
  sigma = np.sqrt(p * (1 - p) * sum(counts))
  assert (np.abs(np.array(counts) - p * sum(counts)) < 5 * sigma).all()


def test_normalisation_is_per_channel():
  images = RNG.integers(0, 256, (4, 5, 6, 3), np.uint8)
  images[0, 0, 0], images[0, 0, 1] = 0, 255
  mean, std = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
  actual = augment.normalize(images, mean, std)
  assert actual.dtype == np.float32
  expected = (images.astype(np.float64) - mean) / std
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_every_crop_occurs_equally_often_and_no_other():
  cropped = np.asarray(augment.random_crop(jax.random.key(1), IMAGES, PAD))
  assert cropped.shape == IMAGES.shape
  padded = np.zeros((COUNT, HEIGHT + 2 * PAD, WIDTH + 2 * PAD, 2), np.float32)
  padded[:, PAD:-PAD, PAD:-PAD] = IMAGES
  counts = np.array(
    [
      (padded[:, y : y + HEIGHT, x : x + WIDTH] == cropped).all((1, 2, 3)).sum()
      for y in range(2 * PAD + 1)
      for x in range(2 * PAD + 1)
    ]
  )
  assert counts.sum() == COUNT
  assert_uniform(counts)


def test_half_of_the_images_are_mirrored_and_the_others_left():
  flipped = np.asarray(augment.random_flip(jax.random.key(2), IMAGES))
  mirrored = (flipped == IMAGES[:, :, ::-1]).all((1, 2, 3))
  left = (flipped == IMAGES).all((1, 2, 3))
  assert (mirrored ^ left).all()
  assert_uniform([mirrored.sum(), left.sum()])


@pytest.mark.parametrize(
  'function',
  [
    lambda key: augment.random_crop(key, IMAGES, PAD),
    lambda key: augment.random_flip(key, IMAGES),
  ],
)
def test_the_key_decides(function):
  one, again, other = (
    np.asarray(function(jax.random.key(seed))) for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
