"""The launchers: what they print, and what they start with stand-ins.

A stand-in for gcloud, srun, xpk or nvidia-smi on the PATH notes its arguments,
and starts what the real one would start.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
# Notes its name and arguments, then does what BODY says.
STAND_IN = """#!{python}
import json, os, subprocess, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open({notes!r}, 'a') as file:
  file.write(json.dumps([name, *arguments]) + '\\n')
{body}
"""
RUN = {
  # From the first argument that is no option.
  'srun': """
while arguments[0].startswith('-'):
  arguments.pop(0)
os.execvp(arguments[0], arguments)
""",
  'scontrol': '',
  'nvidia-smi': "print('GPU 0: a stand-in')",
  # `describe` prints the states in turn; `ssh` runs the command here.
  'gcloud': """
verb = arguments[3]
if verb == 'describe':
  with open({states!r}) as file:
    states = file.read().split()
  with open({states!r}, 'w') as file:
    file.write(' '.join(states[1:] or states))
  if states[0] == 'ABSENT':
    sys.exit(1)
  print(states[0])
elif verb == 'ssh':
  command = arguments[-1].removeprefix('--command=')
  if ' -m maskconnect_jax.main' in command:
    command = command.partition(' && ')[2]
    sys.exit(subprocess.call(['bash', '-c', command], cwd={root!r}))
""",
  'xpk': """
