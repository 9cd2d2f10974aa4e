"""Accuracy of a network on a split, every example counted once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from maskconnect_jax import datasets, distributed, steps


class Evaluator:
  """Accuracy on a split, every example counted once."""

  def __init__(
    self, recipe: steps.Recipe, batch_size: int, mesh: jax.sharding.Mesh
  ) -> None:
    self._recipe = recipe
    self._batch_size = batch_size
    self._sharding = distributed.sharded(mesh)
    self._step = jax.jit(steps.eval_step, static_argnums=0)

  def __call__(
    self,
    network: Any,
    variables: Any,
    split: datasets.Split,
    *,
    draw_masks: bool = False,
  ) -> float:
    """Returns the accuracy in [0, 1].

    Args:
      network: the graph that `variables` belong to.
      variables: weights, masks and statistics.
      split: images and labels; the last batch is padded, the padding not
        counted.
      draw_masks: whether each batch draws a mask from r, as in training,
        instead of taking the topology or the top-K.
    """
    recipe = dataclasses.replace(self._recipe, network=network)
    size, correct = self._batch_size, 0
    for start in range(0, len(split), size):
      images = split.images[start : start + size]
      missing = size - len(images)
      labels = np.pad(split.labels[start : start + size], (0, missing))
      images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
      counted = np.arange(size) < size - missing
      batch = distributed.to_global((images, labels, counted), self._sharding)
      key = recipe.key(steps.EVALUATION_MASK, start) if draw_masks else None
      correct += int(self._step(recipe, variables, *batch, key)['correct'])
    return correct / len(split)
