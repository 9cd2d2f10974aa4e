"""The network that a config would train and its cost, without training."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from clu import parameter_overview
from flax import nnx

from maskconnect_jax import backend, files
from maskconnect_jax import config as config_lib
from maskconnect_jax.drawing import graph, svg
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.networks import cost
from maskconnect_jax.run import (
  cores,
  distributed,
  experiment,
  narrow,
  steps,
  train_state,
)

# The timing ends after this many steps, or after this many seconds.
_STEPS = 5
_SECONDS = 5.0


GRAPHS: dict[str, Callable[..., str]] = {
  '.svg': svg.topology_svg,
  '.dot': graph.dot,
  '.graphml': graph.graphml,
}


def check_graph(path: Path) -> None:
  """Checks the path of a graph, before any work is done.

  Raises:
    InputError: its suffix is none of GRAPHS, or it cannot be written.
  """
  if path.suffix not in GRAPHS:
    raise InputError(f'--graph={path} must end in {", ".join(GRAPHS)}')
  files.check_output(path)


def write_graph(path: Path, model: Any, workdir: Path | None = None) -> None:
  """Writes the topology of a network as a graph.

  Args:
    path: FILE.svg, FILE.dot or FILE.graphml.
    model: the network. If its wiring is to be learned, the graph has every edge
      that a block may take.
    workdir: of a run, whose topology.json is taken if it is there.

  Raises:
    InputError: topology.json is damaged or of another network, or the file
      cannot be written.
  """
  own = model.topology or topology_lib.from_mask(model.stack.valid)
  if workdir is not None and (workdir / 'topology.json').is_file():
    own = topology_lib.read(
      workdir / 'topology.json', remedy='omit --workdir, or train again'
    )
    own.check(model.stack.valid)
  text = GRAPHS[path.suffix](
    own.sources,
    stages=model.stages,
    live=getattr(own, 'live_branches', own.live),
    title=path.stem,
  )
  files.write_text(path, text)


def describe(
  config: ml_collections.ConfigDict,
  graph_path: Path | None = None,
  workdir: Path | None = None,
) -> str:
  """Returns the network layer by layer, and the cost of training it.

  FLOPs, bytes and memory are XLA's count for one device of the compiled
  training step of the first phase. The time of a step is measured on random
  images. Where a CPU takes compiled C++ code, which XLA cannot
  count, FLOPs, bytes and memory are those of XLA's. The activations of an image
  are the step's temporary memory divided by
  the number of images on one device.

  Args:
    config: see `maskconnect_jax/config.py`.
    graph_path: where the topology is written as a graph; None: nowhere.
    workdir: of a run, see `write_graph`.

  Returns:
    A table of the layers, then one line for each fact.

  Raises:
    InputError: the config or its data cannot be used.
  """
  config_lib.check(config)
  cores.use(cores.for_batches(config.batch_size, config.data))
  distributed.check_platform()
  job = experiment.build(config)
  dataset, plan, model, recipe = job.dataset, job.plan, job.model, job.recipe
  if graph_path is not None:
    write_graph(graph_path, model, workdir)
  state = train_state.on_devices(recipe, train_state.init_state(model, recipe))
  rng = np.random.default_rng(0)
  batch = distributed.to_global(
    (
      rng.integers(0, 256, (config.batch_size, *dataset.image_shape), np.uint8),
      np.stack([dataset.train.blank_label] * config.batch_size),
    ),
    recipe.batch_sharding,
  )
  print('compiling and timing the training step', file=sys.stderr)
  step = jax.jit(steps.train_step, static_argnums=0, donate_argnums=1)
  with backend.native(False):  # of whose work XLA knows nothing
    compiled = step.lower(recipe, state, *batch).compile()
  counted: Any = compiled.cost_analysis()
  memory: Any = compiled.memory_analysis()
  if native_code := backend.native.value:
    compiled = step.lower(recipe, state, *batch).compile()
  seconds = _time_of_a_step(compiled, state, batch)

  own, wiring = config.connectivity, model.stack
  num_valid = int(np.sum(wiring.valid))
  links = (
    model.topology.num_links if model.topology else int(wiring.row_fan_in.sum())
  )
  note = experiment.note_on_fan_in(job)
  measuring = narrow.cost_in_words(job)
  weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  share = config.batch_size // job.mesh.size
  total = tqdm.tqdm.format_interval(seconds * plan.total)
  return '\n'.join(
    [
      parameter_overview.get_parameter_overview(weights, include_stats=False),
      '',
      f'network      {config.model.name}, {len(wiring.blocks)} blocks,'
      f' {cost.count_parameters(model):,} parameters',
      f'input        {" x ".join(map(str, dataset.image_shape))},'
      f' {len(dataset.classes)} classes',
      f'wiring       {own.rule}, {own.level}-level, {links:,} edges of'
      f' {num_valid:,} valid, fan-in {own.fan_in}'
      + (f'; {note}' if note else ''),
      f'data         {len(dataset.train):,} training,'
      f' {len(dataset.validation) if dataset.validation else 0:,} validation,'
      f' {len(dataset.test):,} test images',
      f'run          {plan.in_words(config.batch_size)}',
      *([f'measuring    {measuring}'] if measuring else []),
      f'forward      {_giga(cost.forward_products(model, dataset.image_shape))}'
      ' multiply-adds an image, padding included, as papers count them',
      f'an image     {counted["flops"] / share / 1e6:,.1f} MFLOP to train on,'
      f' {memory.temp_size_in_bytes / share / 1e6:,.2f} MB of activations',
      f'a step       {counted["flops"] / 1e6:,.1f} MFLOP,'
      f' {counted["bytes accessed"] / 1e6:,.1f} MB accessed,'
      f' {memory.temp_size_in_bytes / 1e6:,.1f} MB temporary'
      f' (XLA, {jax.default_backend()}, per device)',
      f'memory       {memory.argument_size_in_bytes / 1e6:,.1f} MB of weights,'
      ' momentum, statistics and images on each device, beside the temporary',
      f'time         {seconds * 1e3:,.1f} ms a step,'
      f' {config.batch_size / seconds:,.0f} images per second, {total} for all'
      f' steps (measured; {job.mesh.size} x {jax.devices()[0].device_kind}'
      + (', convolutions compiled for it)' if native_code else ')'),
    ]
  )


def _giga(count: int) -> str:
  return f'{count / 1e9:,.2f} G' if count >= 1e9 else f'{count / 1e6:,.2f} M'


def _time_of_a_step(compiled: Any, state: Any, batch: Any) -> float:
  """Returns the median time of a step in seconds, without the first step."""
  taken: list[float] = []
  while len(taken) <= 1 or (len(taken) <= _STEPS and sum(taken) < _SECONDS):
    begun = time.perf_counter()
    state, values = compiled(state, *batch)
    jax.block_until_ready((state, values))
    taken.append(time.perf_counter() - begun)
  return statistics.median(taken[1:])
