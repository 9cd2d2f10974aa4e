"""Joins the images of requests that wait at the same time into one batch."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np

_Waiting: TypeAlias = tuple[np.ndarray, asyncio.Future[np.ndarray]]


class BusyError(RuntimeError):
  """Too many images wait already."""


class Batcher:
  """Computes the rows of images, a batch at a time, in a thread of its own.

  No image waits for others to come: while one batch is computed, the images
  that arrive become the next one. So a lone request is as fast as without
  batches, and batches grow with the load.

  Attributes:
    waiting: images that are in no batch yet, each with the future of its row.
  """

  def __init__(
    self,
    compute: Callable[[np.ndarray], np.ndarray],
    *,
    size: int,
    most_waiting: int,
    observe: Callable[[int], None] = lambda count: None,
  ) -> None:
    """Takes what computes a batch.

    Args:
      compute: maps a batch [N, ...] to N rows; called in another thread.
      size: images in a batch at most.
      most_waiting: images that may wait at most.
      observe: called with the size of each batch.
    """
    self._compute = compute
    self._size = size
    self._most = most_waiting
    self._observe = observe
    self._arrived = asyncio.Event()
    self.waiting: collections.deque[_Waiting] = collections.deque()

  @contextlib.asynccontextmanager
  async def running(self) -> AsyncIterator[None]:
    """Within the context, batches are computed."""
    with ThreadPoolExecutor(1, 'forward') as thread:
      task = asyncio.create_task(self._run(thread))
      try:
        yield
      finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
          await task

  async def rows(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the row of each image. A caller that is cancelled takes no time.

    Args:
      images: arrays of one shape and dtype.

    Raises:
      BusyError: more images would wait than may.
    """
    if len(self.waiting) + len(images) > self._most:
      raise BusyError(f'{len(self.waiting)} images are waiting already')
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in images]
    self.waiting.extend(zip(images, futures, strict=True))
    self._arrived.set()
    return await asyncio.gather(*futures)

  async def _run(self, thread: ThreadPoolExecutor) -> None:
    loop = asyncio.get_running_loop()
    while True:
      await self._arrived.wait()
      part: list[_Waiting] = []
      while self.waiting and len(part) < self._size:
        image, future = self.waiting.popleft()
        if not future.done():  # the caller was cancelled
          part.append((image, future))
      if not self.waiting:
        self._arrived.clear()
      if not part:
        continue
      self._observe(len(part))
      batch = np.stack([image for image, _ in part])
      try:
        rows = await loop.run_in_executor(thread, self._compute, batch)
      except Exception as error:  # of the device, such as no memory
        for _, future in part:
          if not future.done():
            future.set_exception(error)
        continue
      for (_, future), row in zip(part, rows, strict=True):
        if not future.done():
          future.set_result(row)
