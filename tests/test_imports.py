"""The arrows of the architecture: who may import whom, read from the source.

Nothing of the package is imported here, so an import inside a function or
under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = 'maskconnect_jax'
ROOT = Path(__file__).parents[1] / PACKAGE
FILES_FOUND = sorted(ROOT.rglob('*.py'))

# A folder -> the folders and files that all of it may import, beside its own.
# Arrows go down only; `errors` is at the bottom of all.
FOLDERS: dict[str, set[str]] = {
  '': {  # main
    'command', 'config', 'data.image_files', 'data.mini_imagenet', 'files',
    'flags', 'names', 'run', 'serve', 'signals', 'study',
  },
  'serve': {
    'files', 'names', 'signals', 'data.image_headers', 'run.cores',
    'run.inference',
  },
  'study': {
    'config', 'command', 'fields', 'files', 'signals', 'run', 'figures',
    'method.connectivity', 'method.spec', 'method.topology',
    'networks.architectures', 'networks.models', 'report',
  },
  'run': {
    'backend', 'config', 'files', 'limits', 'names', 'signals', 'fields',
    'data', 'networks', 'method', 'figures', 'report', 'drawing',
  },
  'networks': {'backend', 'convolution', 'limits', 'method'},
  'data': {'config', 'files', 'limits', 'names', 'signals'},
  'figures': {'drawing', 'files'},
  'report': {'drawing'},
  'method': {'backend', 'drawing', 'files', 'limits'},
  'drawing': set(),
}  # fmt: skip
# Single files that may do less than their folder, or more.
ARROWS: dict[str, set[str]] = {
  '__init__': {
    'method.stack', 'method.wiring', 'networks.architectures',
    'networks.models', 'run.inference', 'run.train',
  },
  '__main__': {'command', 'main'},
  'backend': set(),
  'convolution': {'backend'},
  'command': {'signals'},
  'config': {'fields', 'files', 'limits', 'method.spec'},
  'errors': set(),
  'fields': set(),
  'files': set(),
  'flags': {'config', 'fields'},
  'limits': set(),
  'names': set(),
  'signals': set(),
  'method.adapters': {'backend'},
  'method.connectivity': set(),
  'method.spec': {'limits'},
  'run.checkpoint': {
    'files', 'run.model_arrays', 'run.storage', 'run.stored',
  },
  'run.model_arrays': {'run.storage', 'run.stored'},
  # What serves a model has neither the loop nor the data sets.
  'run.inference': {
    'config', 'drawing', 'files', 'limits', 'names', 'data.image_headers',
    'data.image_inputs', 'data.images', 'method', 'networks', 'run.augment',
    'run.bucket', 'run.cores', 'run.distributed', 'run.model_arrays',
    'run.model_record', 'run.native', 'run.snapshot', 'run.weights',
  },
  'run.snapshot': {
    'files', 'method', 'networks', 'run.checkpoint', 'run.model_record',
    'run.stored',
  },
  'run.weights': {'limits'},
  'run.card': {'names', 'run.scores', 'run.software'},
  'run.objective': set(),
  'run.scores': {'names'},
  'run.export': {
    'backend', 'files', 'run.augment', 'run.inference',
  },
  'run.native': {
    'backend', 'convolution', 'method.aggregate', 'run.compilation_cache',
  },
}  # fmt: skip
# Package -> the files that may import it: one of the checkpoints', the others
# of extras, which are decided on in one place each.
ONLY_IN = {
  'orbax': {'run.checkpoint', 'run.model_arrays', 'run.storage'},
  'cv2': {'data.jpeg'},
  'datasets': {'data.hugging_face'},
  'pyarrow': {'data.hugging_face'},
}
ON_JAX = {'clu', 'flax', 'jax', 'jaxlib', 'optax'}  # orbax: see ONLY_IN
WITHOUT_JAX = {'data', 'command', 'config', 'fields', 'files', 'flags',
               'limits', 'names', 'signals', 'figures', 'report',
               'drawing'}  # fmt: skip
# Module -> all that it may import beside the standard library.
ONLY = {'method.connectivity': {'jax', 'numpy'}, 'backend': {'jax'},
        'command': set(), 'signals': set(), 'errors': set()}  # fmt: skip
ALL_MODULES = {
  '.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in FILES_FOUND
}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
  """Yields the line and the absolute dotted name of every import."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        base = f'{"." * node.level}{base}'
      for alias in node.names:
        ours = base.partition('.')[0] == PACKAGE
        yield node.lineno, f'{base}.{alias.name}' if ours else base
    elif isinstance(node, ast.Call) and node.args:
      function = ast.unparse(node.func).rpartition('.')[2]
      name = node.args[0]
      if function in ('import_module', '__import__') and isinstance(
        name, ast.Constant
      ):
        yield node.lineno, str(name.value)


def _is_in(name: str, allowed: set[str]) -> bool:
  return name in allowed or name.partition('.')[0] in allowed


