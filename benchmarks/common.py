"""Training steps built as a run builds them, timed in turns, and reported."""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import math
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax
import jax
import jaxlib
import ml_collections
import numpy as np
from jaxlib import _jax
from PIL import Image

from maskconnect_jax import config as config_lib
from maskconnect_jax import files
from maskconnect_jax.networks import architectures
from maskconnect_jax.run import (
  cores,
  distributed,
  experiment,
  steps,
  train_state,
)
from maskconnect_jax.study import sweep

# What the PyTorch port has, beside the defaults.
SAME = (
  'data.pad=0 data.flip=False optimizer.schedule=constant'
  ' connectivity.phase=100% connectivity.initial_spread=0.5'
  ' connectivity.gradient=all'
)


@dataclasses.dataclass(frozen=True)
class Form:
  """A network, its batch and its wiring; K is None where a rule has none."""

  network: str
  batch: int
  rule: str
  K: int | None = None

  def like(self, rule: str, fan_in: int | None = None) -> 'Form':
    """Returns the same network and batch under another rule."""
    return dataclasses.replace(self, rule=rule, K=fan_in)


def run(main: Callable[[], None]) -> None:
  """Runs a program; bad input is one line and exit status 2."""
  try:
    main()
  except config_lib.InputError as error:
    say(f'error: {error}')
    sys.exit(2)


def parser(doc: str | None, **defaults: str) -> argparse.ArgumentParser:
  """Returns one with the options of all programs, given their lists."""
  own = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  own.add_argument(
    '--quick', action='store_true', help='under 3 minutes on two CPU cores'
  )
  for name, default in defaults.items():
    own.add_argument(
      f'--{name}',
      type=numbers if name in ('batches', 'fan_in') else names,
      default=default,
      help=f'separated by commas, default {default}',
    )
  own.add_argument('--dtype', help='default bfloat16, on CPU float32')
  own.add_argument(
    '--set',
    default='',
    help="config fields of all forms, 'connectivity.gradient=drawn ...'",
  )
  own.add_argument(
    '--seed', type=int, default=0, help='of all forms, default 0'
  )
  own.add_argument('--json', type=pathlib.Path, help='a file for the table')
  return own


def add_turns(own: argparse.ArgumentParser) -> None:
  """Adds the options of programs that time things in turns."""
  own.add_argument('--rounds', type=int, default=20, help='default 20')
  own.add_argument(
    '--steps',
    type=int,
    help='of each in a round, default 10, on CPU 1',
  )


def names(text: str) -> list[str]:
  return text.split(',')


def numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(',')]


