"""Memory, FLOPs and bytes of a training step as the network grows deeper.

python benchmarks/memory.py [--quick] [--batches=32]
  [--models=resnet20,resnet38,resnet74,resnet110] [--fan_in=10] [--json=FILE]

It compiles but runs nothing, so it prints the same every time. "a block" is the
temporary memory divided by the size of all blocks' outputs together; it does
not depend on the depth if memory grows as O(L). "O(L) MB" is the memory that
O(L) growth predicts from the rule's first network. "blocks" counts the blocks
that the program runs: blocks without a reader are left out.

--target=h100, or a TPU slice such as --target=v5e:2x2, compiles for one device
of that kind. The device need not be there; targets.py tells the packages to
install. "kernels" counts the kernels that a GPU's program starts. "Mcycles" is
the TPU compiler's estimate for the step, its only figure of time.
"""

import dataclasses
from typing import Any

import common
import jax
import jax.numpy as jnp
import targets
from common import Form
from flax import nnx

from maskconnect_jax import backend


def measure(form: Form, given: Any) -> dict[str, Any]:
  common.say(f'compiling {form}')
  job = common.build(form, given)
  if given.target:
    job = targets.on_target(job, given.target)
  with backend.native(False):  # of whose work XLA knows nothing
    lowered = common.traced(job).lower()
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  on_cpu = jax.default_backend() == 'cpu'
  flops, accessed = common.cost(lowered, compiled)
  program = compiled.as_text()
  on_gpu = given.target in targets.GPUS or jax.default_backend() == 'gpu'
  cycles = targets.cycles(program)
  return dataclasses.asdict(form) | {
    'L': len(job.model.stack.blocks),
    'blocks': common.live_blocks(job),
    'temporary MB': memory.temp_size_in_bytes / 1e6,
    'a block': memory.temp_size_in_bytes / output_bytes(job),
    'arguments MB': memory.argument_size_in_bytes / 1e6,
    'results MB': memory.output_size_in_bytes / 1e6,
    # On CPU XLA leaves temporary memory out of the peak.
    'peak MB': None if on_cpu else memory.peak_memory_in_bytes / 1e6,
    'GFLOP': flops / 1e9,
    'GB': accessed / 1e9,
    'kernels': targets.launches(program) if on_gpu else None,
    'Mcycles': cycles and cycles / 1e6,
    'outputs MB': output_bytes(job) / 1e6,
  }


def output_bytes(job: Any) -> int:
  """Returns the size of the outputs of all blocks on a device, in bytes."""
  share = job.config.batch_size // job.mesh.size
  images = jnp.zeros((share, *job.dataset.image_shape), jnp.float32)

  def outputs(images: jax.Array) -> list[jax.Array]:
    model = nnx.clone(job.model)
    taken = [model.stem(images)]
    for block in model.stack.blocks:
      taken.append(block(taken[-1]))
    return taken[1:]

  shapes = jax.eval_shape(outputs, images)
  return sum(shape.size * shape.dtype.itemsize for shape in shapes)


def main() -> None:
  parser = common.parser(
    __doc__,
    models='resnet20,resnet38,resnet74,resnet110',
    batches='32',
    rules='learned,fixed_random,fixed_prev,fixed_all',
    fan_in='10',
  )
  parser.add_argument('--target', default='', help='h100, v5e:2x2, ...')
  given, _ = parser.parse_known_args()
  if given.target:
    targets.prepare(given.target)
    parser.set_defaults(dtype='bfloat16')
  given = common.parsed(parser, models='resnet8,resnet14,resnet20', batches='8')
  rows = {form: measure(form, given) for form in common.forms(given)}
  for form, row in rows.items():
    first = rows[dataclasses.replace(form, network=given.models[0])]
    row['O(L) MB'] = first['a block'] * row.pop('outputs MB')
    for column, other in (
      ('temporary MB', form.like('fixed_all')),
      ('GB', form.like('fixed_random', form.K)),
      ('Mcycles', form.like('fixed_random', form.K)),
    ):
      theirs = rows[other][column] if other in rows else None
      row[f'{column} ÷ {other.rule}'] = theirs and row[column] / theirs
  compiled_for = {'compiled_for': given.target} if given.target else {}
  common.report(rows.values(), given, **compiled_for)


if __name__ == '__main__':
  common.run(main)
