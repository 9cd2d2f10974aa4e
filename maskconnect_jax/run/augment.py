"""Augmentation inside the jitted step: each a function of a key and a batch.

Random numbers are drawn for the whole batch at once, so an image gets the same
crop and flip however the batch is sharded.
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
    mean: per channel, on the 0..255 scale.
    std: likewise.
  """
  return (
    images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)
  ) / jnp.asarray(std, jnp.float32)


def random_crop(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
  """Crops [N, H, W, C] to its own size after `pad` zeros on every side.

  After normalisation a zero is the mean colour.
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
  """Mirrors each of [N, H, W, C] left to right with probability 1/2."""
  heads = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
  return jnp.where(heads, images[:, :, ::-1], images)


def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Mixes each example with its neighbour in the batch.

  m x_i + (1 - m) x_(i-1), the same of the targets, with one m a batch;
  Zhang et al., 2018, arXiv 1710.09412. m is of Beta(alpha, alpha), or 1 - m if
  that is larger: as a batch mixes the same pairs either way, and an example
  keeps the larger share of itself, its own label is what accuracy is measured
  on. The order of a batch is random, so the neighbour is any other example; it
  lies on the same device or the next.

  Args:
    key: decides m.
    images: [N, ...].
    targets: class probabilities, [N, num_classes].
    alpha: above 0.
  """
  m = jax.random.beta(key, alpha, alpha)
  m = jnp.maximum(m, 1 - m)

  def mix(x: jax.Array) -> jax.Array:
    return m * x + (1 - m) * jnp.roll(x, 1, axis=0)

  return mix(images), mix(targets)
