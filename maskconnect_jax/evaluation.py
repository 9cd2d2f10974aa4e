"""What a network scores on a split, every example counted once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from maskconnect_jax import batches, datasets, inference, steps, streams
from maskconnect_jax.config import InputError
from maskconnect_jax.datasets import Split, Stream


@dataclasses.dataclass(frozen=True)
class Scores:
  """Means over the examples of a split.

  Attributes:
    accuracy: in [0, 1].
    top5_accuracy: how often the label is among the five best classes.
    loss: cross-entropy of the label, in nats, without smoothing.
    count: how many examples; damaged ones that are skipped do not count.
  """

  accuracy: float
  top5_accuracy: float
  loss: float
  count: int

  def named(self, prefix: str) -> dict[str, float]:
    """Returns {'test_accuracy': ..., ...} for the prefix 'test'."""
    return {
      f'{prefix}_accuracy': self.accuracy,
      f'{prefix}_top5_accuracy': self.top5_accuracy,
      f'{prefix}_loss': self.loss,
    }


class Evaluator:
  """Scores networks on splits, on all devices."""

  def __init__(
    self,
    recipe: steps.Recipe,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    *,
    threads: int,
  ) -> None:
    """batch_size: examples at once, at most; rounded up to all devices."""
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
  ) -> Scores:
    """Returns the scores of a network.

    Args:
      network: the graph that `variables` belong to.
      variables: weights, masks and statistics.
      split: the examples.
      draw_at: each batch draws a mask from r, as this training step would,
        instead of taking the topology or the top-K.
    """
    recipe = dataclasses.replace(self._recipe, network=network)
    # Of a small split no more than it has: the rest would be filling.
    size = min(self._batch_size, len(split))
    size = -(-size // self._mesh.size) * self._mesh.size
    sums = []
    for index, batch in enumerate(
      batches.evaluation_batches(split, size, self._mesh, threads=self._threads)
    ):
      start = index * size
      drawn = draw_at is not None
      key = recipe.key(streams.EVALUATION_MASK, start) if drawn else None
      found = self._step(recipe, variables, *batch, key, draw_at or 0)
      # Waits, lest batches pile up on a device that is slower than its host.
      sums.append(jax.device_get(found))
    return _means(sums)


def of_model(
  model: inference.Classifier, config: ml_collections.ConfigDict
) -> Scores:
  """Returns what a model scores on a config's test images.

  Raises:
    InputError: the data cannot be read, or is not what the model was made for.
  """
  dataset = datasets.load(config.data)
  if dataset.image_shape != model.image_shape:
    raise InputError(
      f'the test images are {_times(dataset.image_shape)}, but the model takes'
      f' {_times(model.image_shape)}; give the --config it was trained with'
    )
  sums = []
  test, size = dataset.test, config.eval_batch_size
  for images, labels, counted in batches.evaluation_shares(
    test, min(size, len(test)), threads=config.data.threads
  ):
    logits = jnp.asarray(model.logits(images))
    found = steps.scores(logits, labels, counted)
    sums.append(jax.device_get(found))
  return _means(sums)


def _means(sums: list[dict[str, Any]]) -> Scores:
  total = {name: sum(one[name].item() for one in sums) for name in sums[0]}
  count = total['count']
  return Scores(
    total['correct'] / count,
    total['correct_of_5'] / count,
    total['loss'] / count,
    count,
  )


def _times(shape: tuple[int, ...]) -> str:
  return ' x '.join(map(str, shape))
