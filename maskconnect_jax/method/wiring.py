"""The wiring of a stack of blocks, at either level: drawn, frozen, pruned.

A `Wiring` holds the real mask while it is learned, and the topology afterwards;
`freeze` and `prune` turn a model that has some into a smaller, static one.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from maskconnect_jax.errors import InputError
from maskconnect_jax.method import connectivity
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.method.topology import BranchTopology, Topology


class RealMask(nnx.Variable[jax.Array]):
  """The real-valued mask r, trained by an optimizer group of its own."""


class Wiring(nnx.Module):
  """What the stacks of both levels share: the real mask and the topology.

  Attributes:
    spec: how the stack is wired.
    valid: which sources each row may take, bool, of the shape of r.
    topology: the frozen mask, or None while the connectivity is learned.
    real_mask: r, float32; only there when it is learned.
  """

  def __init__(
    self,
    spec: WiringSpec,
    *,
    valid: Any,
    topology: Topology | BranchTopology | None,
    rngs: nnx.Rngs,
  ) -> None:
    """Takes the topology that is given, or makes r or that of a fixed rule.

    Raises:
      InputError: see `Topology.check`; or rule 'fixed_given' has no topology.
    """
    self.spec = nnx.static(spec)
    self.valid = nnx.static(valid)
    self.topology: Any = None
    if topology is not None:
      self.freeze(topology)
    elif spec.rule == 'learned':
      self.real_mask = RealMask(
        connectivity.initial(
          rngs.connectivity(),
          valid,
          center=spec.initial,
          spread=spec.initial_spread,
        )
      )
    elif spec.rule == 'fixed_given':
      raise InputError("rule='fixed_given' needs a topology")
    else:
      # Python must see the mask, also where only shapes are asked for.
      with jax.ensure_compile_time_eval():
        if spec.rule == 'fixed_random':
          mask = connectivity.fixed_random(
            rngs.connectivity(), valid, spec.fan_in
          )
        elif spec.rule == 'fixed_all':
          mask = connectivity.fixed_all(valid)
        else:
          mask = connectivity.fixed_prev(valid)
        self.freeze(topology_lib.from_mask(mask))

  @property
  def fan_in(self) -> int:
    """K, as the spec says."""
    return self.spec.fan_in

  @property
  def row_fan_in(self) -> np.ndarray:
    """k_j, the sources of each row while it is learned; int [..., rows]."""
    return connectivity.fan_in_of(self.valid, self.fan_in)

  def draw(
    self, key: jax.Array, temperature: jax.Array | float | None = None
  ) -> jax.Array | None:
    """Returns a step's mask b, straight-through to r; None if frozen.

    Args:
      key: a PRNG key, another for each step.
      temperature: T of the draw, float32 []; None is the spec's, that of the
        last draws. `spec.temperature_at` makes it fall from 1.

    Returns:
      b, of r's shape and dtype, with k_j ones in row j.
    """
    if self.topology is not None:
      return None
    if temperature is None:
      temperature = self.spec.temperature
    real_mask = self.real_mask[...]
    mask = connectivity.draw(
      key, real_mask, self.valid, self.fan_in, temperature
    )
    return connectivity.straight_through(
      connectivity.proxy(real_mask, mask, self.valid, self.spec.gradient), mask
    )

  def freeze(self, topology: Topology | BranchTopology | None = None) -> None:
    """Makes the wiring static: as given, or else the top K of r.

    Raises:
      InputError: see `Topology.check`.
    """
    if topology is None:
      topology = topology_lib.from_mask(
        connectivity.top_k(self.real_mask[...], self.valid, self.fan_in)
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
