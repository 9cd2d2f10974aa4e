"""Several processes: start-up, common failure, the mesh, global arrays."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from maskconnect_jax import backend
from maskconnect_jax.errors import InputError

# The key of the failure's message in the store that all processes share.
_FAILURE = 'maskconnect_jax/failure'
_HOST = 'maskconnect_jax/host'  # the names of all hosts, by process
_POLL_SECONDS = 1.0
_WAIT_SECONDS = 15.0  # until all other processes have read the message
_MEET_SECONDS = 1800  # until the slowest host has begun, or has ended
_JOIN_SECONDS = 40  # until a process that failed early has joined the others

# By these the user names the other processes.
_NAMES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')

_meetings = itertools.count()  # a barrier's name serves once
_ending = threading.Lock()
_stderr = 2  # where the last line goes once stderr is silenced


def initialize() -> None:
  """Joins the other processes of a pod or a cluster.

  JAX recognises Slurm, Open MPI, Cloud TPU and Kubernetes. Elsewhere set
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. From here on
  this process ends when another one fails, and prints the other's message.

  Raises:
    InputError: JAX does not find the other processes.
  """
  _join()
  client, number, _ = _service()
  client.key_value_set(f'{_HOST}/{number}', socket.gethostname())
  threading.Thread(target=_listen, daemon=True).start()
  print(
    f'process {jax.process_index()} of {jax.process_count()} on'
    f' {socket.gethostname()}: {jax.local_device_count()} of'
    f' {jax.device_count()} devices, {jax.local_devices()[0].device_kind}',
    file=sys.stderr,
  )


def _join(**options: Any) -> None:
  if 'JAX_LOCAL_DEVICE_IDS' not in os.environ and _is_alone_on_its_host():
    # All devices of the host. JAX would take one for each process.
    options['local_device_ids'] = []
  try:
    count, number = (
      int(os.environ[name]) if name in os.environ else None
      for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
    )
    with warnings.catch_warnings():
      # Of a missing package, which the error below names.
      warnings.filterwarnings('ignore', r'\s*Kubernetes environment detected')
      jax.distributed.initialize(
        num_processes=count,
        process_id=number,
        shutdown_timeout_seconds=_MEET_SECONDS,
        **options,
      )
  except ValueError as error:
    kubernetes = (
      'KUBERNETES_SERVICE_HOST' in os.environ
      and importlib.util.find_spec('kubernetes') is None
    )
    remedy = (
      "this is Kubernetes: pip install 'maskconnect_jax[k8s]'"
      if kubernetes
      else 'start it under Slurm, Open MPI, Cloud TPU or Kubernetes'
    )
    raise InputError(
      f'--multihost finds no other processes ({error}); {remedy}, or set'
      f' {", ".join(_NAMES)}'
    ) from error


def _is_alone_on_its_host() -> bool:
  """Returns whether Slurm or Open MPI has started one process on each host."""
  tasks = os.environ.get('SLURM_NTASKS')
  slurm = tasks is not None and tasks == os.environ.get('SLURM_STEP_NUM_NODES')
  return slurm or os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1'


def meet(place: str) -> None:
  """Waits until all processes have come to a place; one alone goes on.

  The CPU's collectives wait for half a minute only, so slow hosts meet before.

  All processes meet at the same places in the same order.

  Args:
    place: a name, for the message of a process that waits in vain.
  """
  if jax.process_count() > 1:
    client, *_ = _service()
    name = f'maskconnect_jax/{next(_meetings)} {place}'
    client.wait_at_barrier(name, 1000 * _MEET_SECONDS)


def check_same(step: int, *, in_folder: str) -> None:
  """Checks that all processes compute the same steps; all call it.

  Args:
    step: at which this process begins.
    in_folder: where it looked.

  Raises:
    InputError: they begin at different steps; or some have compiled
      the C++ code for their CPU, and others have not.
  """
  if jax.process_count() == 1:
    return
  own = np.array([step, backend.native.value], np.int64)
  found, compiled = multihost_utils.process_allgather(own).T.tolist()
  if len({*compiled}) > 1:
    raise InputError(
      f'processes {[n for n, c in enumerate(compiled) if not c]} have not'
      ' compiled the C++ code, and others have; give all hosts a C++'
      ' compiler, or set CXX= on all'
    )
  if len({*found}) > 1:
    raise InputError(
      f'the processes found checkpoints of the steps {found} in'
      f' {in_folder}; all hosts must see one folder, or give an address in a'
      ' bucket'
    )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Ends all processes when one raises an error; each prints the message.

  A context manager that waits for the other processes on exit must be outside
  this one. In a run of one process the error is raised as usual.
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
      # Where a process is lost, JAX's own stack says no more than its line.
      if isinstance(error, jax.errors.JaxRuntimeError):
        print(f'error: {str(error).splitlines()[0]}', file=sys.stderr)
      else:
        traceback.print_exc()
      text = (str(error) or 'no more is known').splitlines()[0]
      fail(f'{type(error).__name__}: {text}', joining=False)
    raise


def fail(message: str, *, joining: bool) -> None:
  """Ends all processes of a run; returns if this process is the only one.

  The others may wait for this process anywhere, also on a device. So no
  computation can tell them. The message goes into the store of the service that
  all have joined.

  Args:
    message: why this process ends; the caller has printed it here.
    joining: whether the others may be waiting for this process to join them.
  """
  if joining and not jax.distributed.is_initialized():
    # RuntimeError: JAX has begun alone, and it is too late to join.
    with contextlib.suppress(InputError, RuntimeError):
      _join(initialization_timeout=_JOIN_SECONDS)
  if not jax.distributed.is_initialized():
    return
  if not _ending.acquire(blocking=False):
    time.sleep(2 * _WAIT_SECONDS)  # `_listen` is ending this process
  _silence()
  client, number, _ = _service()
  # If another process failed first, its message stays.
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
  """Ends this process; the process that runs the service ends last."""
  client, number, count = _service()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client.key_value_set(f'{_FAILURE}/seen/{number}', '')
  # The process that failed waits too. If it ended at once, a device of another
  # process might miss it, and report a lost connection instead.
  until = time.monotonic() + _WAIT_SECONDS
  for other in range(count):
    left = max(1, int(1000 * (until - time.monotonic())))
    try:
      client.blocking_key_value_get(f'{_FAILURE}/seen/{other}', left)
    except jax.errors.JaxRuntimeError:
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        host = client.blocking_key_value_get(f'{_HOST}/{other}', 1000)
        line = f'error: process {other} ({host}) does not answer\n'
        os.write(_stderr, line.encode())
  if number == 0:
    time.sleep(_POLL_SECONDS)
  os._exit(2)


def _silence() -> None:
  """Drops stderr: a process that ends makes JAX complain in the others."""
  global _stderr
  sys.stderr.flush()
  _stderr = os.dup(2)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _service() -> tuple[Any, int, int]:
  # JAX has no public name for its store; Orbax uses this one as well.
  state = jax._src.distributed.global_state
  return state.client, state.process_id, state.num_processes


def check_platform() -> None:
  """Checks that JAX finds devices, of the platform in JAX_PLATFORMS if set.

  Raises:
    InputError: JAX finds none.
  """
  try:
    jax.devices()
  # A platform that is not installed raises AssertionError without a message.
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
  """Returns all devices of all processes as one axis named 'data'.

  The devices of a process lie side by side, so its share of a batch is a block
  of consecutive rows.
  """
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(np.array(devices), ('data',), axis_types=(AxisType.Auto,))


def process() -> tuple[int, int]:
  """Returns the number of this process, and the number of processes."""
  return jax.process_index(), jax.process_count()


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Returns the sharding of parameters: a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its first axis over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def to_global(tree: Any, sharding: NamedSharding) -> Any:
  """Returns global arrays of host arrays that every process holds in full.

  Args:
    tree: a pytree of host arrays, the same in every process.
    sharding: how each global array lies on the devices.
  """

  def place(array: Any) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  return jax.tree.map(place, tree)


def from_shares(tree: Any, sharding: NamedSharding) -> Any:
  """Returns global arrays, joined from the rows that each process holds.

  Args:
    tree: a pytree of host arrays, the rows of this process.
    sharding: how each global array lies on the devices.
  """
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, rows), tree
  )


def union(numbers: set[int]) -> set[int]:
  """Returns the numbers that any process has; all processes call it together.

  Args:
    numbers: those of this process, each in [0, 2**31).
  """
  if jax.process_count() == 1:
    return numbers
  own = np.array(sorted(numbers), np.int32)
  counts = multihost_utils.process_allgather(np.int32(len(own)))
  filled = np.pad(own, (0, counts.max() - len(own)), constant_values=-1)
  found = np.asarray(multihost_utils.process_allgather(filled))
  return set(found[found >= 0].tolist())


def check_batch_size(batch_size: int) -> None:
  """Checks that a batch splits evenly over all devices.

  Raises:
    InputError: it does not; names the nearest size that does.
  """
  devices = jax.device_count()
  if batch_size % devices:
    nearest = max(devices, round(batch_size / devices) * devices)
    raise InputError(
      f'config.batch_size={batch_size} does not divide over'
      f' {devices} devices; {nearest} does'
    )
