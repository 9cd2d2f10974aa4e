"""The README's lines of Python, run as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


@pytest.fixture
def optimized():
  """Compiles as outside of tests: the README computes more than it compiles."""
  name = 'jax_disable_most_optimizations'
  before = jax.config.values[name]
  jax.config.update(name, False)
  yield
  jax.config.update(name, before)


@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_python_block_runs(number, tmp_path, monkeypatch, finished, optimized):
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'digits').symlink_to(finished.workdir)
  monkeypatch.chdir(tmp_path)
  exec(compile(BLOCKS[number], f'README.md block {number}', 'exec'), {})


def test_every_file_it_links_to_is_there():
  root = Path(__file__).parents[1]
  links = re.findall(r'\]\((?!http)([^)#]+)\)', README)
  assert links
  for link in links:
    assert (root / link).exists(), link


def test_every_config_it_names_is_there():
  root = Path(__file__).parents[1]
  names = set(re.findall(r'configs/\w+\.py', README))
  assert names
  for name in names:
    assert (root / name).exists(), name
