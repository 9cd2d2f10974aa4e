"""Training steps built as a run builds them, timed in turns, and reported."""

import argparse
import contextlib
import dataclasses
import datetime
import functools
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
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from PIL import Image

from maskconnect_jax import (
  config as config_lib,
)
from maskconnect_jax import (
  distributed,
  experiment,
  files,
  models,
  steps,
  sweep,
)


@dataclasses.dataclass(frozen=True)
class Form:
  """A network, how it is wired and its batch; fan_in 0: the rule has none."""

  model: str
  batch: int
  rule: str
  fan_in: int = 0

  def like(self, rule: str, fan_in: int = 0) -> 'Form':
    """Returns the same network and batch under another rule."""
    return dataclasses.replace(self, rule=rule, fan_in=fan_in)

  def cells(self) -> dict[str, Any]:
    """Returns the first columns of its row."""
    return {
      'network': self.model,
      'batch': self.batch,
      'rule': self.rule,
      'K': self.fan_in or None,
    }


def parser(
  doc: str | None, *, models: str, batches: str, rules: str, fan_in: str
) -> argparse.ArgumentParser:
  """Returns one with the options of all programs and their defaults."""
  own = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  own.add_argument(
    '--quick', action='store_true', help='under 3 minutes on two CPU cores'
  )
  for name, default, kind in (
    ('models', models, str),
    ('batches', batches, int),
    ('rules', rules, str),
    ('fan_in', fan_in, int),
  ):
    own.add_argument(
      f'--{name}',
      type=functools.partial(listed, kind=kind),
      default=default,
      help=f'separated by commas, default {default}',
    )
  own.add_argument(
    '--dtype', default='', help='default bfloat16, on CPU float32'
  )
  own.add_argument(
    '--set',
    default='',
    help="config fields of all forms, 'connectivity.gradient=drawn ...'",
  )
  own.add_argument('--json', type=pathlib.Path, help='a file for the table')
  return own


def listed(text: str, kind: Callable[[str], Any]) -> list[Any]:
  return [kind(item) for item in text.split(',') if item]


def parsed(
  own: argparse.ArgumentParser, quick: dict[str, Any]
) -> argparse.Namespace:
  """Parses; `quick` are the defaults of --quick. Bad input is one line."""
  if own.parse_known_args()[0].quick:
    own.set_defaults(**quick)
  given = own.parse_args()
  given.dtype = given.dtype or (
    'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  )
  try:
    for rule in given.rules:
      config_lib.check_choice('connectivity.rule', rule, '--rules')
    for model in given.models:
      models.architecture_of(model)
    sweep.parse_variant(given.set)
  except config_lib.InputError as error:
    own.error(str(error))
  return given


def forms(given: argparse.Namespace) -> list[Form]:
  """Returns all combinations; rules without a fan-in come once."""
  return [
    Form(model, batch, rule, fan_in)
    for model in given.models
    for batch in given.batches
    for rule in given.rules
    for fan_in in (given.fan_in if rule in ('learned', 'fixed_random') else [0])
  ]


@contextlib.contextmanager
def noise(num_images: int, num_classes: int, side: int) -> Iterator[str]:
  """Yields a folder of one noisy image under many names."""
  pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    Image.fromarray(pixels).save(root / 'noise.jpg')
    for part, count in (
      ('train', max(num_images, num_classes)),
      ('test', num_classes),
    ):
      for i in range(count):
        folder = root / part / f'{i % num_classes:04d}'
        folder.mkdir(parents=True, exist_ok=True)
        os.link(root / 'noise.jpg', folder / f'{i}.jpg')
    yield name


def build(
  form: Form,
  given: argparse.Namespace,
  *,
  folder: str = '',
  num_batches: int = 1,
) -> experiment.Experiment:
  """Returns the experiment of a form, on 32x32 images, or 224x224 if large.

  Args:
    form: of the network and the batch.
    given: for dtype and config fields.
    folder: of images, decoded as ImageNet's are; '': noise, in memory.
    num_batches: of noise.
  """
  large = models.architecture_of(form.model).large_images
  config = config_lib.default()
  config.duration = '1000 epochs'
  config.batch_size = form.batch
  config.eval_batch_size = jax.device_count()
  config.model.name, config.model.dtype = form.model, given.dtype
  config.connectivity.rule = form.rule
  config.connectivity.fan_in = form.fan_in or 1
  config.data.source = 'folder'
  config.data.image_size = side = 224 if large else 32
  config.data.skip_errors = True
  with contextlib.ExitStack() as stack:
    if folder:
      config.data.dir, config.data.crop = folder, 'resized'
    else:
      config.data.pad = 0 if large else 4  # large images are cropped before
      config.data.dir = stack.enter_context(
        noise(num_batches * form.batch, 1000 if large else 10, side)
      )
    config.update_from_flattened_dict(sweep.parse_variant(given.set))
    return experiment.build(config)


def traced(job: experiment.Experiment) -> Any:
  """Returns the training step, traced for the arrays of a run."""
  everywhere = distributed.replicated(job.mesh)
  state = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=everywhere
    ),
    jax.eval_shape(lambda: steps.init_state(job.model, job.recipe)),
  )
  size, sharding = job.config.batch_size, job.recipe.batch_sharding
  batch = (
    jax.ShapeDtypeStruct(
      (size, *job.dataset.image_shape), np.uint8, sharding=sharding
    ),
    jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding),
  )
  # As train.compile_step does.
  step = jax.jit(steps.train_step, static_argnums=0, donate_argnums=1)
  return step.trace(job.recipe, state, *batch)


