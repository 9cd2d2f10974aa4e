"""Blocks of any kind in a row, each fed by a masked sum of sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskconnect_jax import backend, limits
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import adapters, connectivity
from maskconnect_jax.method.aggregate import fan_out, masked_sum, static_sum
from maskconnect_jax.method.spec import REMATS, WiringSpec
from maskconnect_jax.method.topology import BranchTopology, Topology
from maskconnect_jax.method.wiring import Wiring


class Pruned(nnx.Module):
  """The place of a pruned block: no parameters, only its output's shape.

  The next block still adapts its sources to that shape.
  """

  def __init__(self, block: nnx.Module) -> None:
    graphdef, state = nnx.split(block)
    leaves, tree = jax.tree.flatten(state)
    # Static attributes must be hashable: hence tuples, not lists.
    self.graphdef = nnx.static(graphdef)
    self.tree = nnx.static(tree)
    self.leaves = nnx.static(
      tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)
    )

  def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
    """Returns the block's output for parameters of zeros.

    It is called under `jax.eval_shape` only, so nothing is computed.
    """
    state = jax.tree.unflatten(
      self.tree, [jnp.zeros(shape, dtype) for shape, dtype in self.leaves]
    )
    return nnx.merge(self.graphdef, state)(x, **options)


class MaskedStack(Wiring):
  """Blocks in a row, each fed by a masked sum of sources.

  x_j = c · Σ_i b[j,i] · A(y_i),   y_j = F_j(x_j),   j = 1..L,   y_0 = the input

  The adapter A brings source i to the shape of y_{j-1}, once per source and
  shape. If A returns fewer channels, zero channels are appended. Without a
  topology the program reads every valid source, and the mask is an argument.
  With a topology the program reads only the sources that are taken. It leaves
  out the blocks on which the output does not depend.

  Attributes:
    blocks: the L blocks, each called as `block(x, **options)`.
    adapter: A.
    spec, valid, topology, real_mask: see `Wiring`; the masks are [L, L].
  """

  def __init__(
    self,
    blocks: Sequence[nnx.Module],
    spec: WiringSpec | None = None,
    *,
    valid: tuple[tuple[bool, ...], ...] | None = None,
    adapter: Callable[..., jax.Array] | None = None,
    topology: Topology | BranchTopology | None = None,
    remat: str = 'none',
    rngs: nnx.Rngs,
    **wiring: Any,
  ) -> None:
    """Builds the stack.

    Args:
      blocks: modules that map one array to one array.
      spec: the wiring, of level 'block'; default `WiringSpec()`.
      valid: bool [L, L], the sources that each block may take; default all
        earlier ones.
      adapter: A(x, shape, source) brings x, the source of number `source`, to
        the shape or to fewer channels; default `adapters.PoolAdapter()`.
      topology: the sources that each block takes. If given, no real mask is
        made.
      remat: 'none'; or 'block': the backward pass computes the activations
        inside a block again, and they are not kept. This takes a third more
        arithmetic and less memory.
      rngs: its 'connectivity' stream draws r and the random topology.
      **wiring: fields of the spec to replace, such as fan_in=2.

    Raises:
      InputError: no block or too many, a value that `WiringSpec` refuses, a
        level other than 'block', a `valid` of another shape, a `valid` in which
        a block has no source or one that does not come before it, or a topology
        that `valid` does not allow.
    """
    limits.whole('the number of blocks', len(blocks), 1, limits.MAX_BLOCKS)
    limits.choice('remat', remat, REMATS)
    spec = dataclasses.replace(spec or WiringSpec(), **wiring)
    limits.choice("a MaskedStack's level", spec.level, ('block',))
    if valid is not None:
      _check_valid(valid, len(blocks))
    self.blocks = nnx.List(blocks)
    self.adapter = adapters.PoolAdapter() if adapter is None else adapter
    self.remat = remat
    super().__init__(
      spec,
      valid=valid or connectivity.valid_sources(len(blocks)),
      topology=topology,
      rngs=rngs,
    )

  def scale_of(self, num_terms: int) -> float:
    """Returns c, 1 / num_terms or 1, for a sum of `num_terms` sources."""
    return 1 / num_terms if self.spec.scale == 'mean' else 1.0

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    keep: jax.Array | None = None,
    **options: Any,
  ) -> jax.Array:
    """Returns y_L.

    Args:
      x: y_0, [batch, ...]; all outputs have the same first axis.
      mask: b, [L, L], from `draw`, with any number of ones in a row; None takes
        `mask()`. A topology takes the place of both.
      keep: [batch, L]; block j is called with its column, `keep=keep[:, j]`,
        such as what stochastic depth multiplies residuals with. None: no block
        gets one.
      **options: passed on to every block, such as train=True.

    Returns:
      The last block's output, [batch, ...].

    Raises:
      ValueError: the adapter returned a wrong shape.
    """
    return self.outputs(x, mask, keep=keep, **options)[-1]

  def outputs(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    keep: jax.Array | None = None,
    **options: Any,
  ) -> list[Any]:
    """Returns all sources: y_0, the input, to y_L; see `__call__`.

    In place of the output of a block that a topology leaves out stands its
    shape and dtype, a `jax.ShapeDtypeStruct`.
    """
    if self.topology is not None:
      return self._run_frozen(x, self.topology, keep, options)
    if mask is None:
      mask = self.mask()
    sources = _MaskedOutputs(x, self.adapter, self._weights(mask))
    run = _runner(options, self.remat)
    for number, (block, valid) in enumerate(
      zip(self.blocks, self.valid, strict=True)
    ):
      total = sources.masked_sum(number, valid)
      sources.outputs.append(run(block, total, _column(keep, number)))
    return sources.outputs

  def _weights(self, mask: jax.Array) -> jax.Array:
    """Returns the weight c_j * b[j, i] of each source in each sum, [L, L]."""
    mask = jnp.where(np.array(self.valid), mask, 0)
    if self.spec.scale == 'sum':
      return mask
    # k_j is a number, not a function of b: its gradient would be another one.
    count = jax.lax.stop_gradient(mask.sum(-1, keepdims=True))
    return mask * (1 / jnp.maximum(count, 1))

  def _run_frozen(
    self,
    x: jax.Array,
    topology: Topology,
    keep: jax.Array | None,
    options: dict[str, Any],
  ) -> list[Any]:
    sources = _Outputs(x, self.adapter)
    run = _runner(options, self.remat)
    for number, (block, picked, live) in enumerate(
      zip(self.blocks, topology.sources, topology.live, strict=True)
    ):
      if live:
        total = sources.static_sum(picked, self.scale_of(len(picked)))
        sources.outputs.append(run(block, total, _column(keep, number)))
      else:
        sources.outputs.append(jax.eval_shape(block, sources.outputs[-1]))
    return sources.outputs

  def prune(self) -> None:
    """See `Wiring.prune`."""
    super().prune()
    edges = set()
    for target, (sources, live) in enumerate(
      zip(self.topology.sources, self.topology.live, strict=True)
    ):
      if live:
        edges |= {(source, target) for source in sources}
      elif not isinstance(self.blocks[target], Pruned):
        self.blocks[target] = Pruned(self.blocks[target])
    if isinstance(self.adapter, adapters.ProjectionAdapter):
      self.adapter.prune(edges)


def _column(keep: jax.Array | None, number: int) -> dict[str, Any]:
  return {} if keep is None else {'keep': keep[:, number]}


def _check_valid(valid: Any, num_blocks: int) -> None:
  """Raises InputError unless each block has sources, all of them before it."""
  table = np.asarray(valid)
  if table.shape != (num_blocks, num_blocks):
    raise InputError(
      f'valid is of shape {table.shape}; {num_blocks} blocks need'
      f' {(num_blocks, num_blocks)}'
    )
  if np.triu(table, 1).any():
    raise InputError('valid lets a block take a source that comes after it')
  if not table.any(1).all():
    raise InputError('valid leaves a block without a source')


def _runner(
  options: dict[str, Any], remat: str
) -> Callable[[nnx.Module, jax.Array, dict[str, Any]], jax.Array]:
  """Returns the function that runs a block on its input and its own options.

  The function splits a block into its graph, which is static, and its arrays.
  Of blocks with equal graphs only the first is traced.

  Args:
    options: the options of every block's call.
    remat: see `MaskedStack`.
  """
  plain = {
    name: option
    for name, option in options.items()
    if isinstance(option, bool | int | float | str | None)
  }
  arrays = {name: options[name] for name in options.keys() - plain.keys()}
  run: Callable[..., Any] = _run
  call: Callable[..., Any] = _call
  if remat == 'block':
    run = jax.checkpoint(run, static_argnums=(0, 1))
    call = nnx.remat(call, static_argnums=(1,))

  def run_block(block: Any, x: jax.Array, own: dict[str, Any]) -> Any:
    graph, state = nnx.split(block)
    given = arrays | own
    try:
      hash(graph)
    except TypeError:  # such as that of a user's block that holds a list
      return call(block, tuple(plain.items()), x, given)
    y, changed = run(graph, tuple(plain.items()), state, x, given)
    if changed:
      nnx.update(block, changed)
    return y

  return run_block


@backend.traced_once(0, 1)
def _run(
  graph: Any,
  plain: tuple[tuple[str, Any], ...],
  state: Any,
  x: jax.Array,
  arrays: dict[str, Any],
) -> tuple[jax.Array, Any]:
  """Returns a block's output and the part of its state that it changed."""
  block = nnx.merge(graph, state)
  before = {
    path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(block))
  }
  y = _call(block, plain, x, arrays)
  return y, nnx.from_flat_state(
    (path, leaf)
    for path, leaf in nnx.to_flat_state(nnx.state(block))
    if leaf.get_value() is not before.get(path)
  )


