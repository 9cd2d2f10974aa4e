"""Accuracy of a network on a split, every example counted once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import ml_collections
import numpy as np

from maskconnect_jax import batches, datasets, distributed, inference, steps
from maskconnect_jax.config import InputError
from maskconnect_jax.datasets import Split, Stream


class Evaluator:
  """Accuracy on a split, every example counted once."""

  def __init__(
    self,
    recipe: steps.Recipe,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    *,
    threads: int,
  ) -> None:
    self._recipe = recipe
    self._batch_size = batch_size
    self._mesh = mesh
    self._threads = threads
    self._step = jax.jit(steps.eval_step, static_argnums=0)

  def __call__(
    self,
    network: Any,
    variables: Any,
    split: Split | Stream,
    *,
    draw_at: int | None = None,
  ) -> tuple[float, int]:
    """Returns the accuracy in [0, 1], and of how many examples.

    Args:
      network: the graph that `variables` belong to.
      variables: weights, masks and statistics.
      split: the examples; damaged ones that are skipped do not count.
      draw_at: each batch draws a mask from r, as this training step would,
        instead of taking the topology or the top-K.
    """
    recipe = dataclasses.replace(self._recipe, network=network)
    total = {'correct': 0, 'count': 0}
    for index, batch in enumerate(
      batches.evaluation_batches(
        split, self._batch_size, self._mesh, threads=self._threads
      )
    ):
      start = index * self._batch_size
      drawn = draw_at is not None
      key = recipe.key(steps.EVALUATION_MASK, start) if drawn else None
      sums = self._step(recipe, variables, *batch, key, draw_at or 0)
      total = {name: total[name] + int(sums[name]) for name in total}
    return total['correct'] / total['count'], total['count']


def of_model(
  model: inference.Classifier, config: ml_collections.ConfigDict
) -> tuple[float, int]:
  """Returns a model's accuracy on a config's test images, and their number.

  Raises:
    InputError: the data cannot be read, or is not what the model was made for.
  """
  dataset = datasets.load(config.data)
  if dataset.image_shape != model.image_shape:
    raise InputError(
      f'the test images are {_times(dataset.image_shape)}, but the model takes'
      f' {_times(model.image_shape)}; give the --config it was trained with'
    )
  right = count = 0
  for images, labels, counted in batches.evaluation_batches(
    dataset.test,
    config.eval_batch_size,
    distributed.make_mesh(),
    threads=config.data.threads,
  ):
    found = model.probabilities(np.asarray(images)).argmax(-1)
    right += int(((found == labels) & counted).sum())
    count += int(counted.sum())
  return right / count, count


def _times(shape: tuple[int, ...]) -> str:
  return ' x '.join(map(str, shape))
