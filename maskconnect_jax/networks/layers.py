"""The layers of the networks: convolutions and BatchNorm."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from maskconnect_jax import convolution

# Constants of BatchNorm: the share that a running average keeps at each step,
# and the number added to the variance.
MOMENTUM = 0.9
EPSILON = 1e-5


def he_normal_by_fan_out(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws a kernel from the normal distribution with variance 2 / fan-out.

  He et al., "Delving Deep into Rectifiers", 2015, eq. 14. The fan-out is the
  product of all sides but the last but one. The values are those of
  `jax.nn.initializers.variance_scaling(2, 'fan_out', 'normal')`, to the bit
  those of JAX 0.10.

  Args:
    key: a key that is used for nothing else.
    shape: [height, width, in, out], or [in, out].

  Returns:
    float32, of this shape.
  """
  values = jax.random.normal(key, _at_least(shape), jnp.float32)
  variance = np.float32(2 * shape[-2] / math.prod(shape))
  return _scaled(values, shape, np.sqrt(variance))


def lecun_normal(
  key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """Draws a kernel of a linear layer: variance 1 / in, cut at two deviations.

  LeCun et al., "Efficient BackProp", 1998, eq. 16. The values are to the bit
  those of `jax.nn.initializers.lecun_normal()`, Flax's default.

  Args:
    key: a key that is used for nothing else.
    shape: [in, out].
    dtype: float32.
  """
  values = jax.random.truncated_normal(key, -2, 2, _at_least(shape), dtype)
  cut = np.float32(0.87962566103423978)  # the deviation of what is left
  return _scaled(values, shape, np.sqrt(np.float32(1 / shape[0])) / cut)


def _at_least(shape: tuple[int, ...]) -> tuple[int]:
  """Returns the shape in which numbers are drawn: (4096,), (16384,), ...

  A program that draws is compiled for each shape, in up to a second. The first
  n of many draws are those of n draws, so kernels of many shapes share a few.
  """
  count = 4096
  while count < math.prod(shape):
    count *= 4
  return (count,)


@jax.jit(static_argnums=1)
def _scaled(
  values: jax.Array, shape: tuple[int, ...], by: np.float32
) -> jax.Array:
  return values[: math.prod(shape)].reshape(shape) * by


def widened(x: jax.Array) -> jax.Array:
  """Returns x in float32, or in its own dtype if that is wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class BatchNorm(nnx.Module):
  """BatchNorm over batch and space, in float32.

    y = a x + (bias - a mean),   a = scale / sqrt(var + epsilon)

  Ioffe and Szegedy, "Batch Normalization", 2015. The gradient of this form
  takes two sums over the batch, of dy and of x dy. Flax computes
  (x - mean) a + bias, whose gradient takes three sums. If x is bfloat16, Flax
  rounds all terms except x to bfloat16. With the form above, networks read and
  write less on a GPU and a TPU (docs/notebook.md, "Compiled for an H100 and a
  TPU v5e, on neither").

  Under jit with a sharded batch XLA takes the statistics over the whole batch,
  on all devices.

  The variance is E[x^2] - E[x]^2, computed in one pass over x. Its relative
  error is at most about 2^-20 (1 + mean^2 / variance). It is 1e-6 for a mean
  near 0, and 1 % for a mean of 100 standard deviations; at 1,000 no digit is
  left. After a convolution with He's kernels the mean is a few standard
  deviations at most. Subtracting the running mean from x first costs memory
  traffic: compiled for a CPU, resnet20 then accesses 8 % more bytes. It does
  not help before the running mean is close to the mean.

  The running variance averages the batches' biased variances, over
  n = images * height * width values. PyTorch averages n / (n - 1) times these
  variances, with the same epsilon and the same momentum (there called 0.1). To
  evaluate weights published for PyTorch, copy their `running_var` to `var`
  unchanged. To give weights to PyTorch, or to train on as PyTorch would,
  multiply the share that a batch adds to `var` by n / (n - 1).

  Attributes:
    scale, bias: float32 [features].
    mean, var: the running averages, float32 [features].
  """

  def __init__(
    self, features: int, *, zero_init: bool = False, dtype: DTypeLike
  ) -> None:
    """Builds the layer.

    Args:
      features: channels.
      zero_init: whether the scale starts at 0, not at 1.
      dtype: of the output.
    """
    self.dtype = jnp.dtype(dtype)
    # By NumPy, as JAX would compile a program for each width.
    zeros, ones = np.zeros(features, np.float32), np.ones(features, np.float32)
    self.scale = nnx.Param(jnp.asarray(zeros if zero_init else ones))
    self.bias = nnx.Param(jnp.asarray(zeros))
    self.mean = nnx.BatchStat(jnp.asarray(zeros))
    self.var = nnx.BatchStat(jnp.asarray(ones))

  def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
    """Maps [..., features] to the same shape.

    Args:
      x: the input, of any floating dtype.
      use_running_average: True normalizes by the running averages. False
        normalizes by the mean and the variance of x and adds these to the
        running averages.
    """
    wide = widened(x)
    if use_running_average:
      mean, var = self.mean[...], self.var[...]
    else:
      axes = tuple(range(x.ndim - 1))
      mean = wide.mean(axes)
      # Rounding may make a small variance negative.
      var = jnp.maximum(jnp.square(wide).mean(axes) - jnp.square(mean), 0)
      for average, now in ((self.mean, mean), (self.var, var)):
        average[...] = MOMENTUM * average[...] + (1 - MOMENTUM) * now
    slope = self.scale[...] * jax.lax.rsqrt(var + EPSILON)
    return (slope * wide + (self.bias[...] - slope * mean)).astype(self.dtype)


class Conv(nnx.Module):
  """A square convolution without bias; stride 1 keeps the size.

  The padding is symmetric, as in the published networks. At stride 2 XLA's
  'SAME' padding is not symmetric.

  Attributes:
    kernel: float32 [size, size, in_features / groups, out_features].
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    size: int,
    *,
    groups: int = 1,
    stride: int = 1,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ) -> None:
    """Draws the kernel.

    Args:
      in_features: channels of the input, a multiple of `groups`.
      out_features: channels of the output, a multiple of `groups`.
      size: height and width of the kernel, odd.
      groups: the number of groups of channels.
      stride: s, in both directions.
      dtype: of the output.
      rngs: its 'params' stream draws the kernel.
    """
    self.stride = stride
    self.dtype = jnp.dtype(dtype)
    shape = (size, size, in_features // groups, out_features)
    self.kernel = nnx.Param(he_normal_by_fan_out(rngs.params(), shape))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, H, W, in_features] to [N, ceil(H/s), ceil(W/s), features].

    The last are out_features.
    """
    x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
    return convolution.conv(x, kernel, self.stride)
