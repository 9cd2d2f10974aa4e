"""What other masks would cost: losses on training batches, in one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maskconnect_jax.run import objective, steps, train_state


def _losses_of_masks(
  recipe: train_state.Recipe,
  variables: tuple[Any, Any, Any],
  images: jax.Array,
  labels: jax.Array,
  step: Any,
) -> Callable[[jax.Array], jax.Array]:
  """Returns the function of a mask to the loss of each image; see below."""
  inputs = steps.augmented(recipe, images, step)
  variables = recipe.whole(variables)

  def losses(mask: jax.Array) -> jax.Array:
    model = nnx.merge(recipe.network, *variables)
    logits = model(inputs, mask, train=True)
    return objective.losses(logits, labels, multi_label=recipe.multi_label)

  return losses


def differences(
  recipe: train_state.Recipe,
  variables: tuple[Any, Any, Any],
  images: jax.Array,
  labels: jax.Array,
  step: Any,
  masks: jax.Array,
  count: jax.Array | int,
  at_once: int,
) -> jax.Array:
  """Returns what other masks cost on a training batch.

  BatchNorm takes the batch's statistics, as in training.

  Args:
    recipe: a static argument of jit.
    variables: weights, masks and statistics.
    images: uint8 [batch, H, W, C].
    labels: see `steps.train_step`.
    step: int32 [], decides crops and flips.
    masks: [1 + n, ...]; the first is the one that the others are compared with.
    count: int32 [], at most n, how many of the others are computed.
    at_once: how many masks are computed side by side, a static argument that
      divides n.

  Returns:
    float32 [n, 2]: the sum over the images of loss(mask) - loss(first mask),
    and that of the squares. From the row `count` on they mean nothing.
  """
  losses = _losses_of_masks(recipe, variables, images, labels, step)

  def sums(mask: jax.Array) -> jax.Array:
    difference = losses(mask) - base
    return jnp.stack([difference.sum(), jnp.square(difference).sum()])

  def measured(turn: Any, found: jax.Array) -> jax.Array:
    start = turn * at_once
    some = jax.lax.dynamic_slice_in_dim(masks, 1 + start, at_once)
    # Under `vmap` each call of compiled code becomes a loop of its own.
    own = sums(some[0])[None] if at_once == 1 else jax.vmap(sums)(some)
    return jax.lax.dynamic_update_slice_in_dim(found, own, start, 0)

  with recipe.on_mesh():
    base = losses(masks[0])
    turns = (count + at_once - 1) // at_once
    found = jnp.zeros((len(masks) - 1, 2), base.dtype)
    return jax.lax.fori_loop(0, turns, measured, found)


def mask_gradient(
  recipe: train_state.Recipe,
  variables: tuple[Any, Any, Any],
  images: jax.Array,
  labels: jax.Array,
  step: Any,
  mask: jax.Array,
) -> jax.Array:
  """Returns dloss/db of a training batch, float32, of b's shape.

  Args:
    recipe: a static argument of jit.
    variables: weights, masks and statistics.
    images: uint8 [batch, H, W, C].
    labels: see `steps.train_step`.
    step: int32 [], decides crops and flips.
    mask: b.
  """
  losses = _losses_of_masks(recipe, variables, images, labels, step)
  with recipe.on_mesh():
    return jax.grad(lambda mask: jnp.mean(losses(mask)))(mask)
