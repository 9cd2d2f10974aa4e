"""Residual blocks: basic, and bottleneck with one group or many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maskconnect_jax import backend
from maskconnect_jax.method import adapters
from maskconnect_jax.networks import layers


class _Residual(nnx.Module):
  """A block whose shortcut may have parameters.

  They belong to the block itself, under the names that stored weights have.
  """

  def add_shortcut(
    self,
    in_features: int,
    features: int,
    stride: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ) -> None:
    """Gives the shortcut a 1x1 convolution with BatchNorm."""
    self.shortcut_conv = layers.Conv(
      in_features, features, 1, stride=stride, dtype=dtype, rngs=rngs
    )
    self.shortcut_norm = layers.BatchNorm(features, dtype=dtype)

  def shortcut(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [N, H, W, in_features] to [N, ceil(H/s), ceil(W/s), features]."""
    return self.shortcut_norm(
      self.shortcut_conv(x), use_running_average=not train
    )


class BasicBlock(_Residual):
  """Two 3x3 convolutions and a shortcut.

  y = relu(F(x) + S(x)). S is the identity. In a block that opens a stage, S
  takes every second pixel and appends zero channels (option A, of the networks
  for CIFAR); or, `projected`, it is a 1x1 convolution with BatchNorm (option B,
  of those for ImageNet). The first convolution carries the stride. He et al.,
  "Deep Residual Learning for Image Recognition", 2016, sections 3.3 and 4.2.
  """

  def __init__(
    self,
    in_features: int,
    features: int,
    *,
    stride: int = 1,
    projected: bool = False,
    zero_init: bool = False,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    """Builds the block.

    Args:
      in_features: channels of the input.
      features: channels of the output.
      stride: s, of the first convolution and the shortcut.
      projected: whether a shortcut to another shape has parameters.
      zero_init: see `Bottleneck`.
      dtype: of the activations.
      rngs: its 'params' stream draws the kernels.
    """
    self.features = features
    self.stride = stride
    self.conv1 = layers.Conv(
      in_features, features, 3, stride=stride, dtype=dtype, rngs=rngs
    )
    self.norm1 = layers.BatchNorm(features, dtype=dtype)
    self.conv2 = layers.Conv(features, features, 3, dtype=dtype, rngs=rngs)
    self.norm2 = layers.BatchNorm(features, zero_init=zero_init, dtype=dtype)
    self.projected = projected and (stride != 1 or in_features != features)
    if self.projected:
      self.add_shortcut(in_features, features, stride, dtype, rngs)

  def __call__(
    self, x: jax.Array, *, train: bool = False, keep: jax.Array | None = None
  ) -> jax.Array:
    """Maps [N, H, W, in_features] to [N, ceil(H/s), ceil(W/s), features].

    Args:
      x: the input.
      train: whether BatchNorm takes the batch's statistics.
      keep: float [N], times the residual of each image; None: 1.
    """
    residual = self.conv1(x)
    residual = self.norm1(residual, use_running_average=not train)
    residual = self.conv2(backend.relu(residual))
    residual = self.norm2(residual, use_running_average=not train)
    residual = _kept(residual, keep)
    if self.projected:
      shortcut = self.shortcut(x, train)
    else:
      shortcut = adapters.zero_pad_channels(
        x[:, :: self.stride, :: self.stride], self.features
      )
    return backend.relu(residual + shortcut)


class Bottleneck(_Residual):
  """Convolutions 1x1, 3x3 in groups and 1x1, and a shortcut.

  y = relu(F(x) + S(x)). S is the identity. In a block whose output has another
  shape than its input, S is a 1x1 convolution with BatchNorm. The 3x3
  convolution carries the stride.

  With one group: He et al., 2016. With many: Xie et al., "Aggregated Residual
  Transformations for Deep Neural Networks", 2017, form (c) of figure 3.
  """

  def __init__(
    self,
    in_features: int,
    inner: int,
    features: int,
    *,
    groups: int = 1,
    stride: int = 1,
    zero_init: bool = False,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    """Builds the block.

    Args:
      in_features: channels of the input.
      inner: channels between the 1x1 convolutions, of all groups together.
      features: channels of the output.
      groups: C, the cardinality.
      stride: s, of the 3x3 convolution and the shortcut.
      zero_init: whether the last BatchNorm's scale starts at 0, so that the
        block starts as its shortcut.
      dtype: of the activations.
      rngs: its 'params' stream draws the kernels.
    """
    self.conv1 = layers.Conv(in_features, inner, 1, dtype=dtype, rngs=rngs)
    self.norm1 = layers.BatchNorm(inner, dtype=dtype)
    self.conv2 = layers.Conv(
      inner, inner, 3, groups=groups, stride=stride, dtype=dtype, rngs=rngs
    )
    self.norm2 = layers.BatchNorm(inner, dtype=dtype)
    self.conv3 = layers.Conv(inner, features, 1, dtype=dtype, rngs=rngs)
    self.norm3 = layers.BatchNorm(features, zero_init=zero_init, dtype=dtype)
    self.projected = stride != 1 or in_features != features
    if self.projected:
      self.add_shortcut(in_features, features, stride, dtype, rngs)

  def __call__(
    self, x: jax.Array, *, train: bool = False, keep: jax.Array | None = None
  ) -> jax.Array:
    """Maps [N, H, W, in_features] to [N, ceil(H/s), ceil(W/s), features].

    See `BasicBlock.__call__`.
    """
    running = not train
    residual = self.norm1(self.conv1(x), use_running_average=running)
    residual = self.conv2(backend.relu(residual))
    residual = self.norm2(residual, use_running_average=running)
    residual = self.conv3(backend.relu(residual))
    residual = self.norm3(residual, use_running_average=running)
    residual = _kept(residual, keep)
    if self.projected:
      x = self.shortcut(x, train)
    return backend.relu(residual + x)


def _kept(residual: jax.Array, keep: jax.Array | None) -> jax.Array:
  if keep is None:
    return residual
  return residual * keep.astype(residual.dtype)[:, None, None, None]
