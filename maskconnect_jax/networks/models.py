"""The networks and their registry.

`create_model` -> connectivity phase -> `wiring.freeze` -> fine-tuning ->
`wiring.prune`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maskconnect_jax import backend, limits
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import adapters, connectivity
from maskconnect_jax.method import spec as spec_lib
from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.method.stack import MaskedStack
from maskconnect_jax.method.topology import BranchTopology, Topology
from maskconnect_jax.networks import layers, streams
from maskconnect_jax.networks.blocks import BasicBlock, Bottleneck
from maskconnect_jax.networks.branches import BranchBlock, BranchStack

# A version fixes the outputs for given options and weights, and the draws for a
# given seed. Models and workdirs of an earlier version keep that version.
#   '1': kernels, random topology and first real mask are drawn one after the
#     other from a single stream; at the branch level s is 1/K in the first
#     block, too.
#   '2': kernels and masks have a stream each, see `streams.of_network`; at the
#     branch level s is 1/C in the first block, see `branches`.
VERSION = '2'


@dataclasses.dataclass(frozen=True)
class Architecture:
  """The sizes of a network; `REGISTRY` has one for each name.

  Attributes:
    blocks_per_stage: the number of blocks of each stage. Each stage after the
      first halves the image and doubles the channels.
    width: channels of the first stage; a bottleneck puts out 4 times as many.
    bottleneck: True for bottlenecks, False for basic blocks.
    cardinality: C, groups of a bottleneck's 3x3 convolution.
    branch_width: w, channels of a group in the first stage; 0: width / C.
    large_images: True for ImageNet's stem, shortcuts with parameters and
      residuals that start at zero; False for CIFAR's stem and, of basic
      blocks, shortcuts without parameters.
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
    """Returns the mask's shape: (L, L), or at level 'branch' (L - 1, C, C)."""
    blocks = sum(self.blocks_per_stage)
    if level == 'block':
      return blocks, blocks
    return blocks - 1, self.cardinality, self.cardinality

  def valid_sources(
    self, level: str, *, stem_source: bool = True, adapter: str = 'pool'
  ) -> tuple[Any, ...]:
    """Returns which edges may be taken, bool, of the shape of the mask.

    Args:
      level: 'block' or 'branch'.
      stem_source: see `create_model`.
      adapter: see `create_model`.
    """
    if level == 'branch':
      return connectivity.valid_branches(len(self.stages), self.cardinality)
    channels = self.channels(self.width)
    return connectivity.valid_sources(
      len(self.stages),
      stem_source=stem_source,
      stages=channels if adapter == 'same_stage' else None,
    )

  def channels(self, width: int) -> list[int]:
    """Returns the channels of sources 0..L.

    Args:
      width: channels of the first stage.
    """
    expansion = 4 if self.bottleneck else 1
    return [width, *(expansion * width * 2**stage for stage in self.stages)]

  def strides(self) -> list[tuple[int, int]]:
    """Returns (stage, stride) of each block."""
    before = (0, *self.stages)
    return [
      (stage, 2 if stage > last else 1)
      for last, stage in zip(before, self.stages, strict=False)
    ]

  def inner_width(self, stage_width: int) -> int:
    """Returns the channels between a bottleneck's 1x1 convolutions.

    Args:
      stage_width: channels of the stage, before the bottleneck's factor of 4.

    Raises:
      InputError: no whole number of channels is left to a branch.
    """
    if not self.branch_width:
      return stage_width
    # branch_width is w in a stage of the architecture's own width.
    own = self.branch_width * stage_width / self.width
    if own < 1 or own % 1:
      raise InputError(
        f'width={stage_width} leaves {own:g} channels to a branch; the width'
        f' must be a multiple of {self.width // self.branch_width}'
      )
    return self.cardinality * int(own)

  def check_size(self, width: int) -> None:
    """Raises InputError for more weights than `limits.MAX_WEIGHTS`.

    It counts the weights of the blocks' convolutions before any is made.

    Args:
      width: channels of the first stage.
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

  def blocks(
    self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs
  ) -> list[nnx.Module]:
    """Returns the L blocks, after a stem of `width` channels."""
    made: list[nnx.Module] = []
    channels = self.channels(width)
    for index, (stage, stride) in enumerate(self.strides()):
      if self.bottleneck:
        block: nnx.Module = Bottleneck(
          channels[index],
          self.inner_width(width * 2**stage),
          channels[index + 1],
          groups=self.cardinality,
          stride=stride,
          zero_init=self.large_images,
          dtype=dtype,
          rngs=rngs,
        )
      else:
        block = BasicBlock(
          channels[index],
          channels[index + 1],
          stride=stride,
          projected=self.large_images,
          zero_init=self.large_images,
          dtype=dtype,
          rngs=rngs,
        )
      made.append(block)
    return made

  def branch_blocks(
    self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs
  ) -> list[BranchBlock]:
    """Returns the L blocks of a ResNeXt, each of C branches.

    They follow a stem of `width` channels.
    """
    channels = self.channels(width)
    return [
      BranchBlock(
        channels[index],
        self.inner_width(width * 2**stage) // self.cardinality,
        channels[index + 1],
        branches=self.cardinality,
        stride=stride,
        dtype=dtype,
        rngs=rngs,
      )
      for index, (stage, stride) in enumerate(self.strides())
    ]


class Stem(nnx.Module):
  """Maps images to source 0.

  For small images it is a 3x3 convolution. For large images it is a 7x7
  convolution of stride 2 and a max pool of stride 2.
  """

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
    self.conv = layers.Conv(
      in_channels,
      features,
      7 if large else 3,
      stride=2 if large else 1,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = layers.BatchNorm(features, dtype=dtype)

  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [N, H, W, C] to [N, H, W, features].

    A stem for large images returns a quarter of H and of W.
    """
    x = self.norm(self.conv(images), use_running_average=not train)
    x = backend.relu(x)
    if self.large:
      x = backend.max_of_windows(x)
    return x


