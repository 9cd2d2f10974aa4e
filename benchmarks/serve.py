"""Requests per second and their times: one client at a time against many.

Serves a model folder on this machine (--mode=serve, a process of its own), or
without --workdir a resnet20 with weights of a seed, and asks it from here. All
traffic stays on the loopback. The clients take a share of the cores.
"""

import argparse
import asyncio
import contextlib
import io
import json
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import common
import numpy as np
from PIL import Image

import maskconnect_jax
from maskconnect_jax.method import wiring
from maskconnect_jax.run import inference


def main() -> None:
  own = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  own.add_argument('--workdir', type=pathlib.Path, help='a finished run')
  own.add_argument('--requests', type=int, default=2000, help='default 2000')
  own.add_argument('--clients', type=int, default=64, help='default 64')
  own.add_argument('--json', type=pathlib.Path, help='a file for the rows')
  given = own.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    workdir = given.workdir or saved(pathlib.Path(folder, 'model'))
    shape = inference.load(workdir).image_shape
    with served(workdir) as port:
      bodies = images(shape)
      asyncio.run(load(port, 1, 50, bodies))  # both sides warm up
      rows = [
        asyncio.run(load(port, clients, count, bodies))
        for clients, count in (
          (1, max(1, given.requests // 4)),
          (given.clients, given.requests),
        )
      ]
  print('| clients | requests | failed | requests/s | median ms | p99 ms |')
  print('| --- | --- | --- | --- | --- | --- |')
  for row in rows:
    print(
      f'| {row["clients"]} | {row["requests"]} | {row["failed"]} |'
      f' {row["per_second"]:.0f} | {row["median_ms"]:.1f} |'
      f' {row["p99_ms"]:.1f} |'
    )
  if given.json:
    given.json.write_text(json.dumps(rows))


def saved(folder: pathlib.Path) -> pathlib.Path:
  """Writes a resnet20 for images of 32x32 pixels, and returns its folder."""
  architecture = {'name': 'resnet20', 'num_classes': 10}
  model = maskconnect_jax.create_model(**architecture, fan_in=3)
  inference.save(
    folder,
    wiring.prune(wiring.freeze(model)),
    architecture=architecture,
    classes=list('0123456789'),
    image_shape=(32, 32, 3),
    resize=0,
    mean=[125.0] * 3,
    std=[64.0] * 3,
  )
  return folder


@contextlib.contextmanager
def served(workdir: pathlib.Path) -> Iterator[int]:
  """Yields the port at which a process serves a model."""
  command = [sys.executable, '-m', 'maskconnect_jax.main', '--mode=serve']
  command += [f'--workdir={workdir}', '--port=0']
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
    assert program.stdout
    try:
      line = program.stdout.readline()
      match = re.search(r':(\d+)$', line.strip())
      if match is None:
        raise common.config_lib.InputError(f'no service began: {line!r}')
      yield int(match[1])
    finally:
      program.send_signal(signal.SIGTERM)
      program.wait(60)


def images(shape: tuple[int, ...]) -> list[bytes]:
  """Returns the bodies of requests, PNG files of random images."""
  bodies, rng = [], np.random.default_rng(0)
  for _ in range(16):
    image = rng.integers(0, 256, shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, 'png')
    bodies.append(file.getvalue())
  return bodies


async def load(
  port: int, clients: int, count: int, bodies: list[bytes]
) -> dict[str, Any]:
  """Sends requests over so many connections, each waiting for its answer."""
  numbers, times, failed = iter(range(count)), [], []

  async def client() -> None:
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    with contextlib.closing(writer):
      for number in numbers:
        body = bodies[number % len(bodies)]
        began = time.perf_counter()
        writer.write(
          b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d'
          b'\r\n\r\n%s' % (len(body), body)
        )
        head = await reader.readuntil(b'\r\n\r\n')
        length = re.search(rb'content-length: (\d+)', head)
        assert length, head
        answer = await reader.readexactly(int(length[1]))
        times.append(time.perf_counter() - began)
        if b' 200 ' not in head.split(b'\r\n')[0] or b'predictions' not in (
          answer
        ):
          failed.append(head)

  began = time.perf_counter()
  await asyncio.gather(*(client() for _ in range(clients)))
  seconds = time.perf_counter() - began
  median, p99 = np.percentile(times, (50, 99))
  return {
    'clients': clients,
    'requests': len(times),
    'failed': len(failed),
    'per_second': len(times) / seconds,
    'median_ms': 1e3 * median,
    'p99_ms': 1e3 * p99,
  }


if __name__ == '__main__':
  common.run(main)
