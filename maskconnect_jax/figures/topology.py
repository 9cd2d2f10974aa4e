"""The picture of a topology, at block level or at branch level.

At block level the blocks stand in a row, and an edge is an arc over the blocks
that it skips. At branch level every block is a column of branches, and an edge
goes from one column to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import patches, path, style
from matplotlib.figure import Figure

from maskconnect_jax.drawing import layout
from maskconnect_jax.drawing.parts import Graph
from maskconnect_jax.drawing.sources import Ints, Sources
from maskconnect_jax.figures import page as paper
from maskconnect_jax.figures.page import Look, Page, Theme

_LEGEND = 12  # y of the key, in points
_CUBIC = [path.Path.MOVETO, *[path.Path.CURVE4] * 3]


def topology_figure(
  sources: Sources,
  *,
  stages: Ints | None,
  live: Sequence[bool] | Sequence[Ints],
  title: str,
  real_mask: np.ndarray | None = None,
  theme: Theme = paper.LIGHT,
) -> Figure:
  """Draws which sources every block, or every branch, takes.

  An edge has the colour of its target's stage. With a real mask, the width and
  opacity of an edge grow with its entry r. Pruned blocks and branches are
  hollow, and their edges are dashed. The figure is ten inches wide.

  In the SVG, a block has the id `block-NUMBER`, a branch the id
  `branch-BLOCK.BRANCH`, and an edge the id `edge-SOURCE-TARGET`. SOURCE and
  TARGET are NUMBER, BLOCK.BRANCH, `stem` or `head`. The id of a pruned block,
  branch or edge ends in `-pruned`.

  Args:
    sources: at block level `[L]` rows: `sources[t]` are the sources of block
      t + 1. At branch level `[L-1][C]` rows: `sources[i][c]` are the branches
      of block i + 1 that branch c of block i + 2 takes.
    stages: `[L]` stage numbers from 0, never decreasing; None: unknown.
    live: `[L]`. At block level: whether the network's output depends on each
      block. At branch level: the branches of each block that it depends on.
    title: the headline, one line.
    real_mask: float in [0, 1]: `[L, L]` (target block, source), or
      `[L-1, C, C]` (junction, target branch, source branch).
    theme: the colours; `page.DARK` is for dark slides.

  Returns:
    The figure.

  Raises:
    ValueError: lengths or shapes differ, stages decrease, or a source is not
      earlier than its block.
  """
  graph = layout.place(
    sources, stages, live, tint=theme.tint, ink=theme.ink, real_mask=real_mask
  )
  with style.context(paper.STYLE):
    page = Page(720, graph.high + 66, title, graph.subtitle, theme)
    if stages:
      _draw_bands(page, graph, stages)
    _draw_edges(page, graph)
    _draw_nodes(page, graph, stages)
    name = 'edge, in the colour of the stage it feeds' if stages else 'edge'
    _draw_key(page, graph, name, graph.nodes[-2].color)
  return page.figure


def _draw_bands(page: Page, graph: Graph, stages: Ints) -> None:
  """Draws a band behind the blocks of every stage, with its name below."""
  for stage, first, last in layout.runs_of(stages):
    left = graph.columns[first] - graph.gap / 2 + 1.5
    right = graph.columns[last] + graph.gap / 2 - 1.5
    tint = page.theme.tint(stage)
    band = patches.FancyBboxPatch(
      (left, layout.STAGE - 11),
      right - left,
      graph.high - layout.STAGE + 11,
      boxstyle=patches.BoxStyle.Round(pad=0, rounding_size=5),
      color=tint,
      alpha=page.theme.band,
      lw=0,
      zorder=0,
    )
    band.set_gid(f'stage-{stage + 1}')
    page.axes.add_patch(band)
    page.write(
      (left + right) / 2,
      layout.STAGE,
      paper.stage_name(stage, right - left),
      color=tint,
      size=10,
      weight='bold',
    )


def _draw_edges(page: Page, graph: Graph) -> None:
  """Draws every edge, from the back to the front."""
  for edge in sorted(graph.edges, key=layout.depth):
    color = edge.target.color if edge.chosen else page.theme.soft
    look = {'color': color, **_strength(edge.real, graph.boldness)}
    if not edge.live:
      look = page.theme.pruned
      look['lw'] *= 0.4 + 0.6 * graph.boldness
    arc = patches.PathPatch(
      path.Path(edge.curve, _CUBIC),
      fill=False,
      capstyle='round',
      zorder=2 if edge.live else 1,
      **look,
    )
    pruned = '' if edge.live else '-pruned'
    arc.set_gid(f'edge-{edge.source.name}-{edge.target.name}{pruned}')
    page.axes.add_patch(arc)


def _strength(real: float | None, boldness: float) -> Look:
  """Returns the width and opacity of an edge with entry r; None: unknown."""
  width, opacity = layout.strength(real, boldness)
  return {'lw': width, 'alpha': opacity}


def _draw_nodes(page: Page, graph: Graph, stages: Ints | None) -> None:
  """Draws stem, head and every block or branch, and writes their names."""
  inside = layout.holds_text(graph.size)
  for node in graph.nodes:
    look: Look = {'color': node.color, 'mec': page.theme.paper, 'mew': 1.2}
    if not node.live:
      look = {'color': page.theme.paper, 'mec': page.theme.faint, 'mew': 1.2}
    (mark,) = page.axes.plot(
      [node.x],
      [node.y],
      marker='s' if node.fixed else 'o',
      ms=(max(graph.size, 12) if node.fixed else graph.size) + 1.2,
      zorder=4,
      **look,
    )
    mark.set_gid(node.gid)
    if inside and not node.fixed:
      stage = stages[node.block - 1] if stages else 0
      page.write(
        node.x,
        node.y,
        node.name.rpartition('.')[2],
        color=page.theme.number(stage) if node.live else page.theme.soft,
        size=9.5,
        weight='bold',
        va='center_baseline',
        zorder=5,
      )
  # The words are flush with the squares, so that no edge or band meets them.
  half = max(graph.size, 12) / 2
  stem, head = graph.nodes[0], graph.nodes[-1]
  page.write(stem.x + half, stem.y - half - 10, 'stem', ha='right')
  page.write(head.x - half, head.y - half - 10, 'head', ha='left')
  _write_blocks(page, graph)


def _write_blocks(page: Page, graph: Graph) -> None:
  """Writes the blocks' numbers below them, unless the nodes hold them."""
  by_branches = any('.' in node.name for node in graph.nodes)
  if layout.holds_text(graph.size) and not by_branches:
    return
  every = 1 if graph.gap >= 16 else 5
  word = 'block ' if graph.gap >= 46 else ''
  *places, head = graph.columns
  for block, x in enumerate(places):
    near = every > 1 and head - x < 24  # the word 'head' stands there
    if block and block % every == 0 and not near:
      page.write(x, graph.low - graph.size / 2 - 10, f'{word}{block}')


def _draw_key(page: Page, graph: Graph, edge: str, tint: str) -> None:
  """Draws the key: an edge, the strengths of r if known, and pruned parts."""
  bold = max(graph.boldness, 0.6)
  keys: dict[str, Look] = {edge: {'color': tint, **_strength(None, bold)}}
  if any(edge.real is not None for edge in graph.edges):
    for real in (0.0, 0.5, 1.0):
      look = {'color': page.theme.soft, **_strength(real, bold)}
      keys[f'r = {real:g}'] = look
  if not all(node.live for node in graph.nodes):
    hollow = {'marker': 'o', 'mfc': page.theme.paper}
    keys['pruned'] = page.theme.pruned | hollow
  page.legend(24, _LEGEND, keys)