def problems(module: str, source: str) -> list[str]:
  """Returns a line for each import in `source` that `module` may not have."""
  folder, _, _ = module.rpartition('.')
  if folder not in FOLDERS or (not folder and module not in {*ARROWS, 'main'}):
    return [f'{module}: an unknown place; give it a row']
  allowed = ARROWS.get(module, FOLDERS[folder] | ({folder} - {''}))
  found = []
  for line, name in imported(ast.parse(source)):
    top, _, rest = name.partition('.')
    if top == PACKAGE:
      # from maskconnect_jax.run import train names a module or a thing in one.
      target = rest
      while target and target not in ALL_MODULES and target not in FOLDERS:
        target = target.rpartition('.')[0]
      wrong = target != 'errors' and not _is_in(target or '__init__', allowed)
      wrong = wrong or (module in ONLY and target != 'signals')
    else:
      wrong = (
        not top  # from .. import: out of the package
        or module not in ONLY_IN.get(top, {module})
        or (top in ON_JAX and _is_in(module, WITHOUT_JAX))
        or (
          module in ONLY
          and top not in ONLY[module]
          and top not in sys.stdlib_module_names
        )
      )
    if wrong:
      found.append(f'{module}.py:{line} may not import {name}')
  return found


def module_of(path: Path) -> str:
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


@pytest.mark.parametrize('path', FILES_FOUND, ids=module_of)
def test_a_module_imports_only_what_it_may(path: Path) -> None:
  assert problems(module_of(path), path.read_text('utf-8')) == []


def test_the_package_was_found() -> None:
  assert FILES_FOUND, f'no modules in {ROOT}'


def test_arrows_between_folders_go_one_way() -> None:
  rows = {
    folder: {other.partition('.')[0] for other in targets}
    & {*FOLDERS, 'config'} - {''}
    for folder, targets in FOLDERS.items()
  } | {'config': {'method.spec'}}
  order = list(graphlib.TopologicalSorter(rows).static_order())
  assert order.index('method') < order.index('networks') < order.index('run')
  assert order.index('data') < order.index('run') < order.index('study')


def test_one_file_knows_the_platforms() -> None:
  found = [
    module_of(path)
    for path in FILES_FOUND
    if 'platform_dependent' in path.read_text('utf-8')
  ]
  assert found == ['backend']


def test_no_two_files_import_each_other() -> None:
  rows = {}
  for path in FILES_FOUND:
    targets = set()
    for _, name in imported(ast.parse(path.read_text('utf-8'))):
      target = name.removeprefix(f'{PACKAGE}.')
      while target and target not in ALL_MODULES:
        target = target.rpartition('.')[0]
      targets |= {target} - {''}
    rows[module_of(path)] = targets
  del rows['__init__']
  list(graphlib.TopologicalSorter(rows).static_order())  # raises CycleError


def test_the_data_is_read_without_jax() -> None:
  code = (
    'import sys, maskconnect_jax.data.datasets, maskconnect_jax.config;'
    "print([name for name in ('jax', 'flax', 'optax') if name in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout == '[]\n'


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('run.steps', 'from maskconnect_jax.study import sweep'),
    ('run.steps', 'import maskconnect_jax.study.sweep'),
    ('run.steps', 'from maskconnect_jax.study.sweep import Member'),
    ('run.steps', 'from .train import run'),
    ('run.steps', 'from .. import study'),
    ('run.steps', 'def f():\n  from maskconnect_jax.study import sweep'),
    ('run.steps', "importlib.import_module('maskconnect_jax.study.sweep')"),
    ('run.steps', 'from maskconnect_jax import main'),
    ('run.inference', 'from maskconnect_jax.data import datasets'),
    ('run.inference', 'from maskconnect_jax.run import train'),
    ('networks.models', 'from maskconnect_jax import load'),
    ('networks.models', 'from maskconnect_jax import config'),
    ('method.stack', 'from maskconnect_jax.networks import layers'),
    ('method.stack', 'from maskconnect_jax.config import default'),
    ('config', 'import maskconnect_jax'),
    ('config', 'from maskconnect_jax.method import stack'),
    ('run.train', 'from orbax.checkpoint import v1 as ocp'),
    ('data.datasets', 'import jax.numpy as jnp'),
    ('data.images', 'from jax import numpy'),
    ('data.photographs', 'import cv2'),
    ('data.sources', 'from datasets import load_from_disk'),
    ('data.images', 'from maskconnect_jax.run import steps'),
    ('figures.page', 'import jax'),
    ('method.connectivity', 'import optax'),
    ('method.connectivity', 'from maskconnect_jax import limits'),
    ('backend', 'from flax import nnx'),
    ('backend', 'from maskconnect_jax import limits'),
    ('utils', ''),
    ('networks.layers.extra', ''),
  ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
  assert len(problems(module, source)) == 1


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('main', 'from maskconnect_jax.run import train'),
    ('__init__', 'from maskconnect_jax.run.inference import load'),
    ('run.checkpoint', 'from orbax.checkpoint import v1 as ocp'),
    ('method.connectivity', 'import math\nimport jax\nimport numpy as np'),
    ('data.datasets', 'from maskconnect_jax.errors import InputError'),
  ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
  assert problems(module, source) == []


def test_a_start_does_not_wait_for_what_it_may_not_need(tmp_path: Path) -> None:
  """TensorBoardX would import PyTorch, for seconds; the user still can."""
  (tmp_path / 'torch.py').write_text('loaded = True\n')
  program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import maskconnect_jax.main
late = 'torch', 'matplotlib', 'scipy.optimize', 'sklearn', 'tensorflow'
print([name for name in late if name in sys.modules])
import tensorboardX, torch
print(torch.loaded)
"""
  ran = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=False
  )
  assert ran.stdout == '[]\nTrue\n', ran.stderr
