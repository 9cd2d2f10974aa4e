"""Scores of a network on a split, with every example counted once."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from maskconnect_jax.data import datasets, photographs, sources
from maskconnect_jax.data.datasets import LazySplit, Split
from maskconnect_jax.errors import InputError
from maskconnect_jax.networks import streams
from maskconnect_jax.run import (
  batches,
  distributed,
  inference,
  objective,
  scores,
  steps,
  train_state,
)

_TIMED = 3  # calls of a network, of which the fastest counts


class Stopped(Exception):
  """The run is to stop, so a measurement was not finished."""


class Evaluator:
  """Scores networks on splits, on all devices."""

  def __init__(
    self,
    recipe: train_state.Recipe,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    *,
    threads: int,
    stopping: Callable[[], bool] = lambda: False,
    pause: Callable[
      [], contextlib.AbstractContextManager[None]
    ] = contextlib.nullcontext,
  ) -> None:
    """Stores the settings of the measurements.

    Args:
      recipe: the run's recipe.
      batch_size: most examples in a batch, rounded up to a multiple of the
        number of devices.
      mesh: all devices.
      threads: number of decoding threads.
      stopping: called before each batch; once it returns True, a measurement
        raises `Stopped`.
      pause: see `ProgressBar.pause`; programs are compiled in it.
    """
    self._recipe = recipe
    self._batch_size = batch_size
    self._mesh = mesh
    self._threads = threads
    self._stopping = stopping
    self._pause = pause
    self._step = jax.jit(steps.eval_step, static_argnums=0)

  def __call__(
    self,
    network: Any,
    variables: Any,
    split: Split | LazySplit,
    *,
    draw_at: int | None = None,
  ) -> scores.Scores:
    """Returns the scores of a network.

    Args:
      network: the graph that `variables` belong to.
      variables: weights, masks and statistics.
      split: the examples.
      draw_at: a training step. With it, each batch takes a mask of that step:
        drawn from the real mask r, or with sources that fade in. With None, the
        network takes its topology, or the top K of r.

    Raises:
      InputError: a record is damaged and `config.data.skip_errors` is False;
        or see `scores.of_batches`.
      Stopped: the run is to stop.
    """
    recipe = dataclasses.replace(self._recipe, network=network)
    size = self._size(split)
    sums: list[dict[str, Any]] = []
    for index, batch in enumerate(
      batches.evaluation_batches(split, size, self._mesh, threads=self._threads)
    ):
      if self._stopping():
        raise Stopped
      start = index * size
      drawn = draw_at is not None
      key = recipe.key(streams.EVALUATION_MASK, start) if drawn else None
      arguments = recipe, variables, *batch, key, draw_at or 0
      if not sums:
        with self._pause():
          self._step.lower(*arguments).compile()
      found = self._step(*arguments)
      # Waits, as batches would pile up on a device slower than its host.
      sums.append(jax.device_get(found))
    return scores.of_batches(sums, multi_label=recipe.multi_label)

  def examples(
    self, network: Any, variables: Any, split: Split | LazySplit
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns some images of a split, and the labels a network gives them.

    They are a batch, evenly spread over the split, so that the program of a
    measurement serves here too.

    Args:
      network: see `__call__`.
      variables: see `__call__`.
      split: see `__call__`.

    Returns:
      Images, uint8 [N, H, W, C], their labels, as in `Split`, and the labels
      that the network gives them, of the same form. Damaged records are left
      out. With several processes, each gets its share.

    Raises:
      InputError: see `__call__`.
    """
    recipe = dataclasses.replace(self._recipe, network=network)
    size = self._size(split)
    spread = np.linspace(0, len(split) - 1, min(size, len(split)))
    process, count = distributed.process()
    (share,) = batches.evaluation_shares(
      split.part(np.unique(spread.astype(np.int64))),
      size,
      process,
      count,
      threads=self._threads,
    )
    images, labels, counted = share
    batch = distributed.from_shares(share, distributed.sharded(self._mesh))
    found = self._step(recipe, variables, *batch, None, 0)
    own = size // count
    pairs = jax.device_get(found['outcomes'])[process * own :][:own]
    kept = np.flatnonzero(counted)
    # A class; or the logits of several, see `objective.predicted`.
    taken = pairs[kept, 1]
    return images[kept], labels[kept], taken > 0 if taken.ndim == 2 else taken

  def seconds(
    self, networks: Sequence[tuple[Any, Any]], split: Split | LazySplit
  ) -> tuple[int, list[float]]:
    """Returns how long networks take for one batch of a split.

    The first call of each network, which may compile, does not count. Of the
    next ones the fastest counts: whatever else the machine does makes the
    others slower.

    Args:
      networks: of each network the graph and its variables, see `__call__`.
      split: see `__call__`; the batch is its first one.

    Returns:
      The number of examples in the batch, and the seconds of each network.

    Raises:
      InputError: see `__call__`.
    """
    size = self._size(split)
    first = split.part(np.arange(min(size, len(split))))
    (batch,) = batches.evaluation_batches(
      first, size, self._mesh, threads=self._threads
    )
    seconds = []
    for network, variables in networks:
      recipe = dataclasses.replace(self._recipe, network=network)
      taken = []
      for _ in range(1 + _TIMED):
        start = time.perf_counter()
        jax.block_until_ready(self._step(recipe, variables, *batch, None, 0))
        taken.append(time.perf_counter() - start)
      seconds.append(min(taken[1:]))
    return size, seconds

  def _size(self, split: Split | LazySplit) -> int:
    # A batch larger than the split would only add filling.
    size = min(self._batch_size, len(split))
    return -(-size // self._mesh.size) * self._mesh.size


def of_model(
  model: inference.Classifier, config: ml_collections.ConfigDict
) -> scores.Scores:
  """Returns the scores of a model on a config's test images.

  The model's preprocessing prepares the images. It overrules sizes, mean and
  std of the config. Labels are matched by the names of the classes, in any
  order. Data and model must have the same classes: accuracies over different
  numbers of classes cannot be compared, and the model cannot predict a class it
  lacks.

  Args:
    model: from `inference.load`.
    config: `data` and `eval_batch_size` are used.

  Raises:
    InputError: the data cannot be read, or their classes are not the model's;
      or one of model and data has several labels an image, the other one class.
  """
  data, several = config.data, model.multi_label
  if data.multi_label != several:
    raise InputError(
      'the model gives an image'
      f' {"several labels" if several else "one class"}; evaluate it on such'
      f' data, with config.data.multi_label={several}'
    )
  source = sources.open_source(data)
  if not source.num_test:
    raise InputError(f'{source.name} has no test images')
  _tell_of_differences(model, data)
  test = datasets.LazySplit(
    _in_order(source, model.classes),
    np.arange(source.num_train, len(source)),
    augment=lambda record, _: model.prepare(record),
    decode=model.prepare,
    skip_errors=data.skip_errors,
  )
  sums = []
  size = min(config.eval_batch_size, len(test))
  for images, labels, counted in batches.evaluation_shares(
    test, size, threads=data.threads
  ):
    logits = jnp.asarray(model.logits(images))
    found: dict[str, Any] = {}
    found |= objective.scores(logits, labels, counted, multi_label=several)
    found['outcomes'] = objective.outcomes(
      logits, labels, counted, multi_label=several
    )
    sums.append(jax.device_get(found))
  return scores.of_batches(sums, multi_label=several)


def _tell_of_differences(
  model: inference.Classifier, data: ml_collections.ConfigDict
) -> None:
  """Warns of each field of a config that the model's record overrules."""
  own = model.record['preprocessing']
  height, width, _ = model.image_shape
  for field, given, decides in (
    ('image_size', (data.image_size,) * 2, (height, width)),
    ('eval_resize', data.eval_resize, own.get('resize', 0)),
    ('mean', tuple(data.mean), tuple(own['mean'])),
    ('std', tuple(data.std), tuple(own['std'])),
  ):
    measured = given in ((), (0, 0))  # the config leaves it to the data
    if given != decides and not measured:
      logging.warning(
        'config.data.%s=%s is not what the model was made with, %s, which'
        ' decides',
        field,
        data[field],
        decides,
      )


def _in_order(
  source: sources.Source, classes: tuple[str, ...]
) -> sources.Source:
  """Returns a data source whose labels index a model's classes.

  Args:
    source: a data source with its own order of classes.
    classes: the model's classes.

  Raises:
    InputError: the classes differ; names those that only one side has.
  """
  ours, theirs = (
    [unicodedata.normalize('NFC', name) for name in given]
    for given in (classes, source.classes)
  )
  faults = [
    f'{_listed(sorted(odd))} {where}'
    for odd, where in (
      (set(theirs) - set(ours), 'the model does not have'),
      (set(ours) - set(theirs), 'the data do not have'),
    )
    if odd
  ]
  place = {name: number for number, name in enumerate(ours)}
  if not faults and ours != theirs and len(place) < max(len(ours), len(theirs)):
    faults = ['two of a name, in another order']
  if faults:
    raise InputError(
      f'{source.name} has other classes than the model: {"; ".join(faults)}.'
      ' Give data of the same classes'
    )
  same = ours == theirs
  numbers = range(len(ours)) if same else [place[name] for name in theirs]

  order = np.argsort(numbers)  # of a label of ours, the number of theirs

  def read(i: int) -> tuple[photographs.Record, sources.Label]:
    record, label = source.read(i)
    if isinstance(label, np.ndarray):  # several labels
      return record, label[order]
    if not 0 <= label < len(numbers):
      raise InputError(
        f'{source.name} has a test image with the label {label}; its'
        f' {len(numbers)} classes need labels from 0 to {len(numbers) - 1}'
      )
    return record, numbers[label]

  # The labels in memory index the other order.
  return dataclasses.replace(source, read=read, classes=classes, labels=None)


def _listed(odd: list[str]) -> str:
  some = ', '.join(ascii(name)[:60] for name in odd[:5])
  return f'{some} and {len(odd) - 5} more' if len(odd) > 5 else some
