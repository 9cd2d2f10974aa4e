"""Which images share a batch, and whose row is whose."""

import asyncio
import threading

import numpy as np
import pytest

from maskconnect_jax.serve.batcher import Batcher, BusyError


def images(*values):
  return [np.full((2, 2), value, np.float64) for value in values]


def run(main):
  async def limited():
    async with asyncio.timeout(20):
      await main()

  asyncio.run(limited())


def test_what_waits_is_one_batch_and_each_caller_gets_its_own_rows():
  open_, sizes = threading.Event(), []

  def compute(batch):
    assert open_.wait(20)
    return batch.sum((1, 2))

  async def main():
    batcher = Batcher(compute, size=4, most_waiting=9, observe=sizes.append)
    async with batcher.running():
      first = asyncio.create_task(batcher.rows(images(1)))
      while not sizes:
        await asyncio.sleep(0)
      others = [
        asyncio.create_task(batcher.rows(images(*values)))
        for values in ((2, 3), (4,), (5, 6, 7))
      ]
      gone = asyncio.create_task(batcher.rows(images(8)))
      await asyncio.sleep(0)
      gone.cancel()
      with pytest.raises(BusyError, match='7 images are waiting'):
        await batcher.rows(images(9, 9, 9))
      open_.set()
      found = await asyncio.gather(first, *others)
      assert found == [[4], [8, 12], [16], [20, 24, 28]]
      assert await batcher.rows(images(10)) == [40]

  run(main)
  assert sizes == [1, 4, 2, 1]


def test_a_batch_that_fails_fails_its_callers_alone():
  def compute(batch):
    if batch.max() > 1:
      raise MemoryError('too large')
    return batch[:, 0, 0]

  async def main():
    batcher = Batcher(compute, size=1, most_waiting=9)
    async with batcher.running():
      found = await asyncio.gather(
        batcher.rows(images(1)),
        batcher.rows(images(2)),
        batcher.rows(images(0)),
        return_exceptions=True,
      )
    assert found[0] == [1]
    assert found[2] == [0]
    assert isinstance(found[1], MemoryError)

  run(main)
