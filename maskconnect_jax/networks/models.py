"""The networks and their registry.

`create_model` -> train -> `wiring.freeze` -> fine-tune -> `wiring.prune`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maskconnect_jax import backend, limits
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import adapters, connectivity, spec
from maskconnect_jax.method.stack import MaskedStack
from maskconnect_jax.networks import layers, streams
from maskconnect_jax.networks.blocks import BasicBlock, Bottleneck
from maskconnect_jax.networks.branches import BranchBlock, BranchStack

# Of what the same options and weights compute, and of what a seed draws. Models
# and workdirs of a version before keep it.
#   '1': kernels, random topology and first real mask are drawn one after the
#     other from a single stream; in the branch form's first block s is 1/K.
#   '2': see `streams.of_network` and `branches`.
VERSION = '2'


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What a name in the registry stands for.

  Attributes:
    blocks_per_stage: each stage after the first halves the image and doubles
      the channels.
    width: channels of the first stage; a bottleneck puts out 4 times as many.
    bottleneck: whether blocks are bottlenecks, or basic ones.
    cardinality: C, groups of a bottleneck's 3x3 convolution.
    branch_width: w, channels of a group in the first stage; 0: width / C.
    large_images: ImageNet's stem and zero-initialised residuals, or CIFAR's.
  """

  blocks_per_stage: tuple[int, ...]
  width: int
  bottleneck: bool = False
  cardinality: int = 1
  branch_width: int = 0
  large_images: bool = False

  @property
  def stages(self) -> tuple[int, ...]:
    """The stage of each block, from 0."""
    return tuple(
      stage
      for stage, depth in enumerate(self.blocks_per_stage)
      for _ in range(depth)
    )

  def mask_shape(self, level: str) -> tuple[int, ...]:
    """Of the mask: (L, L), or with level 'branch' (L - 1, C, C)."""
    blocks = sum(self.blocks_per_stage)
    if level == 'block':
      return blocks, blocks
    return blocks - 1, self.cardinality, self.cardinality

  def strides(self) -> list[tuple[int, int]]:
    """Returns (stage, stride) of each block."""
    before = (0, *self.stages)
    return [
      (stage, 2 if stage > last else 1)
      for last, stage in zip(before, self.stages, strict=False)
    ]

  def inner_width(self, stage_width: int) -> int:
    """Returns the channels between a bottleneck's 1x1 convolutions."""
    if not self.branch_width:
      return stage_width
    # w is that of a first stage of the architecture's own width.
    own = self.branch_width * stage_width / self.width
    if own < 1 or own % 1:
      raise InputError(
        f'width={stage_width} leaves {own:g} channels to a branch; the width'
        f' must be a multiple of {self.width // self.branch_width}'
      )
    return self.cardinality * int(own)

  def check_size(self, width: int) -> None:
    """Raises InputError for a network of far more weights than there are bytes.

    Counted are the blocks' own convolutions, before any is made.
    """
    total = 0
    for stage in self.stages:
      wide = width * 2**stage
      if self.bottleneck:
        inner = self.inner_width(wide)
        total += 6 * wide * inner + 9 * inner * inner // self.cardinality
      else:
        total += 13 * wide * wide
    if total > limits.MAX_WEIGHTS:
      raise InputError(
        f'width={width} gives {len(self.stages)} blocks {total:,} weights; at'
        f' most {limits.MAX_WEIGHTS:,} are possible'
      )

  def block(
    self,
    in_features: int,
    stage_width: int,
    stride: int,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ) -> tuple[nnx.Module, int]:
    """Returns a block and its output's channels."""
    if not self.bottleneck:
      basic = BasicBlock(
        in_features, stage_width, stride=stride, dtype=dtype, rngs=rngs
      )
      return basic, stage_width
    block = Bottleneck(
      in_features,
      self.inner_width(stage_width),
      4 * stage_width,
      groups=self.cardinality,
      stride=stride,
      zero_init=self.large_images,
      dtype=dtype,
      rngs=rngs,
    )
    return block, 4 * stage_width


