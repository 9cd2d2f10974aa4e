"""Branch-level connectivity: every branch of a ResNeXt block picks its sources.

Between blocks i-1 and i lies one C x C mask b. Branch c of block i computes

  x_c = sum_k b[c, k] * y_k         over the branches k of block i-1
  y_c = F_c(x_c) + s * A(x_c)       s = 1/K; F_c is a whole bottleneck

The branches of the first block all take the stem's output, and share it: there
s = 1/C. The head reads the sum of the last block's branches. Ahmed, Torresani,
"Connectivity Learning in Multi-Branch Networks", 2017, arXiv 1709.09582.

Scales. The sum of a block's C branches holds the stem's output once, for any K
and C: it does so in the first block, and s = 1/K keeps it. With s = 1/K in the
first block, too, the sum held it C/K times. The curvature of the loss in the
head's kernel grows with the square of that: at the start, on CIFAR-10 with
C = 8 and 32 channels, it was 0.8 for K = 8, 3.8 for K = 4, 20 for K = 2 and 79
for K = 1; now it is 0.7 for each. SGD with Nesterov's momentum of 0.9 and a
rate of 0.1 is stable below 2 (1 + 0.9) / ((1 + 2 * 0.9) 0.1) = 13.6. A fixed
wiring still settled from there. With K = 1 and masks that are drawn, each step
takes other chains of branches, on which the head was not yet corrected, and the
loss was not finite after about 90 to 140 steps.

Within a branch, BatchNorm's output is multiplied by sqrt(1/C): see
`BranchBlock`. C such terms, added up, are as large as the one of the ordinary
block, and SGD moves their sum as fast.

What is held. An x_c and a y_c are as wide as the block's output, and each block
has C of both; written down as they stand they take C times the memory of the
ordinary ResNeXt. But F_c ends in a 1x1 convolution V_c and BatchNorm, and
begins with a 1x1 convolution W_c; all between the narrow activations h_c (w
channels) of one block and those of a later one is linear. So a stream is kept
as its factors, never as their product:

  x_c = sum_j sum_k P_j[c, k] * V_j,k h_j,k  +  a_c * stem  +  bias_c

with P_j = b (s b) ... (s b) a small matrix, and a block reads it through

  W_c x_c = sum_j sum_k (P_j[c, k] * W_c V_j,k) h_j,k  +  ...

one dense 1x1 convolution from narrow to narrow for each earlier block j. The
statistics that BatchNorm needs of V h are those of h: mean V m, variance
diag(V Cov(h) V^T). No activation of full width exists anywhere, and the
gradient of every b[c, k], drawn or not, is a by-product of the gradient of
these small kernels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maskconnect_jax import backend, limits
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import adapters, connectivity
from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.method.topology import BranchTopology, Topology
from maskconnect_jax.method.wiring import Wiring
from maskconnect_jax.networks import layers
from maskconnect_jax.networks.layers import EPSILON, MOMENTUM


@dataclasses.dataclass
class Term:
  """What one earlier block adds to the streams: P, V and h of the equation."""

  paths: jax.Array  # P, [streams, C]
  expand: jax.Array  # V, [C, w, features]
  narrow: jax.Array  # h, [N, H, W, C * w]


@dataclasses.dataclass
class Streams:
  """The inputs x_c, or outputs y_c, of a block's branches, in factors.

  Attributes:
    terms: of the earlier blocks.
    stem: source 0, [N, H, W, features of the stem].
    stem_share: a, [streams].
    bias: [streams, features].
  """

  terms: list[Term]
  stem: jax.Array
  stem_share: jax.Array
  bias: jax.Array

  def mixed(self, mask: jax.Array) -> Streams:
    """Returns sum_k mask[c, k] * stream k, for each c."""
    return Streams(
      [
        Term(_exact('ck,kj->cj', mask, term.paths), term.expand, term.narrow)
        for term in self.terms
      ],
      self.stem,
      _exact('ck,k->c', mask, self.stem_share),
      _exact('ck,kd->cd', mask, self.bias),
    )

  def adapted(self, height: int, width: int, features: int) -> Streams:
    """Returns A of every stream: average-pooled, with zero channels added.

    Both are linear, so the pool acts on the narrow activations and the zeros
    are appended to the kernels.
    """
    return Streams(
      [
        Term(
          term.paths,
          adapters.zero_pad_channels(term.expand, features),
          adapters.average_pool_to(term.narrow, height, width),
        )
        for term in self.terms
      ],
      adapters.average_pool_to(self.stem, height, width),
      self.stem_share,
      adapters.zero_pad_channels(self.bias, features),
    )

  def read(self, reduce: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns W_c x_c of every stream.

    Args:
      reduce: W, float32 [streams, features, w].
      dtype: of the activations.

    Returns:
      [N, H, W, streams * w].
    """
    streams, _, width = reduce.shape
    own = reduce[:, : self.stem.shape[-1]] * self.stem_share[:, None, None]
    total = _conv1x1(
      self.stem, own.transpose(1, 0, 2).reshape(-1, streams * width), dtype
    )
    for term in self.terms:
      kernel = jnp.einsum(
        'ck,kvd,cdw->kvcw', term.paths, term.expand, reduce
      ).reshape(-1, streams * width)
      total += _conv1x1(term.narrow, kernel, dtype)
    bias = _exact('cd,cdw->cw', self.bias, reduce).reshape(-1)
    return total + bias.astype(dtype)

  def pooled(self, features: int) -> jax.Array:
    """Returns the sum of all streams, averaged over space, [N, D]."""
    stem = jnp.mean(layers.widened(self.stem), (1, 2))
    total = adapters.zero_pad_channels(
      stem * self.stem_share.sum(), features
    ) + self.bias.sum(0)
    for term in self.terms:
      count, width, _ = term.expand.shape
      narrow = jnp.mean(layers.widened(term.narrow), (1, 2))
      total += _exact(
        'nkv,k,kvd->nd',
        narrow.reshape(-1, count, width),
        term.paths.sum(0),
        term.expand,
      )
    return total


