"""The drawing of a topology as SVG, for pages and notebooks.

Colours are the custom properties of `theme.style`, so that one drawing serves
light and dark. Classes name the parts: `band`, `edge`, `node`, `pruned`. An
edge has the attributes `data-from` and `data-to`, a node `data-node`; their
values are 'stem', 'head', a block such as '3', or a branch such as '3.2'.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from maskconnect_jax.drawing import layout, theme
from maskconnect_jax.drawing.parts import Edge, Graph, Node
from maskconnect_jax.drawing.sources import Ints, Sources, has_branches

# The rules of the parts, without the colours themselves.
STYLE = """
.topology{font:9.5px ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,
'Helvetica Neue',Arial,sans-serif;fill:var(--soft);text-anchor:middle}
.topology .band{opacity:var(--band)}
.topology .stage{font-size:10px;font-weight:600;
fill:color-mix(in oklab,var(--t) 60%,var(--ink))}
.topology .edge{fill:none;stroke-linecap:round}
.topology .edge.pruned{stroke:var(--faint)!important;stroke-dasharray:3 2}
.topology .node circle,.topology .node rect{stroke:var(--paper);
stroke-width:1.2}
.topology .node text{font-weight:600;pointer-events:none}
.topology .node.pruned circle{fill:var(--paper)!important;stroke:var(--faint)}
.topology .node.pruned text{fill:var(--soft)!important}
"""
_ABOVE = 6  # room above the drawing, in points
_BESIDE = 24  # room beside the stem and the head, in points


def topology_svg(
  sources: Sources,
  *,
  stages: Ints | None,
  live: Sequence[bool] | Sequence[Ints],
  title: str,
  real_mask: np.ndarray | None = None,
  width: float = layout.WIDTH,
  standalone: bool = True,
) -> str:
  """Returns the drawing of a topology.

  Args:
    sources: `[L]` or `[L-1][C]` rows, as in `figures.topology`.
    stages: `[L]` stage numbers from 0, never decreasing; None: unknown.
    live: `[L]`, whether the output depends on each block; or the branches of
      each block that it depends on.
    title: what a screen reader calls the drawing.
    real_mask: float in [0, 1]: `[L, L]` (target block, source), or `[L-1, C,
      C]`; the strength of an edge is its entry.
    width: distance from the stem to the head, in points.
    standalone: whether the drawing brings its colours and its background. A
      page with the colours of `theme.style` and the rules of `STYLE` needs
      neither.

  Returns:
    An `<svg>` element.

  Raises:
    ValueError: lengths or shapes differ, stages decrease, or a source is not
      earlier than its block.
  """
  graph = layout.place(
    sources,
    stages,
    live,
    tint=lambda stage: f'var(--tint-{_tint(stage)})',
    ink='var(--ink)',
    real_mask=real_mask,
    width=width,
  )
  low = layout.STAGE - 16  # nothing is drawn below the names of the stages
  high, left = graph.high + _ABOVE, layout.LEFT - _BESIDE
  across, tall = width + 2 * _BESIDE, high - low
  parts = [
    f'<svg class="topology" xmlns="http://www.w3.org/2000/svg" role="group"'
    f' viewBox="{left} 0 {across:g} {tall:.4g}" width="{across:g}"'
    f' height="{tall:.4g}"'
    f' aria-label="{escape(title)}">'
  ]
  if standalone:
    style = theme.style('.topology') + STYLE.replace('\n', '')
    parts += [
      f'<style>{style}</style>',
      f'<rect x="{left}" width="100%" height="100%" fill="var(--paper)"/>',
    ]
  parts += [
    *_bands(graph, stages, high),
    *(
      _edge(edge, graph.boldness, high)
      for edge in sorted(graph.edges, key=layout.depth)
    ),
    *(_node(node, graph, stages, high) for node in graph.nodes),
    *_numbers(graph, has_branches(sources), high),
    '</svg>',
  ]
  return '\n'.join(parts)


def _tint(stage: int) -> int:
  return int(stage) % len(theme.LIGHT.tints)


def _bands(graph: Graph, stages: Ints | None, high: float) -> list[str]:
  """Returns a band behind the blocks of every stage, and its name below."""
  parts = []
  for stage, first, last in layout.runs_of(stages or ()):
    left = graph.columns[first] - graph.gap / 2 + 1.5
    wide = graph.columns[last] + graph.gap / 2 - 1.5 - left
    tint = f'var(--tint-{_tint(stage)})'
    name = f'stage {stage + 1}' if wide > 42 else f'{stage + 1}'
    parts += [
      f'<rect class="band" x="{left:.5g}" y="{_ABOVE}" width="{wide:.5g}"'
      f' height="{high - layout.STAGE + 11 - _ABOVE:.5g}" rx="5"'
      f' style="fill:{tint}"/>',
      f'<text class="stage" x="{left + wide / 2:.5g}"'
      f' y="{high - layout.STAGE + 3.5:.5g}" style="--t:{tint}">{name}</text>',
    ]
  return parts


def _edge(edge: Edge, boldness: float, high: float) -> str:
  wide, opacity = layout.strength(edge.real, boldness)
  color = edge.target.color if edge.chosen else 'var(--faint)'
  if not edge.live:
    wide, opacity = 0.8 * (0.4 + 0.6 * boldness), 1.0
  points = [f'{x:.5g} {high - y:.5g}' for x, y in edge.curve]
  real = '' if edge.real is None else f' data-r="{edge.real:.2f}"'
  return (
    f'<path class="edge{"" if edge.live else " pruned"}"'
    f' data-from="{edge.source.name}" data-to="{edge.target.name}"{real}'
    f' d="M{points[0]}C{",".join(points[1:])}" style="stroke:{color};'
    f'stroke-width:{wide:.3g};opacity:{opacity:.2g}"/>'
  )


def _node(node: Node, graph: Graph, stages: Ints | None, high: float) -> str:
  inside = layout.holds_text(graph.size) and not node.fixed
  x, y, half = node.x, high - node.y, graph.size / 2
  shape = (
    f'<circle cx="{x:.5g}" cy="{y:.5g}" r="{half:.4g}"'
    f' style="fill:{node.color}"/>'
  )
  if node.fixed:
    half = max(half, 6)
    shape = (
      f'<rect x="{x - half:.5g}" y="{y - half:.5g}" width="{2 * half:.4g}"'
      f' height="{2 * half:.4g}" rx="2" style="fill:{node.color}"/>'
    )
  name = ''
  if inside:
    own = node.name.rpartition('.')[2]
    tint = _tint(stages[node.block - 1] if stages else 0)
    name = (
      f'<text x="{x:.5g}" y="{y + 3.3:.5g}" style="fill:var(--on-{tint})">{own}'
      '</text>'
    )
  gone = '' if node.live else ' pruned'
  about = escape(describe(node, graph, stages))
  return (
    f'<g class="node{gone}" data-node="{node.name}" role="img"'
    f' aria-label="{about}"><title>{about}</title>{shape}{name}</g>'
  )


def describe(node: Node, graph: Graph, stages: Ints | None) -> str:
  """Returns a node in words: its stage, its sources with r, and its readers."""
  name = node.name
  words = f'{name[:1].upper()}{name[1:]}'
  if not node.fixed:
    kind = 'Branch' if '.' in name else 'Block'
    words = f'{kind} {name}'
    if stages:
      words += f', stage {stages[node.block - 1] + 1}'
    words += '' if node.live else ', pruned'
  read = [
    edge.source.name + ('' if edge.real is None else f' (r = {edge.real:.2f})')
    for edge in graph.edges
    if edge.target is node
  ]
  readers = [edge.target.name for edge in graph.edges if edge.source is node]
  if read:
    words += f'. Reads {", ".join(read)}'
  if name != 'head':
    words += f'. Read by {", ".join(readers) or "nothing"}'
  return f'{words}.'


def _numbers(graph: Graph, branches: bool, high: float) -> list[str]:
  """Returns the words stem and head, and numbers that nodes do not hold."""
  half = max(graph.size, 12) / 2
  stem, head = graph.nodes[0], graph.nodes[-1]
  below = [
    (node.x, node.y - half - 12, node.name, 'middle') for node in (stem, head)
  ]
  if branches or not layout.holds_text(graph.size):
    every = 1 if graph.gap >= 16 else 5
    foot = graph.low - graph.size / 2 - 12
    below += [
      (x, foot, str(block), 'middle')
      for block, x in enumerate(graph.columns[:-1])
      if block
      and block % every == 0
      and (branches or graph.columns[-1] - x > 24)
    ]
  return [
    f'<text x="{x:.5g}" y="{high - y:.5g}" text-anchor="{anchor}"'
    f' aria-hidden="true">{text}</text>'
    for x, y, text, anchor in below
  ]


def of_topology(topology: Any, title: str) -> str:
  """Returns the drawing of a `method.topology` object, stages unknown."""
  live = getattr(topology, 'live_branches', topology.live)
  return topology_svg(topology.sources, stages=None, live=live, title=title)
