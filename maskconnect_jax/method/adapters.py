"""A: what brings a source to the shape of a block's input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def zero_pad_channels(x: jax.Array, features: int) -> jax.Array:
  """Returns [..., C] with zero channels appended up to `features`."""
  missing = features - x.shape[-1]
  if missing == 0:
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def append_zero_channels(x: jax.Array, features: int) -> jax.Array:
  """Returns what `zero_pad_channels` does, of a finite x that is added to.

  On a CPU by a product with the identity: it leaves alone the loops before and
  after it, which XLA would fuse around a padding, with a question for each
  element and no vector instructions (docs/performance.md).
  """
  if x.shape[-1] == features:
    return x
  return _append_zero_channels(x, features)


@functools.partial(jax.jit, static_argnums=1)  # once for all blocks, to trace
def _append_zero_channels(x: jax.Array, features: int) -> jax.Array:
  identity = jnp.eye(x.shape[-1], features, dtype=x.dtype)
  return jax.lax.platform_dependent(
    x,
    cpu=lambda x: jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST),
    default=lambda x: zero_pad_channels(x, features),
  )


def average_pool_to(x: jax.Array, height: int, width: int) -> jax.Array:
  """Average-pools [N, H, W, C] to [N, height, width, C], windows side by side.

  At the border of a size that does not divide, the mean is over the pixels
  that are there.
  """
  window = (math.ceil(x.shape[1] / height), math.ceil(x.shape[2] / width))
  if window == (1, 1):
    return x
  return _average_pool(x, window)


@functools.partial(jax.jit, static_argnums=1)  # once for all sources, to trace
def _average_pool(x: jax.Array, window: tuple[int, int]) -> jax.Array:
  # Flax's mean over what is there is float32 whatever x is.
  return nnx.avg_pool(
    x, window, strides=window, padding='SAME', count_include_pad=False
  ).astype(x.dtype)


class PoolAdapter(nnx.Module):
  """A without parameters: average pool; the stack appends zero channels."""

  def __call__(
    self,
    x: jax.Array,
    shape: tuple[int, ...],
    source: int,
    before: Sequence[jax.Array] = (),
  ) -> jax.Array:
    """Returns source `source`, x [N, H, W, C], as [N, h, w, C].

    Of what it was brought to before, the smallest is pooled on whose pixels'
    means make the same means: fewer to read, and in the backward pass to write.
    """
    del source
    for smaller in before:
      if _tiled(x, smaller.shape) and _tiled(smaller, shape):
        x = smaller
    return average_pool_to(x, *shape[1:3])


def _tiled(x: jax.Array, shape: tuple[int, ...]) -> bool:
  """Returns whether windows of one size cover x, as many as `shape` says."""
  return x.shape[1] % shape[1] == 0 and x.shape[2] % shape[2] == 0


class ProjectionAdapter(nnx.Module):
  """A with parameters: average pool, then a 1x1 convolution.

  There is one for each source and each wider shape it is brought to.
  """

  def __init__(
    self, features: list[int], projection: Callable[[int, int], nnx.Module]
  ) -> None:
    """Makes the projections.

    Args:
      features: channels of sources 0..L.
      projection: makes a module from so many channels to so many.
    """
    self.features = tuple(features)
    self.projections = nnx.Dict(
      {
        f'source{source}_to{wider}': projection(own, wider)
        for source, own in enumerate(features)
        for wider in sorted({f for f in features[source:-1] if f > own})
      }
    )

  def __call__(
    self,
    x: jax.Array,
    shape: tuple[int, ...],
    source: int,
    before: Sequence[jax.Array] = (),
  ) -> jax.Array:
    """Returns source `source`, x [N, H, W, C], in the shape [N, h, w, c]."""
    del before  # their channels are mixed already
    if x.shape == shape:
      return x
    return self.projections[f'source{source}_to{shape[-1]}'](
      average_pool_to(x, *shape[1:3])
    )

  def prune(self, edges: set[tuple[int, int]]) -> None:
    """Drops the projections that no (source, target source) edge uses."""
    used = {
      f'source{source}_to{self.features[target]}' for source, target in edges
    }
    for name in list(self.projections):
      if name not in used:
        del self.projections[name]
