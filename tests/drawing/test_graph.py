"""Graphs for other programs, read back by networkx or line by line."""

import io
import re

import networkx
import pytest

from maskconnect_jax.drawing import graph
from maskconnect_jax.method import topology

BLOCKS = topology.Topology(((0,), (0, 1), (1, 2), (0, 2), (3, 4), (2, 4)))
BRANCHES = topology.BranchTopology((((0, 1), (0,)), ((1,), (1,))))


def options(own):
  return {
    'stages': [0, 0, 1, 1, 2, 2] if own is BLOCKS else [0, 1, 1],
    'live': getattr(own, 'live_branches', own.live),
    'title': 'net "1"',
  }


def edges_of(own):
  """The edges, by hand: numbers of branches count from 1."""
  if own is BLOCKS:
    found = {
      (str(i) if i else 'stem', str(j))
      for j, row in enumerate(own.sources, start=1)
      for i in row
    }
    return found | {('6', 'head')}
  found = {
    (f'{at + 1}.{k + 1}', f'{at + 2}.{c + 1}')
    for at, rows in enumerate(own.sources)
    for c, row in enumerate(rows)
    for k in row
  }
  ends = {('stem', f'1.{c}') for c in (1, 2)}
  return found | ends | {(f'3.{c}', 'head') for c in (1, 2)}


@pytest.mark.parametrize('own', [BLOCKS, BRANCHES], ids=['blocks', 'branches'])
def test_networkx_reads_graphml(own):
  text = graph.graphml(own.sources, **options(own))
  read = networkx.read_graphml(io.BytesIO(text.encode()))
  assert read.is_directed()
  assert set(read.edges) == edges_of(own)
  assert read.number_of_nodes() == 8
  assert networkx.is_directed_acyclic_graph(read)
  # What is pruned does not lead to the head, by networkx's own search.
  living = networkx.ancestors(read, 'head') | {'head'}
  for name, about in read.nodes(data=True):
    if name not in ('stem', 'head'):
      assert about['pruned'] == (name not in living), name
      assert about['stage'] == options(own)['stages'][int(name[0]) - 1] + 1


@pytest.mark.parametrize('own', [BLOCKS, BRANCHES], ids=['blocks', 'branches'])
def test_dot(own):
  text = graph.dot(own.sources, **options(own))
  assert text.startswith('digraph "net \\"1\\"" {\n')
  found = re.findall(r'^  "([\w.]+)" -> "([\w.]+)"', text, re.MULTILINE)
  assert set(found) == edges_of(own)
  assert len(found) == len(edges_of(own))
  nodes = re.findall(r'^  "([\w.]+)"(?: \[[^\]]*\])?;$', text, re.MULTILINE)
  assert sorted(nodes) == sorted({n for edge in found for n in edge})
  assert text.count('{') == text.count('}')
  assert text.count('subgraph') == len(set(options(own)['stages']))
