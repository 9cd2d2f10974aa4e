"""A CPU's cores and memory: a device for each core, memory that stays.

XLA runs a convolution on one thread. So a CPU of n cores is used as n devices,
over which a batch is split like over n GPUs. A step's memory, hundreds of MB,
is freed after the step. By default glibc then gives it back to Linux, which
fills it with zeros for the next step, page by page. The figures stand in
docs/notebook.md under "Devices and memory of a CPU".
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import jax
import ml_collections

from maskconnect_jax.run import native

# Pixels of a batch that are worth a device of their own. With fewer, devices
# wait for each other longer than they compute.
_PIXELS = 8192

# Parameters of glibc's mallopt, and the environment variables that set them.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_VARIABLES = ('MALLOC_', 'GLIBC_TUNABLES')
_NEVER, _DEFAULT_TRIM, _DEFAULT_MMAP = -1, 128 * 1024, 65536

_DEVICES = 'jax_num_cpu_devices'


def use(count: int) -> None:
  """Lets JAX use a CPU well: all cores, memory that stays, `native` code.

  Call it before JAX computes anything; later, and on a machine with a GPU or a
  TPU, it does nothing. JAX_NUM_CPU_DEVICES and XLA_FLAGS may set the number of
  devices, MALLOC_* and GLIBC_TUNABLES the memory; these are left as they are.
  Each of several processes of a run keeps one device. `experiment.build` and
  `inference.load` wait for the `native` code.

  Args:
    count: devices, see `for_batches`, or `available`.
  """
  if not _only_a_cpu():
    return
  native.begin()
  if not _devices_are_given():
    try:
      jax.config.update(_DEVICES, count)
    except RuntimeError:  # JAX has begun
      return
  _set({_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER})


def _devices_are_given() -> bool:
  """Returns whether the user, or several processes, decide on the devices."""
  return (
    _DEVICES.upper() in os.environ
    or 'host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
    or jax.distributed.is_initialized()
  )


def for_batches(batch_size: int, data: ml_collections.ConfigDict) -> int:
  """Returns how many devices share a batch of `config.data`.

  Before the images are read, their side may be a guess: nothing else depends on
  it.
  """
  side = data.image_size or (8 if data.source == 'digits' else 32)
  return devices(batch_size, side, available())


def devices(batch_size: int, side: int, cores: int) -> int:
  """Returns how many devices share a batch: at most one for each core.

  Args:
    batch_size: images in a batch; each device gets as many.
    side: height and width of an image, pixels.
    cores: that this process may use.
  """
  pixels = batch_size * side**2
  return max(
    count
    for count in range(1, cores + 1)
    if count == 1 or (batch_size % count == 0 and pixels >= count * _PIXELS)
  )


def give_back_memory(step: int) -> None:
  """Lets memory go after each step if the machine has too little to keep it.

  Steps are queued, so the next one takes its memory before the last one's is
  freed. With gaps between arrays, up to three times a step's memory is kept.

  Args:
    step: bytes that a step takes.
  """
  with contextlib.suppress(ValueError, OSError):  # the system does not tell
    pages = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    if 3 * step > pages:
      _set({_MMAP_MAX: _DEFAULT_MMAP, _TRIM_THRESHOLD: _DEFAULT_TRIM})


def available() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1  # macOS, Windows


def _set(parameters: dict[int, int]) -> None:
  """Sets parameters of glibc's malloc, unless the environment sets any."""
  if platform.libc_ver()[0] != 'glibc' or any(
    name.startswith(_VARIABLES) for name in os.environ
  ):
    return
  library = ctypes.CDLL(None)
  for parameter, value in parameters.items():
    library.mallopt(parameter, value)


def _only_a_cpu() -> bool:
  """Returns whether JAX will run on the CPU: by request or for want.

  An installed plugin or libtpu counts as a device that JAX may find.
  """
  settings: Any = jax.config
  asked = settings.jax_platforms
  if asked:
    return bool(asked.split(',')[0] == 'cpu')
  # As JAX looks for them.
  return not (
    importlib.metadata.entry_points(group='jax_plugins')
    or importlib.util.find_spec('jax_plugins')
    or importlib.util.find_spec('libtpu')
  )
