"""One training step and one evaluation step: pure functions.

Everything random in them is a function of (seed, step). So a resumed run makes
the same random draws as an uninterrupted one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from maskconnect_jax.networks import layers, streams
from maskconnect_jax.run import augment, distributed, objective
from maskconnect_jax.run.train_state import (
  Recipe,
  TrainState,
  shardings,
)


def augmented(recipe: Recipe, images: jax.Array, step: jax.Array) -> jax.Array:
  """Normalises and augments one batch.

  Args:
    recipe: the recipe of the run.
    images: uint8 [batch, H, W, C].
    step: int32 [], decides crops, flips and erased boxes.

  Returns:
    float32 [batch, H, W, C].
  """
  batch = augment.normalize(images, recipe.mean, recipe.std)
  if recipe.pad:
    batch = augment.random_crop(
      recipe.key(streams.CROP, step), batch, recipe.pad
    )
  if recipe.flip:
    batch = augment.random_flip(recipe.key(streams.FLIP, step), batch)
  if recipe.erasing:
    batch = augment.random_erasing(
      recipe.key(streams.ERASING, step), batch, recipe.erasing
    )
  return batch


def mixed(
  recipe: Recipe, images: jax.Array, targets: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns a batch after mixup or CutMix.

  If the recipe has both, a fair coin decides for each step.

  Args:
    recipe: the recipe of the run.
    images: float32 [batch, H, W, C].
    targets: float32 [batch, num_classes].
    step: int32 [], decides the shares, the box and the coin.
  """
  kinds = []
  if recipe.mixup:
    kinds.append((augment.mixup, streams.MIXUP, recipe.mixup))
  if recipe.cutmix:
    kinds.append((augment.cutmix, streams.CUTMIX, recipe.cutmix))
  found = [
    mix(recipe.key(stream, step), images, targets, alpha)
    for mix, stream, alpha in kinds
  ]
  if len(found) < 2:
    return found[0] if found else (images, targets)
  coin = jax.random.fold_in(recipe.key(streams.CUTMIX, step), 1)
  heads = jax.random.bernoulli(coin)
  return jax.tree.map(lambda a, b: jnp.where(heads, a, b), *found)


