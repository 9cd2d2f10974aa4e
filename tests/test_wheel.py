"""The wheel: all of the package and the configs, of use in an empty folder."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd, **environment):
  done = subprocess.run(
    [str(argument) for argument in arguments],
    cwd=cwd,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_it_holds_every_file(wheel):
  expected = {
    str(path.relative_to(ROOT)) for path in ROOT.glob('maskconnect_jax/**/*.py')
  }
  configs = ROOT.glob('configs/*.py')
  expected |= {f'maskconnect_jax/configs/{path.name}' for path in configs}
  with zipfile.ZipFile(wheel) as archive:
    held = {name for name in archive.namelist() if '.dist-info/' not in name}
  page = {f'maskconnect_jax/report/page.{kind}' for kind in ('css', 'js')}
  others = {
    f'maskconnect_jax/{name}'
    for name in (
      'convolution.cc',
      'method/aggregate.cc',
      'native.h',
      'py.typed',
    )
  }
  assert held == expected | page | others


def test_a_command_in_an_empty_folder(wheel, tmp_path):
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / 'site')
  empty = tmp_path / 'empty'
  empty.mkdir()
  site = {'PYTHONPATH': str(tmp_path / 'site')}
  code = (
    'from maskconnect_jax import flags; parse = flags.ConfigParser().parse\n'
    'assert parse("digits") == parse("configs/digits.py")\n'
    'assert parse("cifar10") == parse("configs/cifar.py:10")\n'
    'print(flags.__file__)'
  )
  said = run(sys.executable, '-c', code, cwd=empty, **site)
  assert said == f'{tmp_path}/site/maskconnect_jax/flags.py\n'
  said = run(
    sys.executable, '-m', 'maskconnect_jax.main', '--mode=describe',
    '--config=digits', '--config.model.name=resnet8',
    '--config.model.width=4', cwd=empty, **site,
  )  # fmt: skip
  assert 'resnet8, 3 blocks' in said
  assert not list(empty.iterdir())


@pytest.mark.slow  # installs all that the package needs, from the network
def test_an_empty_environment(wheel, tmp_path):
  faulthandler.cancel_dump_traceback_later()  # pip may take more than 300 s
  run(sys.executable, '-m', 'venv', tmp_path / 'venv', cwd=tmp_path)
  version = 'py{}{}'.format(*sys.version_info)
  pins = ROOT / 'constraints' / f'{version}.txt'
  bin_folder = tmp_path / 'venv' / 'bin'
  run(
    bin_folder / 'python', '-m', 'pip', 'install', '--quiet', '--no-compile',
    *(['-c', pins] if pins.exists() else []), wheel, cwd=tmp_path,
  )  # fmt: skip
  empty = tmp_path / 'empty'
  empty.mkdir()
  for config in ('digits', 'configs/digits.py'):
    said = run(
      bin_folder / 'maskconnect', '--mode=describe', f'--config={config}',
      '--config.model.name=resnet8', '--config.model.width=4', cwd=empty,
    )  # fmt: skip
    assert 'resnet8, 3 blocks' in said
  said = run(bin_folder / 'maskconnect', '--help', cwd=empty)
  assert '--workdirs: summarize, dynamics, report:' in said
  assert not list(empty.iterdir())
