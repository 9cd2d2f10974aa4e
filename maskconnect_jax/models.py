"""The networks: blocks, the stack that wires them, and the registry.

`create_model` -> train -> `freeze` -> fine-tune -> `prune`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maskconnect_jax import connectivity, layers
from maskconnect_jax.aggregate import masked_sum, static_sum
from maskconnect_jax.config import InputError, check_choice
from maskconnect_jax.connectivity import Topology


class RealMask(nnx.Variable[jax.Array]):
  """The real-valued mask r, trained by an optimizer group of its own."""


class BasicBlock(nnx.Module):
  """Two 3x3 convolutions and a shortcut without parameters (option A).

  y = relu(F(x) + S(x)), where S is the identity, or where the block opens a
  stage every second pixel with zero channels appended. He et al., "Deep
  Residual Learning for Image Recognition", 2016, section 4.2.
  """

  def __init__(
    self,
    in_features: int,
    features: int,
    *,
    stride: int = 1,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    self.features = features
    self.stride = stride
    self.conv1 = layers.conv(
      in_features, features, 3, stride=stride, dtype=dtype, rngs=rngs
    )
    self.norm1 = layers.batch_norm(features, dtype=dtype, rngs=rngs)
    self.conv2 = layers.conv(features, features, 3, dtype=dtype, rngs=rngs)
    self.norm2 = layers.batch_norm(features, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [N, H, W, in_features] to [N, ceil(H/s), ceil(W/s), features]."""
    residual = self.conv1(x)
    residual = self.norm1(residual, use_running_average=not train)
    residual = self.conv2(nnx.relu(residual))
    residual = self.norm2(residual, use_running_average=not train)
    shortcut = layers.zero_pad_channels(
      x[:, :: self.stride, :: self.stride], self.features
    )
    return nnx.relu(residual + shortcut)


class Pruned(nnx.Module):
  """What is left of a pruned block: no parameter, but its output's shape.

  The block after a pruned one still adapts its sources to that shape.
  """

  def __init__(self, block: nnx.Module) -> None:
    graphdef, state = nnx.split(block)
    leaves, tree = jax.tree.flatten(state)
    # Static, hence hashable: tuples all the way down.
    self.graphdef = nnx.static(graphdef)
    self.tree = nnx.static(tree)
    self.leaves = nnx.static(
      tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)
    )

  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Called under `jax.eval_shape` only, and so never computed."""
    state = jax.tree.unflatten(
      self.tree, [jnp.zeros(shape, dtype) for shape, dtype in self.leaves]
    )
    return nnx.merge(self.graphdef, state)(x, train=train)


class MaskedStack(nnx.Module):
  """Blocks in a row, each fed by the masked sum of earlier outputs.

  x_j = c · Σ_i b[j,i] · A(y_i),   y_j = F_j(x_j),   j = 1..L,   y_0 = the input

  A brings source i to the shape of y_{j-1}, once per source and shape. With a
  topology, the sums and the blocks that nothing reads are left out of the
  program; without one, every valid source is read and the mask is data.

  Attributes:
    blocks: the L blocks; each is called as `block(x, train=...)`.
    topology: the frozen mask, or None while the connectivity is learned.
    real_mask: r, float32 [L, L]; only there when it is learned.
  """

  def __init__(
    self,
    blocks: Sequence[nnx.Module],
    *,
    fan_in: int,
    rule: str = 'learned',
    valid: tuple[tuple[bool, ...], ...] | None = None,
    adapter: Callable[[jax.Array, tuple[int, ...], int], jax.Array]
    | None = None,
    scale: str = 'mean',
    gradient: str = 'all',
    initial: float = 0.5,
    initial_spread: float = 0.0,
    rngs: nnx.Rngs,
  ) -> None:
    """Builds the stack.

    Args:
      blocks: modules that map one array to one array.
      fan_in: K, sources per block; a block with fewer takes all of them.
      rule: 'learned', 'fixed_prev', 'fixed_random' or 'fixed_all'.
      valid: [L, L], the sources each block may take; default all earlier ones.
      adapter: A(x, shape, source), default `layers.PoolAdapter()`.
      scale: c, 'mean' (1/k_j) or 'sum' (1).
      gradient: whether 'all' valid entries of r get a gradient, or the 'drawn'.
      initial: where the entries of r start.
      initial_spread: half the width of the uniform noise added there.
      rngs: its 'connectivity' stream draws r and the random topology.

    Raises:
      InputError: a fan_in below 1, or an unknown rule.
    """
    if fan_in < 1:
      raise InputError(f'fan_in={fan_in} must be at least 1')
    for option, value in (
      ('rule', rule),
      ('scale', scale),
      ('gradient', gradient),
    ):
      check_choice(f'connectivity.{option}', value, option)
    self.blocks = nnx.List(blocks)
    self.adapter = layers.PoolAdapter() if adapter is None else adapter
    self.fan_in = fan_in
    self.scale = scale
    self.gradient = gradient
    self.valid = nnx.static(
      valid or connectivity.valid_sources(len(self.blocks))
    )
    topology = None
    if rule == 'learned':
      self.real_mask = RealMask(
        connectivity.initial(
          rngs.connectivity(), self.valid, center=initial, spread=initial_spread
        )
      )
    elif rule == 'fixed_random':
      topology = connectivity.fixed_random(
        rngs.connectivity(), self.valid, fan_in
      )
    elif rule == 'fixed_all':
      topology = connectivity.fixed_all(self.valid)
    else:
      topology = connectivity.fixed_prev(len(self.blocks))
    self.topology: Topology | None = nnx.static(topology)

  def draw(self, key: jax.Array) -> jax.Array | None:
    """Returns a step's mask b [L, L], straight-through to r; None if frozen."""
    if self.topology is not None:
      return None
    real = self.real_mask[...]
    mask = connectivity.draw(key, real, self.valid, self.fan_in)
    through = connectivity.straight_through(real, mask)
    # A drawn entry is a one: the product passes its gradient and no other's.
    return through * mask if self.gradient == 'drawn' else through

  def scale_of(self, num_terms: int) -> float:
    """Returns c for a sum of so many terms."""
    return 1 / num_terms if self.scale == 'mean' else 1.0

  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
  ) -> jax.Array:
    """Returns y_L.

    Args:
      x: y_0, [batch, ...].
      mask: b, [L, L], from `draw`; None takes the topology, or without one
        the top-K of r.
      train: passed on to the blocks.
    """
    if self.topology is not None:
      return self._run_frozen(x, self.topology, train)
    if mask is None:
      mask = connectivity.top_k(self.real_mask[...], self.valid, self.fan_in)
    sources = _Sources(x, self.adapter)
    for target, block in enumerate(self.blocks):
      valid = [i for i, ok in enumerate(self.valid[target]) if ok]
      scale = self.scale_of(min(self.fan_in, len(valid)))
      weights = jnp.stack([mask[target, i] * scale for i in valid])
      total = masked_sum(weights, tuple(sources.take(valid)))
      sources.outputs.append(block(total, train=train))
    return sources.outputs[-1]

  def _run_frozen(
    self, x: jax.Array, topology: Topology, train: bool
  ) -> jax.Array:
    sources = _Sources(x, self.adapter)
    for block, picked, live in zip(
      self.blocks, topology.sources, topology.live, strict=True
    ):
      if live:
        total = static_sum(sources.take(picked), self.scale_of(len(picked)))
        sources.outputs.append(block(total, train=train))
      else:
        sources.outputs.append(jax.eval_shape(block, sources.outputs[-1]))
    return sources.outputs[-1]


