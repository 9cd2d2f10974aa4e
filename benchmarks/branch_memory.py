"""Memory and FLOPs of a branch-level gradient beside the ordinary ResNeXt's.

python benchmarks/branch_memory.py resnext20_8x4d [...] [--batch=32] [--side=32]

It compiles but runs nothing. So it prints the same numbers every time, except
for the seconds of compiling.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from flax import nnx

import maskconnect_jax
from maskconnect_jax.run import train_state

FORMS = (
  {'rule': 'fixed_prev'},
  {'level': 'branch', 'fan_in': 4},
  {'level': 'branch', 'rule': 'fixed_all'},
)


def compiled_gradient(name, form, batch, side):
  network, weights, masks, statistics = train_state.split(
    nnx.eval_shape(
      lambda: maskconnect_jax.create_model(name, num_classes=10, **form)
    )
  )

  def loss(params, statistics, images, key):
    model = nnx.merge(network, *params, statistics, copy=True)
    logits = model(images, model.draw(key), train=True)
    return jnp.sum(logits**2), nnx.state(model, nnx.BatchStat)

  images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  gradient = jax.jit(jax.grad(loss, has_aux=True))
  return gradient.lower((weights, masks), statistics, images, key).compile()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('names', nargs='+')
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--side', type=int, default=32)
  given = parser.parse_args()
  for name in given.names:
    for form in FORMS:
      start = time.perf_counter()
      compiled = compiled_gradient(name, form, given.batch, given.side)
      seconds = time.perf_counter() - start
      cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
      print(
        f'{name} {form}: {memory.temp_size_in_bytes / 1e6:.0f} MB,'
        f' {cost["flops"] / 1e9:.1f} GFLOP,'
        f' {cost["bytes accessed"] / 1e9:.1f} GB ({seconds:.0f} s)',
        flush=True,
      )


if __name__ == '__main__':
  main()
