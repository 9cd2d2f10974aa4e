"""The architectures: sizes of networks, and the registry of their names."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from maskconnect_jax import limits
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import connectivity
from maskconnect_jax.networks.blocks import BasicBlock, Bottleneck
from maskconnect_jax.networks.branches import BranchBlock


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
      stem_source: see `models.create_model`.
      adapter: see `models.create_model`.
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
