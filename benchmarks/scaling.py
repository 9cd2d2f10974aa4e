"""What a training step computes, keeps and sends as the devices grow in number.

python benchmarks/scaling.py [--quick] [--devices=1,8,64,256]
  [--models=resnet20] [--fan_in=4] [--batches=8] [--total]
  [--set='model.batchnorm=device'] [--json=FILE]

It compiles for devices that it forces on this host, and runs nothing, so it
prints the same every time. --batches counts the images of each device, with
--total those of all devices together. All numbers are of one device and a step.

"of ideal" is the FLOPs of one device times the devices, by those of a step on
one device with as many images in all. "messages" counts the sums over all
devices that the program asks for; XLA's compilers for GPUs and TPUs join some.
"sent MB" is the size of these sums, "ideal MB" that of the gradients and of
BatchNorm's four sums for each channel in float32. Every device sends and gets
2 (n - 1) / n times a sum's size where n devices form a ring. "other" counts the
collectives that are no sums.
"""

import dataclasses
import os
from typing import Any

import common
import jax
import numpy as np
from common import Form
from flax import nnx
from jax.sharding import AxisType, Mesh

from maskconnect_jax import backend
from maskconnect_jax import config as config_lib
from maskconnect_jax.method.wiring import RealMask
from maskconnect_jax.networks import layers
from maskconnect_jax.run import distributed


def on_first(job: Any, devices: int, batch: int) -> Any:
  """Returns an experiment on the first devices, with another batch."""
  mesh = Mesh(
    np.array(jax.devices()[:devices]), ('data',), axis_types=(AxisType.Auto,)
  )
  recipe = dataclasses.replace(
    job.recipe, batch_sharding=distributed.sharded(mesh)
  )
  config = job.config.copy_and_resolve_references()
  config.batch_size = batch
  return dataclasses.replace(job, config=config, mesh=mesh, recipe=recipe)


def ideal_bytes(model: Any) -> int:
  """Returns the size of the gradients, and of BatchNorm's sums over a batch."""
  weights, masks = (
    sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, kind)))
    for kind in (nnx.Param, RealMask)
  )
  norms = sum(
    module.scale.size
    for _, module in nnx.iter_modules(model)
    if isinstance(module, layers.BatchNorm)
  )
  # Backward, two of the four sums are the gradients of scale and bias.
  return weights + masks + 2 * 4 * norms


def measure(form: Form, devices: int, given: Any) -> dict[str, Any]:
  batch = form.batch if given.total else form.batch * devices
  common.say(f'compiling {form} for {devices} devices')
  # The smallest batch that all devices share; only its shape matters here.
  whole = dataclasses.replace(form, batch=jax.device_count())
  job = on_first(common.build(whole, given), devices, batch)
  with backend.native(False):  # of whose work XLA knows nothing
    compiled = common.traced(job).lower().compile()
  memory = compiled.memory_analysis()
  sent = common.collectives(compiled.as_text())
  sums = sent.pop('all-reduce', (0, 0))
  return {
    'network': form.network,
    'L': len(job.model.stack.blocks),
    'rule': form.rule,
    'K': form.K,
    'devices': devices,
    'images': batch // devices,
    'MFLOP': compiled.cost_analysis()['flops'] / 1e6,
    'of ideal': None,
    'temporary MB': memory.temp_size_in_bytes / 1e6,
    'arguments MB': memory.argument_size_in_bytes / 1e6,
    'messages': sums[0],
    'sent MB': sums[1] / 1e6,
    'ideal MB': ideal_bytes(job.model) / 1e6 if devices > 1 else 0.0,
    'other': ', '.join(f'{n} {kind}' for kind, (n, _) in sent.items()) or '0',
  }


def rows(given: Any) -> Any:
  for form in common.forms(given):
    first = None
    for devices in given.devices:
      row = measure(form, devices, given)
      # FLOPs of a step are in proportion to its images, but for the update.
      first = first or row
      if first['devices'] == 1:
        share = row['images'] / first['images']
        row['of ideal'] = row['MFLOP'] / (first['MFLOP'] * share)
      yield row


def main() -> None:
  parser = common.parser(
    __doc__, models='resnet20', batches='8', rules='learned', fan_in='4'
  )
  parser.add_argument('--devices', type=common.numbers, default='1,8,64,256')
  parser.add_argument('--total', action='store_true')
  given = parser.parse_args()
  if given.quick:
    given.models, given.devices = ['resnet8'], given.devices[:2]
  given.dtype = given.dtype or 'float32'
  most = max(given.devices)
  for batch in given.batches:
    if given.total and batch % most:
      raise config_lib.InputError(
        f'--batches={batch} does not divide over {most} devices'
      )
  if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', most)
  common.report(rows(given), given)


if __name__ == '__main__':
  common.run(main)
