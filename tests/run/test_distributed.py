"""How a process joins others under Slurm, Open MPI and Kubernetes, for real."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys

import pytest

JOIN = """
import jax
from maskconnect_jax.run import distributed
try:
  distributed.initialize()
except distributed.InputError as error:
  raise SystemExit(f'error: {error}')
print(jax.config.values['jax_cuda_visible_devices'])
"""


def join(**environment):
  names = ('SLURM_', 'OMPI_', 'KUBERNETES', 'JAX_COORD', 'JAX_NUM_P', 'JAX_PRO')
  inherited = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(names) and name != 'XLA_FLAGS'
  }
  return subprocess.run(
    [sys.executable, '-c', JOIN],
    capture_output=True,
    text=True,
    env=inherited
    | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'}
    | environment,
    timeout=120,
    check=False,
  )


def slurm(tasks, nodes):
  with socket.socket() as server:
    server.bind(('localhost', 0))
    port = str(server.getsockname()[1])
  return {
    'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': str(tasks), 'SLURM_STEP_NUM_NODES': str(nodes),
    'SLURM_PROCID': '0', 'SLURM_LOCALID': '0', 'JAX_COORDINATOR_PORT': port,
  }  # fmt: skip


def test_one_task_of_a_node_takes_all_of_its_devices():
  ran = join(**slurm(tasks=1, nodes=1))
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout.strip() == 'all'
  assert (
    f'process 0 of 1 on {socket.gethostname()}: 2 of 2 devices' in ran.stderr
  )


def test_devices_that_the_user_names_are_those():
  ran = join(**slurm(tasks=1, nodes=1), JAX_LOCAL_DEVICE_IDS='1,3')
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout.strip() == '1,3'


def test_kubernetes_without_its_package_names_the_extra():
  if importlib.util.find_spec('kubernetes'):
    pytest.skip('kubernetes is installed')
  ran = join(KUBERNETES_SERVICE_HOST='10.0.0.1')
  assert ran.returncode == 1
  (line,) = ran.stderr.strip().splitlines()
  assert line.startswith('error: --multihost finds no other processes')
  assert "pip install 'maskconnect_jax[k8s]'" in line


def test_without_others_the_ways_to_name_them_are_told():
  ran = join()
  assert ran.returncode == 1
  assert 'start it under Slurm' in ran.stderr
  assert 'JAX_PROCESS_ID' in ran.stderr
