"""Our step beside PyTorch's on the cores of one CPU: one ratio, and its spread.

python benchmarks/cpu_peer.py [--quick] [--models=resnet20,resnet38,...]
  [--batches=32,128] [--rules=learned,fixed_prev] [--fan_in=4] [--inference]
  [--layers] [--ours='NAME [VARIABLE=VALUE ...]'] [--modes=eager,default]
  [--cores=0,1] [--rounds=20] [--json=FILE]

Each side runs in a process of its own, which is bound to --cores and has a
thread for each. Both have the same network, weights, batch and rates; nothing
is augmented. They take turns: a round times --steps steps of each, and begins
with another one than the round before. "ours ÷" is the median, over the rounds,
of our time divided by theirs of the same round. The last column has the
quartiles of these ratios. "theirs" is the fastest of --modes: eager, or one of
torch.compile's. PyTorch has fused SGD and, except for branches, channels_last.

A turn in which others take more than a twentieth of the cores is thrown away
and taken again. If too many are, nothing is reported, and the exit status is 2.

--ours names a setting of ours, as it is started: 'xla CXX=' without the
compiled convolutions, or 'one_device JAX_NUM_CPU_DEVICES=1'. It may be given
several times. Without it, ours starts as the package starts by itself.

--inference times the forward pass of a frozen, pruned network instead, with
--batches=1,128. --layers times each kind of convolution of the networks, the
forward pass and the gradients of input and kernel, and BatchNorm with its relu.

PyTorch is no dependency of the package: pip install torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import cpu_side

OTHERS = 0.05  # the share of the cores that others may take in a turn
TRIES = 3  # turns taken for each one that counts, on average, at most
PAUSE = 0.05  # seconds in which the threads of the last turn fall asleep
FORMS = ('models', 'batches', 'rules', 'fan_in')


class Refused(Exception):
  """The machine is busy, or the two sides differ; nothing can be reported."""


def busy_seconds(cores: list[int]) -> float:
  """Returns the seconds that the cores have worked, for anybody, since boot."""
  ticks = os.sysconf('SC_CLK_TCK')
  names = {f'cpu{core}' for core in cores}
  worked = 0
  for line in pathlib.Path('/proc/stat').read_text().splitlines():
    name, *values = line.split()
    if name in names:
      user, nice, system, _, _, interrupts, soft, stolen = map(int, values[:8])
      worked += user + nice + system + interrupts + soft + stolen
  return worked / ticks


@dataclasses.dataclass(frozen=True)
class Turn:
  """What one turn took.

  Attributes:
    seconds: of a step.
    faults: pages that the kernel gave the process in a step.
    peak: the most memory that the process ever had, in MB.
    others: the share of the cores that other processes took.
  """

  seconds: float
  faults: float
  peak: float
  others: float


class Side:
  """A process that takes steps of one form when it is asked to."""

  def __init__(
    self, kind: str, given: argparse.Namespace, cores: list[int], **more: str
  ) -> None:
    """Starts the process.

    Args:
      kind: 'ours', or a mode of PyTorch.
      given: the options of the program.
      cores: that the process may use.
      **more: variables of its environment.
    """
    self.cores = cores
    threads = str(len(cores))
    program = os.path.join(os.path.dirname(__file__), 'cpu_side.py')
    options = [f'--seed={given.seed}', f'--set={given.set}']
    # As an argument: the first thread that starts inherits it.
    code = (
      f'import os, runpy, sys; os.sched_setaffinity(0, {cores});'
      f' sys.path.insert(0, {os.path.dirname(__file__)!r});'
      f' runpy.run_path({program!r}, run_name="__main__")'
    )
    self.process = subprocess.Popen(
      [sys.executable, '-c', code, kind, *options],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'OMP_NUM_THREADS': threads, **more},
    )

  def ask(self, **question: Any) -> Any:
    """Returns the answer to a question.

    Raises:
      Refused: the process has ended.
    """
    try:
      self.process.stdin.write(json.dumps(question) + '\n')
      self.process.stdin.flush()
      answer = json.loads(self.process.stdout.readline())
    except (OSError, ValueError) as error:  # no pipe, or no answer in it
      raise Refused(f'{shlex.join(self.process.args[3:])} ended') from error
    return answer

  def turn(self, count: int) -> Turn:
    """Takes `count` steps; the result is of one step."""
    time.sleep(PAUSE)
    before, began = busy_seconds(self.cores), time.perf_counter()
    answer = self.ask(steps=count)
    wall = time.perf_counter() - began
    others = busy_seconds(self.cores) - before - answer['cpu']
    # The kernel counts in ticks of 10 ms, for each core.
    others = max(0.0, others - 0.01 * len(self.cores))
    return Turn(
      answer['seconds'] / count,
      answer['faults'] / count,
      answer['peak'],
      others / (wall * len(self.cores)),
    )

  def end(self) -> None:
    """Ends the process, which sees that no more questions come."""
    self.process.communicate()


def in_turns(
  sides: dict[str, Side], rounds: int, count: int
) -> tuple[dict[str, list[Turn]], int]:
  """Returns the turns of each side by round, and how many were thrown away.

  Raises:
    Refused: others take the cores too often.
  """
  names, turns = list(sides), {name: [] for name in sides}
  dropped = 0
  rounds += 2  # the first two do not count
  for i in range(rounds):
    for name in names[i % len(names) :] + names[: i % len(names)]:
      turn = sides[name].turn(count)
      while i > 1 and turn.others > OTHERS:
        dropped += 1
        if dropped > (TRIES - 1) * len(names) * rounds:
          raise Refused(
            f'other processes take {100 * turn.others:.0f} % of the cores;'
            ' end them, or wait'
          )
        time.sleep(0.5)
        turn = sides[name].turn(count)
      turns[name].append(turn)
  return {name: own[2:] for name, own in turns.items()}, dropped


def rows_of(
  form: dict[str, Any], turns: dict[str, list[Turn]], **more: Any
) -> Iterator[dict[str, Any]]:
  """Yields a row for each side; theirs are the sides of PyTorch."""
  seconds = {
    name: [turn.seconds for turn in own] for name, own in turns.items()
  }
  modes = [name for name in turns if name.startswith('torch')]
  fastest = min(modes, key=lambda name: statistics.median(seconds[name]))
  for name, own in seconds.items():
    ratios = [a / b for a, b in zip(own, seconds[fastest], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    yield {
      **form,
      'side': name,
      'ms': 1e3 * statistics.median(own),
      'faults': round(statistics.median(turn.faults for turn in turns[name])),
      'peak MB': round(turns[name][-1].peak),
      '÷ theirs': statistics.median(ratios),
      'quartiles': f'{low:.2f} to {high:.2f}',
      **more,
    }


def compared(
  given: argparse.Namespace, cores: list[int]
) -> Iterator[dict[str, Any]]:
  """Yields the table's rows, form by form."""
  for form in forms(given):
    print('preparing', form, file=sys.stderr, flush=True)
    sides = {}
    try:
      for setting in given.ours:
        name, *variables = shlex.split(setting) or ['']
        more = dict(variable.split('=', 1) for variable in variables)
        sides[f'ours {name}'.strip()] = Side('ours', given, cores, **more)
      for mode in given.modes:
        sides[f'torch {mode}'] = Side(mode, given, cores)
      values = {name: side.ask(**form)['value'] for name, side in sides.items()}
      check_equal(form, values)
      turns, dropped = in_turns(sides, given.rounds, given.steps)
      yield from rows_of(form, turns, dropped=dropped)
    finally:
      for side in sides.values():
        side.end()


