"""A network of either level: a stem, a wired stack and a head.

`create_model` -> connectivity phase -> `wiring.freeze` -> fine-tuning ->
`wiring.prune`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maskconnect_jax import backend, limits
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import adapters
from maskconnect_jax.method import spec as spec_lib
from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.method.stack import MaskedStack
from maskconnect_jax.method.topology import BranchTopology, Topology
from maskconnect_jax.networks import layers, streams
from maskconnect_jax.networks.architectures import (
  Architecture,
  architecture_of,
  list_models,
)
from maskconnect_jax.networks.branches import BranchStack

# A version fixes the outputs for given options and weights, and the draws for a
# given seed. Models and workdirs of an earlier version keep that version.
#   '1': kernels, random topology and first real mask are drawn one after the
#     other from a single stream; at the branch level s is 1/K in the first
#     block, too.
#   '2': kernels and masks have a stream each, see `streams.of_network`; at the
#     branch level s is 1/C in the first block, see `branches`.
VERSION = '2'


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
    self.head = nnx.Linear(
      channels[-1], num_classes, kernel_init=layers.lecun_normal, rngs=rngs
    )

  @property
  def topology(self) -> Any:
    """The topology, or None while the wiring is learned."""
    return self.stack.topology

  def draw(
    self,
    key: jax.Array,
    temperature: jax.Array | float | None = None,
    newcomers: jax.Array | float = 1.0,
  ) -> jax.Array | None:
    """Returns the mask of one training step; see `Wiring.draw`."""
    return self.stack.draw(key, temperature, newcomers)

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