def _call(
  block: Any,
  plain: tuple[tuple[str, Any], ...],
  x: jax.Array,
  arrays: dict[str, Any],
) -> Any:
  return block(x, **dict(plain), **arrays)


class _Outputs:
  """The sources so far; each is adapted to a shape once, for all readers."""

  def __init__(self, x: jax.Array, adapter: Any) -> None:
    self.outputs: list[Any] = [x]
    self._adapter = adapter
    # The forms of each source by shape, in the order they were made.
    self._forms: dict[int, dict[tuple[int, ...], jax.Array]] = {}

  def static_sum(self, picked: Sequence[int], scale: float) -> jax.Array:
    """Returns the picked sources' scaled sum, in the newest output's shape."""
    features = self.outputs[-1].shape[-1]
    return static_sum([self._take(i) for i in picked], scale, features)

  def _take(self, i: int) -> jax.Array:
    """Returns source i in the newest output's shape, or with fewer channels."""
    x, shape = self.outputs[i], self.outputs[-1].shape
    if x.shape == shape:
      return x
    forms = self._forms.setdefault(i, {})
    if shape not in forms:
      # Any other adapter may mix channels, and gets the source itself.
      if isinstance(self._adapter, adapters.PoolAdapter):
        x = adapters.pooled_furthest([x, *forms.values()], shape)
      y = self._adapter(x, shape, i)
      if y.shape[:-1] != shape[:-1] or y.shape[-1] > shape[-1]:
        raise ValueError(
          f'the adapter has brought source {i} to the shape {y.shape}, but'
          f' {shape} is needed, or fewer channels'
        )
      forms[shape] = backend.written_in_own_dtype(y)
    return forms[shape]