def cost(lowered: Any, compiled: Any) -> tuple[float, float]:
  """Returns FLOPs, and bytes that the compiled program accesses, per device.

  FLOPs are counted before XLA turns convolutions into library calls, of which
  it knows neither FLOPs nor bytes; what these read and write is added.
  """
  theirs = compiled.cost_analysis()
  flops = lowered.cost_analysis()['flops'] / jax.device_count()
  accessed = theirs['bytes accessed']
  if theirs['flops'] < flops / 2:
    accessed += library_bytes(compiled.as_text())
  return flops, accessed


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
    r'(%[\w.-]+) = .* custom-call\(([^)]*)\).* custom_call_target="__', program
  )
  return sum(
    size[name]
    for result, operands in calls
    for name in (result, *re.findall(r'%[\w.-]+', operands))
  )


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
    self.state = distributed.to_global(
      steps.init_state(job.model, job.recipe), distributed.replicated(job.mesh)
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


def machine() -> dict[str, Any]:
  """Returns what the numbers hold for."""
  return {
    'date': datetime.date.today().isoformat(),
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'cpu_cores': os.cpu_count(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'flax': flax.__version__,
  }


def report(
  rows: list[dict[str, Any]],
  given: argparse.Namespace,
  **more: Any,
) -> None:
  """Prints a Markdown table, and writes the same as JSON where asked to.

  Args:
    rows: column to value, all with the same columns; None is left blank.
    given: for dtype and file.
    **more: what holds for all rows.
  """
  about = machine() | {
    'command': shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
    'dtype': given.dtype,
    **more,
  }
  print(', '.join(f'{key} {cell(about[key])}' for key in about) + '.\n')
  columns = list(rows[0])
  print(f'| {" | ".join(columns)} |')
  print(f'| {" | ".join("---" for _ in columns)} |')
  for row in rows:
    print(f'| {" | ".join(cell(row[key]) for key in columns)} |')
  if given.json:
    files.write_json(given.json, {**about, 'rows': rows})


def cell(value: Any) -> str:
  """Returns a number to three digits, none before the point left out."""
  if value is None:
    return ''
  if not isinstance(value, float):
    return str(value)
  return f'{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}'
