"""A, the adapters: they bring a source to the shape of a block's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from maskconnect_jax import backend


def zero_pad_channels(x: jax.Array, features: int) -> jax.Array:
  """Returns [..., C] with zero channels appended up to `features`."""
  missing = features - x.shape[-1]
  if missing == 0:
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def average_pool_to(x: jax.Array, height: int, width: int) -> jax.Array:
  """Average-pools [N, H, W, C] to [N, height, width, C], windows side by side.

  At the border of a size that does not divide, the mean is over the pixels
  that are there.
  """
  window = (math.ceil(x.shape[1] / height), math.ceil(x.shape[2] / width))
  if window == (1, 1):
    return x
  return backend.mean_of_windows(x, window)


class PoolAdapter(nnx.Module):
  """A without parameters: average pool; the stack appends zero channels."""

  def __call__(
    self, x: jax.Array, shape: tuple[int, ...], source: int
  ) -> jax.Array:
    """Returns source `source`, x [N, H, W, C], as [N, h, w, C]."""
    del source
    return average_pool_to(x, *shape[1:3])


def pooled_furthest(
  forms: Sequence[jax.Array], shape: tuple[int, ...]
) -> jax.Array:
  """Returns the form of a source that is to be pooled on.

  Where windows of one size cover a form, the mean of their means is the mean
  of the form's pixels. The last such form has the fewest pixels to read.

  Args:
    forms: the source, [N, H, W, C], and the forms it was pooled to so far.
    shape: [N, h, w, c], the shape that is wanted.
  """
  found, *others = forms
  for form in others:
    if _tiles(form.shape, found.shape) and _tiles(shape, form.shape):
      found = form
  return found


def _tiles(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
  """Returns whether windows of one size cover `large`, one for each pixel."""
  return large[1] % small[1] == 0 and large[2] % small[2] == 0


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
    self, x: jax.Array, shape: tuple[int, ...], source: int
  ) -> jax.Array:
    """Returns source `source`, x [N, H, W, C], in the shape [N, h, w, c]."""
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