class Stem(nnx.Module):
  """From image to source 0: 3x3 for small images, 7x7 and pool for large."""

  def __init__(
    self,
    in_channels: int,
    features: int,
    *,
    large: bool,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ) -> None:
    self.large = large
    self.conv = layers.conv(
      in_channels,
      features,
      7 if large else 3,
      stride=2 if large else 1,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = layers.BatchNorm(features, dtype=dtype)

  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [N, H, W, C] to [N, H, W, features], or to a quarter of H and W."""
    x = self.norm(self.conv(images), use_running_average=not train)
    x = backend.relu(x)
    if self.large:
      x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    return x


class Network(nnx.Module):
  """Stem, stack, linear head: what the networks of both levels share.

  Parameters, masks, statistics and logits are float32 whatever the dtype of
  the activations.

  Attributes:
    stack: the wiring, a `MaskedStack` or a `BranchStack`.
    stages: of each block, from 0, for drawings.
    version: see `VERSION`.
    matmul_precision: see `create_model`.
  """

  def __init__(
    self,
    architecture: Architecture,
    *,
    num_classes: int,
    in_channels: int = 3,
    width: int | None = None,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    version: str = VERSION,
    matmul_precision: str = 'default',
    **wiring: Any,
  ) -> None:
    """Builds the network; the arguments are those of `create_model`."""
    limits.whole('num_classes', num_classes, 1, limits.MAX_CLASSES)
    limits.whole('in_channels', in_channels, 1, limits.MAX_CHANNELS)
    if width is None:
      width = architecture.width
    limits.whole('width', width, 1, limits.MAX_WIDTH)
    architecture.check_size(width)
    dtype = _activations(dtype)
    limits.choice('version', version, spec.VERSIONS)
    limits.choice('matmul_precision', matmul_precision, spec.PRECISIONS)
    self.version = version
    self.matmul_precision = matmul_precision
    seed = limits.whole('seed', seed, -(2**63), 2**63 - 1)
    rngs = nnx.Rngs(seed) if version == '1' else streams.of_network(seed)
    self.stem = Stem(
      in_channels,
      width,
      large=architecture.large_images,
      dtype=dtype,
      rngs=rngs,
    )
    self.stages = architecture.stages
    self.stack, features = self._make_stack(
      architecture, width, dtype=dtype, rngs=rngs, **wiring
    )
    self.head = nnx.Linear(features, num_classes, rngs=rngs)

  def _make_stack(
    self,
    architecture: Architecture,
    width: int,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    **wiring: Any,
  ) -> tuple[Any, int]:
    """Returns the stack and the channels of its output."""
    raise NotImplementedError

  @property
  def topology(self) -> Any:
    """The frozen wiring, or None while it is learned."""
    return self.stack.topology

  def draw(
    self, key: jax.Array, temperature: jax.Array | float = 1.0
  ) -> jax.Array | None:
    """Returns the mask of one training step; see `Wiring.draw`."""
    return self.stack.draw(key, temperature)

  def __call__(
    self,
    images: jax.Array,
    mask: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> jax.Array:
    """Returns logits, float32 [N, num_classes].

    Args:
      images: float [N, H, W, in_channels], normalised; H, W >= 8.
      mask: b from `draw`; None takes the topology or the top-K of r.
      train: whether BatchNorm takes the batch's statistics and keeps them.
    """
    # The products of the backward pass take it over from these.
    precise = (
      contextlib.nullcontext()
      if self.matmul_precision == 'default'
      else jax.default_matmul_precision(self.matmul_precision)
    )
    with precise:
      x = self.stem(images, train=train)
      return self.head(self.pool(self.stack(x, mask, train=train)))

  def pool(self, x: jax.Array) -> jax.Array:
    """Returns the mean over space, float32 [N, features]."""
    return jnp.mean(layers.widened(x), (1, 2))


class ResNet(Network):
  """A residual network; each block picks the earlier blocks it reads."""

  def _make_stack(
    self,
    architecture: Architecture,
    width: int,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    stem_source: bool = True,
    adapter: str = 'pool',
    **wiring: Any,
  ) -> tuple[MaskedStack, int]:
    limits.choice('adapter', adapter, spec.ADAPTERS)
    limits.flag('stem_source', stem_source)
    blocks: list[nnx.Module] = []
    features = [width]  # of sources 0..L
    for stage, stride in architecture.strides():
      block, wide = architecture.block(
        features[-1], width * 2**stage, stride, dtype=dtype, rngs=rngs
      )
      blocks.append(block)
      features.append(wide)
    stack = MaskedStack(
      blocks,
      valid=connectivity.valid_sources(
        len(blocks),
        stem_source=stem_source,
        stages=features if adapter == 'same_stage' else None,
      ),
      adapter=(
        adapters.ProjectionAdapter(
          features,
          lambda narrow, wide: layers.conv(
            narrow, wide, 1, dtype=dtype, rngs=rngs
          ),
        )
        if adapter == 'projection'
        else None
      ),
      rngs=rngs,
      **wiring,
    )
    return stack, features[-1]


class BranchResNeXt(Network):
  """A ResNeXt; each branch picks the branches of the block before it reads."""

  def _make_stack(
    self,
    architecture: Architecture,
    width: int,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    **wiring: Any,
  ) -> tuple[BranchStack, int]:
    blocks = []
    features = width
    for stage, stride in architecture.strides():
      stage_width = width * 2**stage
      blocks.append(
        BranchBlock(
          features,
          architecture.inner_width(stage_width) // architecture.cardinality,
          4 * stage_width,
          branches=architecture.cardinality,
          stride=stride,
          dtype=dtype,
          rngs=rngs,
        )
      )
      features = 4 * stage_width
    stack = BranchStack(
      blocks, shared_stem=self.version != '1', rngs=rngs, **wiring
    )
    return stack, features

  def pool(self, x: jax.Array) -> jax.Array:
    """The stack has pooled already: see `Streams.pooled`."""
    return x


def _activations(dtype: DTypeLike) -> jnp.dtype:
  """Returns the dtype. Raises InputError for one that is not of floats."""
  try:
    known = jnp.dtype(dtype) if dtype is not None else jnp.dtype(bool)
  except (TypeError, ValueError):
    known = jnp.dtype(bool)
  if not jnp.issubdtype(known, jnp.floating):
    raise InputError(
      f"dtype={limits.shown(dtype)} is none for activations; 'float32' and"
      " 'bfloat16' are"
    )
  return known


def count_parameters(model: Any) -> int:
  """Returns the number of trained weights: no statistics, no real mask."""
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _cifar(depth: int) -> Architecture:
  return Architecture(((depth - 2) // 6,) * 3, width=16)


def _cifar_resnext(depth: int, cardinality: int, width: int) -> Architecture:
  return Architecture(
    ((depth - 2) // 9,) * 3,
    width=64,
    bottleneck=True,
    cardinality=cardinality,
    branch_width=width,
  )


def _imagenet(
  depth: int, cardinality: int = 1, branch_width: int = 0
) -> Architecture:
  return Architecture(
    {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth],
    width=64,
    bottleneck=True,
    cardinality=cardinality,
    branch_width=branch_width,
    large_images=True,
  )


REGISTRY: dict[str, Architecture] = {
  **{f'resnet{d}': _cifar(d) for d in (20, 32, 38, 44, 56, 74, 110)},
  'resnet50': _imagenet(50),
  'resnet101': _imagenet(101),
  'resnext20_8x4d': _cifar_resnext(20, 8, 4),
  'resnext29_8x8d': _cifar_resnext(29, 8, 8),
  'resnext29_8x64d': _cifar_resnext(29, 8, 64),
  'resnext50_32x4d': _imagenet(50, 32, 4),
  'resnext101_32x4d': _imagenet(101, 32, 4),
  'resnext101_64x4d': _imagenet(101, 64, 4),
}


def list_models(pattern: str = '*') -> list[str]:
  """Returns the names that match, such as list_models('resnext*')."""
  return fnmatch.filter(REGISTRY, pattern)


def architecture_of(name: Any) -> Architecture:
  """Returns what a name stands for.

  Beside the registry: 'resnetD', D = 6n+2, CIFAR-form with basic blocks, and
  'resnetD_bottleneck', D = 9n+2, with bottlenecks. 'resnet50' and 'resnet101'
  are ImageNet's.

  Raises:
    InputError: no network has this name or depth, or it has more than
      `limits.MAX_BLOCKS` blocks.
  """
  shown = limits.shown(name)
  if not isinstance(name, str):
    raise InputError(f'model {shown} is no name; list_models() names all')
  if name in REGISTRY:
    return REGISTRY[name]
  match = re.fullmatch(r'resnet([0-9]+)(_bottleneck)?', name)
  if not match:
    near = difflib.get_close_matches(name[:100], REGISTRY, n=1)
    raise InputError(
      f'model {shown} is not known; '
      + (f'did you mean {near[0]!r}?' if near else 'list_models() names all')
    )
  suffix = match[2] or ''
  period = 9 if suffix else 6
  deepest = limits.MAX_BLOCKS // 3 * period + 2
  # Python takes no number of thousands of digits.
  depth = int(match[1]) if len(match[1]) < 10 else 10**9
  if depth > deepest:
    raise InputError(
      f'model {shown} has more than {limits.MAX_BLOCKS:,} blocks; the deepest'
      f' is resnet{deepest}{suffix}'
    )
  if depth % period != 2 or depth < period + 2:
    below = max(period + 2, depth - (depth - 2) % period)
    raise InputError(
      f'model {shown}: the depth must be {period}n+2, such as'
      f' resnet{below}{suffix} or resnet{below + period}{suffix}'
    )
  return Architecture(
    ((depth - 2) // period,) * 3, width=16, bottleneck=bool(suffix)
  )


def _options_of(network: type[Network], stack: type[Any]) -> frozenset[str]:
  """Returns the names that `create_model` passes on, beside its own."""
  parts = network.__init__, network._make_stack, stack.__init__
  names = {
    parameter.name
    for part in parts
    for parameter in inspect.signature(part).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
  }
  return frozenset(names - {'fan_in', 'num_classes', 'rngs', 'valid'})


_OPTIONS = {
  'block': _options_of(ResNet, MaskedStack),
  'branch': _options_of(BranchResNeXt, BranchStack),
}


def create_model(
  name: str,
  *,
  num_classes: int,
  fan_in: int = 4,
  level: str = 'block',
  **options: Any,
) -> ResNet | BranchResNeXt:
  """Builds a network by name.

  Args:
    name: one of `list_models()`, or a CIFAR-form ResNet of another depth; see
      `architecture_of`.
    num_classes: width of the last layer.
    fan_in: K, sources per block, or per branch.
    level: 'block', where each block picks earlier blocks, or 'branch', where
      each branch of a ResNeXt picks branches of the block before.
    **options: rule ('learned', 'fixed_prev', 'fixed_random', 'fixed_all'),
      in_channels (3), width (of the first stage; the network's own), dtype
      ('float32' or 'bfloat16', of the activations), gradient (see
      `draw_through`), initial, initial_spread, seed, version ('2', or '1' for
      what was trained before; see `VERSION`), matmul_precision (of the products
      of float32 in convolutions and matrices: 'default' is the device's, which
      on GPUs from Ampere on may be TF32 and on TPUs is bfloat16, unless
      JAX_DEFAULT_MATMUL_PRECISION says otherwise; 'high' is TF32, or three
      passes of bfloat16; 'highest' is float32; a CPU has float32 alone, and
      masks and statistics are always of float32); with level 'block' also
      stem_source, adapter ('pool', 'projection', 'same_stage'), scale
      ('mean', 'sum') and remat ('none', 'block'), see `MaskedStack`; with
      level 'branch' identity ('1/K', '1/C').

  Returns:
    A Flax NNX module: images float [N, H, W, in_channels] to logits
    float32 [N, num_classes].

  Raises:
    InputError: an unknown name, rule or option, an impossible depth, a number
      out of its bounds, see `limits`, or level 'branch' of a network that has
      no branches.
  """
  limits.choice('level', level, spec.LEVELS)
  architecture = architecture_of(name)
  known = _OPTIONS[level]
  for option in options:
    if option not in known:
      raise InputError(
        f'{limits.shown(option)} is no option of level {level!r}; it has'
        f' {", ".join(sorted(known))}'
      )
  if level == 'block':
    return ResNet(
      architecture, num_classes=num_classes, fan_in=fan_in, **options
    )
  if architecture.cardinality == 1:
    raise InputError(
      f"model {name!r} has no branches; level 'branch' needs one of"
      f' {", ".join(list_models("resnext*"))}'
    )
  return BranchResNeXt(
    architecture, num_classes=num_classes, fan_in=fan_in, **options
  )
