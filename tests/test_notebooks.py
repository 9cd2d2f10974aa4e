"""The notebooks, run from a wheel in an empty folder, as on a fresh runtime."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def cells_of(path, kind):
  cells = json.loads(path.read_text('utf-8'))['cells']
  return [''.join(c['source']) for c in cells if c['cell_type'] == kind]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs_and_says_what_comes(path):
  for cell in json.loads(path.read_text('utf-8'))['cells']:
    assert not cell.get('outputs')
    assert cell.get('execution_count') is None
  assert cells_of(path, 'markdown')[0].startswith('# ')
  assert 'SOURCE = ' in cells_of(path, 'code')[0]


def test_the_vit_is_that_of_the_page():
  page = (ROOT / 'docs/your_blocks.md').read_text('utf-8')
  (code,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  notebook = '\n'.join(cells_of(ROOT / 'notebooks/your_blocks.ipynb', 'code'))
  lines = [line for line in code.splitlines() if line.strip()]
  missing = [line for line in lines if line not in notebook]
  assert len(missing) <= 2, missing  # how the page prints the result


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, wheel, tmp_path, monkeypatch):
  nbclient = pytest.importorskip('nbclient', reason='needs .[notebooks]')
  nbformat = pytest.importorskip('nbformat')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / 'site')
  monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'site'))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  # As a reader's: without the many devices and the quick compiling of tests.
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '0')
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name='python3',
    resources={'metadata': {'path': str(tmp_path)}},
  ).execute()  # fmt: skip
  said = ''.join(
    output.get('text', '')
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  )
  assert any(
    'image/png' in output.get('data', {})
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  )
  if path.stem != 'predict':
    (accuracy,) = re.findall(r'^(?:test )?accuracy ([\d.]+)%', said, re.M)
    assert float(accuracy) > 80
