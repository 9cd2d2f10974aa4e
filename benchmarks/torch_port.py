"""Our training step beside the same one in PyTorch: equal, then timed.

python benchmarks/torch_port.py [--quick] [--check] [--batches=128]
  [--models=resnet38,resnet110] [--rules=learned,fixed_prev] [--fan_in=10]
  [--modes=default,reduce-overhead] [--json=FILE]

--check takes ten steps in both, from the same weights, on the same batch, with
the masks that ours draws. It fails if they differ too much. "loss" is the
relative difference at the first and at the worst step, "mask gradient" the
relative difference in norm at the first step, "real masks" the largest
difference after the last step.

Without --check both are timed in turns, in one process on one device, as in
step_time.py. "ours x" is our images per second divided by theirs. The batch is
on the device, and nothing is augmented. The peer is torch_network.py, with
torch.compile (reduce-overhead: CUDA graphs), channels_last, autocast and fused
SGD. For an ImageNet form the peer is timm's network of the same name, or else
torchvision's; this peer is only timed. PyTorch is no dependency of the package:
pip install torch timm.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Form
from flax import nnx

from maskconnect_jax import config as config_lib
from maskconnect_jax.method import connectivity
from maskconnect_jax.networks import architectures, models, streams
from maskconnect_jax.run import experiment, steps, train_state

try:
  import torch
except ImportError:
  sys.exit('PyTorch is missing: pip install torch (and timm, for resnet50)')

import step_time
import torch_network

STEPS = 10  # of a check
# A rate at which ten steps do not yet amplify the last bits of the first, a
# decay that the losses show, and real masks that move.
CHECKED = (
  f'{common.SAME} optimizer.learning_rate=0.01 optimizer.weight_decay=1'
  ' masks.learning_rate=1'
)
# Of the columns of a check. A gradient jumps where the input of a ReLU rounds
# to the other side of zero: float32 is 1e-6 apart without such a one, and up to
# 1e-2 with it. In float64 the gradients of all parameters agree to 1e-9:
# tests/test_torch_port.py.
LIMITS = {
  'float32': (1e-5, 1e-3, 3e-2, 3e-2),
  'bfloat16': (1e-2, 3e-2, 3e-1, 1e-1),
}


def torch_weights(model: nnx.Module) -> dict[str, torch.Tensor]:
  """Returns our parameters and statistics as PyTorch names and lays them out.

  Kernels go from HWIO to OIHW, and from [in, out] to [out, in]. The branches'
  1x1 convolutions go from [C, in, out] to one in C groups.
  """
  names = {
    'kernel': 'weight',
    'scale': 'weight',
    'mean': 'running_mean',
    'var': 'running_var',
  }
  weights = {}
  for state in train_state.split(model)[1:]:
    for (*path, kind), variable in nnx.to_flat_state(state):
      value = np.array(variable[...])
      if kind == 'kernel':
        value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
      elif kind in ('reduce', 'expand'):
        path.append('conv1' if kind == 'reduce' else 'conv3')
        value = value.swapaxes(1, 2).reshape(-1, value.shape[1], 1, 1)
        kind = 'kernel'
      elif value.ndim == 2 and kind != 'real_mask':  # BatchNorm of branches
        path.append('norm3')
        value = value.reshape(-1)
      name = '.'.join(map(str, [*path, names.get(kind, kind)]))
      weights[name] = torch.from_numpy(value.copy())
  return weights


def ported(model: models.Network, name: str) -> torch.nn.Module:
  """Returns the PyTorch network of ours, with its weights.

  Args:
    model: learned, frozen or pruned; what nothing reads is left out.
    name: of its architecture.
  """
  architecture = architectures.architecture_of(name)
  branches = model.stack.spec.level == 'branch'
  network = torch_network.ResNet(
    (branch_stack if branches else masked_stack)(model.stack, architecture),
    width=architecture.width,
    features=model.head.in_features,
    num_classes=model.head.out_features,
  )
  own = torch_weights(model)
  network.load_state_dict(
    {
      key: own.get(key, value) if key.endswith('_tracked') else own[key]
      for key, value in network.state_dict().items()
    }
  )
  return network


def masked_stack(
  stack: Any, architecture: architectures.Architecture
) -> torch_network.MaskedStack:
  """Returns PyTorch's stack of blocks; its weights are not ours yet."""
  blocks: list[torch.nn.Module] = []
  for stage, before, features, stride in sizes_of(architecture):
    if architecture.bottleneck:
      inner = architecture.inner_width(architecture.width * 2**stage)
      block = torch_network.Bottleneck(
        before, inner, features, stride, architecture.cardinality
      )
    else:
      block = torch_network.BasicBlock(before, features, stride)
    blocks.append(block)
  topology = stack.topology
  return torch_network.MaskedStack(
    blocks,
    fan_in=stack.fan_in,
    topology=topology and topology.sources,
    live=topology and topology.live,
  )