command = arguments[-1].removeprefix('--command=').partition(' && ')[2]
sys.exit(subprocess.call(['bash', '-c', command], cwd={root!r}))
""",
  # The program that the workers' shells find.
  'python': 'os.execv({python!r}, [{python!r}, *{started}])',
}


class Bench:
  """A folder of stand-ins, and what they noted."""

  def __init__(self, folder: Path) -> None:
    self.folder, self.notes = folder, folder / 'notes'
    self.states = folder / 'states'
    self.bin = folder / 'bin'
    self.bin.mkdir(parents=True)
    self.states.write_text('READY')
    for name, body in RUN.items():
      body = body.format(
        states=str(self.states), root=str(ROOT), python=sys.executable,
        started="[a for a in arguments if a != '--multihost']",
      )  # fmt: skip
      path = self.bin / name
      path.write_text(
        STAND_IN.format(python=sys.executable, notes=str(self.notes), body=body)
      )
      path.chmod(0o755)

  def start(self, script: str, *arguments: str, **environment: str):
    return subprocess.Popen(
      ['bash', str(LAUNCH / script), *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env=os.environ
      | {'PATH': f'{self.bin}:{os.environ["PATH"]}', 'PYTHON': sys.executable}
      | environment,
    )

  def run(self, script: str, *arguments: str, **environment: str):
    process = self.start(script, *arguments, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

  def called(self, name: str) -> list[list[str]]:
    if not self.notes.exists():
      return []
    calls = map(json.loads, self.notes.read_text().splitlines())
    return [call[1:] for call in calls if call[0] == name]


@pytest.fixture
def bench(tmp_path):
  return Bench(tmp_path / 'bench')


@pytest.fixture
def short(tiny, tmp_path):
  """The arguments of a run of two steps, whose folder has a space in it."""
  return (
    f'--config={tiny}', f'--workdir={tmp_path / "a run"}',
    '--config.duration=2 steps', '--config.connectivity.phase=1 steps',
  )  # fmt: skip


TPU = {'ZONE': 'here', 'TYPE': 'v5litepod-16'}


@pytest.mark.parametrize(
  ('script', 'first', 'environment', 'last'),
  [
    ('gpu.sh', [], {}, 'env JAX_PLATFORMS=cuda'),
    ('local_hosts.sh', ['2'], {}, 'JAX_PROCESS_ID=1'),
    ('slurm.sbatch', [], {}, 'srun --ntasks-per-node=1'),
    ('tpu_pod.sh', ['mine'], TPU, 'tpu-vm delete mine --zone=here --quiet'),
    ('xpk.sh', ['mine'], {'CLUSTER': 'c', 'GPU': 'h100'}, '--device-type=h100'),
  ],
)
def test_a_dry_run_prints_and_starts_nothing(
  bench, script, first, environment, last
):
  code, out, err = bench.run(
    script, '--dry-run', *first, '--config=c.py', '--workdir=a b', **environment
  )
  assert (code, err) == (0, '')
  lines = out.splitlines()
  assert last in lines[-1]
  words = [word for line in lines for word in shlex.split(line)]
  inner = [w for word in words if ' ' in word for w in shlex.split(word)]
  assert '--workdir=a b' in words + inner
  assert not bench.notes.exists()


@pytest.mark.parametrize(
  ('script', 'environment', 'installs'),
  [
    ('tpu_pod.sh', TPU, "'./maskconnect_jax[tpu,opencv,gcs]'"),
    ('xpk.sh', {'CLUSTER': 'c', 'TPU': 'v5'}, "'.[tpu,k8s,opencv,gcs]'"),
  ],
)
def test_what_a_bucket_needs_is_installed(bench, script, environment, installs):
  code, out, err = bench.run(
    script, '--dry-run', 'mine', '--workdir=gs://b/run', **environment
  )
  assert (code, err) == (0, '')
  assert any(installs in word for word in shlex.split(out))


@pytest.mark.parametrize(
  ('script', 'arguments', 'environment', 'message'),
  [
    ('gpu.sh', [], {}, 'give the arguments of the run'),
    ('local_hosts.sh', ['--config=c'], {}, 'number of processes first'),
    ('local_hosts.sh', ['0', '--config=c'], {}, 'number of processes first'),
    ('slurm.sbatch', [], {}, 'give the arguments of the run'),
    ('tpu_pod.sh', ['--config=c'], TPU, 'name of the slice first'),
    ('tpu_pod.sh', ['me', '--config=c'], {'TYPE': 'v5'}, 'set ZONE'),
    ('xpk.sh', ['me', '--config=c'], {}, 'set CLUSTER'),
    ('xpk.sh', ['me', '--config=c'], {'CLUSTER': 'c'}, 'set TPU'),
  ],
)
def test_what_is_missing_is_named(
  bench, script, arguments, environment, message
):
  code, out, err = bench.run(script, *arguments, **environment)
  assert (code, out) == (2, '')
  assert err.startswith('error: ')
  assert message in err
  assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
  ('script', 'first', 'environment', 'workdir'),
  [
    ('gpu.sh', [], {}, ['--workdir', 'd']),
    ('local_hosts.sh', ['2'], {}, ['--workdir', 'd']),
    ('slurm.sbatch', [], {'SLURM_ARRAY_TASK_ID': '3'}, ['--workdir', 'd']),
    ('slurm.sbatch', [], {'SLURM_ARRAY_TASK_ID': '3'}, ['-workdir=d']),
    ('tpu_pod.sh', ['mine'], TPU, ['-workdir=gs://b/run']),
    ('xpk.sh', ['mine'], {'CLUSTER': 'c', 'TPU': 'v5'}, ['-workdir', 'd']),
  ],
)
def test_a_workdir_that_a_launcher_would_overlook(
  bench, script, first, environment, workdir
):
  code, out, err = bench.run(
    script, '--dry-run', *first, '--config=c.py', *workdir, **environment
  )
  assert (code, out) == (2, '')
  assert err == (
    'error: give the workdir as one argument, --workdir=DIR, not as'
    f' {workdir[0]}\n'
  )


@pytest.mark.parametrize('workdir', [[], ['--workdir='], ['--workdirs=a']])
def test_tasks_of_an_array_need_a_workdir(bench, workdir):
  code, out, err = bench.run(
    'slurm.sbatch', '--dry-run', '--config=c.py', *workdir,
    SLURM_ARRAY_TASK_ID='3',
  )  # fmt: skip
  assert (code, out) == (2, '')
  assert err.startswith('error: give --workdir=DIR; each task of the array')
  assert len(err.splitlines()) == 1


def test_a_gpu_host_starts_one_process_for_all(bench, short, tmp_path):
  """The stand-in for Python shows what it was given: there is no GPU here."""
  shown = tmp_path / 'shown'
  python = tmp_path / 'python'
  python.write_text(f'#!/bin/sh\necho "$JAX_PLATFORMS" "$@" > {shown}\n')
  python.chmod(0o755)
  code, _, err = bench.run('gpu.sh', *short, PYTHON=str(python))
  assert (code, err) == (0, 'GPU 0: a stand-in\n')
  assert shown.read_text().startswith('cuda -m maskconnect_jax.main --config=')
  assert bench.called('nvidia-smi') == [['--list-gpus']]


@pytest.mark.parametrize(
  ('active', 'expected'),
  [
    ({'VIRTUAL_ENV': '{env}'}, '{env}/bin/python'),
    ({'CONDA_PREFIX': '{env}', 'CONDA_DEFAULT_ENV': 'jax'}, '{env}/bin/python'),
    ({'CONDA_PREFIX': '{env}', 'CONDA_DEFAULT_ENV': 'base'}, '{root}'),
    ({'VIRTUAL_ENV': '{env}/none'}, '{root}'),
    ({}, '{root}'),
  ],
  ids=['venv', 'conda', 'base', 'gone', 'none'],
)
def test_the_active_environment_comes_first(bench, active, expected, tmp_path):
  """`make demo` puts JAX for the CPU alone into .venv."""
  env = tmp_path / 'env'
  (env / 'bin').mkdir(parents=True)
  (env / 'bin' / 'python').symlink_to(sys.executable)
  own = ROOT / '.venv/bin/python'
  root = str(own if own.exists() else 'python3')
  _, out, _ = bench.run(
    'gpu.sh', '--dry-run', '--config=c', PYTHON='',
    **{'VIRTUAL_ENV': '', 'CONDA_PREFIX': '', 'CONDA_DEFAULT_ENV': ''}
    | {name: value.format(env=env) for name, value in active.items()},
  )  # fmt: skip
  python = expected.format(env=env, root=root)
  assert out.startswith(f'env JAX_PLATFORMS=cuda {python} -m ')


def test_slurm_trains_a_task_of_an_array(bench, short, tmp_path):
  code, _, err = bench.run(
    'slurm.sbatch', *short, SLURM_ARRAY_TASK_ID='3', SLURM_JOB_NUM_NODES='1',
    SLURM_JOB_ID='77', SLURM_SUBMIT_DIR=str(ROOT),
  )  # fmt: skip
  assert code == 0, err
  summary = json.loads((tmp_path / 'a run/seed3/summary.json').read_text())
  assert summary['seed'] == 3
  (call,) = bench.called('srun')
  assert '--kill-on-bad-exit=1' in call
  assert '--multihost' not in call
  assert not bench.called('scontrol')


def test_slurm_queues_a_preempted_job_again(bench, tmp_path):
  """The run is a stand-in that ends with 143, as a saved run does."""
  python = tmp_path / 'python'
  python.write_text(
    "#!/bin/bash\ntrap 'exit 143' TERM\necho up\n"
    'while true; do sleep 0.1; done\n'
  )
  python.chmod(0o755)
  process = bench.start(
    'slurm.sbatch', '--config=c', PYTHON=str(python), SLURM_JOB_ID='77',
    SLURM_SUBMIT_DIR=str(ROOT),
  )  # fmt: skip
  assert process.stdout.readline() == 'up\n'
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 143, err
  assert bench.called('scontrol') == [['requeue', '77']]
  (call,) = bench.called('srun')
  assert '--multihost' in call


@pytest.mark.slow
def test_a_pod_is_created_used_and_deleted(bench, short, tmp_path):
  bench.states.write_text('ABSENT READY')
  code, _, err = bench.run('tpu_pod.sh', 'mine', *short, SPOT='yes', **TPU)
  assert code == 0, err
  assert (tmp_path / 'a run/summary.json').exists()
  verbs = [call[3] for call in bench.called('gcloud')]
  assert verbs == ['describe', 'create', 'scp', 'ssh', 'ssh', 'delete']
  create = bench.called('gcloud')[1]
  assert {'--accelerator-type=v5litepod-16', '--spot', 'mine'} <= set(create)
  assert '--multihost' in bench.called('gcloud')[4][-1]


def test_a_lost_pod_is_made_anew(bench, tmp_path):
  """The second start is of a slice that was preempted in the first."""
  marker = tmp_path / 'tried'
  (bench.bin / 'python').write_text(
    f'#!/bin/sh\n[ -e {marker} ] || {{ touch {marker}; exit 1; }}\n'
  )
  bench.states.write_text('READY PREEMPTED PREEMPTED READY')
  code, _, err = bench.run(
    'tpu_pod.sh', 'mine', '--config=c', KEEP='yes', **TPU
  )
  assert code == 0, err
  assert 'the slice is lost' in err
  verbs = [call[3] for call in bench.called('gcloud')]
  assert verbs == [
    'describe', 'scp', 'ssh', 'ssh', 'describe',
    'describe', 'delete', 'create', 'scp', 'ssh', 'ssh',
  ]  # fmt: skip


def test_an_error_of_the_run_is_not_a_lost_pod(bench):
  (bench.bin / 'python').write_text('#!/bin/sh\nexit 2\n')
  code, _, _ = bench.run('tpu_pod.sh', 'mine', '--config=c', **TPU)
  assert code == 2
  assert [c[3] for c in bench.called('gcloud')][-1] == 'delete'


@pytest.mark.slow
def test_xpk_starts_the_run_in_its_pods(bench, short, tmp_path):
  code, _, err = bench.run('xpk.sh', 'mine', *short, CLUSTER='c', TPU='v5')
  assert code == 0, err
  assert (tmp_path / 'a run/summary.json').exists()
  (call,) = bench.called('xpk')
  assert call[:2] == ['workload', 'create']
  assert {'--cluster=c', '--workload=mine', '--max-restarts=100'} <= set(call)
  assert '.[tpu,k8s,opencv]' in call[-1]
  assert '--multihost' in call[-1]


@pytest.mark.slow
def test_local_hosts_train_as_one(bench, tiny, tmp_path):
  """Two processes of two devices; SIGTERM saves, and the same goes on."""
  command = ('2', f'--config={tiny}', f'--workdir={tmp_path / "run"}')
  code, _, err = bench.run('local_hosts.sh', *command)
  assert code == 0, err
  assert 'process 0 of 2 on ' in err
  assert '2 of 4 devices' in err
  assert json.loads((tmp_path / 'run/summary.json').read_text())['steps'] == 24
  # The parameters are those of one process: test_multihost compares them.
  process = bench.start(
    'local_hosts.sh', '2', f'--config={tiny}', f'--workdir={tmp_path / "cut"}',
    '--config.duration=20000 steps',
  )  # fmt: skip
  log = tmp_path / 'cut/metrics.jsonl'
  until = time.monotonic() + 120
  while not log.exists() and time.monotonic() < until:
    time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 143, err
  assert 'the same command goes on' in err


@pytest.mark.slow
def test_a_lost_process_is_named_and_all_go_on(bench, tiny, tmp_path):
  command = ('2', f'--config={tiny}', f'--workdir={tmp_path / "run"}')
  process = bench.start(
    'local_hosts.sh', *command, '--config.log_every=1 steps', DEVICES='1'
  )
  log = tmp_path / 'run/metrics.jsonl'
  until = time.monotonic() + 120
  while not log.exists() and time.monotonic() < until:
    time.sleep(0.05)
  listed = subprocess.run(
    ['ps', '-o', 'pid=,args=', '--ppid', str(process.pid)],
    capture_output=True, text=True, check=True,
  ).stdout  # fmt: skip
  pids = [
    int(line.split()[0]) for line in listed.splitlines() if '--multi' in line
  ]
  os.kill(max(pids), signal.SIGKILL)
  begun = time.monotonic()
  _, err = process.communicate(timeout=120)
  assert time.monotonic() - begun < 60
  assert process.returncode != 0
  assert f'error: process 1 ({socket.gethostname()}) does not answer' in err
  code, _, err = bench.run(
    'local_hosts.sh', *command, '--config.log_every=1 steps', DEVICES='1'
  )
  assert code == 0, err
  assert json.loads((tmp_path / 'run/summary.json').read_text())['steps'] == 24


def test_shellcheck_has_nothing_to_say():
  shellcheck = Path(sys.executable).with_name('shellcheck')
  if not shellcheck.exists():
    pytest.skip('shellcheck is not installed')
  found = subprocess.run(
    [shellcheck, '-x', *sorted(map(str, LAUNCH.iterdir()))],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert found.returncode == 0, found.stdout
