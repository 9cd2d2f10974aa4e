"""How near a training step is to the limits of a device's memory or arithmetic.

python benchmarks/roofline.py [--quick] [--models=resnet38,resnet110]
  [--batches=128,1024] [--rules=learned,fixed_random,fixed_prev,fixed_all]
  [--fan_in=10] [--json=FILE]

Two times bound a step from below: its FLOPs at the rate of a large matrix
product, and its bytes accessed at the rate of reading and writing a large
array. Both rates are measured here. "bound" is the longer of the two times.

FLOPs and bytes are XLA's counts for one device's program. They assume that
every kernel reads its operands from memory, so a step whose operands stay in a
cache is faster than its bound. The body of a scan counts once.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp

from maskconnect_jax import backend


def copy_bandwidth(num_bytes: int) -> float:
  """Returns bytes per second, read or written, of changing a large array.

  In place: memory that is new to a process costs several times as much on CPU.
  """
  array = jnp.zeros(num_bytes // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)

  def call() -> jax.Array:
    nonlocal array
    array = add(array)
    return array

  return 2 * array.nbytes / seconds_of(call)


def matrix_rate(side: int, dtype: str) -> float:
  """Returns FLOPs per second of a product of large square matrices.

  In float32 at JAX's default precision, as the network's convolutions.
  """
  matrix = jnp.ones((side, side), dtype)
  product = jax.jit(jnp.matmul)
  return 2 * side**3 / seconds_of(lambda: product(matrix, matrix))


def seconds_of(call: Callable[[], Any]) -> float:
  for _ in range(2):
    common.timed(call, 1)
  return statistics.median(common.timed(call, 3)[1] for _ in range(5))


def main() -> None:
  parser = common.parser(
    __doc__,
    models='resnet38,resnet110',
    batches='128,1024',
    rules='learned,fixed_random,fixed_prev,fixed_all',
    fan_in='10',
  )
  cpu = jax.default_backend() == 'cpu'
  common.add_turns(parser)
  given = common.parsed(
    parser,
    models='resnet20',
    batches='16',
    rules='learned,fixed_prev',
    fan_in='4',
    rounds=5,
  )
  bandwidth = copy_bandwidth(2**28 if cpu else 2**31)
  rates = {
    dtype: matrix_rate(2048 if cpu else 8192, dtype)
    for dtype in ('float32', 'bfloat16')
  }
  common.report(
    (
      measure(form, given, bandwidth, rates[given.dtype])
      for form in common.forms(given)
    ),
    given,
    copy_gb_per_second=bandwidth / 1e9,
    **{f'{dtype}_tflops': rate / 1e12 for dtype, rate in rates.items()},
  )


def measure(
  form: common.Form, given: argparse.Namespace, bandwidth: float, rate: float
) -> dict[str, Any]:
  common.say(f'compiling {form}')
  job = common.build(form, given)
  step = common.TrainingStep(job)
  with backend.native(False):  # of whose work XLA knows nothing
    lowered = common.traced(job).lower()
  flops, accessed = common.cost(lowered, step.compiled)
  times = common.in_turns({form: step}, given.rounds, given.steps)
  seconds = statistics.median(times[form][1])
  arithmetic, memory = flops / rate, accessed / bandwidth
  return dataclasses.asdict(form) | {
    'GFLOP': flops / 1e9,
    'GB': accessed / 1e9,
    'arithmetic ms': arithmetic * 1e3,
    'memory ms': memory * 1e3,
    'bound': 'arithmetic' if arithmetic > memory else 'memory',
    'measured ms': seconds * 1e3,
    'measured ÷ bound': seconds / max(arithmetic, memory),
  }


if __name__ == '__main__':
  common.run(main)
