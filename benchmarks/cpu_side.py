"""One side of cpu_peer.py: a process that takes our steps, or PyTorch's.

python benchmarks/cpu_side.py KIND [--seed=0] [--set='FIELD=VALUE ...']

KIND is 'ours', 'eager' or a mode of torch.compile. A question is a line of JSON
on stdin, and its answer a line on stdout. A form, such as {"network":
"resnet20", "batch": 32, "rule": "learned", "K": 4, "inference": false} or
{"layer": "3x3 8x8 64", "batch": 32}, is prepared and called once; the answer
has its value. {"steps": 3} times three calls.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

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
  import torch_network
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
  layout = torch_network.layout_of(network)
  network = network.to(memory_format=layout).eval()
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
  jax.set_mesh(mesh)  # each device computes its part of the batch
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
  parser.add_argument('kind')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--set', default='')
  given = parser.parse_args()
  serve(given.kind, given)


if __name__ == '__main__':
  main()
