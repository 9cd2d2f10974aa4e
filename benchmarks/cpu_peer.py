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
torch.compile's. PyTorch has channels_last and fused SGD.

A turn in which others take more than a twentieth of the cores is thrown away
and taken again. If too many are, nothing is reported, and the exit status is 2.

--ours names a setting of ours, as it is started: 'plain XLA_FLAGS=' or
'one_device JAX_NUM_CPU_DEVICES=1'. It may be given several times. Without it,
ours starts as the package starts by itself.

--inference times the forward pass of a frozen, pruned network instead, with
--batches=1,128. --layers times each kind of convolution of the networks, the
forward pass and the gradients of input and kernel, and BatchNorm with its relu.

PyTorch is no dependency of the package: pip install torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

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
    options = [f'--seed={given.seed}', f'--set={given.set}']
    # As an argument: the first thread that starts inherits it.
    program = (
      f'import os, runpy, sys; os.sched_setaffinity(0, {cores});'
      f' sys.path.insert(0, {os.path.dirname(__file__)!r});'
      f' runpy.run_path({__file__!r}, run_name="__main__")'
    )
    self.process = subprocess.Popen(
      [sys.executable, '-c', program, f'--serve={kind}', *options],
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
    for name, batch in itertools.product(LAYERS, given.batches):
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


# Of resnet20's and resnext20_8x4d's stages: height, channels in and out, kernel
# and groups.
LAYERS = {
  '3x3 32x32 16': (32, 16, 16, 3, 1),
  '3x3 16x16 32': (16, 32, 32, 3, 1),
  '3x3 8x8 64': (8, 64, 64, 3, 1),
  '1x1 32x32 256-32': (32, 256, 32, 1, 1),
  '1x1 32x32 32-256': (32, 32, 256, 1, 1),
  '3x3 32x32 32/8': (32, 32, 32, 3, 8),
  '3x3 8x8 128/8': (8, 128, 128, 3, 8),
  'norm 32x32 16': (32, 16, 0, 0, 0),
}


def serve(kind: str, given: argparse.Namespace) -> None:
  """Answers questions on stdin: a form is prepared, its steps are timed."""
  answers, sys.stdout = sys.stdout, sys.stderr
  call: Callable[[], Any] = int  # the first question replaces both
  wait: Callable[[Any], float] = float
  prepare = ours if kind == 'ours' else functools.partial(theirs, mode=kind)
  for line in sys.stdin:
    question = json.loads(line)
    if 'steps' not in question:
      call, wait = prepare(question, given)
      answer = {'value': wait(call())}
      wait(call())
    else:
      used, faults = time.process_time(), page_faults()
      began = time.perf_counter()
      for _ in range(question['steps']):
        last = call()
      wait(last)
      answer = {
        'seconds': time.perf_counter() - began,
        'cpu': time.process_time() - used,
        'faults': page_faults() - faults,
        'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
      }
    print(json.dumps(answer), file=answers, flush=True)


def page_faults() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


Prepared = tuple[Callable[[], Any], Callable[[Any], float]]


def job_of(
  question: dict[str, Any], given: argparse.Namespace, batch: int
) -> Any:
  """Returns the experiment of a form."""
  import common

  own = argparse.Namespace(
    dtype='float32', seed=given.seed, set=f'{common.SAME} {given.set}'
  )
  form = common.Form(
    question['network'], batch, question['rule'], question['K']
  )
  return common.build(form, own)


def pruned(job: Any) -> Any:
  from maskconnect_jax.method import wiring

  return wiring.prune(
    wiring.freeze(job.model) if job.model.topology is None else job.model
  )


def ours(question: dict[str, Any], given: argparse.Namespace) -> Prepared:
  """Returns our call, and what waits for its result."""
  from maskconnect_jax.run import cores

  cores.use(cores.devices(question['batch'], 32, cores.available()))
  if 'layer' in question:
    return our_layer(question)
  import common

  if question['inference']:
    return classifier(question, given)
  step = common.TrainingStep(job_of(question, given, question['batch']))
  return step, lambda result: float(result[1]['loss'])


def classifier(question: dict[str, Any], given: argparse.Namespace) -> Prepared:
  """Returns the model that `maskconnect_jax.load` would, called on images."""
  import jax
  import numpy as np
  from flax import nnx

  from maskconnect_jax.run import inference

  job = job_of(question, given, jax.device_count())
  network, state = nnx.split(pruned(job))
  height, width, channels = job.dataset.image_shape
  model = inference.Classifier(
    network,
    state,
    {
      'classes': job.dataset.classes,
      'topology': pruned(job).topology.to_dict(),
      'preprocessing': {
        'height': height,
        'width': width,
        'channels': channels,
        'mean': job.recipe.mean,
        'std': job.recipe.std,
      },
    },
  )
  images = images_of(question)
  return lambda: model.logits(images), lambda logits: float(
    np.abs(logits).mean()
  )


def images_of(question: dict[str, Any]) -> Any:
  import numpy as np

  shape = (question['batch'], 32, 32, 3)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def theirs(
  question: dict[str, Any], given: argparse.Namespace, mode: str
) -> Prepared:
  """Returns PyTorch's call, and what waits for its result."""
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if 'layer' in question:
    return their_layer(question, mode)
  import common
  import torch_port

  job = job_of(question, given, question['batch'])
  if not question['inference']:
    step = torch_port.torch_step(
      job, torch_port.ported(job.model, question['network']), mode
    )
    images, labels = torch_port.on_device(*common.random_batch(job))
    labels = labels.long()
    return lambda: step(images, labels), float
  network = torch_port.ported(pruned(job), question['network'])
  network = network.to(memory_format=torch.channels_last).eval()
  images = torch.from_numpy(images_of(question))
  mean, std = (
    torch.tensor(values).view(3, 1, 1)
    for values in (job.recipe.mean, job.recipe.std)
  )

  def forward() -> Any:
    return network((images.permute(0, 3, 1, 2).float() - mean) / std)

  compiled = forward if mode == 'eager' else torch.compile(forward, mode=mode)
  called = torch.inference_mode()(compiled)
  return lambda: called().numpy(), lambda logits: float(abs(logits).mean())


def layer_arrays(question: dict[str, Any]) -> tuple[Any, Any, Any]:
  """Returns input [N, H, W, C], kernel [h, w, C / groups, C'] and cotangent."""
  import numpy as np

  rng, batch = np.random.default_rng(0), question['batch']
  side, inner, outer, size, groups = LAYERS[question['layer']]
  x = rng.normal(size=(batch, side, side, inner)).astype(np.float32)
  if not size:
    return x, np.ones(inner, np.float32), x
  kernel = rng.normal(size=(size, size, inner // groups, outer))
  y = rng.normal(size=(batch, side, side, outer))
  return x, kernel.astype(np.float32), y.astype(np.float32)


def our_layer(question: dict[str, Any]) -> Prepared:
  import jax
  import numpy as np

  from maskconnect_jax import backend, convolution
  from maskconnect_jax.networks import layers
  from maskconnect_jax.run import distributed

  size = LAYERS[question['layer']][3]
  x, kernel, y = layer_arrays(question)
  mesh = distributed.make_mesh()
  x, y = distributed.to_global((x, y), distributed.sharded(mesh))
  kernel = distributed.to_global(kernel, distributed.replicated(mesh))

  def layer(x: Any, kernel: Any) -> Any:
    if not size:
      norm = layers.BatchNorm(len(kernel), dtype='float32')
      norm.scale[...] = kernel
      return backend.relu(norm(x, use_running_average=False))
    return convolution.conv(x, kernel)

  @jax.jit
  def everything(x: Any, kernel: Any, y: Any) -> Any:
    out, back = jax.vjp(layer, x, kernel)
    return out, *back(y)

  def wait(result: Any) -> float:
    jax.block_until_ready(result)
    return float(np.abs(result[2]).mean())

  return lambda: everything(x, kernel, y), wait


def their_layer(question: dict[str, Any], mode: str) -> Prepared:
  import torch
  from torch.nn import functional

  _, _, _, size, groups = LAYERS[question['layer']]
  x, kernel, y = map(torch.from_numpy, layer_arrays(question))
  x, y = x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)
  x.requires_grad_()
  if size:
    kernel = kernel.permute(3, 2, 0, 1).contiguous(
      memory_format=torch.channels_last
    )
  kernel.requires_grad_()
  zeros = torch.zeros(x.shape[1])

  def layer() -> Any:
    if size:
      return functional.conv2d(x, kernel, padding=size // 2, groups=groups)
    normal = functional.batch_norm(
      x, torch.zeros_like(zeros), zeros + 1, kernel, zeros, training=True
    )
    return functional.relu(normal)

  forward = layer if mode == 'eager' else torch.compile(layer, mode=mode)

  def everything() -> Any:
    x.grad = kernel.grad = None
    forward().backward(y)
    return kernel.grad

  return everything, lambda gradient: float(gradient.abs().mean())


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
  parser.add_argument('--serve', help=argparse.SUPPRESS)
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
  if given.serve:
    serve(given.serve, given)
    return
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