def parsed(own: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
  """Parses and checks all forms; `quick` are the defaults of --quick."""
  if own.parse_known_args()[0].quick:
    own.set_defaults(**quick)
  given = own.parse_args()
  if hasattr(given, 'rounds'):  # a program that times things, as a run does
    cores.use(cores.devices(math.gcd(*given.batches), 32, cores.available()))
    given.steps = given.steps or (1 if jax.default_backend() == 'cpu' else 10)
  given.dtype = given.dtype or (
    'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  )
  for form in forms(given):
    config_lib.check(config_of(form, given))
    distributed.check_batch_size(form.batch)
  return given


def forms(given: argparse.Namespace) -> list[Form]:
  """Returns all combinations; rules without a fan-in come once."""
  return [
    Form(model, batch, rule, fan_in)
    for model, batch, rule in itertools.product(
      given.models, given.batches, given.rules
    )
    for fan_in in (
      [None] if rule in ('fixed_prev', 'fixed_all') else given.fan_in
    )
  ]


def config_of(
  form: Form, given: argparse.Namespace
) -> ml_collections.ConfigDict:
  """Returns the config of a form, on images of 32x32, or 224x224 if large."""
  large = architectures.architecture_of(form.network).large_images
  config = config_lib.default()
  config.seed = given.seed
  config.duration = '1000 epochs'
  config.batch_size = form.batch
  config.eval_batch_size = jax.device_count()
  config.model.name, config.model.dtype = form.network, given.dtype
  config.connectivity.rule = form.rule
  # Every step with the masks' gradient; a narrowing wiring has none.
  config.connectivity.learner = 'draws'
  config.connectivity.fan_in = 1 if form.K is None else form.K
  config.data.source = 'folder'
  config.data.image_size = 224 if large else 32
  config.data.pad = 0 if large else 4  # large images are cropped by the host
  config.data.skip_errors = True
  config.update_from_flattened_dict(sweep.parse_variant(given.set))
  return config


def build(
  form: Form,
  given: argparse.Namespace,
  *,
  folder: str = '',
  num_batches: int = 1,
) -> experiment.Experiment:
  """Returns the experiment of a form.

  Args:
    form: of the network and the batch.
    given: for dtype and config fields.
    folder: of images, decoded as ImageNet's are; '': noise, in memory.
    num_batches: of noise.
  """
  config = config_of(form, given)
  if folder:
    config.data.dir, config.data.crop = folder, 'resized'
    return experiment.build(config)
  large = architectures.architecture_of(form.network).large_images
  with noise(
    num_batches * form.batch, 1000 if large else 10, config.data.image_size
  ) as config.data.dir:
    return experiment.build(config)


def live_blocks(job: experiment.Experiment) -> int:
  """Returns how many blocks the program runs: all, or those that are read."""
  topology = job.model.topology
  return len(job.model.stack.blocks) if topology is None else sum(topology.live)


@contextlib.contextmanager
def noise(num_images: int, num_classes: int, side: int) -> Iterator[str]:
  """Yields a folder of one noisy image under as many names, or one a class."""
  pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    Image.fromarray(pixels).save(root / 'noise.jpg')
    for part, count in (('train', num_images), ('test', 0)):
      for i in range(max(count, num_classes)):
        folder = root / part / f'{i % num_classes:04d}'
        folder.mkdir(parents=True, exist_ok=True)
        os.link(root / 'noise.jpg', folder / f'{i}.jpg')
    yield name


def traced(job: experiment.Experiment) -> Any:
  """Returns the training step, traced for the arrays of a run."""
  shapes = jax.eval_shape(lambda: train_state.init_state(job.model, job.recipe))
  state = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    train_state.shardings(job.recipe, shapes),
  )
  size, sharding = job.config.batch_size, job.recipe.batch_sharding
  batch = (
    jax.ShapeDtypeStruct(
      (size, *job.dataset.image_shape), np.uint8, sharding=sharding
    ),
    jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding),
  )
  # As loop.compile_step does.
  step = jax.jit(steps.train_step, static_argnums=0, donate_argnums=1)
  return step.trace(job.recipe, state, *batch)


def cost(lowered: Any, compiled: Any) -> tuple[float, float]:
  """Returns FLOPs, and bytes that the compiled program accesses, per device.

  FLOPs are counted before XLA turns convolutions into library calls, of which
  it knows neither FLOPs nor bytes; what these read and write is added.
  """
  (program,) = compiled.runtime_executable().hlo_modules()
  theirs = counted(program)
  before = counted(lowered.compiler_ir('hlo').as_hlo_module())
  flops = before['flops'] / jax.device_count()
  accessed = theirs['bytes accessed']
  if theirs['flops'] < flops / 2:
    accessed += library_bytes(compiled.as_text())
  return flops, accessed


def counted(program: Any) -> dict[str, float]:
  """Returns XLA's count of FLOPs and bytes of a program, in HLO.

  As the compiled step's own cost_analysis(), which needs the device it is for.
  A GPU's client cannot count (jax 0.11); the CPU's counts any program.
  """
  return _jax.hlo_module_cost_analysis(jax.devices('cpu')[0].client, program)


def library_bytes(program: str) -> int:
  """Returns the bytes of operands and results of all calls to libraries.

  Args:
    program: in HLO, optimized. A second result is scratch space, not counted.
  """
  size = {
    name: array_bytes(kind)
    for name, kind in re.findall(r'(%[\w.-]+) = \(?(\w+\[[\d,]*\])', program)
  }
  calls = re.findall(
    r'(%[\w.-]+) = .* custom-call\(([^)]*)\)'
    r'.* custom_call_target="(?:__|maskconnect)',
    program,
  )
  return sum(
    size[name]
    for result, operands in calls
    for name in (result, *re.findall(r'%[\w.-]+', operands))
  )


def collectives(program: str) -> dict[str, tuple[int, int]]:
  """Returns number, and bytes of the results, of each kind of collective.

  Args:
    program: in HLO, optimized.
  """
  found: dict[str, tuple[int, int]] = {}
  for kinds, name in re.findall(
    r' = (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all'
    r'|collective-permute)(?:-start)?\(',
    program,
  ):
    count, size = found.get(name, (0, 0))
    arrays = re.findall(r'\w+\[[\d,]*\]', kinds)
    found[name] = count + 1, size + sum(map(array_bytes, arrays))
  return found