def _exact(equation: str, *operands: jax.Array) -> jax.Array:
  """An einsum in float32 also where an accelerator's default is narrower.

  For masks and statistics: a variance from a covariance in bfloat16 may come
  out below 0. The large kernels of `Streams.read` are no more exact than the
  convolutions that they are for.
  """
  return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)


def _conv1x1(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
  return jnp.einsum('nhwi,io->nhwo', x.astype(dtype), kernel.astype(dtype))


class BranchBlock(nnx.Module):
  """C bottlenecks side by side, each with its own input.

  Attributes:
    reduce: W, the first 1x1 convolutions, float32 [C, in_features, w].
    expand: the last ones, float32 [C, w, features].
    scale, bias, mean, var: of the BatchNorm after them, [C, features].
    gain: sqrt(1/C), by which what BatchNorm gives is multiplied.
  """

  def __init__(
    self,
    in_features: int,
    branch_width: int,
    features: int,
    *,
    branches: int,
    stride: int = 1,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    """Builds the block; branch_width is w, the rest as in `Bottleneck`."""
    self.branches = branches
    self.stride = stride
    self.dtype = jnp.dtype(dtype)
    inner = branches * branch_width

    # Drawn as the 1x1 convolutions of the ordinary block are: He, by the whole
    # fan-out. But BatchNorm then follows each branch's w channels alone, not
    # all C * w: sqrt(C) keeps the kernels as large against their steps.
    reduce = layers.he_normal_by_fan_out(
      rngs.params(), (in_features, inner), jnp.float32
    )
    expand = layers.he_normal_by_fan_out(
      rngs.params(), (inner, features), jnp.float32
    ) * math.sqrt(branches)
    self.reduce = nnx.Param(
      reduce.reshape(in_features, branches, branch_width).transpose(1, 0, 2)
    )
    self.norm1 = layers.BatchNorm(inner, dtype=dtype)
    self.conv2 = layers.GroupedConv(
      inner, groups=branches, stride=stride, dtype=dtype, rngs=rngs
    )
    self.norm2 = layers.BatchNorm(inner, dtype=dtype)
    self.expand = nnx.Param(expand.reshape(branches, branch_width, features))
    # C scales and biases move the sum of the branches C times as fast as the
    # one of the ordinary block: sqrt(1/C), on value and gradient, undoes it.
    self.gain = branches**-0.5
    # Every branch starts as its shortcut. Starting with F_c at full size, masks
    # drawn anew at each step keep the loss from settling at a rate of 0.1.
    self.scale = nnx.Param(jnp.zeros((branches, features), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((branches, features), jnp.float32))
    self.mean = nnx.BatchStat(jnp.zeros((branches, features), jnp.float32))
    self.var = nnx.BatchStat(jnp.ones((branches, features), jnp.float32))

  def __call__(self, x: Streams, identity: float, *, train: bool) -> Streams:
    """Returns y_c = F_c(x_c) + identity * A(x_c) of every branch."""
    running = not train
    narrow = x.read(self.reduce[...], self.dtype)
    narrow = backend.relu(self.norm1(narrow, use_running_average=running))
    narrow = self.conv2(narrow)
    narrow = backend.relu(self.norm2(narrow, use_running_average=running))

    branches, _, features = self.expand.shape
    mean, var = self._statistics(narrow, train)
    gain = self.gain * self.scale[...] * jax.lax.rsqrt(var + EPSILON)
    _, height, width, _ = narrow.shape
    shortcut = x.adapted(height, width, features).mixed(
      identity * jnp.eye(branches)
    )
    own = Term(jnp.eye(branches), self.expand[...] * gain[:, None], narrow)
    return Streams(
      [*shortcut.terms, own],
      shortcut.stem,
      shortcut.stem_share,
      shortcut.bias + self.gain * self.bias[...] - mean * gain,
    )

  def _statistics(
    self, narrow: jax.Array, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance [C, features] of V h, without computing V h."""
    if not train:
      return self.mean[...], self.var[...]
    branches, width, _ = self.expand.shape
    h = layers.widened(narrow).reshape(-1, branches, width)
    center = jnp.mean(h, 0)
    h -= center
    covariance = _exact('nkv,nku->kvu', h, h) / h.shape[0]
    expand = self.expand[...]
    mean = _exact('kv,kvd->kd', center, expand)
    var = _exact('kvd,kvu,kud->kd', expand, covariance, expand)
    var = jnp.maximum(var, 0)  # rounding may leave less of a small one
    self.mean[...] = MOMENTUM * self.mean[...] + (1 - MOMENTUM) * mean
    self.var[...] = MOMENTUM * self.var[...] + (1 - MOMENTUM) * var
    return mean, var

  def keep(self, live: list[int]) -> None:
    """Drops the kernels, scales and statistics of all other branches."""
    index = jnp.array(live)
    for variable in (
      self.reduce,
      self.expand,
      self.scale,
      self.bias,
      self.mean,
      self.var,
    ):
      variable.set_value(variable[...][index])
    width = self.expand.shape[1]
    channels = (index[:, None] * width + jnp.arange(width)).reshape(-1)
    for norm in (self.norm1, self.norm2):
      parts: Any = (norm.scale, norm.bias, norm.mean, norm.var)
      for variable in parts:
        variable.set_value(variable[...][channels])
    kernel = self.conv2.kernel
    kernel.set_value(kernel[...][..., channels])
    self.conv2.groups = self.branches = len(live)


class BranchStack(Wiring):
  """Blocks of branches in a row, a C x C mask between each two.

  Attributes:
    blocks: the L blocks.
    spec, valid, topology, real_mask: see `Wiring`; [L-1, C, C].
  """

  def __init__(
    self,
    blocks: list[BranchBlock],
    spec: WiringSpec,
    *,
    topology: Topology | BranchTopology | None = None,
    shared_stem: bool = True,
    rngs: nnx.Rngs,
  ) -> None:
    """Builds the stack.

    Args:
      blocks: all with the same number C of branches.
      spec: how they are wired, at level 'branch'. Rule 'fixed_prev' takes the
        branch of the same number alone.
      topology: the branches that each branch takes; no real mask is made then.
      shared_stem: whether s is 1/C in the first block, whatever it is later.
      rngs: its 'connectivity' stream draws r and the random topology.

    Raises:
      InputError: fewer than two blocks, blocks of unlike numbers of branches,
        or a topology of another number of either.
    """
    limits.choice("a BranchStack's level", spec.level, ('branch',))
    limits.whole('the number of blocks', len(blocks), 2, limits.MAX_BLOCKS)
    branches = blocks[0].branches
    if unlike := {block.branches for block in blocks} - {branches}:
      raise InputError(
        f'all blocks need as many branches, not {branches} and {min(unlike)}'
      )
    self.blocks = nnx.List(blocks)
    self._shared_stem = shared_stem
    super().__init__(
      spec,
      valid=connectivity.valid_branches(len(blocks), branches),
      topology=topology,
      rngs=rngs,
    )

  @property
  def identity(self) -> float:
    """s, by the topology where there is one: its K may not be the spec's."""
    branches = self.blocks[-1].branches  # of these none is ever pruned
    if self.spec.identity == '1/C':
      return 1 / branches
    return 1 / (
      self.topology.fan_in if self.topology else min(self.fan_in, branches)
    )

  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
  ) -> jax.Array:
    """Returns the sum of the last branches, averaged over space.

    Args:
      x: the stem's output, [N, H, W, features].
      mask: b, [L-1, C, C], from `draw`; None takes the topology, or without
        one the top-K of r.
      train: whether BatchNorm takes the batch's statistics and keeps them.

    Returns:
      float32 [N, features of the last block].
    """
    if self.topology is not None:
      masks: Any = [jnp.asarray(m, jnp.float32) for m in self._live_masks()]
    elif mask is None:
      masks = connectivity.top_k(self.real_mask[...], self.valid, self.fan_in)
    else:
      masks = mask
    first = self.blocks[0]
    streams = Streams(
      [],
      x,
      jnp.ones(first.branches),
      jnp.zeros((first.branches, first.reduce.shape[1])),
    )
    for index, block in enumerate(self.blocks):
      if index:
        streams = streams.mixed(masks[index - 1])
      shared = self._shared_stem and not index
      # Of the last block's branches none is ever pruned.
      own = 1 / self.blocks[-1].branches if shared else self.identity
      streams = block(streams, own, train=train)
    return streams.pooled(self.blocks[-1].expand.shape[-1])

  def _live_masks(self) -> list[list[list[int]]]:
    """The frozen masks, of the branches that the blocks still hold."""
    held = [
      live if len(live) == block.branches else list(range(block.branches))
      for block, live in zip(
        self.blocks, self.topology.live_branches, strict=True
      )
    ]
    return [
      [
        [int(k in self.topology.sources[i][c]) for k in held[i]]
        for c in held[i + 1]
      ]
      for i in range(len(held) - 1)
    ]

  def prune(self) -> None:
    """See `Wiring.prune`."""
    super().prune()
    for block, live in zip(
      self.blocks, self.topology.live_branches, strict=True
    ):
      if len(live) < block.branches:
        block.keep(list(live))
