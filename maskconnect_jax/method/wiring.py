"""The wiring of a stack of blocks, at either level: drawn, frozen, pruned.

A `Wiring` holds the real mask while it is learned, and the topology once it is
frozen. `freeze` and `prune` make a smaller, static copy of a model that holds
wirings.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskconnect_jax.errors import InputError
from maskconnect_jax.method import connectivity, narrowing
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.method.spec import NARROWING, WiringSpec
from maskconnect_jax.method.topology import BranchTopology, Topology

_DRAWS, _AT_ONCE = 2**18, 256  # in search of a random wiring


class RealMask(nnx.Variable[jax.Array]):
  """The real mask r, which an optimizer group of its own trains."""


class Wiring(nnx.Module):
  """The base of both levels' stacks: the real mask and the topology.

  Attributes:
    spec: how the stack is wired.
    valid: which sources each row may take, bool, of the shape of r.
    topology: the frozen mask, or None while the wiring is learned.
    real_mask: r, float32; absent if a topology was given, under a fixed rule,
      and after `prune`.
  """

  def __init__(
    self,
    spec: WiringSpec,
    *,
    valid: Any,
    topology: Topology | BranchTopology | None,
    rngs: nnx.Rngs,
  ) -> None:
    """Takes the given topology, or makes r or the topology of a fixed rule.

    Args:
      spec: how the stack is wired.
      valid: which sources each row may take, bool [..., rows, sources].
      topology: if given, the spec's rule is not used.
      rngs: its 'connectivity' stream draws r and the random topology.

    Raises:
      InputError: see `Topology.check`; or rule 'fixed_given' has no topology;
        or no random wiring has as many live blocks as the spec asks for.
    """
    self.spec = nnx.static(spec)
    self.valid = nnx.static(valid)
    self.topology: Any = None
    if topology is not None:
      self.freeze(topology)
    elif spec.rule == 'learned':
      self.real_mask = RealMask(
        # A narrowing wiring begins with all sources.
        connectivity.fixed_all(valid)
        if spec.learner in NARROWING
        else connectivity.initial(
          rngs.connectivity(),
          valid,
          center=spec.initial,
          spread=spec.initial_spread,
        )
      )
    elif spec.rule == 'fixed_given':
      raise InputError("rule='fixed_given' needs a topology")
    else:
      # The mask becomes numbers of Python, even under `jax.eval_shape`.
      with jax.ensure_compile_time_eval():
        if spec.rule == 'fixed_random':
          mask = _random_mask(rngs.connectivity(), valid, spec)
        elif spec.rule == 'fixed_near':
          mask = connectivity.fixed_near(valid, spec.fan_in)
        elif spec.rule == 'fixed_all':
          mask = connectivity.fixed_all(valid)
        else:
          mask = connectivity.fixed_prev(valid)
        self.freeze(topology_lib.from_mask(mask))

  @property
  def fan_in(self) -> int:
    """K, the fan-in of the spec."""
    return self.spec.fan_in

  @property
  def row_fan_in(self) -> np.ndarray:
    """k_j, the number of sources each row draws; int [..., rows]."""
    return connectivity.fan_in_of(self.valid, self.fan_in)

  def mask(self) -> jax.Array:
    """Returns b without a draw: the top K of r, or all sources still kept."""
    real_mask = self.real_mask[...]
    if self.spec.learner in NARROWING:
      return narrowing.kept(real_mask, self.valid)
    return connectivity.top_k(real_mask, self.valid, self.fan_in)

  def draw(
    self,
    key: jax.Array,
    temperature: jax.Array | float | None = None,
    newcomers: jax.Array | float = 1.0,
  ) -> jax.Array | None:
    """Returns the mask b of one step, or None if the wiring is frozen.

    The gradient of b passes straight through to r; see `connectivity.proxy`.

    Args:
      key: a PRNG key, another one for each step.
      temperature: T of the draw, float32 []. None takes the spec's temperature,
        which is T of the last draws. `spec.temperature_at` gives T of any draw.
      newcomers: the weight w of `narrowing.fading_in`, for start='previous'.

    Returns:
      b, of r's shape and dtype, with k_j ones in row j. While a wiring narrows,
      nothing is drawn: b is `mask()`, or fades in.
    """
    if self.topology is not None:
      return None
    spec, real_mask = self.spec, self.real_mask[...]
    if spec.learner in NARROWING:
      if spec.start == 'all':
        return self.mask()
      chain = connectivity.fixed_prev(self.valid)
      return narrowing.fading_in(self.mask(), chain, newcomers)
    gradient = spec.gradient
    if temperature is None:
      temperature = spec.temperature
    if spec.learner == 'as_published':
      gradient, temperature = 'all', 1.0
    mask = connectivity.draw(
      key, real_mask, self.valid, self.fan_in, temperature
    )
    return connectivity.straight_through(
      connectivity.proxy(real_mask, mask, self.valid, gradient), mask
    )

  def freeze(self, topology: Topology | BranchTopology | None = None) -> None:
    """Makes the wiring static.

    Args:
      topology: the topology to freeze to; default the top K of r.

    Raises:
      InputError: see `Topology.check`.
    """
    if topology is None:
      best = jax.jit(connectivity.top_k, static_argnums=2)
      topology = topology_lib.from_mask(
        best(self.real_mask[...], np.asarray(self.valid), self.fan_in)
      )
    topology.check(self.valid)
    self.topology = nnx.static(topology)

  def prune(self) -> None:
    """Drops the real mask and the parts on which the output does not depend.

    Raises:
      ValueError: the wiring is not frozen.
    """
    if self.topology is None:
      raise ValueError('freeze the model before pruning it')
    if hasattr(self, 'real_mask'):
      del self.real_mask


def _random_mask(key: jax.Array, valid: Any, spec: WiringSpec) -> jax.Array:
  """Returns the mask of rule 'fixed_random', with `spec.live` live blocks."""

  def draw(key: jax.Array) -> jax.Array:
    return connectivity.fixed_random(key, valid, spec.fan_in)

  if not spec.live:
    return draw(key)
  draw_many = jax.jit(jax.vmap(draw))
  for part in jax.random.split(key, _DRAWS // _AT_ONCE):
    masks = np.asarray(draw_many(jax.random.split(part, _AT_ONCE)))
    for found in np.flatnonzero(_num_live(masks) == spec.live):
      return jnp.asarray(masks[found])
  raise InputError(
    f'none of {_DRAWS:,} random wirings with fan_in={spec.fan_in} has'
    f' {spec.live} live {"blocks" if spec.level == "block" else "branches"}'
  )


def _num_live(masks: np.ndarray) -> np.ndarray:
  """Returns for each mask how many blocks, or branches, the output depends on.

  Args:
    masks: [N, L, L] or, at the branch level, [N, L - 1, C, C].

  Returns:
    int [N].
  """
  taken = masks.astype(bool)
  if taken.ndim == 3:
    needed = np.zeros((len(taken), taken.shape[1] + 1), bool)
    needed[:, -1] = True
    for block in range(taken.shape[1], 0, -1):
      needed[:, :-1] |= needed[:, block, None] & taken[:, block - 1]
    return needed[:, 1:].sum(-1)
  layer = np.ones((len(taken), taken.shape[-1]), bool)
  count = layer.sum(-1)
  for block in range(taken.shape[1] - 1, -1, -1):
    layer = (layer[:, :, None] & taken[:, block]).any(1)
    count += layer.sum(-1)
  return count


def wirings_of(model: nnx.Module) -> list[Wiring]:
  """Returns every stack in a model, the model itself included."""
  return [
    module
    for _, module in nnx.iter_modules(model)
    if isinstance(module, Wiring)
  ]


def freeze(
  model: Any, topology: Topology | BranchTopology | None = None
) -> Any:
  """Returns a copy of a model with a static wiring.

  Args:
    model: a stack, or any module that holds stacks.
    topology: the topology to freeze to. By default a stack keeps the topology
      it already has, and any other stack gets the top K of its real mask.

  Raises:
    InputError: the topology does not fit the model; see `Topology.check`.
  """
  model = nnx.clone(model)
  for wiring in wirings_of(model):
    if topology is not None or wiring.topology is None:
      wiring.freeze(topology)
  return model


def prune(model: Any) -> Any:
  """Returns a copy of a frozen model without the parts its output ignores.

  The output does not change. The real mask is dropped, too: only the
  connectivity phase needs it.

  Args:
    model: a frozen stack, or any module that holds frozen stacks.

  Raises:
    ValueError: the model is not frozen.
  """
  model = nnx.clone(model)
  for wiring in wirings_of(model):
    wiring.prune()
  return model
