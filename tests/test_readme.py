"""Python and links of the README and docs, run as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCKS = {
  f'{page.name}-{number}': code
  for page in PAGES
  for number, code in enumerate(
    re.findall(r'```python\n(.*?)```', page.read_text('utf-8'), re.DOTALL)
  )
}


@pytest.fixture
def optimized():
  """Compiles as outside of tests: the README computes more than it compiles."""
  name = 'jax_disable_most_optimizations'
  before = jax.config.values[name]
  jax.config.update(name, False)
  yield
  jax.config.update(name, before)


@pytest.mark.parametrize('name', BLOCKS)
def test_python_block_runs(name, tmp_path, monkeypatch, finished, optimized):
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'digits').symlink_to(finished.workdir)
  (tmp_path / 'docs').symlink_to(ROOT / 'docs')
  monkeypatch.chdir(tmp_path)
  exec(compile(BLOCKS[name], name, 'exec'), {})


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_file_and_heading_it_links_to_is_there(page):
  links = re.findall(r'\]\((?!http)([^)]+)\)', page.read_text('utf-8'))
  for link in links:
    path, _, heading = link.partition('#')
    target = page.parent / path if path else page
    assert target.exists(), link
    if heading:
      titles = re.findall(r'^#+ (.*)$', target.read_text('utf-8'), re.MULTILINE)
      anchors = [
        re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-')
        for title in titles
      ]
      assert heading in anchors, link


def test_there_are_links_and_blocks():
  assert len(BLOCKS) >= 4
  assert '](docs/' in PAGES[0].read_text('utf-8')


def test_every_config_it_names_is_there():
  for page in PAGES:
    text = page.read_text('utf-8')
    for name in set(re.findall(r'configs/\w+\.py', text)):
      assert (ROOT / name).exists(), (page.name, name)
