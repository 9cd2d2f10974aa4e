"""Many images as one array."""

import os
import threading
import time

import numpy as np

from maskconnect_jax.data import in_memory
from maskconnect_jax.errors import InputError


def test_read_all_uses_threads_when_images_are_slow():
  threads = set()

  def read(i):
    threads.add(threading.get_ident())
    time.sleep(0.001)
    return np.full((2, 3, 1), i % 251, np.uint8)

  pixels, kept, errors = in_memory.read_all(read, 500, name='x', memory_gb=1)
  np.testing.assert_array_equal(pixels[:, 1, 2, 0], np.arange(500) % 251)
  assert kept.all()
  assert not errors
  # This thread and those of the pool.
  assert len(threads) > 2 or os.cpu_count() == 1


def test_read_all_keeps_order_and_counts_what_it_skips():
  def read(i):
    if i % 7 == 0:
      raise InputError(f'number {i}')
    return np.full((2, 2, 1), i, np.uint8)

  pixels, kept, errors = in_memory.read_all(
    read, 200, name='x', memory_gb=1, skip_errors=True
  )
  good = [i for i in range(200) if i % 7]
  assert pixels[:, 0, 0, 0].tolist() == good
  assert np.flatnonzero(kept).tolist() == good
  assert errors == [f'number {i}' for i in range(0, 200, 7)]