class _MaskedOutputs(_Outputs):
  """The sources so far, and their masked sums."""

  def __init__(self, x: jax.Array, adapter: Any, weights: jax.Array) -> None:
    """Begins with source 0, x, [batch, ...]; weights are [L, L]."""
    super().__init__(x, adapter)
    self._rows = backend.rows_for_images(jax.lax.stop_gradient(weights), len(x))
    self._columns = backend.rows_for_images(weights.T, len(x))
    # Of each source and shape the copies for the blocks still to come.
    self._copies: dict[tuple[int, tuple[int, ...]], dict[int, jax.Array]] = {}

  def masked_sum(self, number: int, valid: Sequence[bool]) -> jax.Array:
    """Returns the sum that a block reads, of the newest output's shape.

    Args:
      number: of the block, from 0.
      valid: which of the sources 0..L-1 it may take.
    """
    newest = self.outputs[-1]
    taken = [i for i, ok in enumerate(valid) if ok]
    (weights,) = backend.rows_of(self._rows[number], [taken])
    sources = tuple(self._copy(i, number) for i in taken)
    return masked_sum(weights, sources, newest.shape[-1]).astype(newest.dtype)

  def _copy(self, i: int, number: int) -> jax.Array:
    """Returns source i as `_take`, in the copy for block `number`."""
    key = i, self.outputs[-1].shape
    if key not in self._copies:
      copies = fan_out(self._columns[i][number:], self._take(i))
      self._copies[key] = dict(enumerate(copies, start=number))
    return self._copies[key][number]
