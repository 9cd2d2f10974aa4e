"""Whole blocks dropped from a trained network, by measured loss or at random.

python benchmarks/drop_blocks.py RUN OUT [--counts=3,5,7] [--images=2000]
  [--seed=0]

RUN is the workdir of a finished block-level run, such as one of rule fixed_all.
A block is dropped if no block reads it any more. The cost of a block is the
mean loss of training images without it, less that with all blocks. For each
count, OUT gets measuredN.json, without the N blocks of least cost, and
randomN.json, without N random ones. The last block stays. A run goes on with
them by

  --config.init_from=RUN --config.connectivity.rule=fixed_given
  --config.connectivity.topology=OUT/measured3.json
"""

import argparse
import pathlib

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import maskconnect_jax
from maskconnect_jax import config as config_lib
from maskconnect_jax import files
from maskconnect_jax.data import datasets
from maskconnect_jax.method.topology import Topology
from maskconnect_jax.run import augment


def without(topology: Topology, dropped: set[int]) -> Topology:
  """Returns a topology in which no block reads the dropped ones.

  A block that would read nothing reads the latest source that is left.
  """
  rows = []
  for block, row in enumerate(topology.sources):
    left = tuple(source for source in row if source not in dropped)
    latest = max(set(range(block + 1)) - dropped)
    rows.append(left or (latest,))
  return Topology(tuple(rows))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('run', type=pathlib.Path)
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('--counts', type=common.numbers, default='3,5,7')
  parser.add_argument('--images', type=int, default=2000)
  parser.add_argument('--seed', type=int, default=0)
  given = parser.parse_args()
  data = datasets.load(config_lib.stored(given.run).data)
  model = maskconnect_jax.load(given.run).model
  topology = model.stack.topology
  if not isinstance(topology, Topology):
    raise config_lib.InputError(f'{given.run} is no run of level block')
  rng = np.random.default_rng(given.seed)
  chosen = rng.permutation(len(data.train.labels))[: given.images]
  images = augment.normalize(
    jnp.asarray(data.train.images[chosen]),
    *(tuple(values.tolist()) for values in data.mean_and_std()),
  )
  labels = jnp.asarray(data.train.labels[chosen])

  def loss(own: Topology) -> float:
    model.stack.topology = nnx.static(own)
    graph, state = nnx.split(model)
    mean = jax.jit(
      lambda state: optax.softmax_cross_entropy_with_integer_labels(
        nnx.merge(graph, state)(images), labels
      ).mean()
    )
    return float(mean(state))

  blocks = len(topology.sources)
  whole = loss(topology)
  cost = {
    block: loss(without(topology, {block})) - whole
    for block in range(1, blocks)
  }
  print('| block | loss without it |\n| --- | --- |')
  for block, more in cost.items():
    print(f'| {block} | {more:+.4f} |')
  order = sorted(cost, key=cost.__getitem__)
  given.out.mkdir(parents=True, exist_ok=True)
  for count in given.counts:
    for how, dropped in (
      ('measured', order[:count]),
      ('random', (1 + rng.permutation(blocks - 1)[:count]).tolist()),
    ):
      path = given.out / f'{how}{count}.json'
      files.write_json(path, without(topology, {*dropped}).to_dict())
      print(f'{path}: without {", ".join(map(str, sorted(dropped)))}')


if __name__ == '__main__':
  common.run(main)
