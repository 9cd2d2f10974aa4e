"""The adapters A: each brings a source to the shape of a block's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from maskconnect_jax import backend


def zero_pad_channels(x: jax.Array, features: int) -> jax.Array:
  """Returns x, [..., C], with zero channels appended: [..., features]."""
  missing = features - x.shape[-1]
  if missing == 0:
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def average_pool_to(x: jax.Array, height: int, width: int) -> jax.Array:
  """Average-pools x, [N, H, W, C], to [N, height, width, C].

  The windows lie side by side and have ceil(H / height) by ceil(W / width)
  pixels. A window that reaches beyond the border is averaged over its pixels
  inside the image.
  """
  window = (math.ceil(x.shape[1] / height), math.ceil(x.shape[2] / width))
  if window == (1, 1):
    return x
  return backend.mean_of_windows(x, window)


class PoolAdapter(nnx.Module):
  """The adapter without parameters: an average pool.

  It keeps the channels; the stack appends zero channels.
  """

  def __call__(
    self, x: jax.Array, shape: tuple[int, ...], source: int
  ) -> jax.Array:
    """Returns the source pooled to a block's height and width.

    Args:
      x: the source, [N, H, W, C].
      shape: the shape of the block's input, [N, h, w, c].
      source: the number of the source; not used.

    Returns:
      [N, h, w, C], in x's dtype.
    """
    del source
    return average_pool_to(x, *shape[1:3])


def pooled_furthest(
  forms: Sequence[jax.Array], shape: tuple[int, ...]
) -> jax.Array:
  """Returns the smallest form of a source that can be pooled to a shape.

  A form is the source pooled to one shape. Where windows of equal size cover a
  form, the mean of the windows' means is the mean of the form's pixels. So a
  form can be pooled again in place of the source. The last form that fits has
  the fewest pixels to read.

  Args:
    forms: the source, [N, H, W, C], then its forms in the order they were made.
    shape: the shape to pool to, [N, h, w, c].

  Returns:
    One of `forms`.
  """
  found, *others = forms
  for form in others:
    if _tiles(form.shape, found.shape) and _tiles(shape, form.shape):
      found = form
  return found


def _tiles(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
  """Returns whether equal windows cover `large`, one per pixel of `small`."""
  return large[1] % small[1] == 0 and large[2] % small[2] == 0


class ProjectionAdapter(nnx.Module):
  """The adapter with parameters: an average pool, then a 1x1 convolution.

  Each pair of a source and a larger number of channels has its own convolution.
  """

  def __init__(
    self, features: list[int], projection: Callable[[int, int], nnx.Module]
  ) -> None:
    """Makes the projections.

    Args:
      features: channels of sources 0..L.
      projection: called with a source's channels and a block's channels; it
        returns the module that maps the first to the second.
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
    self, x: jax.Array, shape: tuple[int, ...], source: int
  ) -> jax.Array:
    """Returns the source in the shape of a block's input.

    Args:
      x: the source, [N, H, W, C].
      shape: the shape of the block's input, [N, h, w, c].
      source: the number of the source.
    """
    if x.shape == shape:
      return x
    return self.projections[f'source{source}_to{shape[-1]}'](
      average_pool_to(x, *shape[1:3])
    )

  def prune(self, edges: set[tuple[int, int]]) -> None:
    """Drops the projections that no edge uses.

    Args:
      edges: pairs (source, target). The target is the number of the source
        before the block; the block's input has that source's shape.
    """
    used = {
      f'source{source}_to{self.features[target]}' for source, target in edges
    }
    for name in list(self.projections):
      if name not in used:
        del self.projections[name]
