"""What a compiled step of four devices computes and sends.

No result would show it.
"""

from __future__ import annotations

import math
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

import maskconnect_jax
from maskconnect_jax import convolution
from maskconnect_jax.method.wiring import RealMask
from maskconnect_jax.run import distributed, optimizer, steps, train_state

BATCH = 256  # enough for the batch to outweigh the small kernels


def mesh_of(devices):
  return Mesh(
    np.array(jax.devices()[:devices]), ('data',), axis_types=(AxisType.Auto,)
  )


def compiled_step(network, level, devices):
  """The program, and the bytes of all sums over the batch that it needs."""
  model = maskconnect_jax.create_model(
    network,
    num_classes=10,
    fan_in=4,
    level=level,
    width=16,
    learner='draws',
  )
  transform = optimizer.partitioned(
    optax.sgd(0.1),
    optimizer.masks_transform(lambda step: 0.1, model.stack.valid),
  )
  mesh = mesh_of(devices)
  recipe = train_state.Recipe(
    temperature=lambda _: 1.0,
    network=train_state.split(model)[0],
    optimizer=transform,
    seed=0,
    pad=0,
    flip=False,
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    mixup=0.0,
    label_smoothing=0.0,
    average=0.0,
    batch_sharding=distributed.sharded(mesh),
  )

  def abstract(tree, sharding):
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
    )

  state = abstract(
    train_state.init_state(model, recipe), distributed.replicated(mesh)
  )
  batch = abstract(
    (
      np.zeros((BATCH, 32, 32, 3), np.uint8),
      np.zeros(BATCH, np.int32),
    ),
    recipe.batch_sharding,
  )
  step = jax.jit(steps.train_step, static_argnums=0)
  norms = sum(
    leaf.size
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    if path[-1] == 'mean'
  )
  gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(
    model, nnx.Any(nnx.Param, RealMask)
  )))  # fmt: skip
  # Forward, sums of x and of x^2 for each channel. Backward, sums of dy and of
  # x dy, which are the gradients of bias and scale.
  needed = gradients + 2 * 4 * norms
  return step.lower(recipe, state, *batch).compile(), needed


def sent(program):
  """Kinds of collectives, and the bytes of what they give."""
  kinds, size = set(), 0
  for line in program.splitlines():
    found = re.search(
      r' (all-\w+|reduce-scatter|collective-\w+|ragged-\w+)(-start)?\(', line
    )
    if found and ' = ' in line:
      kinds.add(found[1])
      for dtype, shape in re.findall(
        r'(\w+)\[([\d,]*)\]', line[line.index(' = ') : found.start()]
      ):
        count = math.prod(int(n) for n in shape.split(',') if n)
        size += count * int(re.sub(r'\D', '', dtype)) // 8
  return kinds, size


@pytest.mark.parametrize(
  ('network', 'level', 'native'),
  [
    pytest.param('resnet8', 'block', False, marks=pytest.mark.slow),
    ('resnext20_8x4d', 'block', True),
    ('resnext20_8x4d', 'branch', False),
    pytest.param('resnext20_8x4d', 'block', False, marks=pytest.mark.slow),
    pytest.param('resnext20_8x4d', 'branch', True, marks=pytest.mark.slow),
  ],
)
def test_a_quarter_of_the_flops_and_sums_of_gradients_and_statistics(
  network, level, native, monkeypatch
):
  if native:  # what GPUs and TPUs run
    monkeypatch.setattr(convolution, 'on_a_cpu', convolution.by_library)
  (one, _), (four, needed) = (
    compiled_step(network, level, devices) for devices in (1, 4)
  )
  kinds, size = sent(four.as_text())
  ratio = four.cost_analysis()['flops'] / one.cost_analysis()['flops']
  print(
    f'{network}, {level}: {ratio:.4f} of the FLOPs; {", ".join(kinds)} of'
    f' {size:,} bytes, {needed:,} are needed'
  )
  assert kinds == {'all-reduce'}
  assert ratio == pytest.approx(1 / 4, rel=0.02)
  # A CPU's form of grouped convolutions sums gradients of wider kernels.
  wider = network.startswith('resnext') and level == 'block' and not native
  assert size <= (1.15 if wider else 1.02) * needed
  # A branch's last BatchNorm has no sums of its own; see networks/branches.py.
  assert level == 'branch' or size >= needed
