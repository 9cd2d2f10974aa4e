"""Memory and FLOPs of a branch-level gradient beside the ordinary ResNeXt's.

python benchmarks/branch_memory.py resnext20_8x4d [...]

Compiles, does not run: what it prints does not vary.
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx

import maskconnect_jax
from maskconnect_jax import steps

FORMS = (
  {'rule': 'fixed_prev'},
  {'level': 'branch', 'fan_in': 4},
  {'level': 'branch', 'rule': 'fixed_all'},
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('names', nargs='+')
  parser.add_argument('--batch', type=int, default=32)
  given = parser.parse_args()
  for name in given.names:
    for form in FORMS:
      model = maskconnect_jax.create_model(name, num_classes=10, **form)
      network, weights, masks, statistics = steps.split(model)

      def loss(params, statistics, images, key, network=network):
        model = nnx.merge(network, *params, statistics, copy=True)
        logits = model(images, model.draw(key), train=True)
        return jnp.sum(logits**2), nnx.state(model, nnx.BatchStat)

      arguments = jax.eval_shape(
        lambda: (
          (weights, masks),  # noqa: B023
          statistics,  # noqa: B023
          jnp.zeros((given.batch, 32, 32, 3)),
          jax.random.key(0),
        )
      )
      compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(*arguments)
      compiled = compiled.compile()
      cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
      print(
        f'{name} {form}: {memory.temp_size_in_bytes / 1e6:.0f} MB,'
        f' {cost["flops"] / 1e9:.1f} GFLOP,'
        f' {cost["bytes accessed"] / 1e9:.1f} GB',
        flush=True,
      )


if __name__ == '__main__':
  main()