class Network(nnx.Module):
  """A stem, a stack and a linear head: the network of either level.

  Parameters, masks, statistics and logits are float32, for any dtype of the
  activations.

  Attributes:
    stack: the wired blocks, a `MaskedStack` or a `BranchStack`.
    stages: the stage of each block, from 0; figures show it.
    version: see `VERSION`.
    matmul_precision: see `create_model`.
  """

  def __init__(
    self,
    architecture: Architecture,
    spec: WiringSpec,
    *,
    topology: Topology | BranchTopology | None,
    num_classes: int,
    in_channels: int,
    width: int | None,
    dtype: DTypeLike,
    seed: int,
    version: str,
    matmul_precision: str,
    head_norm: bool,
    stem_source: bool,
    adapter: str,
    remat: str,
  ) -> None:
    """Builds the network; the arguments are those of `create_model`."""
    limits.whole('num_classes', num_classes, 1, limits.MAX_CLASSES)
    limits.whole('in_channels', in_channels, 1, limits.MAX_CHANNELS)
    width = architecture.width if width is None else width
    architecture.check_size(limits.whole('width', width, 1, limits.MAX_WIDTH))
    dtype = _activations(dtype)
    self.version = limits.choice('version', version, spec_lib.VERSIONS)
    self.matmul_precision = limits.choice(
      'matmul_precision', matmul_precision, spec_lib.PRECISIONS
    )
    limits.choice('adapter', adapter, spec_lib.ADAPTERS)
    limits.flag('stem_source', stem_source)
    limits.flag('head_norm', head_norm)
    seed = limits.whole('seed', seed, -(2**63), 2**63 - 1)
    rngs = nnx.Rngs(seed) if version == '1' else streams.of_network(seed)
    self.stages = architecture.stages
    self.stem = Stem(
      in_channels,
      width,
      large=architecture.large_images,
      dtype=dtype,
      rngs=rngs,
    )
    channels = architecture.channels(width)
    self.stack: Any
    if spec.level == 'branch':
      self.stack = BranchStack(
        architecture.branch_blocks(width, dtype=dtype, rngs=rngs),
        spec,
        topology=topology,
        shared_stem=version != '1',
        rngs=rngs,
      )
    else:
      self.stack = MaskedStack(
        architecture.blocks(width, dtype=dtype, rngs=rngs),
        spec,
        valid=architecture.valid_sources(
          spec.level, stem_source=stem_source, adapter=adapter
        ),
        adapter=(
          adapters.ProjectionAdapter(
            channels,
            lambda narrow, wide: layers.Conv(
              narrow, wide, 1, dtype=dtype, rngs=rngs
            ),
          )
          if adapter == 'projection'
          else None
        ),
        topology=topology,
        remat=remat,
        rngs=rngs,
      )
    self.head_norm = (
      layers.BatchNorm(channels[-1], dtype=jnp.float32) if head_norm else None
    )
    self.head = nnx.Linear(channels[-1], num_classes, rngs=rngs)

  @property
  def topology(self) -> Any:
    """The topology, or None while the wiring is learned."""
    return self.stack.topology

  def draw(
    self, key: jax.Array, temperature: jax.Array | float | None = None
  ) -> jax.Array | None:
    """Returns the mask of one training step; see `Wiring.draw`."""
    return self.stack.draw(key, temperature)

  def __call__(
    self,
    images: jax.Array,
    mask: jax.Array | None = None,
    *,
    train: bool = False,
    keep: jax.Array | None = None,
  ) -> jax.Array:
    """Returns logits, float32 [N, num_classes].

    Args:
      images: float [N, H, W, in_channels], normalised; H, W >= 8.
      mask: b from `draw`; None takes the top K of r. A topology takes the place
        of both.
      train: whether BatchNorm takes the batch's statistics and keeps them.
      keep: [N, L], times the residuals of each image and block, for stochastic
        depth; None: 1. It is for level 'block' alone.
    """
    options = {} if keep is None else {'keep': keep}
    # The backward pass inherits the precision of the forward pass.
    precise = (
      contextlib.nullcontext()
      if self.matmul_precision == 'default'
      else jax.default_matmul_precision(self.matmul_precision)
    )
    with precise:
      x = self.stem(images, train=train)
      x = self.pool(self.stack(x, mask, train=train, **options))
      if self.head_norm is not None:
        x = self.head_norm(x, use_running_average=not train)
      return self.head(x)

  def features(self, images: jax.Array, block: int | None = None) -> jax.Array:
    """Returns what a block gives, averaged over space.

    Args:
      images: see `__call__`.
      block: the block, from 1; None takes what the head reads. At level
        'branch' it is the sum of the block's branches.

    Returns:
      float32 [N, channels of the block].

    Raises:
      InputError: there is no such block, or it was pruned.
    """
    if block is None:
      return self.pool(self.stack(self.stem(images)))
    limits.whole('block', block, 1, len(self.stack.blocks))
    outputs = self.stack.outputs(self.stem(images))
    found = outputs[block - len(self.stack.blocks) - 1]
    if isinstance(found, jax.ShapeDtypeStruct):
      raise InputError(f'block {block} is pruned: nothing reads it')
    return self.pool(found)

  def pool(self, x: jax.Array) -> jax.Array:
    """Returns the stack's output as the head reads it, float32 [N, features].

    At level 'block' it is the mean over space. A `BranchStack` returns its
    output pooled already; see `branches`.
    """
    if self.stack.spec.level == 'block':
      return jnp.mean(layers.widened(x), (1, 2))
    return x


