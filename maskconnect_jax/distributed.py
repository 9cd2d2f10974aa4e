"""Start-up, the mesh, host arrays to global arrays, and preemption."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskconnect_jax.config import InputError


def initialize() -> None:
  """Joins the other processes of a pod or a cluster.

  Slurm, Open MPI, Cloud TPU and Kubernetes are recognised by JAX; elsewhere
  set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Raises:
    InputError: JAX cannot tell who the others are.
  """
  count, number = (
    int(os.environ[name]) if name in os.environ else None
    for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  )
  try:
    jax.distributed.initialize(num_processes=count, process_id=number)
  except ValueError as error:
    raise InputError(
      f'--multihost finds no other processes ({error}); start it under Slurm,'
      ' Open MPI, Cloud TPU or Kubernetes, or set JAX_COORDINATOR_ADDRESS,'
      ' JAX_NUM_PROCESSES and JAX_PROCESS_ID'
    ) from error


def make_mesh() -> Mesh:
  """Returns all devices, of all processes, as one axis named 'data'.

  The devices of a process lie side by side, so that its share of a batch is
  one run of rows.
  """
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(np.array(devices), ('data',), axis_types=(AxisType.Auto,))


def process() -> tuple[int, int]:
  """Returns the number of this process, and how many there are."""
  return jax.process_index(), jax.process_count()


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of parameters: a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def to_global(tree: Any, sharding: NamedSharding) -> Any:
  """Places host arrays that every process holds in full."""

  def place(array: Any) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  return jax.tree.map(place, tree)


def from_shares(tree: Any, sharding: NamedSharding) -> Any:
  """Joins the rows that each process holds of an array to a global one."""
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, rows), tree
  )


def check_batch_size(batch_size: int) -> None:
  """Raises InputError unless the batch splits evenly over the devices."""
  devices = jax.device_count()
  if batch_size % devices:
    nearest = max(devices, round(batch_size / devices) * devices)
    raise InputError(
      f'config.batch_size={batch_size} does not divide over'
      f' {devices} devices; {nearest} does'
    )


class Preemption:
  """Notices that a run is to stop: SIGTERM of a machine, or Ctrl-C.

  Used as a context manager around the loop; `requested(step)` then tells, on
  all processes at the same step, that it is time to save and stop. A second
  Ctrl-C stops at once; of several processes already the first one does.
  """

  def __init__(self) -> None:
    self._signalled = 0
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Preemption:
    # With jax.distributed its own service owns the signal and agrees on a step.
    self._coordinated = jax.process_count() > 1
    if self._coordinated:
      return self
    for number in (signal.SIGTERM, signal.SIGINT):
      # A shell lets what it runs in the background ignore SIGINT.
      if signal.getsignal(number) == signal.SIG_IGN:
        continue
      with contextlib.suppress(ValueError):  # in a thread, as some notebooks
        self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      # One that was not Python's is not known, and cannot be put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    if number == signal.SIGINT and self._signalled:
      raise KeyboardInterrupt
    self._signalled = number
    with contextlib.suppress(RuntimeError):  # amid another line to stderr
      logging.warning(
        '%s: saving after the step under way, then stopping%s',
        signal.Signals(number).name,
        '; once more stops at once' * (number == signal.SIGINT),
      )

  def requested(self, step: int) -> int:
    """Returns the signal for which to save and stop after `step`, else 0."""
    if self._coordinated:
      reached = multihost_utils.reached_preemption_sync_point(step)
      return signal.SIGTERM if reached else 0
    return self._signalled
