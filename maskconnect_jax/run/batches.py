"""Batches for the devices, from memory or decoded while training.

Training batches are a function of (seed, step). So a run that goes on at a step
gets the batches of an uninterrupted run, also with another number of processes,
threads or workers. Each epoch has a new order of the training set. The examples
at its end that do not fill a batch are left out. Evaluation sees every example
once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from maskconnect_jax.data.datasets import LazySplit, Split
from maskconnect_jax.networks import streams
from maskconnect_jax.run import cores, distributed

_LONG = 30.0  # seconds of training; the first batches are always late


class Resident:
  """Training batches of a set that lies whole on every device.

  One small program on the device takes a batch, so the device never waits for
  the host.

  Attributes:
    damaged: numbers of the damaged records: none.
  """

  # The images of a `Split` are decoded already, so none is damaged.
  damaged: frozenset[int] = frozenset()

  def __init__(
    self,
    split: Split,
    batch_size: int,
    *,
    seed: int,
    sharding: jax.sharding.NamedSharding,
  ) -> None:
    """Puts the split on the devices.

    Args:
      split: the training examples.
      batch_size: examples in a step, on all devices together.
      seed: seed of the run; decides the order of each epoch.
      sharding: how a batch lies on the devices.
    """
    self._size = batch_size
    self._per_epoch = len(split) // batch_size
    everywhere = distributed.replicated(sharding.mesh)
    self._arrays = distributed.to_global(
      (split.images, split.labels), everywhere
    )

    def order(step: Any) -> jax.Array:
      return jax.random.permutation(
        streams.at_step(seed, streams.ORDER, step), len(split)
      ).astype(jnp.int32)

    def take(arrays: Any, order: jax.Array, start: Any) -> Any:
      indices = jax.lax.dynamic_slice(order, (start,), (batch_size,))
      indices = jax.lax.with_sharding_constraint(indices, sharding)
      return jax.tree.map(lambda array: array[indices], arrays)

    self._order = jax.jit(order, out_shardings=everywhere)
    self._take = jax.jit(take, out_shardings=sharding)

  def starting_at(self, step: int) -> Iterator[Any]:
    """Yields the batches of `step`, `step` + 1, ... without an end.

    Yields:
      Images, uint8 [batch, H, W, C], and labels, as in `Split`, [batch, ...];
      sharded over the devices.
    """
    epoch, place = divmod(step, self._per_epoch)
    while True:
      order = self._order(epoch * self._per_epoch)
      for index in range(place, self._per_epoch):
        yield self._take(self._arrays, order, index * self._size)
      epoch, place = epoch + 1, 0


class Decoded:
  """Training batches decoded by Grain while the devices work.

  Each process decodes its own share of every batch.

  Attributes:
    damaged: numbers of the records found damaged so far.
  """

  def __init__(
    self,
    split: LazySplit,
    batch_size: int,
    *,
    seed: int,
    sharding: jax.sharding.NamedSharding,
    threads: int,
    workers: int,
  ) -> None:
    """Makes the order of the examples; reads no image.

    Args:
      split: the training examples.
      batch_size: examples in a step, on all devices together.
      seed: seed of the run; decides the order of each epoch, and every crop.
      sharding: how a batch lies on the devices.
      threads: number of decoding threads in a process, at most; all processes
        together have no more than one for each core, or one each.
      workers: number of decoding processes; with 0 this process decodes.
    """
    self.damaged: set[int] = set()
    self._waited, self._advised = 0.0, False
    self._batch_size = batch_size
    self._sharding = sharding
    self._threads, self._workers = threads, workers
    self._examples = training_examples(split, seed, batch_size)

  def starting_at(self, step: int) -> Iterator[Any]:
    """Yields the batches of `step`, `step` + 1, ... without an end.

    Yields:
      Images, uint8 [batch, H, W, C], and labels, as in `Split`, [batch, ...];
      sharded over the devices.
    """
    batches = share_of_batches(
      self._examples, self._batch_size, step, *distributed.process()
    ).to_iter_dataset(_read_options(self._threads, max(1, self._workers)))
    if self._workers:
      if not flags.FLAGS.is_parsed():  # Grain reads some, also in a notebook
        flags.FLAGS.mark_as_parsed()
      batches = batches.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self._workers),
        worker_init_fn=_prepare_worker,
      )
    # Closing the iterator ends the workers and frees their shared memory.
    with contextlib.closing(iter(batches)) as iterator:
      while True:
        began = time.perf_counter()
        batch = next(iterator)
        self._waited += time.perf_counter() - began
        if self._workers:
          # JAX may refer to the array that it is given until the run ends.
          # By then Grain no longer frees shared memory, so JAX gets a copy.
          batch = tuple(map(np.array, batch))
        images, labels, damaged = batch
        self.damaged.update(damaged[damaged >= 0].tolist())
        yield distributed.from_shares((images, labels), self._sharding)

  def advice(self, seconds: float) -> str | None:
    """Returns, once, how to decode sooner, if steps are sooner than batches.

    Args:
      seconds: of training since the last call.
    """
    waited, self._waited = self._waited, 0.0
    workers = cores.available() - 2
    late = seconds > _LONG and waited > seconds / 2
    if self._advised or not late or workers <= max(1, self._workers):
      return None
    self._advised = True
    return (
      'images are decoded more slowly than the device takes them:'
      f' --config.data.workers={workers} decodes in {workers} processes'
    )


Batches: TypeAlias = Resident | Decoded


def training_examples(
  split: LazySplit, seed: int, batch_size: int
) -> grain.MapDataset[Any]:
  """Returns the examples of all epochs in the order of training.

  Example n is a function of (seed, n), its crop included.

  Args:
    split: the training examples.
    seed: seed of the run.
    batch_size: examples in a step, on all devices together.

  Returns:
    A dataset whose items are those of `LazySplit.training_example`.
  """
  numbers = grain.MapDataset.range(len(split)).seed(seed).shuffle()
  whole = len(split) // batch_size * batch_size
  return numbers[:whole].random_map(split.training_example).repeat()


def share_of_batches(
  examples: grain.MapDataset[Any],
  batch_size: int,
  first: int,
  process: int,
  num_processes: int,
) -> grain.MapDataset[Any]:
  """Returns one process's rows of batch `first`, `first` + 1, ...

  The processes hold the rows of a batch in the order of their devices; see
  `distributed.make_mesh`.

  Args:
    examples: all examples, in order.
    batch_size: examples in a batch, on all processes together.
    first: number of the first batch.
    process: number of the process.
    num_processes: how many processes there are.

  Returns:
    A dataset of batches of `batch_size` // `num_processes` rows.
  """
  share = batch_size // num_processes

  def example(row: int) -> Any:
    batch, place = divmod(row, share)
    return examples[batch * batch_size + process * share + place]

  rows = range(first * share, len(examples) // batch_size * share)
  return (
    grain.MapDataset.range(rows.start, rows.stop)
    .map(example)
    .batch(share, drop_remainder=True)
  )


def evaluation_batches(
  split: Split | LazySplit,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  *,
  threads: int,
) -> Iterator[Any]:
  """Yields every example once, sharded over all devices.

  Args:
    split: the examples.
    batch_size: examples in a batch, on all devices together.
    mesh: all devices.
    threads: number of decoding threads, where `split` is a `LazySplit`.

  Yields:
    The arrays of `evaluation_shares`, as global arrays [batch, ...].
  """
  sharding = distributed.sharded(mesh)
  for share in evaluation_shares(
    split, batch_size, *distributed.process(), threads=threads
  ):
    yield distributed.from_shares(share, sharding)


def evaluation_shares(
  split: Split | LazySplit,
  batch_size: int,
  process: int = 0,
  num_processes: int = 1,
  *,
  threads: int,
) -> Iterator[Any]:
  """Yields one process's rows of the batches; each example is in one batch.

  The last batch is filled up with zeros.

  Args:
    split: the examples.
    batch_size: examples in a batch, on all processes together.
    process: number of the process.
    num_processes: how many processes there are.
    threads: number of decoding threads, where `split` is a `LazySplit`.

  Yields:
    Images uint8 [share, H, W, C], labels as in `Split`, [share, ...], and bool
    [share], whether an example counts. Filling and damaged records do not.
  """
  if isinstance(split, LazySplit):
    yield from share_of_batches(
      evaluation_examples(split, batch_size),
      batch_size,
      0,
      process,
      num_processes,
    ).to_iter_dataset(_read_options(threads))
    return
  share = batch_size // num_processes
  for start in range(0, len(split), batch_size):
    first = start + process * share
    images = split.images[first : first + share]
    missing = share - len(images)
    yield (
      _filled(images, missing),
      _filled(split.labels[first : first + share], missing),
      np.arange(share) < share - missing,
    )


def _filled(rows: np.ndarray, missing: int) -> np.ndarray:
  """Returns an array [N, ...] with rows of zeros behind it."""
  return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))


def evaluation_examples(
  split: LazySplit, batch_size: int
) -> grain.MapDataset[Any]:
  """Returns the examples in order, filled up to whole batches.

  Each item is image, label and whether the example counts.
  """
  filling = np.zeros(split.image_shape, np.uint8), split.blank_label, False

  def example(i: int) -> Any:
    return split.evaluation_example(i) if i < len(split) else filling

  size = -(-len(split) // batch_size) * batch_size
  return grain.MapDataset.range(size).map(example)


def _prepare_worker(worker: int, num_workers: int) -> None:
  """Leaves Ctrl-C to the run, and ends the worker when the run ends.

  A terminal sends Ctrl-C to workers too. A killed run cannot end its workers;
  they would wait for it for ever.
  """
  del worker, num_workers
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Waits until the parent process is gone, then ends this process.

  Python's resource tracker outlives both and then removes the shared memory.
  Linux's signal for the end of a parent, PR_SET_PDEATHSIG, is no use: it comes
  when the starting thread ends, and Grain starts workers from short-lived
  threads.
  """
  if parent := multiprocessing.parent_process():
    parent.join()
  os._exit(1)


def _read_options(threads: int, processes: int = 1) -> grain.ReadOptions:
  # A thread fills a whole batch; one batch waits for each thread.
  threads = min(threads, -(-cores.available() // processes))
  return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
