"""The streams of random numbers: one of its own for everything random.

The key of a stream is fold_in(key(seed), stream). Training folds in the step,
the network the number of the kernel. So no two of them share a key, and neither
the wiring nor a step's draws depend on how many kernels a network has.
"""

from __future__ import annotations

import jax
from flax import nnx

ORDER, CROP, FLIP, MASK, EVALUATION_MASK, MIXUP, WEIGHTS, WIRING = range(8)


def root(seed: int, stream: int) -> jax.Array:
  """Returns the key of a stream."""
  return jax.random.fold_in(jax.random.key(seed), stream)


def at_step(seed: int, stream: int, step: jax.Array | int) -> jax.Array:
  """Returns the key of a stream at one training step."""
  return jax.random.fold_in(root(seed, stream), step)


def of_network(seed: int) -> nnx.Rngs:
  """Returns what draws a network: 'params' the kernels, 'connectivity' masks.

  'connectivity' draws the topology of rule 'fixed_random', or the real mask
  before training.
  """
  return nnx.Rngs(params=root(seed, WEIGHTS), connectivity=root(seed, WIRING))
