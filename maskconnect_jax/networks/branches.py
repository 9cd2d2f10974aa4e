"""Branch-level connectivity: each branch of a ResNeXt block picks branches.

Between blocks i-1 and i lies one C x C mask b. Branch c of block i computes

  x_c = sum_k b[c, k] * y_k         over the branches k of block i-1
  y_c = F_c(x_c) + s * A(x_c)       s = 1/K; F_c is a whole bottleneck

All branches of the first block take the stem's output; there s = 1/C. The head
reads the sum of the last block's branches. Ahmed, Torresani, "Connectivity
Learning in Multi-Branch Networks", 2017, arXiv 1709.09582.

The scale s. The sum of a block's C branches holds the stem's output once, for
any K and C: s = 1/C makes it so in the first block, and s = 1/K keeps it so in
the later ones. With s = 1/K in the first block, too, the sum would hold it C/K
times. The curvature of the loss in the head's kernel grows with the square of
C/K. At the start, on CIFAR-10 with C = 8 and 32 channels, the curvature was 0.8
for K = 8, 3.8 for K = 4, 20 for K = 2 and 79 for K = 1. With s = 1/C it is 0.7
for each K. SGD with Nesterov's momentum of 0.9 and a rate of 0.1 is stable
below 2 (1 + 0.9) / ((1 + 2 * 0.9) 0.1) = 13.6. Above this bound a fixed wiring
still settled. A drawn wiring with K = 1 did not: each step takes other chains
of branches, and the head was not yet corrected on them. The loss was not finite
after about 90 to 140 steps (docs/notebook.md).

The scale of F_c. Within a branch, BatchNorm's output is multiplied by
sqrt(1/C): see `BranchBlock`. The sum of C such terms is as large as the one
term of the ordinary block, and SGD moves the sum as fast.

Memory. An x_c and a y_c are as wide as the block's output, and each block has C
of both. Stored at full width they take C times the memory of the ordinary
ResNeXt. But F_c begins with a 1x1 convolution W_c, and it ends in a 1x1
convolution V_c and BatchNorm. Let h_c be the narrow activations (w channels)
before V_c. From the h of one block to W_c of a later one, all is linear. So x_c
is kept as its factors, never as their product:

  x_c = sum_j sum_k P_j[c, k] * V_j,k h_j,k  +  a_c * stem  +  bias_c

P_j = b (s b) ... (s b) is a small matrix. A block reads x_c through

  W_c x_c = sum_j sum_k (P_j[c, k] * W_c V_j,k) h_j,k  +  ...

This is one dense 1x1 convolution, from narrow to narrow activations, for each
earlier block j. BatchNorm needs the statistics of V h, which follow from those
of h: the mean is V m with m = mean(h), the variance is diag(V Cov(h) V^T). No
activation of full width exists anywhere. The gradient of every b[c, k], drawn
or not, is a by-product of the gradient of these small kernels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maskconnect_jax import backend, convolution, limits
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import adapters, connectivity
from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.method.topology import BranchTopology, Topology
from maskconnect_jax.method.wiring import Wiring
from maskconnect_jax.networks import layers
from maskconnect_jax.networks.layers import EPSILON, MOMENTUM


@dataclasses.dataclass
class Term:
  """The term of one block in x_c or y_c: P, V and h of the equation.

  B is the number of the x_c or y_c, C the number of that block's branches.
  """

  paths: jax.Array  # P, [B, C]
  expand: jax.Array  # V, [C, w, features]
  narrow: jax.Array  # h, [N, H, W, C * w]


@dataclasses.dataclass
class Factors:
  """The inputs x_c, or the outputs y_c, of a block's B branches, as factors.

  Attributes:
    terms: one for each block so far.
    stem: source 0, [N, H, W, features of the stem].
    stem_share: a, float32 [B].
    bias: float32 [B, features].
  """

  terms: list[Term]
  stem: jax.Array
  stem_share: jax.Array
  bias: jax.Array

  def mixed(self, mask: jax.Array) -> Factors:
    """Returns x_c = sum_k mask[c, k] * y_k for each c; self holds the y_k.

    Args:
      mask: float32 [number of the x_c, B].
    """
    return Factors(
      [
        Term(_exact('ck,kj->cj', mask, term.paths), term.expand, term.narrow)
        for term in self.terms
      ],
      self.stem,
      _exact('ck,k->c', mask, self.stem_share),
      _exact('ck,kd->cd', mask, self.bias),
    )

  def adapted(self, height: int, width: int, features: int) -> Factors:
    """Returns A(x_c) for each c: average-pooled, with zero channels appended.

    Both operations are linear. So the pool acts on the narrow activations, and
    the zeros are appended to the kernels.

    Args:
      height: H after the pool.
      width: W after the pool.
      features: channels with the zeros.
    """
    return Factors(
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
    """Returns W_c x_c for each c.

    Args:
      reduce: W, float32 [B, features, w].
      dtype: of the activations.

    Returns:
      [N, H, W, B * w], in `dtype`.
    """
    count, _, width = reduce.shape
    own = reduce[:, : self.stem.shape[-1]] * self.stem_share[:, None, None]
    total = _conv1x1(
      self.stem, own.transpose(1, 0, 2).reshape(-1, count * width), dtype
    )
    for term in self.terms:
      kernel = jnp.einsum(
        'ck,kvd,cdw->kvcw', term.paths, term.expand, reduce
      ).reshape(-1, count * width)
      total += _conv1x1(term.narrow, kernel, dtype)
    bias = _exact('cd,cdw->cw', self.bias, reduce).reshape(-1)
    return total + bias.astype(dtype)

  def pooled(self, features: int) -> jax.Array:
    """Returns sum_c y_c, averaged over space, float32 [N, features]."""
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
  """Returns an einsum in float32, even if an accelerator's default is narrower.

  Masks and statistics need it: a variance from a covariance in bfloat16 may
  come out below 0. The large kernels of `Factors.read` do not need it: the
  convolutions that use them are no more exact.
  """
  return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)


def _conv1x1(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
  return convolution.across_channels(x.astype(dtype), kernel.astype(dtype))


class BranchBlock(nnx.Module):
  """C bottlenecks side by side, each with its own input.

  Attributes:
    reduce: W, the first 1x1 convolutions, float32 [C, in_features, w].
    expand: V, the last 1x1 convolutions, float32 [C, w, features].
    scale, bias, mean, var: of the BatchNorm after V, float32 [C, features].
    gain: sqrt(1/C), the factor of this BatchNorm's output.
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
    """Builds the block.

    Args:
      in_features: channels of each branch's input.
      branch_width: w, channels between a branch's 1x1 convolutions.
      features: channels of each branch's output.
      branches: C.
      stride: of the 3x3 convolution and the shortcut.
      dtype: of the activations.
      rngs: its 'params' stream draws the kernels.
    """
    self.branches = branches
    self.stride = stride
    self.dtype = jnp.dtype(dtype)
    inner = branches * branch_width

    # The kernels are drawn like the 1x1 convolutions of the ordinary block: He,
    # by the fan-out of all branches. But here BatchNorm follows V of w channels
    # in each branch, not V of all C * w. The factor sqrt(C) keeps V as large,
    # relative to its steps, as in the ordinary block.
    reduce = layers.he_normal_by_fan_out(rngs.params(), (in_features, inner))
    expand = layers.he_normal_by_fan_out(
      rngs.params(), (inner, features)
    ) * math.sqrt(branches)
    self.reduce = nnx.Param(
      reduce.reshape(in_features, branches, branch_width).transpose(1, 0, 2)
    )
    self.norm1 = layers.BatchNorm(inner, dtype=dtype)
    self.conv2 = layers.Conv(
      inner,
      inner,
      3,
      groups=branches,
      stride=stride,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm2 = layers.BatchNorm(inner, dtype=dtype)
    self.expand = nnx.Param(expand.reshape(branches, branch_width, features))
    # The ordinary block has one scale and bias for a channel. C of them would
    # move the sum of the branches C times as fast. The factor sqrt(1/C) acts on
    # value and gradient, and undoes that.
    self.gain = branches**-0.5
    # Scale 0: every branch starts as its shortcut. If F_c starts at full size,
    # the loss does not settle at a rate of 0.1 while masks are drawn.
    self.scale = nnx.Param(jnp.zeros((branches, features), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((branches, features), jnp.float32))
    self.mean = nnx.BatchStat(jnp.zeros((branches, features), jnp.float32))
    self.var = nnx.BatchStat(jnp.ones((branches, features), jnp.float32))

  def __call__(
    self, x: Factors, identity: jax.Array | float, *, train: bool
  ) -> Factors:
    """Returns y_c = F_c(x_c) + s * A(x_c) for each branch c.

    Args:
      x: the x_c.
      identity: s, one number or float32 [C].
      train: whether BatchNorm takes the batch's statistics and keeps them.
    """
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
    return Factors(
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
    var = jnp.maximum(var, 0)  # rounding may make a small one negative
    self.mean[...] = MOMENTUM * self.mean[...] + (1 - MOMENTUM) * mean
    self.var[...] = MOMENTUM * self.var[...] + (1 - MOMENTUM) * var
    return mean, var

  def keep(self, live: list[int]) -> None:
    """Keeps some branches and drops the arrays of all others.

    Args:
      live: the numbers of the branches to keep, in rising order.
    """
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
    self.branches = len(live)


class BranchStack(Wiring):
  """Blocks of branches in a row, with a C x C mask between neighbours.

  Attributes:
    blocks: the L blocks.
    spec, valid, topology, real_mask: see `Wiring`; the masks are [L-1, C, C].
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
      spec: the wiring, of level 'branch'. Under rule 'fixed_prev' a branch
        takes only the branch of the same number.
      topology: the branches that each branch takes. If given, no real mask is
        made.
      shared_stem: True: s is 1/C in the first block. False: s is the same in
        all blocks.
      rngs: its 'connectivity' stream draws r and the random topology.

    Raises:
      InputError: fewer than two blocks or too many, a level other than
        'branch', blocks that differ in their number of branches, or a topology
        with another number of blocks or branches.
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
    """s, the scale of the shortcuts, 1/K, 1/C or 1.

    With a topology, K is the topology's, which may differ from the spec's. A
    mask has an s for each branch: see `_identity_of`.
    """
    branches = self.blocks[-1].branches  # C: the last block keeps all branches
    if self.spec.identity != '1/K':
      return 1 / branches if self.spec.identity == '1/C' else 1.0
    return 1 / (
      self.topology.fan_in if self.topology else min(self.fan_in, branches)
    )

  def _identity_of(self, mask: jax.Array) -> jax.Array | float:
    """Returns s of the branches that a mask feeds: a number, or float32 [C].

    Args:
      mask: b between two blocks, [C, C]. Row c has k_c ones, and s = 1/k_c.
    """
    if self.topology is not None or self.spec.identity != '1/K':
      return self.identity
    count = jax.lax.stop_gradient(mask.sum(-1))
    return 1 / jnp.maximum(count, 1)

  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
  ) -> jax.Array:
    """Returns the sum of the last branches, averaged over space.

    Args:
      x: the stem's output, [N, H, W, features].
      mask: b, [L-1, C, C], from `draw`, with any number of ones in a row; None
        takes `mask()`. A topology takes the place of both.
      train: whether BatchNorm takes the batch's statistics and keeps them.

    Returns:
      float32 [N, features of the last block].
    """
    last = self._run(x, mask, train)[-1]
    return last.pooled(self.blocks[-1].expand.shape[-1])

  def outputs(self, x: jax.Array) -> list[jax.Array]:
    """Returns the sum of each block's branches, averaged over space.

    Args:
      x: the stem's output, [N, H, W, features].

    Returns:
      L arrays, float32 [N, features of the block].
    """
    return [
      factors.pooled(block.expand.shape[-1])
      for block, factors in zip(
        self.blocks, self._run(x, None, False), strict=True
      )
    ]

  def _run(
    self, x: jax.Array, mask: jax.Array | None, train: bool
  ) -> list[Factors]:
    """Returns the outputs y_c of all blocks."""
    if self.topology is not None:
      masks: Any = [jnp.asarray(m, jnp.float32) for m in self.live_masks()]
    elif mask is None:
      masks = self.mask()
    else:
      masks = mask
    first = self.blocks[0]
    factors = Factors(
      [],
      x,
      jnp.ones(first.branches),
      jnp.zeros((first.branches, first.reduce.shape[1])),
    )
    found = []
    for index, block in enumerate(self.blocks):
      own: jax.Array | float = self.identity
      if index:
        factors = factors.mixed(masks[index - 1])
        own = self._identity_of(masks[index - 1])
      elif self._shared_stem and self.spec.identity != '1':
        # The last block keeps all C branches; earlier blocks may be pruned.
        own = 1 / self.blocks[-1].branches
      factors = block(factors, own, train=train)
      found.append(factors)
    return found

  def live_masks(self) -> list[list[list[int]]]:
    """Returns the frozen masks of the branches that the blocks still hold.

    Each of the L-1 is of zeros and ones, [branches, branches before].
    """
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
