"""The random streams: every kind of draw has a stream of its own.

The key of a stream is fold_in(key(seed), stream). Training folds the step into
the key, and a network folds in the number of the kernel. So no two draws share
a key. Neither the wiring nor the draws of a step depend on the number of
kernels.
"""

from __future__ import annotations

import jax
from flax import nnx

ORDER, CROP, FLIP, MASK, EVALUATION_MASK, MIXUP = range(6)
WEIGHTS, WIRING, NARROWING = range(6, 9)
DROP_PATH, CUTMIX, ERASING, TRIVIALAUGMENT = range(9, 13)


def root(seed: int, stream: int) -> jax.Array:
  """Returns the key of a stream."""
  return jax.random.fold_in(jax.random.key(seed), stream)


def at_step(seed: int, stream: int, step: jax.Array | int) -> jax.Array:
  """Returns the key of a stream at one training step."""
  return jax.random.fold_in(root(seed, stream), step)


def of_network(seed: int) -> nnx.Rngs:
  """Returns the streams of a network, 'params' and 'connectivity'.

  'params' draws the kernels. 'connectivity' draws the topology of rule
  'fixed_random', or the real mask before training.
  """
  return nnx.Rngs(params=root(seed, WEIGHTS), connectivity=root(seed, WIRING))
