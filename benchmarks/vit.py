"""The wiring of a small ViT, learned with `MaskedStack` on an image folder.

python benchmarks/vit.py DIR [--rules=learned,fixed_random,fixed_prev,fixed_all]
  [--fan_in=2,4] [--seeds=0,1,2] [--epochs=10] [--images=20000] [--side=16]
  [--width=48] [--depth=12] [--learner=measured] [--json=FILE]

One row for each rule, K and seed: test accuracy after the last step, encoder
blocks alive and parameters after pruning. A wiring is learned in the first
quarter of the steps, at six moments. All rules take as many steps.
"""

import argparse
import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import maskconnect_jax
from maskconnect_jax import config as config_lib
from maskconnect_jax.data import datasets
from maskconnect_jax.method import narrowing
from maskconnect_jax.networks import cost
from maskconnect_jax.run import augment

BATCH, PHASE, MOMENTS = 128, 0.25, 6


class Encoder(nnx.Module):
  """An encoder block with its norms before attention and MLP."""

  def __init__(self, width: int, rngs: nnx.Rngs) -> None:
    self.norm1 = nnx.LayerNorm(width, rngs=rngs)
    self.attend = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
    self.norm2 = nnx.LayerNorm(width, rngs=rngs)
    self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
    self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, tokens, width] to the same shape."""
    x = x + self.attend(self.norm1(x))
    return x + self.narrow(nnx.gelu(self.widen(self.norm2(x))))


class ViT(nnx.Module):
  """Patches of 4x4 pixels; the mean of the tokens goes into the head."""

  def __init__(
    self, side: int, classes: int, given: argparse.Namespace, **wiring: Any
  ) -> None:
    seed = wiring.pop('seed')
    rngs = nnx.Rngs(params=seed, connectivity=seed + 1000)
    tokens, width = (side // 4) ** 2, given.width
    self.embed = nnx.Linear(48, width, rngs=rngs)
    self.place = nnx.Param(0.02 * rngs.params.normal((tokens, width)))
    self.stack = maskconnect_jax.MaskedStack(
      [Encoder(width, rngs) for _ in range(given.depth)], rngs=rngs, **wiring
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, classes, rngs=rngs)

  def __call__(
    self, images: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps float [N, side, side, 3] to logits [N, classes]."""
    n, side, _, c = images.shape
    x = images.reshape(n, side // 4, 4, side // 4, 4, c).swapaxes(2, 3)
    x = self.embed(x.reshape(n, -1, 16 * c)) + self.place[...]
    return self.head(self.norm(self.stack(x, mask)).mean(1))


def losses(model: Any, images: Any, labels: Any, mask: Any = None) -> jax.Array:
  """Returns the loss of each image."""
  return optax.softmax_cross_entropy_with_integer_labels(
    model(images, mask), labels
  )


@nnx.jit
def train_step(model: Any, optimizer: Any, images: Any, labels: Any) -> None:
  def mean(model: Any) -> jax.Array:
    return losses(model, images, labels).mean()

  optimizer.update(model, nnx.grad(mean)(model))


def run(data: Any, given: argparse.Namespace, **wiring: Any) -> dict[str, Any]:
  """Trains one network, and returns a row."""
  begun, seed = time.monotonic(), wiring['seed']
  images, labels = data.train.images, data.train.labels
  mean, std = data.mean_and_std()
  model: Any = ViT(images.shape[1], len(data.classes), given, **wiring)
  steps = given.epochs * len(labels) // BATCH
  rate = optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 20, steps)
  optimizer = nnx.Optimizer(
    model, optax.adamw(rate, weight_decay=0.05), wrt=nnx.Param
  )
  rng = np.random.default_rng(seed)
  order = np.concatenate(
    [rng.permutation(len(labels)) for _ in range(given.epochs)]
  )

  @jax.jit
  def prepared(images: Any, step: Any) -> jax.Array:
    crop, flip = jax.random.split(
      jax.random.fold_in(jax.random.key(seed), step)
    )
    x = augment.normalize(images, tuple(mean.tolist()), tuple(std.tolist()))
    return augment.random_flip(flip, augment.random_crop(crop, x, 2))

  def batch(step: int) -> tuple[Any, Any]:
    own = order[step * BATCH : (step + 1) * BATCH]
    return prepared(images[own], step), jnp.asarray(labels[own])

  measure: Any = nnx.jit(losses)
  freeze = round(PHASE * steps)
  learned = wiring['rule'] == 'learned'
  for step in range(steps):
    train_step(model, optimizer, *batch(step))
    moment = (step + 1) * MOMENTS // freeze
    if learned and step < freeze and moment > step * MOMENTS // freeze:
      following = [batch((step + 1 + n) % steps) for n in range(7)]

      def losses_of(mask: Any, n: int, following: Any = following) -> Any:
        return measure(model, *following[n], jnp.asarray(mask))

      narrowing.narrow(model.stack, losses_of, moment=moment, moments=MOMENTS)
  pruned = maskconnect_jax.prune(maskconnect_jax.freeze(model))
  predict: Any = nnx.jit(lambda model, x: model(x).argmax(-1))
  right = 0
  for start in range(0, len(data.test.labels), 500):
    x = augment.normalize(
      jnp.asarray(data.test.images[start : start + 500]),
      tuple(mean.tolist()),
      tuple(std.tolist()),
    )
    own = data.test.labels[start : start + 500]
    right += int((predict(pruned, x) == own).sum())
  return {
    'rule': wiring['rule'],
    'fan_in': wiring['fan_in'],
    'seed': seed,
    'accuracy': right / len(data.test.labels),
    'blocks': sum(pruned.stack.topology.live),
    'parameters': cost.count_parameters(pruned),
    'seconds': time.monotonic() - begun,
    'sources': pruned.stack.topology.sources,
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('dir')
  parser.add_argument('--rules', default='learned,fixed_random')
  parser.add_argument('--fan_in', default='2,4')
  parser.add_argument('--seeds', default='0,1,2')
  parser.add_argument('--learner', default='measured')
  parser.add_argument('--epochs', type=int, default=10)
  parser.add_argument('--images', type=int, default=20_000)
  parser.add_argument('--side', type=int, default=16)
  parser.add_argument('--width', type=int, default=48)
  parser.add_argument('--depth', type=int, default=12)
  parser.add_argument('--json')
  given = parser.parse_args()
  config = config_lib.default()
  config.data.source, config.data.dir = 'folder', given.dir
  config.data.image_size, config.data.train_images = given.side, given.images
  data, rows = datasets.load(config.data), []
  for rule in given.rules.split(','):
    plain = rule in ('fixed_prev', 'fixed_all')
    for fan_in in [1] if plain else map(int, given.fan_in.split(',')):
      for seed in map(int, given.seeds.split(',')):
        row = run(
          data, given, rule=rule, fan_in=fan_in, seed=seed,
          learner=given.learner,
        )  # fmt: skip
        rows.append(row)
        k = '' if plain else f', K = {fan_in}'
        print(
          f'{rule}{k}, seed {seed}: {row["accuracy"]:.2%}, {row["blocks"]}'
          f' blocks, {row["parameters"]:,} parameters, {row["seconds"]:.0f} s',
          flush=True,
        )
        if given.json:
          with open(given.json, 'w') as file:
            json.dump(rows, file, indent=1)
  for key in sorted({(row['rule'], row['fan_in']) for row in rows}):
    own = [r['accuracy'] for r in rows if (r['rule'], r['fan_in']) == key]
    spread = np.std(own, ddof=1) if len(own) > 1 else math.nan
    print(f'{key[0]}, K = {key[1]}: {np.mean(own):.2%} ± {spread:.2%}')


if __name__ == '__main__':
  main()
