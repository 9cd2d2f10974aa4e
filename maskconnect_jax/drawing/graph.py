"""A topology as a graph for other programs: Graphviz DOT and GraphML.

Nodes are 'stem', 'head', blocks such as '3' or branches such as '3.2', where
branches count from 1. An edge goes from a source to whatever reads it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from maskconnect_jax.drawing import layout
from maskconnect_jax.drawing.parts import Graph, Node
from maskconnect_jax.drawing.sources import Ints, Sources

_NAMESPACE = 'http://graphml.graphdrawing.org/xmlns'
# Name -> its place and type in GraphML.
_KEYS = {'stage': ('node', 'int'), 'pruned': ('node', 'boolean')}


def _placed(
  sources: Sources, stages: Ints | None, live: Sequence[bool] | Sequence[Ints]
) -> Graph:
  return layout.place(sources, stages, live, tint=lambda _: '', ink='')


def _attributes(node: Node, stages: Ints | None) -> dict[str, str]:
  if node.fixed:
    return {}
  found = {'pruned': str(not node.live).lower()}
  if stages:
    found['stage'] = str(int(stages[node.block - 1]) + 1)
  return found


def dot(
  sources: Sources,
  *,
  stages: Ints | None,
  live: Sequence[bool] | Sequence[Ints],
  title: str,
) -> str:
  """Returns a topology as a digraph of Graphviz.

  Args:
    sources: `[L]` or `[L-1][C]` rows, as in `svg.topology_svg`.
    stages: `[L]` stage numbers from 0; None: unknown. A stage is a cluster.
    live: `[L]`, as in `svg.topology_svg`; pruned parts are dashed.
    title: the label of the graph.

  Raises:
    ValueError: see `svg.topology_svg`.
  """
  graph = _placed(sources, stages, live)
  quoted = title.replace('\\', '\\\\').replace('"', '\\"')
  lines = [f'digraph "{quoted}" {{', f'  label="{quoted}"; rankdir=LR;']
  lines += ['  node [shape=circle];', '  "stem" [shape=box];']
  for stage, first, last in layout.runs_of(stages or [0] * _blocks(graph)):
    if stages:
      lines.append(f'  subgraph "cluster_{stage}" {{ label="stage {stage + 1}"')
    for node in graph.nodes[1:-1]:
      if first <= node.block <= last:
        look = '' if node.live else ' [style=dashed]'
        lines.append(f'  "{node.name}"{look};')
    if stages:
      lines.append('  }')
  lines.append('  "head" [shape=box];')
  for edge in graph.edges:
    look = '' if edge.live else ' [style=dashed]'
    lines.append(f'  "{edge.source.name}" -> "{edge.target.name}"{look};')
  return '\n'.join([*lines, '}', ''])


def _blocks(graph: Graph) -> int:
  return len(graph.columns) - 2


def graphml(
  sources: Sources,
  *,
  stages: Ints | None,
  live: Sequence[bool] | Sequence[Ints],
  title: str,
) -> str:
  """Returns a topology as GraphML, which networkx, Gephi and yEd read.

  Blocks and branches have the attributes `pruned` and, if stages are known,
  `stage`, from 1.

  Args:
    sources: `[L]` or `[L-1][C]` rows, as in `svg.topology_svg`.
    stages: `[L]` stage numbers from 0; None: unknown.
    live: `[L]`, as in `svg.topology_svg`.
    title: the id of the graph.

  Raises:
    ValueError: see `svg.topology_svg`.
  """
  graph = _placed(sources, stages, live)
  ET.register_namespace('', _NAMESPACE)
  root = ET.Element(f'{{{_NAMESPACE}}}graphml')
  for name, (place, kind) in _KEYS.items():
    ET.SubElement(
      root, f'{{{_NAMESPACE}}}key',
      {'id': name, 'for': place, 'attr.name': name, 'attr.type': kind},
    )  # fmt: skip
  body = ET.SubElement(
    root, f'{{{_NAMESPACE}}}graph', id=title, edgedefault='directed'
  )
  for node in graph.nodes:
    one = ET.SubElement(body, f'{{{_NAMESPACE}}}node', id=node.name)
    for name, value in _attributes(node, stages).items():
      ET.SubElement(one, f'{{{_NAMESPACE}}}data', key=name).text = value
  for edge in graph.edges:
    ET.SubElement(
      body,
      f'{{{_NAMESPACE}}}edge',
      source=edge.source.name,
      target=edge.target.name,
    )
  ET.indent(root)
  text = ET.tostring(root, encoding='unicode')
  return f"<?xml version='1.0' encoding='UTF-8'?>\n{text}\n"