def forms(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
  if given.layers:
    for name, batch in itertools.product(cpu_side.LAYERS, given.batches):
      yield {'layer': name, 'batch': batch}
    return
  for model, batch, rule in itertools.product(
    given.models, given.batches, given.rules
  ):
    for fan_in in [None] if rule == 'fixed_prev' else given.fan_in:
      yield {
        'network': model,
        'batch': batch,
        'rule': rule,
        'K': fan_in,
        'inference': given.inference,
      }


def check_equal(form: dict[str, Any], values: dict[str, float]) -> None:
  """Checks that all sides computed the same at the first call.

  Two draws of a mask differ, so a learned network's losses may differ a little.

  Raises:
    Refused: they did not.
  """
  apart = (
    0.2 if form.get('rule') == 'learned' and not form['inference'] else 1e-3
  )
  first = next(iter(values.values()))
  for name, value in values.items():
    if not abs(value - first) <= apart * abs(first):
      raise Refused(f'{form}: {name} computes {value}, not {first}')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='under 3 minutes')
  parser.add_argument('--models', default='resnet20,resnet38,resnext20_8x4d')
  parser.add_argument('--batches')
  parser.add_argument('--rules', default='learned,fixed_prev')
  parser.add_argument('--fan_in', default='4')
  parser.add_argument('--inference', action='store_true')
  parser.add_argument('--layers', action='store_true')
  parser.add_argument('--ours', action='append')
  parser.add_argument('--modes', default='eager,default')
  parser.add_argument('--cores')
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--steps', type=int, default=1)
  parser.add_argument('--set', default='')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--json', type=pathlib.Path)
  if parser.parse_known_args()[0].quick:
    parser.set_defaults(
      models='resnet8', rules='learned', modes='eager', rounds=5
    )
  given = parser.parse_args()
  given.ours = given.ours or ['']
  given.batches = given.batches or ('1,128' if given.inference else '32,128')
  for name in ('models', 'rules', 'modes'):
    setattr(given, name, getattr(given, name).split(','))
  for name in ('batches', 'fan_in'):
    setattr(given, name, [int(n) for n in getattr(given, name).split(',')])
  cores = sorted(os.sched_getaffinity(0))
  if given.cores:
    cores = [int(core) for core in given.cores.split(',')]
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import common
  import torch

  given.dtype = 'float32'
  try:
    common.report(
      compared(given, cores), given, torch=torch.__version__, cores=len(cores)
    )
  except Refused as error:
    common.say(f'error: {error}')
    sys.exit(2)


if __name__ == '__main__':
  main()