def branch_stack(
  stack: Any, architecture: architectures.Architecture
) -> torch_network.BranchStack:
  """Returns PyTorch's stack of branches; its weights are not ours yet."""
  blocks = [
    torch_network.BranchBlock(
      before, own.branches * own.reduce.shape[2], features, stride, own.branches
    )
    for own, (_, before, features, stride) in zip(
      stack.blocks, sizes_of(architecture), strict=True
    )
  ]
  fan_in, masks = stack.fan_in, None
  if stack.topology is not None:
    fan_in = stack.topology.fan_in
    masks = [torch.tensor(mask).float() for mask in stack.live_masks()]
  return torch_network.BranchStack(blocks, fan_in=fan_in, masks=masks)


def sizes_of(architecture: architectures.Architecture) -> Iterator[Any]:
  return torch_network.sizes(
    architecture.blocks_per_stage,
    architecture.width,
    4 if architecture.bottleneck else 1,
  )


def peer(job: experiment.Experiment) -> tuple[str, torch.nn.Module]:
  """Returns where the network to compare with is from, and the network."""
  name = job.config.model.name
  if not architectures.architecture_of(name).large_images:
    return 'torch', ported(job.model, name)
  if job.config.connectivity.rule != 'fixed_prev':
    raise config_lib.InputError(
      f'the peer of {name} has no masks: --rules=fixed_prev'
    )
  try:
    import timm

    return f'timm {timm.__version__}', timm.create_model(name)
  except ImportError:
    pass
  try:
    import torchvision

    own = torchvision.models.get_model(name)
    return f'torchvision {torchvision.__version__}', own
  except ImportError:
    raise config_lib.InputError(f'{name}: pip install timm') from None


def torch_step(
  job: experiment.Experiment, network: torch.nn.Module, mode: str
) -> torch_network.TrainingStep:
  config = job.config
  return torch_network.TrainingStep(
    network,
    mean=job.recipe.mean,
    std=job.recipe.std,
    dtype=getattr(torch, config.model.dtype),
    mode=mode,
    learning_rate=config.optimizer.learning_rate,
    mask_rate=config.masks.learning_rate,
    weight_decay=config.optimizer.weight_decay,
  )


def on_device(*arrays: jax.Array) -> list[torch.Tensor]:
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  return [torch.from_numpy(np.array(array)).to(device) for array in arrays]


def torch_batch(step: common.TrainingStep) -> tuple[torch.Tensor, torch.Tensor]:
  images, labels = on_device(*step.batch)
  return images, labels.long()


def real_mask(step: common.TrainingStep) -> jax.Array:
  return step.state.masks['stack']['real_mask'][...]


def draw(step: common.TrainingStep) -> jax.Array:
  """Returns b of the step to come, [L, L]."""
  recipe, stack = step.job.recipe, step.job.model.stack
  key = recipe.key(streams.MASK, step.state.step)
  return connectivity.draw(
    key,
    real_mask(step),
    stack.valid,
    stack.fan_in,
    recipe.temperature(step.state.step),
  )


@jax.jit(static_argnums=0)
def mask_gradient(
  recipe: train_state.Recipe,
  state: train_state.TrainState,
  images: jax.Array,
  labels: jax.Array,
) -> jax.Array:
  """Returns dloss/dr of the step to come, [L, L]."""

  def loss_of(masks: Any) -> jax.Array:
    model = nnx.merge(recipe.network, state.weights, masks, state.statistics)
    mask = model.draw(
      recipe.key(streams.MASK, state.step), recipe.temperature(state.step)
    )
    inputs = steps.augmented(recipe, images, state.step)
    logits = model(inputs, mask, train=True)
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    )

  return jax.grad(loss_of)(state.masks)['stack']['real_mask'][...]


