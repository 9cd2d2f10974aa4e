"""Milliseconds of a training step under every rule, side by side.

python benchmarks/step_time.py [--quick] [--models=resnet38,resnet110]
  [--batches=128,1024] [--rules=learned,fixed_random,fixed_prev,fixed_all]
  [--fan_in=10,4] [--inference | --data=memory | --data=DIR] [--json=FILE]

The step is that of a run, on noise that stays on the device. All forms of one
network and batch take turns: each of --rounds times --steps of every form. "ms"
is the median over the rounds, "÷" the median of the ratios within a round, "±"
the distance of the quartiles. "blocks" counts the blocks that the program runs:
blocks without a reader are left out, which are most blocks of Fixed-Random.
"dispatch" is the time from the call of the compiled step to its return. Python
and the runtime take this time. It is hidden behind the device's work while it
is far below 100 %. On CPU both share the cores.

--inference times the forward pass of a frozen, pruned network whose real masks
were drawn, beside the ordinary network with as many blocks in each stage.
"bytes ÷" is the ratio of the bytes that the two programs access, by XLA's
count: the cost of reading more than one source.

--data=memory and --data=DIR time the step alone, and in a loop that takes its
batches as a run does; "busy" is their ratio. DIR holds train/CLASS/* and
test/CLASS/*, which are decoded like ImageNet's photographs; imagenet_folder.py
makes such a folder. On CPU, decoding takes time from the step itself.
"""

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Generator, Iterator
from typing import Any

import common
import jax
from flax import nnx

from maskconnect_jax.method import wiring
from maskconnect_jax.networks import architectures, models
from maskconnect_jax.run import augment, experiment, train_state


