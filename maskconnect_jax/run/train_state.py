"""The state of a run, the constants of its steps, how both lie on devices."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maskconnect_jax.method.wiring import RealMask
from maskconnect_jax.networks import streams
from maskconnect_jax.run import distributed

# Arrays of fewer entries are not split over the devices: it would save hardly
# any memory, and cost a message each.
_SMALL = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state of training, from which the next step begins.

  Attributes:
    step: int32 [], steps done.
    weights: kernels, biases, BatchNorm scales, float32.
    masks: the real masks, float32; empty where the topology is fixed.
    statistics: BatchNorm's running averages, float32.
    optimizer: optax state of weights and masks.
    average: {'weights', 'statistics'}, their moving averages; {} if the recipe
      takes no averages.
  """

  step: jax.Array
  weights: Any
  masks: Any
  statistics: Any
  optimizer: Any
  average: dict[str, Any]

  def variables(self) -> tuple[Any, Any, Any]:
    """Returns (weights, masks, statistics), the variables of the model.

    The order is that of `split` and `nnx.merge`. Evaluation and the stored
    model use these variables. Weights and statistics are the moving averages if
    the recipe takes averages.
    """
    own = {'weights': self.weights, 'statistics': self.statistics}
    own |= self.average
    return own['weights'], self.masks, own['statistics']


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The constants of a compiled step: a hashable, static argument of jit.

  Attributes:
    network: the model's graph, without its arrays.
    optimizer: updates {'weights': ..., 'masks': ...}.
    seed: seed of all random streams.
    temperature: temperature of the drawn masks, by step.
    pad, flip, mean, std, mixup, cutmix, erasing: see `config.data`.
    drop_path: see `config.model`.
    class_weights: the weight of each class in the loss; (): 1 each.
    multi_label: whether an image has several labels, see `objective`.
    label_smoothing, average: see `config.optimizer`.
    batch_sharding: how a batch lies on the devices.
    parts: in how many parts the gradient of a batch is computed.
    shard: whether each device keeps a part of the weights, see `shardings`.
    own_statistics: whether BatchNorm takes the statistics of the images on each
      device, not of the whole batch, in training steps.
    newcomers: the weight w of `narrowing.fading_in`, by step.
  """

  network: Any
  optimizer: optax.GradientTransformation
  seed: int
  temperature: optax.Schedule
  pad: int
  flip: bool
  mean: tuple[float, ...]
  std: tuple[float, ...]
  mixup: float
  label_smoothing: float
  average: float
  batch_sharding: jax.sharding.NamedSharding
  parts: int = 1
  cutmix: float = 0.0
  erasing: float = 0.0
  drop_path: float = 0.0
  class_weights: tuple[float, ...] = ()
  multi_label: bool = False
  shard: bool = False
  own_statistics: bool = False
  newcomers: optax.Schedule = lambda step: 1.0

  def key(self, stream: int, step: jax.Array | int) -> jax.Array:
    """Returns the random key of one of `streams` at one step."""
    return streams.at_step(self.seed, stream, step)

  def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    """Sets the mesh for the layers that shard by hand inside a step."""
    mesh = self.batch_sharding.mesh
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)

  def whole(self, tree: Any) -> Any:
    """Returns arrays that each device has in full, inside a compiled step."""
    if not self.shard:
      return tree
    return jax.lax.with_sharding_constraint(
      tree, distributed.replicated(self.batch_sharding.mesh)
    )


def split(model: nnx.Module) -> tuple[Any, Any, Any, Any]:
  """Returns (network, weights, masks, statistics) of a model.

  The last three hold plain arrays. With Flax's variables, Python would take
  every variable apart and rebuild it at each call of a compiled step.
  """
  network, *states = nnx.split(model, nnx.Param, RealMask, nnx.BatchStat)
  weights, masks, statistics = map(nnx.as_pure, states)
  return network, weights, masks, statistics


def init_state(model: nnx.Module, recipe: Recipe) -> TrainState:
  """Returns the state before the first step."""
  _, weights, masks, statistics = split(model)
  average = {'weights': weights, 'statistics': statistics}
  trained = {'weights': weights, 'masks': masks}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    weights=weights,
    masks=masks,
    statistics=statistics,
    # One program; otherwise each shape of a momentum would have its own.
    optimizer=jax.jit(recipe.optimizer.init)(trained),
    average=average if recipe.average else {},
  )


def shardings(recipe: Recipe, state: TrainState) -> TrainState:
  """Returns how a state lies on the devices: a sharding for each array.

  If the recipe shards, weights, their momentum and their averages are split
  over the devices, each along its longest axis that the number of devices
  divides. Small arrays and those without such an axis stay whole everywhere, as
  do masks and statistics.

  Args:
    recipe: has the mesh.
    state: arrays, or their shapes.
  """
  mesh = recipe.batch_sharding.mesh
  everywhere = distributed.replicated(mesh)

  def split(leaf: Any) -> NamedSharding:
    axes = [n for n in leaf.shape if n % mesh.size == 0]
    if not recipe.shard or leaf.size < _SMALL or not axes:
      return everywhere
    axis = leaf.shape.index(max(axes))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'data'))

  found = jax.tree.map(lambda _: everywhere, state)
  return dataclasses.replace(
    found,
    weights=jax.tree.map(split, state.weights),
    optimizer=jax.tree.map(split, state.optimizer),
    average=found.average
    and found.average
    | {'weights': jax.tree.map(split, state.average['weights'])},
  )


def gathered(recipe: Recipe, state: TrainState) -> tuple[Any, Any, Any]:
  """Returns `TrainState.variables`, each of them whole on every device."""
  if not recipe.shard:
    return state.variables()
  whole: tuple[Any, Any, Any] = jax.jit(recipe.whole)(state.variables())
  return whole


def on_devices(recipe: Recipe, state: TrainState) -> TrainState:
  """Returns a state of host arrays as global arrays, see `shardings`."""
  return jax.tree.map(distributed.to_global, state, shardings(recipe, state))
