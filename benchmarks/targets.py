"""Devices that a training step can be compiled for without having one.

'h100' needs `pip install 'jax[cuda13]'`. A TPU needs `pip install 'jax[tpu]'`;
its name is JAX's name of a slice, for example 'v5e:2x2' or 'v6e:2x2'. XLA would
make the same program on the device, with one exception: on a GPU it picks the
algorithms of convolutions and products by trying them, and here it cannot.
"""

import dataclasses
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from maskconnect_jax import config
from maskconnect_jax.run import distributed, experiment

# What XLA's compiler asks of a GPU: the public figures of an H100 SXM.
GPUS = {
  'h100': """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  device_memory_size: 84929347584  memory_bandwidth: 3352320000000
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
}


def prepare(target: str) -> None:
  """Must come before JAX looks for devices; this machine is a CPU then."""
  jax.config.update('jax_platforms', 'cpu')
  # Else libtpu waits for the metadata server that a TPU's machine has.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  if target in GPUS:
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_autotune_level=0'


def on_target(job: experiment.Experiment, target: str) -> experiment.Experiment:
  """Returns the experiment on one device of the target, to be compiled only.

  Raises:
    InputError: JAX does not know the target, or what compiles for it is not
      installed.
  """
  try:
    if target in GPUS:
      there = topologies.get_topology_desc(
        target, 'cuda', target_config=GPUS[target], topology='1x1x1'
      )
    else:
      there = topologies.get_topology_desc(target, 'tpu')
  except Exception as error:  # of many kinds, from each plugin its own
    package = 'jax[cuda13]' if target in GPUS else 'jax[tpu]'
    raise config.InputError(
      f"--target={target} needs pip install '{package}', and a name such as"
      f' h100 or v5e:2x2: {str(error).splitlines()[0]}'
    ) from error
  mesh = Mesh(
    np.array(there.devices[:1]), ('data',), axis_types=(AxisType.Auto,)
  )
  recipe = dataclasses.replace(
    job.recipe, batch_sharding=distributed.sharded(mesh)
  )
  return dataclasses.replace(job, mesh=mesh, recipe=recipe)


def launches(program: str) -> int:
  """Returns how many kernels and library calls a GPU's program starts."""
  kinds = re.findall(
    r'^\s+(?:ROOT )?%[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(',
    program[program.index('\nENTRY ') :],
    re.MULTILINE,
  )
  return sum(kind in ('fusion', 'custom-call', 'copy') for kind in kinds)


def cycles(program: str) -> int | None:
  """Returns the cycles that a TPU's compiler expects; loops not counted."""
  entry = program[program.index('\nENTRY ') :]
  found = re.findall(r'"estimated_cycles":"(\d+)"', entry)
  return sum(map(int, found)) or None
