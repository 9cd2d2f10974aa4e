"""Start-up, failing together, the mesh, and host arrays to global arrays."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from maskconnect_jax.errors import InputError

# The key of what ended a process, in the store that all processes share.
_FAILURE = 'maskconnect_jax/failure'
_POLL_SECONDS = 1.0
_WAIT_SECONDS = 15.0  # for the others to have read it
_JOIN_SECONDS = 40  # for what fails to meet those that have begun

_ending = threading.Lock()


def initialize() -> None:
  """Joins the other processes of a pod or a cluster.

  Slurm, Open MPI, Cloud TPU and Kubernetes are recognised by JAX; elsewhere
  set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. From here
  on this process ends when another one fails, with the other's line.

  Raises:
    InputError: JAX cannot tell who the others are.
  """
  _join()
  threading.Thread(target=_listen, daemon=True).start()


def _join(**options: Any) -> None:
  try:
    count, number = (
      int(os.environ[name]) if name in os.environ else None
      for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
    )
    jax.distributed.initialize(
      num_processes=count, process_id=number, **options
    )
  except ValueError as error:
    raise InputError(
      f'--multihost finds no other processes ({error}); start it under Slurm,'
      ' Open MPI, Cloud TPU or Kubernetes, or set JAX_COORDINATOR_ADDRESS,'
      ' JAX_NUM_PROCESSES and JAX_PROCESS_ID'
    ) from error


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Ends all processes of a run of several with what one of them raises.

  To be inside of whatever waits for the others when it is closed.
  """
  try:
    yield
  except InputError as error:
    if jax.distributed.is_initialized():
      print(f'error: {error}', file=sys.stderr)
      fail(str(error), joining=False)
    raise
  except Exception as error:
    if jax.distributed.is_initialized():
      traceback.print_exc()
      text = (str(error) or 'no more is known').splitlines()[0]
      fail(f'{type(error).__name__}: {text}', joining=False)
    raise


def fail(message: str, *, joining: bool) -> None:
  """Ends all processes of a run of several; returns where there is but one.

  The others may wait for this one anywhere, also on a device. So no computation
  tells them, but the store of the service that they have joined.

  Args:
    message: what ended this process, which has said so itself.
    joining: whether the others may be waiting for this one to join them.
  """
  if joining and not jax.distributed.is_initialized():
    # A RuntimeError: too late to join, JAX has begun alone.
    with contextlib.suppress(InputError, RuntimeError):
      _join(initialization_timeout=_JOIN_SECONDS)
  if not jax.distributed.is_initialized():
    return
  if not _ending.acquire(blocking=False):
    time.sleep(2 * _WAIT_SECONDS)  # `_listen` is ending this process
  _silence()
  client, number, _ = _service()
  # If another process was first, its line stands.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client.key_value_set(
      _FAILURE, f'process {number} ({socket.gethostname()}): {message}'
    )
  _leave()


def _listen() -> None:
  """Ends this process when another one has failed."""
  client, *_ = _service()
  while True:
    time.sleep(_POLL_SECONDS)
    try:
      message = client.key_value_try_get(_FAILURE)
    except jax.errors.JaxRuntimeError as error:
      if 'NOT_FOUND' in str(error):
        continue
      return  # the service has ended
    if _ending.acquire(blocking=False):
      print(f'error: {message}', file=sys.stderr)
      _silence()
      _leave()
    return


def _leave() -> None:
  """Ends this process; the one that runs the service goes last."""
  client, number, count = _service()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client.key_value_set(f'{_FAILURE}/seen/{number}', '')
    # The one who failed waits too: a device of another may miss it else, and
    # that one tell of a connection instead.
    until = time.monotonic() + _WAIT_SECONDS
    for other in range(count):
      left = max(1, int(1000 * (until - time.monotonic())))
      client.blocking_key_value_get(f'{_FAILURE}/seen/{other}', left)
  if number == 0:
    time.sleep(_POLL_SECONDS)
  os._exit(2)


def _silence() -> None:
  """Keeps off stderr what the end of one process makes of the others."""
  sys.stderr.flush()
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _service() -> tuple[Any, int, int]:
  # JAX has no public name for its store; Orbax reaches it here as well.
  state = jax._src.distributed.global_state
  return state.client, state.process_id, state.num_processes


def check_platform() -> None:
  """Raises InputError if JAX finds no devices, such as those it was told to."""
  try:
    jax.devices()
  # An AssertionError without a word: of a platform that is not installed.
  except (RuntimeError, AssertionError) as error:
    asked = os.environ.get('JAX_PLATFORMS', '')
    reason = (str(error) or 'it is not there').splitlines()[0].rstrip('.')
    raise InputError(
      f'JAX_PLATFORMS={asked} cannot be used on this machine ({reason}); unset'
      ' it, or install JAX for it'
      if asked
      else f'JAX finds no devices ({reason})'
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


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
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
