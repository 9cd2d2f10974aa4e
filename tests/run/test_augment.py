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


def boxes_of(changed):
  """The rows and columns of each box of True in bool [N, H, W]."""
  boxes = []
  for image in changed:
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    box = np.zeros_like(image)
    if len(rows):
      box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    np.testing.assert_array_equal(image, box)
    boxes.append((len(rows), len(columns)))
  return np.array(boxes)


def by_torchvision(rng, height, width):
  """RandomErasing's box, after torchvision's get_params."""
  for _ in range(10):
    area = height * width * rng.uniform(0.02, 0.33)
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
    h = round(np.sqrt(area * aspect))
    w = round(np.sqrt(area / aspect))
    if h < height and w < width:
      return h, w
  return 0, 0


def assert_same_law(found, expected):
  """Means and standard deviations within five standard errors."""
  for a, b in (
    (found, expected),
    ((found - found.mean()) ** 2, (expected - expected.mean()) ** 2),
  ):
    error = np.sqrt(a.var() / len(a) + b.var() / len(b))
    assert abs(a.mean() - b.mean()) < 5 * error


def test_erased_boxes_follow_torchvisions_law():
  images = np.ones((4000, 10, 12, 2), np.float32)
  erased = np.asarray(augment.random_erasing(jax.random.key(5), images, 0.4))
  assert (erased[..., 0] == erased[..., 1]).all()
  assert set(np.unique(erased)) == {0, 1}
  boxes = boxes_of(erased[..., 0] == 0)
  hit = boxes[:, 0] > 0
  assert_uniform([hit.sum() / 0.4, (~hit).sum() / 0.6])
  rng = np.random.default_rng(6)
  expected = np.array([by_torchvision(rng, 10, 12) for _ in range(4000)])
  for of in (np.prod, lambda box, _: box[:, 0] / box[:, 1]):
    assert_same_law(of(boxes[hit], 1), of(expected, 1))
  # Any corner is as likely as any other.
  corners = (erased[hit][:, [0, 0, -1, -1], [0, -1, 0, -1], 0] == 0).sum(0)
  assert corners.min() > 0.6 * corners.max() > 0


def by_the_authors(rng, height, width, alpha):
  """The share of CutMix's box, after rand_bbox of the authors' code."""
  share = rng.beta(alpha, alpha)
  w, h = (int(side * np.sqrt(1 - share)) for side in (width, height))
  x, y = rng.integers(width), rng.integers(height)
  columns = np.clip([x - w // 2, x + w // 2], 0, width)
  rows = np.clip([y - h // 2, y + h // 2], 0, height)
  return np.diff(columns)[0] * np.diff(rows)[0] / (height * width)


def test_cutmix_pastes_a_box_of_the_image_before_and_mixes_by_its_share():
  count = 1500
  images = np.ones((3, 10, 12, 2)) * np.arange(1, 4)[:, None, None, None]
  mix = jax.vmap(lambda key: augment.cutmix(key, images, np.eye(3), 0.7))
  pasted, targets = map(
    np.asarray, mix(jax.random.split(jax.random.key(7), count))
  )
  before = np.roll(images, 1, axis=0)
  changed = (pasted == before).all(-1)
  assert (pasted == np.where(changed[..., None], before, images)).all()
  assert (changed == changed[:, :1]).all()  # one box a batch
  boxes = boxes_of(changed[:, 0])
  shares = boxes.prod(1) / 120
  expected = np.eye(3) + shares[:, None, None] * (
    np.roll(np.eye(3), 1, axis=0) - np.eye(3)
  )
  np.testing.assert_allclose(targets, expected, atol=1e-6)
  rng = np.random.default_rng(8)
  assert_same_law(
    shares, np.array([by_the_authors(rng, 10, 12, 0.7) for _ in range(count)])
  )


def test_residuals_drop_out_more_often_with_depth():
  keep = np.asarray(augment.drop_path(jax.random.key(9), COUNT, 4, 0.5))
  for j, column in enumerate(keep.T, start=1):
    stay = 1 - 0.5 * j / 4  # Huang et al.: p_j = j / L * p_L
    assert set(np.unique(column)) == {0, np.float32(1 / np.float32(stay))}
    assert_uniform(
      [(column > 0).sum() / stay, (column == 0).sum() / (1 - stay)]
    )
  assert (keep[:, :3].any(1) != (keep[:, 3] > 0)).any()  # each by itself


@pytest.mark.parametrize(
  'function',
  [
    lambda key: augment.random_crop(key, IMAGES, PAD),
    lambda key: augment.random_flip(key, IMAGES),
    lambda key: augment.drop_path(key, COUNT, 5, 0.5),
  ],
)
def test_the_key_decides(function):
  one, again, other = (
    np.asarray(function(jax.random.key(seed))) for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
