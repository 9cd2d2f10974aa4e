"""Normalisation and augmentation of a batch, inside the jitted step.

Each random function takes a key and draws for the whole batch at once. So an
image gets the same crop and flip however the batch is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalize(
  images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """Returns (x - mean) / std, float32.

  Args:
    images: uint8 [N, H, W, C].
    mean: one number per channel, on the 0..255 scale.
    std: one number per channel, on the 0..255 scale.

  Returns:
    float32 [N, H, W, C].
  """
  return (
    images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)
  ) / jnp.asarray(std, jnp.float32)


def random_crop(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
  """Pads each image with zeros, then crops it to its own size at random.

  After normalisation a zero is the mean colour.

  Args:
    key: decides where each image is cropped.
    images: [N, H, W, C], normalised.
    pad: pixels added on every side.

  Returns:
    Of the shape and dtype of `images`.
  """
  count, height, width, channels = images.shape
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  corners = jax.random.randint(key, (count, 2), 0, 2 * pad + 1)

  def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(
      image, (corner[0], corner[1], 0), (height, width, channels)
    )

  return jax.vmap(crop)(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability 1/2.

  Args:
    key: decides which images are mirrored.
    images: [N, H, W, C].

  Returns:
    Of the shape and dtype of `images`.
  """
  heads = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
  return jnp.where(heads, images[:, :, ::-1], images)


def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Mixes each example with the one before it in the batch.

  x_i <- m x_i + (1 - m) x_(i-1), for images and targets, with one m a batch;
  Zhang et al., 2018, arXiv 1710.09412. u is drawn from Beta(alpha, alpha), and
  m = max(u, 1 - u). Both u and 1 - u mix the same pairs. With the larger one an
  example keeps the larger share of itself, so accuracy is measured on its own
  label. The order of a batch is random, so the example before may be any other.
  It lies on the same device or on a neighbouring one.

  Args:
    key: decides m.
    images: [N, ...].
    targets: class probabilities, [N, num_classes].
    alpha: parameter of the Beta distribution, above 0.

  Returns:
    The mixed images and the mixed targets, of unchanged shapes.
  """
  m = jax.random.beta(key, alpha, alpha)
  m = jnp.maximum(m, 1 - m)

  def mix(x: jax.Array) -> jax.Array:
    return m * x + (1 - m) * jnp.roll(x, 1, axis=0)

  return mix(images), mix(targets)


def cutmix(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Fills a box of each image from the image before it in the batch.

  Yun et al., 2019, arXiv 1905.04899: u is drawn from Beta(alpha, alpha); the
  box has the sides H sqrt(1 - u) and W sqrt(1 - u) and its middle anywhere in
  the image, whose border cuts it. The targets are mixed by the share of the
  pixels that the box then has. The box is the same for the whole batch.
  Accuracy is measured on an example's own label, also where the box is the
  larger part.

  Args:
    key: decides the box.
    images: [N, H, W, C].
    targets: class probabilities, [N, num_classes].
    alpha: parameter of the Beta distribution, above 0.

  Returns:
    The mixed images and the mixed targets, of unchanged shapes.
  """
  size = jnp.array(images.shape[1:3])
  for_share, for_middle = jax.random.split(key)
  u = jax.random.beta(for_share, alpha, alpha)
  sides = (size * jnp.sqrt(1 - u)).astype(jnp.int32)
  middle = jax.random.randint(for_middle, (2,), 0, size)
  low = jnp.clip(middle - sides // 2, 0, size)
  high = jnp.clip(middle + sides // 2, 0, size)
  inside = _boxes(low[None], high[None], images.shape)
  m = 1 - jnp.prod(high - low) / jnp.prod(size)
  return (
    jnp.where(inside, jnp.roll(images, 1, axis=0), images),
    m * targets + (1 - m) * jnp.roll(targets, 1, axis=0),
  )


def random_erasing(
  key: jax.Array, images: jax.Array, share: float
) -> jax.Array:
  """Fills a random box of some images with zeros, the mean colour.

  Zhong et al., 2017, arXiv 1708.04896, with torchvision's ranges: the area is
  uniform in 2 % to 33 % of the image's, height / width log-uniform in 0.3 to
  3.3. A box that does not fit is drawn again, up to ten times; then the image
  stays whole.

  Args:
    key: decides which images, and the box of each.
    images: [N, H, W, C], normalised.
    share: the probability of a box, in [0, 1].

  Returns:
    Of the shape and dtype of `images`.
  """
  count, height, width, _ = images.shape
  for_area, for_ratio, for_place, for_coin = jax.random.split(key, 4)
  shape = (count, 10)
  area = (
    height
    * width
    * jax.random.uniform(for_area, shape, minval=0.02, maxval=0.33)
  )
  ratio = jnp.exp(
    jax.random.uniform(
      for_ratio, shape, minval=math.log(0.3), maxval=math.log(3.3)
    )
  )
  drawn = jnp.round(
    jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], -1)
  ).astype(jnp.int32)
  size = jnp.array([height, width])
  fits = jnp.all(drawn < size, -1)
  first = jnp.argmax(fits, 1)
  sides = jnp.take_along_axis(drawn, first[:, None, None], 1)[:, 0]
  low = jax.random.randint(for_place, (count, 2), 0, size - sides + 1)
  chosen = jax.random.bernoulli(for_coin, share, (count,)) & fits.any(1)
  inside = _boxes(low, low + sides, images.shape)
  return jnp.where(inside & chosen[:, None, None, None], 0, images)


def _boxes(
  low: jax.Array, high: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Returns the pixels with low <= (y, x) < high, bool [N, H, W, 1].

  Args:
    low: int [N, 2].
    high: int [N, 2].
    shape: (_, H, W, _).
  """
  rows, columns = (
    (low[:, i, None] <= jnp.arange(shape[i + 1]))
    & (jnp.arange(shape[i + 1]) < high[:, i, None])
    for i in range(2)
  )
  return (rows[:, :, None] & columns[:, None])[..., None]


def drop_path(
  key: jax.Array, count: int, num_blocks: int, rate: float
) -> jax.Array:
  """Returns what stochastic depth multiplies each residual with.

  Huang et al., 2016, arXiv 1603.09382: block j of L leaves its residual out
  with probability p_j = rate * j / L, here for each image by itself. A residual
  that stays is divided by 1 - p_j, so that evaluation needs no factor.

  Args:
    key: decides which residuals are left out.
    count: N, images.
    num_blocks: L.
    rate: p_L, in [0, 1).

  Returns:
    float32 [N, L], 0 or 1 / (1 - p_j).
  """
  stay = 1 - rate * jnp.arange(1, num_blocks + 1) / num_blocks
  return jax.random.bernoulli(key, stay, (count, num_blocks)) / stay