def train_step(
  recipe: Recipe, state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one step of SGD on weights and, while they are learned, real masks.

  Args:
    recipe: a static argument of jit.
    state: the state before the step.
    images: uint8 [batch, H, W, C].
    labels: int32 [batch], or bool [batch, num_classes]; see `objective`.

  Returns:
    The state after the step, and {'loss', 'accuracy'}, float32 [], of this
    batch before the update. Of several labels, accuracy is the share of labels,
    given or not, that are right at a probability of 0.5.
  """
  pixels = augmented(recipe, images, state.step)

  def loss_of(
    params: dict[str, Any], statistics: Any, inputs: Any, targets: Any
  ) -> tuple[jax.Array, tuple[Any, Any]]:
    model = nnx.merge(
      recipe.network, params['weights'], params['masks'], statistics
    )
    mask = model.draw(
      recipe.key(streams.MASK, state.step),
      recipe.temperature(state.step),
      recipe.newcomers(state.step),
    )
    logits = model(inputs['images'], mask, train=True, keep=inputs['keep'])
    loss = jnp.mean(
      objective.losses(logits, targets, multi_label=recipe.multi_label)
    )
    return loss, (logits, nnx.as_pure(nnx.state(model, nnx.BatchStat)))

  held = {'weights': state.weights, 'masks': state.masks}
  params = recipe.whole(held)
  num_classes = state.weights['head']['kernel'].shape[-1]
  targets = objective.targets(
    labels,
    num_classes,
    recipe.label_smoothing,
    multi_label=recipe.multi_label,
  )
  pixels, targets = mixed(recipe, pixels, targets, state.step)
  if recipe.class_weights:
    targets *= jnp.asarray(recipe.class_weights)
  keep = None
  if recipe.drop_path:
    keep = augment.drop_path(
      recipe.key(streams.DROP_PATH, state.step),
      len(labels),
      len(state.weights['stack']['blocks']),
      recipe.drop_path,
    )
  inputs = {'images': pixels, 'keep': keep}
  with recipe.on_mesh():
    if recipe.parts == 1:
      (loss, (logits, statistics)), gradients = _gradients(recipe, loss_of)(
        params, state.statistics, inputs, targets
      )
    else:
      loss, logits, statistics, gradients = _in_parts(
        recipe, loss_of, params, state.statistics, inputs, targets
      )
  if recipe.shard:  # each device gets its part of the summed gradients
    own = shardings(recipe, state)
    gradients = jax.lax.with_sharding_constraint(
      gradients, {'weights': own.weights, 'masks': own.masks}
    )
  updates, optimizer_state = recipe.optimizer.update(
    gradients, state.optimizer, held
  )
  params = optax.apply_updates(held, updates)
  found = objective.predicted(logits, multi_label=recipe.multi_label)
  accuracy = jnp.mean(found == labels, dtype=jnp.float32)
  after = TrainState(
    step=state.step + 1,
    weights=params['weights'],
    masks=params['masks'],
    statistics=statistics,
    optimizer=optimizer_state,
    average=averaged(recipe, state, params['weights'], statistics),
  )
  if recipe.shard:
    after = jax.lax.with_sharding_constraint(after, own)
  return after, {'loss': loss, 'accuracy': accuracy}


def _gradients(recipe: Recipe, loss_of: Any) -> Any:
  """Returns the function that gives loss, logits, statistics and gradients.

  With `recipe.own_statistics` each device computes those of its own images,
  with BatchNorm's statistics of these. Loss, gradients and running averages are
  the means over the devices, which all have as many images.
  """
  of_images = jax.value_and_grad(loss_of, has_aux=True)
  if not recipe.own_statistics:
    return of_images

  def of_own_images(*arguments: Any) -> Any:
    (loss, (logits, statistics)), gradients = of_images(*arguments)
    loss, statistics, gradients = jax.lax.pmean(
      (loss, statistics, gradients), 'data'
    )
    return (loss, (logits, statistics)), gradients

  split, whole = PartitionSpec('data'), PartitionSpec()
  return jax.shard_map(
    of_own_images,
    mesh=recipe.batch_sharding.mesh,
    in_specs=(whole, whole, split, split),
    out_specs=((whole, (split, whole)), whole),
    check_vma=False,
  )


def _in_parts(
  recipe: Recipe,
  loss_of: Any,
  params: dict[str, Any],
  statistics: Any,
  inputs: Any,
  targets: jax.Array,
) -> tuple[jax.Array, jax.Array, Any, Any]:
  """Returns loss, logits, statistics and gradients, one part after another.

  Image i is in part i mod n. So each device has as many images of each part,
  and none moves. BatchNorm takes the statistics of a part, and its running
  averages take a step a part. All else equals the whole batch up to rounding.

  Args:
    recipe: has the number of parts, which divides the images of a device.
    loss_of: the loss of a part, with (logits, statistics) beside it.
    params: weights and masks.
    statistics: before the step.
    inputs: a tree of arrays [batch, ...].
    targets: float32 [batch, num_classes].
  """
  sharding, count = recipe.batch_sharding, recipe.parts

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return jax.lax.with_sharding_constraint(
      x, jax.sharding.NamedSharding(sharding.mesh, spec)
    )

  def joined(x: jax.Array) -> jax.Array:
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

  def add(carried: Any, own: Any) -> tuple[Any, Any]:
    statistics, total, loss = carried
    (part, (logits, statistics)), gradients = _gradients(recipe, loss_of)(
      params, statistics, *own
    )
    total = jax.tree.map(jnp.add, total, gradients)
    return (statistics, total, loss + part), logits

  zeros = jax.tree.map(jnp.zeros_like, params)
  (statistics, total, loss), logits = jax.lax.scan(
    add,
    (statistics, zeros, jnp.zeros(())),
    jax.tree.map(split, (inputs, targets)),
  )
  gradients = jax.tree.map(lambda g: g / count, total)
  return loss / count, joined(logits), statistics, gradients


def averaged(
  recipe: Recipe, state: TrainState, weights: Any, statistics: Any
) -> dict[str, Any]:
  """Returns a <- d a + (1 - d) w, with d = min(average, (1 + t) / (10 + t)).

  t counts the steps done, as in TensorFlow's ExponentialMovingAverage. In early
  steps d is smaller, so that the average soon forgets the start of the run.

  Args:
    recipe: `recipe.average` of 0 takes no averages.
    state: the state before the step, with t and a.
    weights: weights after the step.
    statistics: BatchNorm's statistics after the step.

  Returns:
    {'weights', 'statistics'}, or {} if the recipe takes no averages.
  """
  if not recipe.average:
    return {}
  decay = jnp.minimum(recipe.average, (1 + state.step) / (10 + state.step))
  return optax.incremental_update(
    {'weights': weights, 'statistics': statistics}, state.average, 1 - decay
  )


def batch_statistics(
  recipe: Recipe, variables: tuple[Any, Any, Any], images: jax.Array, step: Any
) -> Any:
  """Returns BatchNorm's statistics over one training batch alone.

  A running average that starts from 0 is, after one batch, (1 - momentum) times
  the batch's statistics. Blocks that the topology prunes keep their statistics.

  Args:
    recipe: a static argument of jit; its network is frozen.
    variables: weights, masks and statistics.
    images: uint8 [batch, H, W, C].
    step: int32 [], decides crops and flips.

  Returns:
    The statistics, float32, of the structure of `TrainState.statistics`.
  """
  weights, masks, statistics = recipe.whole(variables)
  inputs = augmented(recipe, images, step)
  zeros = jax.tree.map(jnp.zeros_like, statistics)
  model = nnx.merge(recipe.network, weights, masks, zeros)
  with recipe.on_mesh():
    model(inputs, train=True)
  measured = jax.tree.map(
    lambda s: s / (1 - layers.MOMENTUM),
    nnx.as_pure(nnx.state(model, nnx.BatchStat)),
  )
  for block, live in enumerate(model.topology.live):
    if not live:
      measured['stack']['blocks'][block] = statistics['stack']['blocks'][block]
  return measured


def eval_step(
  recipe: Recipe,
  variables: tuple[Any, Any, Any],
  images: jax.Array,
  labels: jax.Array,
  counted: jax.Array,
  mask_key: jax.Array | None,
  mask_step: jax.Array | int,
) -> dict[str, jax.Array]:
  """Returns sums over a batch, so that batches add up exactly.

  Args:
    recipe: a static argument of jit.
    variables: `TrainState.variables()`.
    images: uint8 [batch, H, W, C].
    labels: see `train_step`.
    counted: bool [batch]; False for the padding of the last batch.
    mask_key: draws the mask; None takes the topology, or the top K of r.
    mask_step: the training step whose temperature the draw uses.

  Returns:
    See `objective.scores`; and 'outcomes', see `objective.outcomes`, on all
    devices.
  """
  model = nnx.merge(recipe.network, *recipe.whole(variables))
  mask = None
  if mask_key is not None:
    mask = model.draw(
      mask_key, recipe.temperature(mask_step), recipe.newcomers(mask_step)
    )
  with recipe.on_mesh():
    logits = model(augment.normalize(images, recipe.mean, recipe.std), mask)
  several = recipe.multi_label
  return objective.scores(logits, labels, counted, multi_label=several) | {
    'outcomes': jax.lax.with_sharding_constraint(
      objective.outcomes(logits, labels, counted, multi_label=several),
      distributed.replicated(recipe.batch_sharding.mesh),
    )
  }