class _Sources:
  """The outputs so far, adapted to a shape once however often it is taken."""

  def __init__(self, x: jax.Array, adapter: Any) -> None:
    self.outputs: list[Any] = [x]
    self._adapter = adapter
    self._adapted: dict[tuple[int, tuple[int, ...]], jax.Array] = {}

  def take(self, picked: Sequence[int]) -> list[jax.Array]:
    """Returns the picked sources in the shape of the newest output."""
    shape = self.outputs[-1].shape
    for i in picked:
      if (i, shape) not in self._adapted:
        y = self.outputs[i]
        self._adapted[i, shape] = (
          y if y.shape == shape else self._adapter(y, shape, i)
        )
    return [self._adapted[i, shape] for i in picked]


class ResNet(nnx.Module):
  """A residual network whose blocks' sources are fixed or learned.

  Stem, `MaskedStack`, global average pool, linear. Parameters, masks,
  statistics and logits are float32 whatever the dtype of the activations.
  """

  def __init__(
    self,
    blocks_per_stage: Sequence[int],
    *,
    num_classes: int,
    fan_in: int,
    rule: str = 'learned',
    in_channels: int = 3,
    width: int = 16,
    dtype: DTypeLike = jnp.float32,
    stem_source: bool = True,
    adapter: str = 'pool',
    scale: str = 'mean',
    gradient: str = 'all',
    initial: float = 0.5,
    initial_spread: float = 0.0,
    seed: int = 0,
  ) -> None:
    """Builds the network; the arguments are those of `create_model`."""
    check_choice('connectivity.adapter', adapter, 'adapter')
    rngs = nnx.Rngs(seed)
    dtype = jnp.dtype(dtype)
    self.stem_conv = layers.conv(in_channels, width, 3, dtype=dtype, rngs=rngs)
    self.stem_norm = layers.batch_norm(width, dtype=dtype, rngs=rngs)
    blocks: list[nnx.Module] = []
    features = [width]  # of sources 0..L
    for stage, depth in enumerate(blocks_per_stage):
      for position in range(depth):
        blocks.append(
          BasicBlock(
            features[-1],
            width * 2**stage,
            stride=2 if stage > 0 and position == 0 else 1,
            dtype=dtype,
            rngs=rngs,
          )
        )
        features.append(width * 2**stage)
    # stages[i]: of block i + 1, for drawings.
    self.stages = tuple(
      stage
      for stage, depth in enumerate(blocks_per_stage)
      for _ in range(depth)
    )
    self.stack = MaskedStack(
      blocks,
      fan_in=fan_in,
      rule=rule,
      valid=connectivity.valid_sources(
        len(blocks),
        stem_source=stem_source,
        stages=features if adapter == 'same_stage' else None,
      ),
      adapter=(
        layers.ProjectionAdapter(features, dtype=dtype, rngs=rngs)
        if adapter == 'projection'
        else None
      ),
      scale=scale,
      gradient=gradient,
      initial=initial,
      initial_spread=initial_spread,
      rngs=rngs,
    )
    self.head = nnx.Linear(features[-1], num_classes, rngs=rngs)

  @property
  def topology(self) -> Topology | None:
    """The frozen wiring, or None while it is learned."""
    return self.stack.topology

  def draw(self, key: jax.Array) -> jax.Array | None:
    """Returns the mask of one training step; see `MaskedStack.draw`."""
    return self.stack.draw(key)

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
      mask: b [L, L] from `draw`; None takes the topology or the top-K of r.
      train: whether BatchNorm takes the batch's statistics and keeps them.
    """
    x = self.stem_conv(images)
    x = nnx.relu(self.stem_norm(x, use_running_average=not train))
    x = self.stack(x, mask, train=train)
    return self.head(jnp.mean(x, (1, 2), dtype=jnp.float32))


def freeze(model: Any, topology: Topology | None = None) -> Any:
  """Returns a copy whose wiring is static.

  Args:
    model: a network with a `stack`.
    topology: what to freeze to; default the top-K of its real mask, or the
      topology it already has.
  """
  model = nnx.clone(model)
  stack = model.stack
  if topology is None:
    topology = stack.topology or connectivity.freeze(
      stack.real_mask[...], stack.valid, stack.fan_in
    )
  stack.topology = nnx.static(topology)
  return model


def prune(model: Any) -> Any:
  """Returns a copy of a frozen model without blocks that the output ignores.

  The logits do not change. What only training needs, the real mask, goes too.
  """
  model = nnx.clone(model)
  stack = model.stack
  if stack.topology is None:
    raise ValueError('freeze the model before pruning it')
  edges = set()
  for target, (sources, live) in enumerate(
    zip(stack.topology.sources, stack.topology.live, strict=True)
  ):
    if live:
      edges |= {(source, target) for source in sources}
    elif not isinstance(stack.blocks[target], Pruned):
      stack.blocks[target] = Pruned(stack.blocks[target])
  if isinstance(stack.adapter, layers.ProjectionAdapter):
    stack.adapter.prune(edges)
  if hasattr(stack, 'real_mask'):
    del stack.real_mask
  return model


def count_parameters(model: Any) -> int:
  """Returns the number of trained weights: no statistics, no real mask."""
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


NAMED = tuple(f'resnet{depth}' for depth in (20, 32, 38, 44, 56, 74, 110))


def list_models(pattern: str = '*') -> list[str]:
  """Returns the names that match, such as list_models('resnet*')."""
  return [name for name in NAMED if fnmatch.fnmatch(name, pattern)]


def create_model(
  name: str, *, num_classes: int, fan_in: int = 4, **options: Any
) -> ResNet:
  """Builds a network by name.

  Args:
    name: one of `list_models()`; any CIFAR-form 'resnetD' with D = 6n+2 works.
    num_classes: width of the last layer.
    fan_in: K, sources per block.
    **options: those of `ResNet`: rule ('learned', 'fixed_prev',
      'fixed_random', 'fixed_all'), in_channels (3), width (16, of the first
      stage), dtype ('float32' or 'bfloat16', of the activations), stem_source,
      adapter ('pool', 'projection', 'same_stage'), scale ('mean', 'sum'),
      gradient ('all', 'drawn'), initial, initial_spread, seed.

  Returns:
    A Flax NNX module: images float [N, H, W, in_channels] to logits
    float32 [N, num_classes].

  Raises:
    InputError: an unknown name or rule, a depth that is not 6n+2, fan_in < 1.
  """
  match = re.fullmatch(r'resnet(\d+)', name)
  if not match:
    near = difflib.get_close_matches(name, NAMED, n=1)
    raise InputError(
      f'model {name!r} is not known; '
      + (f'did you mean {near[0]!r}?' if near else 'list_models() names all')
    )
  depth = int(match[1])
  if depth % 6 != 2 or depth < 8:
    below = max(8, depth - (depth - 2) % 6)
    raise InputError(
      f'model {name!r}: the depth must be 6n+2, such as resnet{below} or'
      f' resnet{below + 6}'
    )
  return ResNet(
    ((depth - 2) // 6,) * 3, num_classes=num_classes, fan_in=fan_in, **options
  )