def training(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
  for _, compared in itertools.groupby(
    common.forms(given), lambda form: (form.network, form.batch)
  ):
    group, calls = list(compared), {}
    for form in group:
      common.say(f'compiling {form}')
      calls[form] = common.TrainingStep(common.build(form, given))
    times = common.in_turns(calls, given.rounds, given.steps)
    for form in group:
      ratios = {
        f'÷ {other.rule}': common.ratio(times[form][1], times[other][1])
        if other in times
        else None
        for other in (
          form.like('fixed_random', form.K),
          form.like('fixed_prev'),
        )
      }
      yield (
        dataclasses.asdict(form)
        | {'blocks': common.live_blocks(calls[form].job)}
        | columns(form.batch, *times[form])
        | ratios
        | {'compile s': calls[form].compile_seconds}
      )


def columns(
  batch: int, dispatch: list[float], whole: list[float]
) -> dict[str, Any]:
  seconds = statistics.median(whole)
  return {
    'ms': seconds * 1e3,
    '± %': common.spread(whole),
    'images/s': batch / seconds,
    'dispatch ms': statistics.median(dispatch) * 1e3,
    'dispatch %': 100 * common.ratio(dispatch, whole),
  }


class Forward:
  """The compiled forward pass of a model; a call dispatches one."""

  def __init__(self, job: experiment.Experiment, model: Any) -> None:
    network, *self.variables = train_state.split(model)

    def forward(variables: Any, images: jax.Array) -> jax.Array:
      own = nnx.merge(network, *variables)
      with job.recipe.on_mesh():
        return own(augment.normalize(images, job.recipe.mean, job.recipe.std))

    self.images, _ = common.random_batch(job)
    lowered = jax.jit(forward).lower(self.variables, self.images)
    self.compiled = lowered.compile()
    _, self.bytes = common.cost(lowered, self.compiled)

  def __call__(self) -> jax.Array:
    """Returns logits, perhaps before they are there."""
    return self.compiled(self.variables, self.images)


def inference(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
  for form in common.forms(given):
    if form.rule != 'learned':
      continue
    common.say(f'compiling {form}')
    job = common.build(form, given)
    pruned = wiring.prune(wiring.freeze(job.model))
    ordinary = as_many_blocks(job, pruned)
    calls = {
      'pruned': Forward(job, pruned),
      'fixed_prev': Forward(job, ordinary),
    }
    times = common.in_turns(calls, given.rounds, given.steps)
    for name, model in (('pruned', pruned), ('fixed_prev', ordinary)):
      yield (
        dataclasses.asdict(
          form.like(name, form.K if name == 'pruned' else None)
        )
        | {
          'blocks': sum(model.topology.live),
          'reads': reads(model.topology),
        }
        | columns(form.batch, *times[name])
        | {
          '÷ fixed_prev': common.ratio(times[name][1], times['fixed_prev'][1]),
          'bytes ÷': calls[name].bytes / calls['fixed_prev'].bytes,
        }
      )


def reads(topology: Any) -> int:
  """Returns how many sources the live blocks take together."""
  wired = zip(topology.sources, topology.live, strict=True)
  return sum(len(sources) for sources, live in wired if live)


def as_many_blocks(job: experiment.Experiment, pruned: Any) -> Any:
  """Returns Fixed-Prev with the live blocks of each stage."""
  architecture = architectures.architecture_of(job.architecture['name'])
  live = [0] * len(architecture.blocks_per_stage)
  for stage, alive in zip(pruned.stages, pruned.topology.live, strict=True):
    live[stage] += alive
  return models.create_model(
    dataclasses.replace(architecture, blocks_per_stage=tuple(live)),
    **{key: job.architecture[key] for key in ('num_classes', 'width', 'dtype')},
    fan_in=1,
    rule='fixed_prev',
  )


def loop(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
  for form in common.forms(given):
    common.say(f'compiling {form}')
    job = common.build(
      form,
      given,
      folder='' if given.data == 'memory' else given.data,
      num_batches=32,
    )
    step = common.TrainingStep(job)
    upcoming = experiment.training_batches(job).starting_at(0)
    alone, fed = in_loop(
      step, upcoming, given.rounds, given.steps, ahead=job.config.data.threads
    )
    yield dataclasses.asdict(form) | {
      'alone ms': statistics.median(alone) * 1e3,
      '± %': common.spread(alone),
      'in the loop ms': statistics.median(fed) * 1e3,
      'images/s': form.batch / statistics.median(fed),
      'busy %': 100 * statistics.median(alone) / statistics.median(fed),
    }


def in_loop(
  step: Any, upcoming: Generator[Any], rounds: int, count: int, ahead: int
) -> tuple[list[float], list[float]]:
  """Returns seconds of steps on one batch, and on the batches of a run.

  The first before and after the second, which must not pause: while it did,
  batches would be read ahead.

  Args:
    step: a call takes a step on its `batch`.
    upcoming: batches; nothing is read before the first is taken.
    rounds: times that are returned of each, or twice as many alone.
    count: steps in a round.
    ahead: batches that may lie ready when the first has been waited for.
  """
  own = step.batch

  def alone() -> list[float]:
    step.batch = own
    common.timed(step, count)
    return [common.timed(step, count)[1] for _ in range(rounds)]

  def fed() -> Any:
    step.batch = next(upcoming)
    return step()

  before = alone()
  common.timed(fed, ahead + count)
  within = [common.timed(fed, count)[1] for _ in range(rounds)]
  upcoming.close()  # or it would go on reading ahead
  return before + alone(), within


def main() -> None:
  parser = common.parser(
    __doc__,
    models='resnet38,resnet110',
    batches='128,1024',
    rules='learned,fixed_random,fixed_prev,fixed_all',
    fan_in='10,4',
  )
  common.add_turns(parser)
  what = parser.add_mutually_exclusive_group()
  what.add_argument('--inference', action='store_true')
  what.add_argument('--data', help="'memory' or a folder of images")
  given = common.parsed(
    parser,
    models='resnet20',
    batches='16',
    rules='learned,fixed_random,fixed_prev',
    fan_in='4',
    rounds=5,
  )
  if given.inference:
    # So that the top K differ from row to row, as after training.
    given.set += ' connectivity.initial_spread=0.5'
  run = inference if given.inference else loop if given.data else training
  common.report(run(given), given, rounds=given.rounds, steps=given.steps)


if __name__ == '__main__':
  common.run(main)
