"""What the networks of finished runs take to predict, after pruning.

python benchmarks/latency.py FOLDER... [--batches=1,128] [--rounds=20]
  [--figure=FILE.png] [--json=FILE]

FOLDER is the workdir of a run, or holds workdirs at any depth. A row of
`--mode=summarize` becomes a row here. Its networks are built anew from
config.json and topology.json, for RGB images of ten classes: times do not
depend on the weights. All of
them predict in turns on one device. A row has the median of its seeds' medians,
and the least and the most of these. --figure draws test accuracy against the
time of the last of --batches.
"""

import argparse
import math
import pathlib
import statistics
from typing import Any

import common
import jax
import jax.numpy as jnp
from flax import nnx

import maskconnect_jax
from maskconnect_jax import config as config_lib
from maskconnect_jax.figures import page, trade
from maskconnect_jax.method import topology
from maskconnect_jax.run import experiment
from maskconnect_jax.study import summarize


def predictor(run: summarize.Run) -> tuple[Any, tuple[int, int, int], Any]:
  """Returns what predicts in a run's network, its image, and what fixes both.

  Runs that agree in the third take equally long.
  """
  config = config_lib.stored(run.workdir)
  record = topology.read(
    run.workdir / 'topology.json', remedy='give a finished run'
  )
  model = maskconnect_jax.prune(
    maskconnect_jax.create_model(
      **experiment.architecture_of(config, 10, 3),
      spec=config_lib.wiring_spec(config),
      topology=record,
    )
  )
  size = config.data.image_size
  graph, state = nnx.split(model)
  predict = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
  fixed = config.model.name, config.model.width, size, record
  return lambda images: predict(state, images), (size, size, 3), fixed


def rows(given: argparse.Namespace) -> Any:
  """Yields a row for each of the table's, and draws the figure at the end."""
  found = summarize.summarize(given.folders).rows
  calls: dict[Any, Any] = {}
  owners: dict[Any, Any] = {}
  for row in found:
    for run in row.runs:
      predict, image, fixed = predictor(run)
      owners[run.workdir] = fixed
      for batch in given.batches:
        images = jnp.zeros((batch, *image), jnp.float32)
        calls.setdefault(
          (fixed, batch),
          lambda predict=predict, images=images: predict(images),
        )
  common.say(f'{len(calls)} programs')
  times = {
    key: 1e3 * statistics.median(done)
    for key, (_, done) in common.in_turns(
      calls, given.rounds, given.steps
    ).items()
  }
  taken = {
    batch: [[times[owners[run.workdir], batch] for run in row.runs]
            for row in found]
    for batch in given.batches
  }  # fmt: skip
  for number, row in enumerate(found):
    accuracies = row.values('test_accuracy_pruned')
    own = {
      f'ms, batch {batch}': _words(taken[batch][number])
      for batch in given.batches
    }
    yield {
      'row': row.name,
      'seeds': len(row.runs),
      'test accuracy, %': 100 * statistics.fmean(accuracies),
      **own,
    }
  if given.figure:
    last = given.batches[-1]
    drawing = trade.figure(
      [row.short for row in found],
      [row.kind for row in found],
      taken[last],
      [row.values('test_accuracy_pruned') for row in found],
      title=f'Test accuracy against the time of a prediction of {last} images',
      cost=f'milliseconds, {jax.devices()[0].device_kind}',
    )
    page.save(drawing, given.figure.with_suffix(''))


def _words(values: list[float]) -> str:
  """Returns '4.1 (3.2 to 5.0)', with three digits each."""
  middle, least, most = (
    common.cell(float(f(values))) for f in (statistics.median, min, max)
  )
  return middle if least == most else f'{middle} ({least} to {most})'


def main() -> None:
  parser = common.parser(__doc__, batches='1,128')
  common.add_turns(parser)
  parser.add_argument('folders', nargs='+', type=pathlib.Path)
  parser.add_argument('--figure', type=pathlib.Path)
  given = parser.parse_args()
  if given.quick:
    given.rounds = min(given.rounds, 3)
  if given.figure:
    summarize.check_figure(given.figure)
  given.steps = given.steps or 3
  given.dtype = given.dtype or 'that of each run'
  if not math.prod(given.batches):
    raise config_lib.InputError('--batches must be above 0')
  common.report(rows(given), given)


if __name__ == '__main__':
  common.run(main)
