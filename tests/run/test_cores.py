"""A CPU's cores as devices, and memory that stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from maskconnect_jax.run import cores

# Variables that conftest.py and users set.
OURS = ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES', 'MALLOC_', 'GLIBC_TUNABLES')
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='glibc')


def printed(code: str, **environment: str) -> str:
  """Runs a program without the variables of this one; returns its output."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
  return subprocess.run(
    [sys.executable, '-c', code],
    env={**clean, 'JAX_PLATFORMS': 'cpu', **environment},
    capture_output=True,
    check=True,
    text=True,
  ).stdout.strip()


@pytest.mark.parametrize(
  ('batch_size', 'side', 'available', 'expected'),
  [
    (128, 32, 2, 2),
    (128, 32, 16, 16),
    (32, 32, 16, 4),  # 8 images of CIFAR each
    (48, 32, 5, 4),  # what divides
    (7, 224, 8, 7),
    (1, 224, 8, 1),
    (128, 8, 2, 1),  # the digits: too little work
    (31, 32, 2, 1),
  ],
)
def test_devices(batch_size, side, available, expected):
  assert cores.devices(batch_size, side, available) == expected


USE = """
import jax
from maskconnect_jax.run import cores
cores.use(4)
print(jax.device_count())
"""


def test_a_device_for_each_core():
  assert printed(USE) == '4'


@pytest.mark.parametrize(
  'given',
  [
    {'JAX_NUM_CPU_DEVICES': '3'},
    {'XLA_FLAGS': '--xla_force_host_platform_device_count=3'},
  ],
)
def test_the_users_devices_stay(given):
  assert printed(USE, **given) == '3'


def test_later_it_is_too_late_and_no_error():
  assert printed(f'import jax; jax.devices(){USE}') == '1'


FAULTS = """
import resource
import numpy as np
from maskconnect_jax.run import cores
cores.use(2)
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.full(10_000_000, 1.0)  # 80 MB, freed again
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
kept = faults()
cores.give_back_memory(STEP)
faults()
print(kept, faults())
"""


@LINUX
def test_memory_stays_unless_there_is_too_little_or_the_user_decides():
  pages = 80_000_000 // os.sysconf('SC_PAGE_SIZE')
  kept, still = map(int, printed(FAULTS.replace('STEP', '1')).split())
  assert kept < pages / 100 > still
  kept, after = map(int, printed(FAULTS.replace('STEP', '10**15')).split())
  assert kept < pages / 100
  huge = os.sysconf('SC_PAGE_SIZE') * 512  # large pages are one fault each
  assert after >= 80_000_000 // huge
  kept, _ = map(
    int,
    printed(FAULTS.replace('STEP', '1'), MALLOC_MMAP_THRESHOLD_='1000').split(),
  )
  assert kept >= 80_000_000 // huge