def _activations(dtype: DTypeLike) -> jnp.dtype:
  """Returns the dtype, or raises InputError if it is not a floating one."""
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
    {
      18: (2, 2, 2, 2),
      34: (3, 4, 6, 3),
      50: (3, 4, 6, 3),
      101: (3, 4, 23, 3),
    }[depth],
    width=64,
    bottleneck=depth >= 50,
    cardinality=cardinality,
    branch_width=branch_width,
    large_images=True,
  )


REGISTRY: dict[str, Architecture] = {
  **{f'resnet{d}': _cifar(d) for d in (20, 32, 38, 44, 56, 74, 110)},
  'resnet18': _imagenet(18),
  'resnet34': _imagenet(34),
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
  """Returns the names in the registry that match a pattern.

  Args:
    pattern: as in a shell, such as 'resnext*'.
  """
  return fnmatch.filter(REGISTRY, pattern)


def architecture_of(name: Any) -> Architecture:
  """Returns the architecture of a name, or an `Architecture` unchanged.

  A name of the registry comes first: 'resnet18', '34', '50' and '101' are
  ImageNet's.
  Other names are of CIFAR's form: 'resnetD' with D = 6n+2 has basic blocks,
  'resnetD_bottleneck' with D = 9n+2 has bottlenecks.

  Args:
    name: a name or an `Architecture`.

  Raises:
    InputError: no network has this name or depth, or it has more than
      `limits.MAX_BLOCKS` blocks.
  """
  if isinstance(name, Architecture):
    return name
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
  # int() refuses thousands of digits.
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


# Options of `create_model` beside the fields of `WiringSpec`; a message lists
# them.
_OPTIONS = (
  'adapter', 'dtype', 'head_norm', 'in_channels', 'matmul_precision', 'remat',
  'seed', 'stem_source', 'version', 'width',
)  # fmt: skip


def create_model(
  name: str | Architecture,
  *,
  num_classes: int,
  spec: WiringSpec | None = None,
  topology: Topology | BranchTopology | None = None,
  in_channels: int = 3,
  width: int | None = None,
  dtype: DTypeLike = 'float32',
  seed: int = 0,
  version: str = VERSION,
  matmul_precision: str = 'default',
  head_norm: bool = False,
  stem_source: bool = True,
  adapter: str = 'pool',
  remat: str = 'none',
  **wiring: Any,
) -> Network:
  """Builds a network, such as create_model('resnet38', num_classes=10).

  Args:
    name: a name that `architecture_of` knows, or an `Architecture`.
    num_classes: channels of the logits.
    spec: how the blocks are wired; default `WiringSpec()`.
    topology: the sources that each block or branch takes. If given, the spec's
      rule is not used.
    in_channels: channels of the images.
    width: channels of the first stage; default the architecture's own.
    dtype: of the activations, 'float32' or 'bfloat16'.
    seed: of the weights, the real mask and a random topology.
    version: '2', or '1' for models that were trained before; see `VERSION`.
    matmul_precision: of float32 convolutions and matrix products. 'default' is
      JAX_DEFAULT_MATMUL_PRECISION, or without it the device's own: on GPUs from
      Ampere on it may be TF32, on TPUs it is bfloat16. 'high' is TF32, or three
      passes of bfloat16. 'highest' is float32. A CPU always computes in
      float32. Masks and statistics are always float32.
    head_norm: whether a BatchNorm stands before the head. The authors' plain
      sums need it: the stem's term grows K-fold in each block.
    stem_source: whether blocks after the first may take the stem's output.
    adapter: 'pool' or 'projection', the adapter that brings a source to a
      block's shape, see `adapters`; or 'same_stage', under which a block may
      take only sources of its input's shape.
    remat: see `MaskedStack`. `stem_source`, `adapter` and `remat` are for level
      'block' alone.
    **wiring: fields of the spec to replace, such as fan_in=10.

  Returns:
    A Flax NNX module: images float [N, H, W, in_channels] to logits
    float32 [N, num_classes].

  Raises:
    InputError: an unknown name or option, an impossible value or topology, or
      level 'branch' of a network without branches.
  """
  spec = _spec_of(spec or WiringSpec(), wiring)
  architecture = architecture_of(name)
  if spec.level == 'branch':
    _check_branches(name, architecture, stem_source, adapter, remat)
  return Network(
    architecture,
    spec,
    topology=topology,
    num_classes=num_classes,
    in_channels=in_channels,
    width=width,
    dtype=dtype,
    seed=seed,
    version=version,
    matmul_precision=matmul_precision,
    head_norm=head_norm,
    stem_source=stem_source,
    adapter=adapter,
    remat=remat,
  )


def _spec_of(spec: WiringSpec, wiring: dict[str, Any]) -> WiringSpec:
  """Returns the spec with the fields in `wiring` replaced.

  Raises:
    InputError: a field is not of the spec's level, or has a wrong value.
  """
  level = wiring.get('level', spec.level)
  fields = spec_lib.fields_of(limits.choice('level', level, spec_lib.LEVELS))
  for option in wiring:
    if option not in fields:
      raise InputError(
        f'{limits.shown(option)} is no option of level {level!r}; it has'
        f' {", ".join(sorted((*fields, *_OPTIONS)))}'
      )
  return dataclasses.replace(spec, **wiring)


def _check_branches(
  name: Any,
  architecture: Architecture,
  stem_source: bool,
  adapter: str,
  remat: str,
) -> None:
  """Raises InputError for a network that cannot have level 'branch'."""
  if architecture.cardinality == 1:
    raise InputError(
      f"model {limits.shown(name)} has no branches; level 'branch' needs one of"
      f' {", ".join(list_models("resnext*"))}'
    )
  if (stem_source, adapter, remat) != (True, 'pool', 'none'):
    raise InputError(
      f'stem_source={limits.shown(stem_source)}, adapter='
      f'{limits.shown(adapter)} and remat={limits.shown(remat)} are for level'
      " 'block' alone; leave them at True, 'pool' and 'none'"
    )
