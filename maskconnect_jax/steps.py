"""One training step and one evaluation step: pure functions.

Everything random in them is a function of (seed, step), so a run that was cut
and resumed draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from maskconnect_jax import augment
from maskconnect_jax.stack import RealMask

# The streams of random numbers: fold_in(fold_in(key(seed), stream), step).
ORDER, CROP, FLIP, MASK, EVALUATION_MASK = range(5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that the next step depends on.

  Attributes:
    step: int32 [], steps done.
    order: int32 [N], this epoch's order of the training set.
    weights: kernels, biases, BatchNorm scales, float32.
    masks: the real masks, float32; empty where the topology is fixed.
    statistics: BatchNorm's running averages, float32.
    optimizer: optax state of weights and masks.
  """

  step: jax.Array
  order: jax.Array
  weights: Any
  masks: Any
  statistics: Any
  optimizer: Any

  def variables(self) -> tuple[Any, Any, Any]:
    """The parts that `nnx.merge` makes a model of, in the order of `split`."""
    return self.weights, self.masks, self.statistics


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a step is compiled for; hashable, a static argument of jit.

  Attributes:
    network: the model's graph, without its arrays.
    optimizer: of {'weights': ..., 'masks': ...}.
    seed: of everything random.
    batch_size: examples in a step, on all devices together.
    pad, flip, mean, std: see `config.data`.
    label_smoothing: see `config.optimizer`.
    batch_sharding: how a batch lies on the devices.
  """

  network: Any
  optimizer: optax.GradientTransformation
  seed: int
  batch_size: int
  pad: int
  flip: bool
  mean: tuple[float, ...]
  std: tuple[float, ...]
  label_smoothing: float
  batch_sharding: jax.sharding.NamedSharding

  def key(self, stream: int, step: jax.Array | int) -> jax.Array:
    """Returns the key of one stream at one step."""
    root = jax.random.fold_in(jax.random.key(self.seed), stream)
    return jax.random.fold_in(root, step)

  def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    """Tells layers that shard by hand, inside the step, which mesh it is."""
    mesh = self.batch_sharding.mesh
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def split(model: nnx.Module) -> tuple[Any, Any, Any, Any]:
  """Returns (network, weights, masks, statistics) of a model."""
  network, *states = nnx.split(model, nnx.Param, RealMask, nnx.BatchStat)
  weights, masks, statistics = states
  return network, weights, masks, statistics


def init_state(
  model: nnx.Module,
  optimizer: optax.GradientTransformation,
  num_examples: int,
) -> TrainState:
  """Returns the state before the first step."""
  _, weights, masks, statistics = split(model)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    order=jnp.zeros((num_examples,), jnp.int32),
    weights=weights,
    masks=masks,
    statistics=statistics,
    optimizer=optimizer.init({'weights': weights, 'masks': masks}),
  )


def epoch_order(
  recipe: Recipe, order: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the epoch's order, new at its first step, and the place in it."""
  num_examples = order.shape[0]
  position = step % (num_examples // recipe.batch_size)
  order = jax.lax.cond(
    position == 0,
    lambda: jax.random.permutation(
      recipe.key(ORDER, step), num_examples
    ).astype(jnp.int32),
    lambda: order,
  )
  return order, position * recipe.batch_size


def training_batch(
  recipe: Recipe,
  images: jax.Array,
  labels: jax.Array,
  indices: jax.Array,
  step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Gathers, normalises and augments one batch.

  Args:
    recipe: of the run.
    images: uint8 [N, H, W, C], the whole training set, on the device.
    labels: int32 [N].
    indices: int32 [batch].
    step: int32 [], decides crops and flips.

  Returns:
    float32 [batch, H, W, C] and int32 [batch], sharded over the devices.
  """
  indices = jax.lax.with_sharding_constraint(indices, recipe.batch_sharding)
  batch = augment.normalize(images[indices], recipe.mean, recipe.std)
  if recipe.pad:
    batch = augment.random_crop(recipe.key(CROP, step), batch, recipe.pad)
  if recipe.flip:
    batch = augment.random_flip(recipe.key(FLIP, step), batch)
  return batch, labels[indices]


def train_step(
  recipe: Recipe, state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one step of SGD on weights and, while they are learned, masks.

  Args:
    recipe: static.
    state: before the step.
    images: uint8 [N, H, W, C], the training set.
    labels: int32 [N].

  Returns:
    The state after the step, and {'loss', 'accuracy'}, float32 [], of the
    batch before the update.
  """
  order, start = epoch_order(recipe, state.order, state.step)
  indices = jax.lax.dynamic_slice(order, (start,), (recipe.batch_size,))
  inputs, targets = training_batch(recipe, images, labels, indices, state.step)

  def loss_of(params: dict[str, Any]) -> tuple[jax.Array, tuple[Any, Any]]:
    model = nnx.merge(
      recipe.network,
      params['weights'],
      params['masks'],
      state.statistics,
      copy=True,
    )
    mask = model.draw(recipe.key(MASK, state.step))
    logits = model(inputs, mask, train=True)
    smooth = optax.smooth_labels(
      jax.nn.one_hot(targets, logits.shape[-1]), recipe.label_smoothing
    )
    loss = jnp.mean(optax.softmax_cross_entropy(logits, smooth))
    return loss, (logits, nnx.state(model, nnx.BatchStat))

  params = {'weights': state.weights, 'masks': state.masks}
  with recipe.on_mesh():
    (loss, (logits, statistics)), gradients = jax.value_and_grad(
      loss_of, has_aux=True
    )(params)
  updates, optimizer_state = recipe.optimizer.update(
    gradients, state.optimizer, params
  )
  params = optax.apply_updates(params, updates)
  accuracy = jnp.mean(jnp.argmax(logits, -1) == targets, dtype=jnp.float32)
  return TrainState(
    step=state.step + 1,
    order=order,
    weights=params['weights'],
    masks=params['masks'],
    statistics=statistics,
    optimizer=optimizer_state,
  ), {'loss': loss, 'accuracy': accuracy}


def batch_statistics(
  recipe: Recipe,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  index: jax.Array,
) -> Any:
  """Returns BatchNorm's statistics over the index-th batch of an epoch alone.

  A running average that starts from 0 is (1 - momentum) times the batch's.
  Blocks that the topology leaves out keep theirs.
  """
  step = state.step + index
  order = jax.random.permutation(
    recipe.key(ORDER, state.step), state.order.shape[0]
  )
  count = state.order.shape[0] // recipe.batch_size
  indices = jax.lax.dynamic_slice(
    order, (index % count * recipe.batch_size,), (recipe.batch_size,)
  )
  inputs, _ = training_batch(recipe, images, labels, indices, step)
  zeros = jax.tree.map(jnp.zeros_like, state.statistics)
  model = nnx.merge(
    recipe.network, state.weights, state.masks, zeros, copy=True
  )
  with recipe.on_mesh():
    model(inputs, train=True)
  statistics = jax.tree.map(
    lambda s: s / (1 - model.stem.norm.momentum),
    nnx.state(model, nnx.BatchStat),
  )
  for block, live in enumerate(model.topology.live):
    if not live:
      statistics['stack']['blocks'][block] = state.statistics['stack'][
        'blocks'
      ][block]
  return statistics


def eval_step(
  recipe: Recipe,
  variables: tuple[Any, Any, Any],
  images: jax.Array,
  labels: jax.Array,
  counted: jax.Array,
  mask_key: jax.Array | None,
) -> dict[str, jax.Array]:
  """Returns sums over a batch, so that batches add up exactly.

  Args:
    recipe: static.
    variables: `TrainState.variables()`.
    images: uint8 [batch, H, W, C].
    labels: int32 [batch].
    counted: bool [batch]; False for the padding of the last batch.
    mask_key: draws the mask; None takes the topology or the top-K of r.

  Returns:
    {'correct': int32 [], 'loss': float32 [], 'count': int32 []}.
  """
  model = nnx.merge(recipe.network, *variables, copy=True)
  mask = None if mask_key is None else model.draw(mask_key)
  with recipe.on_mesh():
    logits = model(augment.normalize(images, recipe.mean, recipe.std), mask)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  right = (jnp.argmax(logits, -1) == labels) & counted
  return {
    'correct': jnp.sum(right, dtype=jnp.int32),
    'loss': jnp.sum(jnp.where(counted, losses, 0.0)),
    'count': jnp.sum(counted, dtype=jnp.int32),
  }
