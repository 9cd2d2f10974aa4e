"""The arrows of the architecture: who may import whom, read from the source.

Nothing of the package is imported here, so an import inside a function or
under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = 'maskconnect_jax'
ROOT = Path(__file__).parents[1] / PACKAGE
FILES = sorted(ROOT.rglob('*.py'))

# Module -> the modules of this package that it may import. `config` is at the
# bottom: everything but connectivity, which imports jax alone, may import it.
ARROWS: dict[str, set[str]] = {
  '__init__': {'inference', 'models', 'stack', 'wiring'},
  'main': {
    'describe', 'distributed', 'evaluation', 'files', 'images', 'inference',
    'report', 'summarize', 'sweep', 'train',
  },
  'sweep': {'files', 'summarize', 'train'},
  'summarize': {'plots', 'summary_plots'},
  'summary_plots': {'plots'},
  'train': {
    'batches', 'checkpoint', 'distributed', 'evaluation', 'experiment',
    'files', 'metrics', 'report', 'steps', 'wiring',
  },
  'report': {
    'branch_plots', 'topology', 'experiment', 'files', 'inference',
    'metrics', 'models', 'plots',
  },
  'dynamics': {'dynamics_plots', 'plots', 'summarize', 'trajectories'},
  'dynamics_plots': {'plots'},
  'trajectories': {
    'connectivity', 'experiment', 'metrics', 'models', 'topology',
  },
  'describe': {
    'connectivity', 'distributed', 'experiment', 'models', 'steps',
  },
  'evaluation': {
    'batches', 'datasets', 'distributed', 'inference', 'steps',
  },
  'experiment': {
    'batches', 'datasets', 'distributed', 'models', 'optimizer', 'steps',
    'topology', 'wiring',
  },
  'steps': {'augment', 'layers', 'wiring'},
  'inference': {
    'checkpoint', 'files', 'images', 'models', 'topology', 'wiring',
  },
  'models': {'blocks', 'branches', 'connectivity', 'layers', 'stack'},
  'branches': {'connectivity', 'layers', 'wiring'},
  'stack': {'aggregate', 'connectivity', 'layers', 'topology', 'wiring'},
  'wiring': {'connectivity', 'topology'},
  'topology': set(),
  'blocks': {'layers'},
  'batches': {'datasets', 'distributed', 'steps'},
  'datasets': {'decoding', 'images', 'sources'},
  'sources': {'decoding', 'images'},
  'mini_imagenet': {'images'},
  'metrics': {'files'},
  'branch_plots': {'plots'},
  'plots': set(),
  'aggregate': {'config'},
  'augment': set(),
  'checkpoint': set(),
  'config': set(),
  'connectivity': set(),
  'decoding': {'images', 'randaugment'},
  'distributed': set(),
  'files': set(),
  'images': set(),
  'layers': set(),
  'optimizer': set(),
  'randaugment': set(),
}  # fmt: skip
BOTTOM = 'config'
NEEDS_ORBAX = {'checkpoint'}
ON_JAX = {'clu', 'flax', 'jax', 'jaxlib', 'optax'}  # orbax: see NEEDS_ORBAX
WITHOUT_JAX = {
  'datasets', 'decoding', 'images', 'mini_imagenet', 'randaugment', 'sources',
}  # fmt: skip
# Module -> all that it may import beside the standard library.
ONLY = {'connectivity': {'jax', 'numpy'}}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
  """Yields the line and the absolute dotted name of every import."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level == 1:  # the package has no subpackages
        base = f'{PACKAGE}.{base}'.rstrip('.')
      elif node.level:
        base = f'{"." * node.level}{base}'
      for alias in node.names:
        # `from package import x` names a module or something of __init__.
        yield node.lineno, f'{base}.{alias.name}' if base == PACKAGE else base
    elif isinstance(node, ast.Call) and node.args:
      function = ast.unparse(node.func).rpartition('.')[2]
      name = node.args[0]
      if function in ('import_module', '__import__') and isinstance(
        name, ast.Constant
      ):
        yield node.lineno, str(name.value)


def problems(module: str, source: str) -> list[str]:
  """Returns a line for each import in `source` that `module` may not have."""
  if module not in ARROWS:
    return [f'{module}: an unknown module; give it a row in ARROWS']
  found = []
  for line, name in imported(ast.parse(source)):
    top, _, rest = name.partition('.')
    if top == PACKAGE:
      target = rest.partition('.')[0]
      if target not in ARROWS:
        target = '__init__'  # from maskconnect_jax import create_model
      bottom = target == BOTTOM and module not in ONLY
      wrong = not bottom and target not in ARROWS[module]
    else:
      wrong = (
        not top  # from .. import: out of the package
        or (top == 'orbax' and module not in NEEDS_ORBAX)
        or (top in ON_JAX and module in WITHOUT_JAX)
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


@pytest.mark.parametrize('path', FILES, ids=module_of)
def test_a_module_imports_only_what_it_may(path: Path) -> None:
  assert problems(module_of(path), path.read_text('utf-8')) == []


def test_the_package_was_found() -> None:
  assert FILES, f'no modules in {ROOT}'


def test_arrows_go_one_way() -> None:
  order = list(graphlib.TopologicalSorter(ARROWS).static_order())
  assert set(order) == set(ARROWS)  # every target has a row of its own


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('steps', 'from maskconnect_jax import train'),
    ('steps', 'import maskconnect_jax.train'),
    ('steps', 'from maskconnect_jax.train import run'),
    ('steps', 'from .train import run'),
    ('steps', 'from . import train'),
    ('steps', 'from .. import train'),
    ('steps', 'def f():\n  from maskconnect_jax import train'),
    ('steps', "importlib.import_module('maskconnect_jax.train')"),
    ('inference', 'from maskconnect_jax import datasets'),
    ('models', 'from maskconnect_jax import load'),
    ('config', 'import maskconnect_jax'),
    ('train', 'from orbax.checkpoint import v1 as ocp'),
    ('datasets', 'import jax.numpy as jnp'),
    ('images', 'from jax import numpy'),
    ('connectivity', 'import optax'),
    ('connectivity', 'from maskconnect_jax import config'),
    ('utils', ''),
    ('layers.extra', ''),
  ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
  assert len(problems(module, source)) == 1


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('main', 'from maskconnect_jax import config, train'),
    ('__init__', 'from maskconnect_jax.inference import load'),
    ('checkpoint', 'from orbax.checkpoint import v1 as ocp'),
    ('connectivity', 'import math\nimport jax\nimport numpy as np'),
    ('datasets', 'from maskconnect_jax.config import InputError'),
  ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
  assert problems(module, source) == []
