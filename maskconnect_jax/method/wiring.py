"""The wiring of a stack of blocks, at either level: drawn, frozen, pruned.

A `Wiring` holds the real mask while it is learned, and the topology afterwards;
`freeze` and `prune` turn a model that has some into a smaller, static one.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from maskconnect_jax import limits
from maskconnect_jax.method import connectivity, spec
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.method.topology import BranchTopology, Topology


class RealMask(nnx.Variable[jax.Array]):
  """The real-valued mask r, trained by an optimizer group of its own."""


class Wiring(nnx.Module):
  """What the stacks of both levels share: the real mask and the topology.

  Attributes:
    valid: which sources each row may take, bool, of the shape of r.
    fan_in: K.
    topology: the frozen mask, or None while the connectivity is learned.
    real_mask: r, float32; only there when it is learned.
  """

  def __init__(
    self,
    *,
    valid: Any,
    fan_in: int,
    rule: str,
    gradient: str,
    initial: float,
    initial_spread: float,
    rngs: nnx.Rngs,
  ) -> None:
    """Makes r, or the topology of a fixed rule."""
    fan_in = limits.whole('fan_in', fan_in, 1, limits.MAX_FAN_IN)
    limits.choice('rule', rule, spec.RULES)
    limits.choice('gradient', gradient, spec.GRADIENTS)
    limits.number('initial', initial, 0, 1)
    limits.number('initial_spread', initial_spread, 0)
    self.valid = nnx.static(valid)
    self.fan_in = fan_in
    self.gradient = gradient
    self.topology: Any = None
    if rule == 'learned':
      self.real_mask = RealMask(
        connectivity.initial(
          rngs.connectivity(), valid, center=initial, spread=initial_spread
        )
      )
    else:
      # Python must see the mask, also where only shapes are asked for.
      with jax.ensure_compile_time_eval():
        if rule == 'fixed_random':
          mask = connectivity.fixed_random(rngs.connectivity(), valid, fan_in)
        elif rule == 'fixed_all':
          mask = connectivity.fixed_all(valid)
        else:
          mask = connectivity.fixed_prev(valid)
        self.freeze(topology_lib.from_mask(mask))

  def draw(
    self, key: jax.Array, temperature: jax.Array | float = 1.0
  ) -> jax.Array | None:
    """Returns a step's mask b, straight-through to r; None if frozen."""
    if self.topology is not None:
      return None
    return connectivity.draw_through(
      key,
      self.real_mask[...],
      self.valid,
      self.fan_in,
      self.gradient,
      temperature,
    )

  def freeze(self, topology: Topology | BranchTopology | None = None) -> None:
    """Makes the wiring static: as given, or else the top K of r.

    Raises:
      InputError: see `Topology.check`.
    """
    if topology is None:
      topology = topology_lib.from_mask(
        connectivity.freeze(self.real_mask[...], self.valid, self.fan_in)
      )
    topology.check(self.valid)
    self.topology = nnx.static(topology)

  def prune(self) -> None:
    """Drops what the output does not depend on, and the real mask.

    Raises:
      ValueError: the wiring is not frozen.
    """
    if self.topology is None:
      raise ValueError('freeze the model before pruning it')
    if hasattr(self, 'real_mask'):
      del self.real_mask


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
  """Returns a copy whose wiring is static.

  Args:
    model: any module with a `MaskedStack` in it, or one itself.
    topology: what to freeze to; default the top-K of each real mask, or the
      topology a stack already has.

  Raises:
    InputError: the topology cannot be this model's; see `Topology.check`.
  """
  model = nnx.clone(model)
  for wiring in wirings_of(model):
    if topology is not None or wiring.topology is None:
      wiring.freeze(topology)
  return model


def prune(model: Any) -> Any:
  """Returns a copy of a frozen model without what the output ignores.

  The output does not change. What only training needs, the real mask, goes
  too.

  Raises:
    ValueError: the model is not frozen.
  """
  model = nnx.clone(model)
  for wiring in wirings_of(model):
    wiring.prune()
  return model
