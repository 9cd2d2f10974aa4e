"""What a network is asked for: the class of an image, or its several labels.

Labels are class indices, int32 [batch]; or bool [batch, num_classes] of a
multi-label set. Targets are what a training step makes of them: smoothed and
mixed, float32 [batch, num_classes].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def targets(
  labels: jax.Array, num_classes: int, smoothing: float, *, multi_label: bool
) -> jax.Array:
  """Returns smoothed targets, float32 [batch, num_classes].

  Args:
    labels: see the module.
    num_classes: outputs of the network.
    smoothing: s. A one-hot y becomes (1 - s) y + s / num_classes. Each label of
      several is a choice of two, so that y becomes (1 - s) y + s / 2.
    multi_label: whether an image has several labels.
  """
  if multi_label:
    return (1 - smoothing) * labels.astype(jnp.float32) + smoothing / 2
  return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def losses(
  logits: jax.Array, wanted: jax.Array, *, multi_label: bool
) -> jax.Array:
  """Returns the loss of each image in nats, float32 [batch].

  Of one class it is the cross-entropy of the softmax. Of several labels it is
  the cross-entropy of each label's sigmoid, averaged over the classes.

  Args:
    logits: float32 [batch, num_classes].
    wanted: targets or labels, see the module.
    multi_label: whether an image has several labels.
  """
  if multi_label:
    return optax.sigmoid_binary_cross_entropy(logits, wanted).mean(-1)
  if wanted.ndim == 1:
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
  return optax.softmax_cross_entropy(logits, wanted)


def predicted(logits: jax.Array, *, multi_label: bool) -> jax.Array:
  """Returns the labels that a network gives: the form of `labels`.

  Of several labels it gives those with a probability above 0.5.
  """
  if multi_label:
    return logits > 0
  return jnp.argmax(logits, -1)


def scores(
  logits: jax.Array,
  labels: jax.Array,
  counted: jax.Array,
  *,
  multi_label: bool,
) -> dict[str, jax.Array]:
  """Returns sums over the counted examples.

  Args:
    logits: float32 [batch, num_classes].
    labels: see the module.
    counted: bool [batch]; False for padding.
    multi_label: whether an image has several labels.

  Returns:
    {'count': int32 [], 'loss': float32 []}, and of one class
    {'correct', 'correct_of_5': int32 []}. A label is among the 5 if fewer than
    5 classes have a larger logit.
  """
  found = losses(logits, labels, multi_label=multi_label)
  sums = {}
  if not multi_label:  # the scores of several labels are no sums
    own = jnp.take_along_axis(logits, labels[:, None], -1)
    larger = jnp.sum(~(logits <= own), -1)  # a NaN counts as larger
    right = predicted(logits, multi_label=False) == labels
    sums = {
      'correct': jnp.sum(right & counted, dtype=jnp.int32),
      'correct_of_5': jnp.sum((larger < 5) & counted, dtype=jnp.int32),
    }
  return sums | {
    'loss': jnp.sum(jnp.where(counted, found, 0.0)),
    'count': jnp.sum(counted, dtype=jnp.int32),
  }


def outcomes(
  logits: jax.Array,
  labels: jax.Array,
  counted: jax.Array,
  *,
  multi_label: bool,
) -> jax.Array:
  """Returns what each example is beside what the network makes of it.

  Args:
    logits: float32 [batch, num_classes].
    labels: see the module.
    counted: bool [batch]; False for padding.
    multi_label: whether an image has several labels.

  Returns:
    The label and the class it was taken for, int32 [batch, 2]. Of several
    labels: 0 or 1 and the logit, float32 [batch, 2, num_classes]. Padding is
    -1 throughout.
  """
  if multi_label:
    pairs = jnp.stack([labels.astype(logits.dtype), logits], 1)
    return jnp.where(counted[:, None, None], pairs, -1)
  taken = predicted(logits, multi_label=False).astype(jnp.int32)
  pairs = jnp.stack([labels, taken], -1)
  return jnp.where(counted[:, None], pairs, -1)