def array_bytes(kind: str) -> int:
  """Returns the size of 'bf16[128,32]'."""
  dtype, shape = kind.rstrip(']').split('[')
  bits = re.search(r'\d+', dtype)  # none in pred
  item = math.ceil(int(bits[0]) / 8) if bits else 1
  return item * math.prod(int(side) for side in shape.split(',') if side)


class TrainingStep:
  """A compiled step and its state; a call dispatches one step."""

  def __init__(self, job: experiment.Experiment) -> None:
    self.job = job
    began = time.perf_counter()
    self.lowered = traced(job).lower()
    self.compiled = self.lowered.compile()
    self.compile_seconds = time.perf_counter() - began
    self.state = train_state.on_devices(
      job.recipe, train_state.init_state(job.model, job.recipe)
    )
    self.batch = random_batch(job)

  def __call__(self) -> Any:
    """Returns state and metrics, perhaps before they are there."""
    self.state, values = self.compiled(self.state, *self.batch)
    return self.state, values


def random_batch(job: experiment.Experiment) -> tuple[jax.Array, jax.Array]:
  rng, size = np.random.default_rng(0), job.config.batch_size
  return distributed.to_global(
    (
      rng.integers(0, 256, (size, *job.dataset.image_shape), np.uint8),
      rng.integers(0, len(job.dataset.classes), size, np.int32),
    ),
    job.recipe.batch_sharding,
  )


def timed(call: Callable[[], Any], count: int) -> tuple[float, float]:
  """Returns seconds a call took to dispatch, and to be done with.

  Calls follow each other without a wait, as in training.
  """
  began = time.perf_counter()
  for _ in range(count):
    last = call()
  dispatched = time.perf_counter()
  jax.block_until_ready(last)
  return (dispatched - began) / count, (time.perf_counter() - began) / count


def in_turns(
  calls: dict[Any, Callable[[], Any]], rounds: int, count: int
) -> dict[Any, tuple[list[float], list[float]]]:
  """Times each call `count` times in every round, so that all meet the same.

  Each round begins with another one. Two rounds before are not counted.

  Returns:
    Seconds to dispatch and to be done with, by round.
  """
  keys, times = list(calls), {key: ([], []) for key in calls}
  for i in range(-2, rounds):
    for key in keys[i % len(keys) :] + keys[: i % len(keys)]:
      for values, value in zip(
        times[key], timed(calls[key], count), strict=True
      ):
        values.extend([value] if i >= 0 else [])
  return times


def ratio(ours: list[float], theirs: list[float]) -> float:
  """Returns the median of the ratios of each round."""
  return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def spread(values: list[float]) -> float:
  """Returns the quartiles' distance in per cent of the median."""
  if len(values) < 2:
    return 0.0
  low, middle, high = statistics.quantiles(values, n=4)
  return 100 * (high - low) / middle


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def report(
  rows: Iterable[dict[str, Any]], given: argparse.Namespace, **more: Any
) -> None:
  """Prints a Markdown table, and writes the same as JSON where asked to.

  Args:
    rows: column to value, all with the same columns; None is left blank. Each
      is printed and written when it comes, lest a later one be the end.
    given: for dtype and file.
    **more: what holds for all rows.
  """
  about = {
    'date': datetime.date.today().isoformat(),
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'cpu_cores': os.cpu_count(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'flax': flax.__version__,
    'command': shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
    'dtype': given.dtype,
    **more,
  }
  print(', '.join(f'{key} {cell(about[key])}' for key in about) + '.\n')
  done: list[dict[str, Any]] = []
  for row in rows:
    if not done:
      print(f'| {" | ".join(row)} |\n| {" | ".join("---" for _ in row)} |')
    print(f'| {" | ".join(map(cell, row.values()))} |', flush=True)
    done.append(row)
    if given.json:
      files.write_json(given.json, {**about, 'rows': done})


def cell(value: Any) -> str:
  """Returns a number with three digits, or all before the point."""
  if value is None:
    return ''
  if not isinstance(value, float):
    return str(value)
  return f'{value:.{max(0, 3 - len(str(int(abs(value)))))}f}'
