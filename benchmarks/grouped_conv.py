"""Formulations of the grouped convolution, forward and backward, timed.

python benchmarks/grouped_conv.py [--native]

XLA's own takes seconds a call on CPU and is left out there without --native.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from maskconnect_jax import layers

CASES = (
  (8, 32, 8, 4),
  (8, 32, 8, 64),
  (4, 28, 32, 8),
  (4, 14, 32, 16),
  (4, 7, 32, 32),
  (4, 28, 64, 8),
)


def milliseconds(conv, x, kernel, groups) -> str:
  def loss(x, kernel):
    return jnp.sum(conv(x, kernel, groups) ** 2)

  start = time.perf_counter()
  step = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile()
  compiling = time.perf_counter() - start
  jax.block_until_ready(step(x, kernel))
  times = []
  for _ in range(3):
    start = time.perf_counter()
    jax.block_until_ready(step(x, kernel))
    times.append(time.perf_counter() - start)
  return f'{min(times) * 1e3:.0f} ({compiling:.1f})'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--native', action='store_true')
  native = parser.parse_args().native or jax.default_backend() != 'cpu'
  for batch, side, groups, width in CASES:
    features = groups * width
    x = jax.random.normal(jax.random.key(0), (batch, side, side, features))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, width, features))
    row = [f'{batch}, {side}, {groups}, {width}']
    if native:
      row.append(
        'own '
        + milliseconds(
          lambda x, k, g: layers.sharded_grouped_conv(x, k, g, 1),
          x,
          kernel,
          groups,
        )
      )
    for channels in sorted({width, 64, 128, 256, features}):
      if width <= channels <= features:
        row.append(
          f'{channels}: '
          + milliseconds(
            lambda x, k, g, c=channels: layers.bundled_grouped_conv(
              x, k, g, 1, bundle_channels=c
            ),
            x,
            kernel,
            groups,
          )
        )
    print(' | '.join(row), flush=True)


if __name__ == '__main__':
  main()
