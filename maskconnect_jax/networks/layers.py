"""What the networks are made of: convolution, BatchNorm, shape adapters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

# He et al., "Delving Deep into Rectifiers", 2015, eq. 14: variance 2 / fan-out.
he_normal_by_fan_out = nnx.initializers.variance_scaling(
  2.0, 'fan_out', 'normal'
)


# BatchNorm's.
MOMENTUM = 0.9
EPSILON = 1e-5


def widened(x: jax.Array) -> jax.Array:
  """Returns x in float32, or in its own dtype if that is wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """Returns max(x, 0); its derivative at 0 is 0.

  As x + max(-x, 0), equal to the bit for any x but -inf: XLA's CPU compiler
  computes an operation on one array again for each reader, and what goes into
  it, block after block; of two arrays, it keeps the result. Elsewhere the
  programs read and write the same (docs/performance.md).
  """
  return x + jnp.maximum(-x, 0)


@relu.defjvp
def _relu_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (x,), (dx,) = primals, tangents
  return relu(x), jnp.where(x > 0, dx, 0)


def conv(
  in_features: int,
  out_features: int,
  kernel_size: int,
  *,
  stride: int = 1,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """A square convolution without bias, padded so that stride 1 keeps the size.

  The padding is symmetric, as in the published networks; XLA's 'SAME' is not
  at stride 2.
  """
  pad = kernel_size // 2
  return nnx.Conv(
    in_features,
    out_features,
    (kernel_size, kernel_size),
    strides=stride,
    padding=((pad, pad), (pad, pad)),
    use_bias=False,
    dtype=dtype,
    param_dtype=jnp.float32,
    kernel_init=he_normal_by_fan_out,
    rngs=rngs,
  )


class BatchNorm(nnx.Module):
  """BatchNorm over batch and space, in float32.

    y = a x + (bias - a mean),   a = scale / sqrt(var + epsilon)

  Ioffe and Szegedy, "Batch Normalization", 2015. So written, its gradient takes
  two sums over the batch, of dy and of x dy. That of Flax's (x - mean) a + bias
  takes three, and Flax rounds all but x to bfloat16 if x is: compiled for a GPU
  or a TPU, networks read and write less with this one (docs/performance.md).

  Under jit with a sharded batch XLA takes the statistics over the whole batch,
  on all devices.

  The variance is E[x^2] - E[x]^2, in one pass over x. Its relative error is at
  most about 2^-20 (1 + mean^2 / variance): 1e-6 where the mean is near 0, 1 %
  where it is 100 standard deviations away, and no digit is left at 1,000. What
  comes from a convolution with He's kernels stays within a few. To shift x by
  the running mean first is not free: compiled for a CPU, resnet20 then accesses
  8 % more bytes; and it does not help where that mean is not yet there.

  The running variance averages the batch's own, over n values, which is biased;
  PyTorch's averages n / (n - 1) times that, with the same momentum (there
  called 0.1) and epsilon. Weights published for PyTorch evaluate as there if
  `var` is given their `running_var` as it is. To hand over weights, or to go on
  as PyTorch would, multiply what the batch adds to `var` by n / (n - 1), with
  n = images * height * width.

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
      dtype: of what it returns.
    """
    self.dtype = jnp.dtype(dtype)
    self.scale = nnx.Param(jnp.full(features, 1.0 - zero_init, jnp.float32))
    self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
    self.mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
    self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))

  def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
    """Maps [..., features] to the same shape.

    Args:
      x: what to normalize, of any floating dtype.
      use_running_average: whether by the running averages, not by the mean and
        the variance of x, which then go into them.
    """
    wide = widened(x)
    if use_running_average:
      mean, var = self.mean[...], self.var[...]
    else:
      axes = tuple(range(x.ndim - 1))
      mean = wide.mean(axes)
      # Rounding may leave less than 0 of a small one.
      var = jnp.maximum(jnp.square(wide).mean(axes) - jnp.square(mean), 0)
      for average, now in ((self.mean, mean), (self.var, var)):
        average[...] = MOMENTUM * average[...] + (1 - MOMENTUM) * now
    slope = self.scale[...] * jax.lax.rsqrt(var + EPSILON)
    return (slope * wide + (self.bias[...] - slope * mean)).astype(self.dtype)


class GroupedConv(nnx.Module):
  """A 3x3 convolution in groups of channels, without bias.

  Its formulation follows the backend; all give the same values. On CPU, XLA's
  backward pass of a grouped convolution is 100 times slower than a dense one's
  (docs/performance.md): there, groups are joined into bundles of about 64
  channels, each a dense convolution with a block-diagonal kernel. Elsewhere it
  is XLA's own; under a sharded batch the partitioner would gather the batch on
  every device, so it runs inside shard_map, where every device keeps its own.
  """

  def __init__(
    self,
    features: int,
    *,
    groups: int,
    stride: int = 1,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ) -> None:
    """features: channels in and out, a multiple of groups."""
    self.groups = groups
    self.stride = stride
    self.dtype = jnp.dtype(dtype)
    shape = (3, 3, features // groups, features)
    self.kernel = nnx.Param(
      he_normal_by_fan_out(rngs.params(), shape, jnp.float32)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, H, W, features] to [N, ceil(H/s), ceil(W/s), features]."""
    x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
    groups, stride = self.groups, self.stride
    return jax.lax.platform_dependent(
      x,
      kernel,
      cpu=lambda x, kernel: bundled_grouped_conv(x, kernel, groups, stride),
      default=lambda x, kernel: sharded_grouped_conv(x, kernel, groups, stride),
    )


def _conv3x3(
  x: jax.Array, kernel: jax.Array, groups: int, stride: int
) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def bundled_grouped_conv(
  x: jax.Array,
  kernel: jax.Array,
  groups: int,
  stride: int,
  bundle_channels: int = 64,
) -> jax.Array:
  """A grouped convolution as dense ones over bundles of groups.

  Args:
    x: [N, H, W, C].
    kernel: [3, 3, C / groups, C].
    groups: number of groups.
    stride: in both directions.
    bundle_channels: about so many in each; docs/performance.md.
  """
  width = kernel.shape[2]
  bundle = max(1, min(groups, bundle_channels // width))
  while groups % bundle:
    bundle -= 1
  eye = jnp.eye(bundle, dtype=kernel.dtype)
  parts = []
  for part, own in zip(
    jnp.split(x, groups // bundle, -1),
    jnp.split(kernel, groups // bundle, -1),
    strict=True,
  ):
    blocks = own.reshape(3, 3, width, bundle, width)
    dense = jnp.einsum('hwigo,gj->hwjigo', blocks, eye)
    dense = dense.reshape(3, 3, bundle * width, bundle * width)
    parts.append(_conv3x3(part, dense, 1, stride))
  return jnp.concatenate(parts, -1)


def sharded_grouped_conv(
  x: jax.Array, kernel: jax.Array, groups: int, stride: int
) -> jax.Array:
  """XLA's grouped convolution, each device on its own part of the batch.

  Args:
    x: [N, H, W, C], its batch sharded over the mesh axis 'data', if
      `jax.set_mesh` has set a mesh.
    kernel: [3, 3, C / groups, C], the same everywhere.
    groups: number of groups.
    stride: in both directions.
  """

  def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _conv3x3(x, kernel, groups, stride)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(x, kernel)
  batch, whole = PartitionSpec('data'), PartitionSpec()
  return jax.shard_map(local, in_specs=(batch, whole), out_specs=batch)(
    x, kernel
  )
