"""Normalisation and augmentation of a batch, inside the jitted step.

Each random function takes a key and draws for the whole batch at once. So an
image gets the same crop and flip however the batch is sharded.
"""

from __future__ import annotations

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
