"""Formulations of the grouped convolution, forward and backward, timed.

python benchmarks/grouped_conv.py [--native | --sharded]

XLA's own formulation takes seconds a call on CPU. There it is timed only with
--native. --sharded instead compares the programs that eight forced CPU devices
run, inside shard_map and outside it.
"""

import argparse
import contextlib
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskconnect_jax import convolution

CASES = (
  (8, 32, 8, 4),
  (8, 32, 8, 64),
  (4, 28, 32, 8),
  (4, 14, 32, 16),
  (4, 7, 32, 32),
  (4, 28, 64, 8),
)


def milliseconds(conv, x, kernel) -> str:
  def loss(x, kernel):
    return jnp.sum(conv(x, kernel) ** 2)

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


def sharded() -> None:
  """Prints the all-gathers and FLOPs per device of a gradient."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  x = jax.ShapeDtypeStruct(
    (16, 8, 8, 32),
    jnp.float32,
    sharding=NamedSharding(mesh, PartitionSpec('data')),
  )
  kernel = jax.ShapeDtypeStruct(
    (3, 3, 4, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
  )

  def loss(x, kernel):
    return jnp.sum(convolution.by_library(x, kernel, 1) ** 2)

  for name, context in {
    "XLA's own": contextlib.nullcontext(),  # without a mesh, no shard_map
    'in shard_map': jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
  }.items():
    with context:
      step = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile()
    print(
      f'{name}: {step.as_text().count("all-gather(")} all-gathers,'
      f' {step.cost_analysis()["flops"] / 1e6:.2f} MFLOP per device'
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--native', action='store_true')
  parser.add_argument('--sharded', action='store_true')
  given = parser.parse_args()
  if given.sharded:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 8)
    sharded()
    return
  native = given.native or jax.default_backend() != 'cpu'
  for batch, side, groups, width in CASES:
    features = groups * width
    x = jax.random.normal(jax.random.key(0), (batch, side, side, features))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, width, features))
    row = [f'{batch}, {side}, {groups}, {width}']
    if native:
      row.append(
        'own '
        + milliseconds(
          lambda x, k: convolution.by_library(x, k, 1),
          x,
          kernel,
        )
      )
    for channels in sorted({width, 16, 64, 256, features}):
      if width <= channels <= features:
        row.append(
          f'{channels}: '
          + milliseconds(
            lambda x, k, c=channels: convolution.bundled(x, k, 1, channels=c),
            x,
            kernel,
          )
        )
    print(' | '.join(row), flush=True)


if __name__ == '__main__':
  main()