def compared(form: Form, given: argparse.Namespace, mode: str) -> list[float]:
  """Takes STEPS steps in both.

  Returns:
    Our first and last loss, and the differences that LIMITS are of; those of
    masks are nan where there are none.
  """
  job = common.build(form, given)
  with jax.default_matmul_precision('highest'):  # no TF32 in float32
    ours = common.TrainingStep(job)
    theirs, batch = (
      torch_step(job, ported(job.model, form.network), mode),
      torch_batch(ours),
    )
    losses, gradient, masks, learned = (
      [],
      np.nan,
      np.nan,
      form.rule == 'learned',
    )
    for i in range(STEPS):
      given_mask = on_device(draw(ours)) if learned else []
      if learned and i == 0:
        expected = mask_gradient(job.recipe, ours.state, *ours.batch)
      loss = theirs(*batch, *given_mask).item()
      if learned and i == 0:
        found = theirs.model.stack.real_mask.grad.cpu().numpy()
        norm = np.linalg.norm
        gradient = float(norm(found - expected) / norm(expected))
      losses.append((float(ours()[1]['loss']), loss))
  if learned:
    found = theirs.model.stack.real_mask.detach().cpu().numpy()
    masks = float(np.abs(found - real_mask(ours)).max())
  apart = [abs(their / own - 1) for own, their in losses]
  return [losses[0][0], losses[-1][0], apart[0], max(apart), gradient, masks]


def checks(
  given: argparse.Namespace, failed: list[str]
) -> Iterator[dict[str, Any]]:
  """Yields the table's rows; adds a line for each limit that is not kept."""
  torch.backends.cudnn.allow_tf32 = False
  given.set = CHECKED
  names = ('first loss', 'any loss', 'mask gradient', 'real masks')
  for form, mode in itertools.product(common.forms(given), given.modes):
    common.say(f'checking {form}, {mode}')
    first, last, *apart = compared(form, given, mode)
    yield dataclasses.asdict(form) | {
      'mode': mode,
      'loss, step 1': first,
      f'step {STEPS}': last,
      **{
        f'{name} apart': None if np.isnan(value) else f'{value:.1e}'
        for name, value in zip(names, apart, strict=True)
      },
    }
    for name, value, limit in zip(
      names, apart, LIMITS[given.dtype], strict=True
    ):
      if value > limit:
        failed.append(
          f'{form}, {mode}: {name} {value:.1e} apart, more than {limit:.0e}'
        )


class Queued:
  """What a call of PyTorch returns."""

  def block_until_ready(self) -> None:
    """Waits; `jax.block_until_ready`, and so `common.timed`, calls it."""
    if torch.cuda.is_available():
      torch.cuda.synchronize()


def queued(step: torch_network.TrainingStep, batch: Any) -> Queued:
  step(*batch)
  return Queued()


def timings(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
  torch.set_float32_matmul_precision('high')
  given.set = common.SAME
  for form in common.forms(given):
    job = common.build(form, given)
    common.say(f'compiling {form}')
    ours = common.TrainingStep(job)
    calls, compiling = {'ours': ours}, {'ours': ours.compile_seconds}
    for mode in given.modes:
      origin, network = peer(job)
      who = f'{origin}, {mode}'
      common.say(f'compiling {who}')
      calls[who] = functools.partial(
        queued, torch_step(job, network, mode), torch_batch(ours)
      )
      compiling[who] = common.timed(calls[who], 1)[1]
    times = common.in_turns(calls, given.rounds, given.steps)
    for who, (dispatch, whole) in times.items():
      yield (
        dataclasses.asdict(form)
        | {'step of': who}
        | step_time.columns(form.batch, dispatch, whole)
        | {
          'ours x': common.ratio(whole, times['ours'][1]),
          'compile s': compiling[who],
        }
      )


def main() -> None:
  # By default JAX would take most of a GPU's memory; read at its first use.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  parser = common.parser(
    __doc__,
    models='resnet38,resnet110',
    batches='128',
    rules='learned,fixed_prev',
    fan_in='10',
  )
  cuda = torch.cuda.is_available()
  parser.add_argument('--check', action='store_true')
  parser.add_argument(
    '--modes',
    type=common.names,
    default='reduce-overhead' if cuda else 'default',
    help='of torch.compile: default reduce-overhead, on CPU default; or eager',
  )
  common.add_turns(parser)
  given = common.parsed(
    parser, models='resnet14', batches='16', fan_in='3', rounds=5
  )
  if given.set:
    parser.error('--set: the port has the defaults only')
  if cuda and jax.device_count() > 1:
    parser.error('both must have one GPU: set CUDA_VISIBLE_DEVICES=0')
  failed: list[str] = []
  common.report(
    checks(given, failed) if given.check else timings(given),
    given,
    torch=torch.__version__,
  )
  for line in failed:
    common.say(line)
  sys.exit(bool(failed))


if __name__ == '__main__':
  common.run(main)
