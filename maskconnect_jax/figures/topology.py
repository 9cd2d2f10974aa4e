"""The picture of a topology, at block level and at branch level.

At block level the blocks stand in a row, and an edge is an arc over the blocks
that it skips. At branch level every block is a column of branches, and an edge
goes from one column to the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patches, path, style
from matplotlib.figure import Figure

from maskconnect_jax.figures import page as paper
from maskconnect_jax.figures.page import Look, Page, Theme

Ints = Sequence[int]
BlockSources = Sequence[Ints]
BranchSources = Sequence[Sequence[Ints]]
Sources = Sequence[Sequence[Any]]  # one of the two

_LEFT, _WIDTH = 44, 632  # the stem's place, and the way to the head; points
_LEGEND, _STAGE = 12, 47  # the heights of the key and of the stages' names
_CUBIC = [path.Path.MOVETO, *[path.Path.CURVE4] * 3]
_UNKNOWN = 0.6  # the strength that an edge is drawn with where there is no r


@dataclasses.dataclass(frozen=True)
class _Node:
  """The stem, a block, a branch or the head, and where it stands.

  Attributes:
    name: 'stem', 'head', a block such as '3', or a branch such as '3.2'.
    x: in points.
    y: in points.
    color: of the stage, or ink.
    live: whether the output depends on it.
  """

  name: str
  x: float
  y: float
  color: str
  live: bool = True

  @property
  def fixed(self) -> bool:
    """Whether it is the stem or the head."""
    return self.name in ('stem', 'head')

  @property
  def gid(self) -> str:
    """The id in the SVG."""
    if self.fixed:
      return self.name
    kind = 'branch' if '.' in self.name else 'block'
    return f'{kind}-{self.name}{"" if self.live else "-pruned"}'


@dataclasses.dataclass(frozen=True)
class _Edge:
  """A source that a target takes.

  Attributes:
    source: where it begins.
    target: where it ends.
    curve: the four points of a Bézier curve from one to the other.
    real: its entry of the real mask; None: unknown.
    chosen: False for an edge that every topology has.
  """

  source: _Node
  target: _Node
  curve: list[tuple[float, float]]
  real: float | None = None
  chosen: bool = True

  @property
  def live(self) -> bool:
    """Whether the output depends on it."""
    return self.source.live and self.target.live


@dataclasses.dataclass(frozen=True)
class _Graph:
  """What is drawn of a topology.

  Attributes:
    nodes: all of them.
    edges: all of them.
    columns: [L + 2] the places of stem, blocks and head.
    size: of a node, in points.
    low: the lowest middle of a node.
    high: where the drawing ends.
    subtitle: what was counted.
  """

  nodes: list[_Node]
  edges: list[_Edge]
  columns: list[float]
  size: float
  low: float
  high: float
  subtitle: str

  @property
  def gap(self) -> float:
    """Between the middles of two blocks."""
    return self.columns[1] - self.columns[0]

  @property
  def boldness(self) -> float:
    """Up to 1: many edges must be thin and light."""
    return min(1.0, (60 / len(self.edges)) ** 0.5)


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

  An edge has the colour of the stage that it feeds; where there is a real mask,
  its width and strength follow its entry r. Pruned blocks and branches are
  hollow and their edges dashed. Ten inches wide.

  In the SVG, a block has the id `block-NUMBER`, a branch the id
  `branch-BLOCK.BRANCH`, and an edge the id `edge-SOURCE-TARGET` of two such
  numbers, `stem` or `head`. The ids of pruned things end in `-pruned`.

  Args:
    sources: at block level `[L]` rows: `sources[t]` are the sources of block
      t + 1. At branch level `[L-1][C]` rows: `sources[i][c]` are the branches
      of block i + 1 that branch c of block i + 2 takes.
    stages: `[L]` stage numbers from 0, never decreasing; None: unknown.
    live: `[L]`. At block level whether the output depends on the block, at
      branch level on which of its branches it does.
    title: the headline, one line.
    real_mask: float in [0, 1]: `[L, L]` (target block, source), or
      `[L-1, C, C]` (junction, target branch, source branch).
    theme: the colours; `page.DARK` is for dark slides.

  Raises:
    ValueError: lengths or shapes differ, or a source is no earlier one.
  """
  if has_branches(sources):
    check_branches(sources, stages, real_mask)
    tints = _tints(theme, stages, live, len(sources) + 1)
    graph = _columns_of_branches(sources, live, tints, real_mask)
  else:
    check_blocks(sources, stages, real_mask)
    tints = _tints(theme, stages, live, len(sources))
    graph = _row_of_blocks(sources, live, tints, real_mask)
  with style.context(paper.STYLE):
    page = Page(720, graph.high + 66, title, graph.subtitle, theme)
    if stages:
      _draw_bands(page, graph, stages)
    _draw_edges(page, graph)
    _draw_nodes(page, graph)
    name = 'edge, in the colour of the stage it feeds' if stages else 'edge'
    _draw_key(page, graph, name, tints[-2])
  return page.figure


def has_branches(sources: Sources) -> bool:
  """Returns whether sources are those of branches: rows of rows of numbers."""
  return any(
    isinstance(one, Sequence | np.ndarray) for row in sources for one in row
  )


def check_blocks(
  sources: BlockSources, stages: Ints | None, real_mask: np.ndarray | None
) -> None:
  """Checks a block-level topology.

  Args:
    sources: `[L]` rows.
    stages: `[L]` or None.
    real_mask: `[L, L]` or None.

  Raises:
    ValueError: lengths or shapes differ, stages decrease, or a source is no
      earlier one.
  """
  count = len(sources)
  _check_stages(stages, count)
  for block, row in enumerate(sources, start=1):
    if not _distinct(row, block):
      raise ValueError(f'block {block}: {row} are not distinct earlier sources')
  _check_mask(real_mask, (count, count))


def check_branches(
  sources: BranchSources, stages: Ints | None, real_mask: np.ndarray | None
) -> None:
  """Checks a branch-level topology.

  Args:
    sources: `[L-1][C]` rows.
    stages: `[L]` or None.
    real_mask: `[L-1, C, C]` or None.

  Raises:
    ValueError: lengths or shapes differ, stages decrease, or a source is no
      branch.
  """
  branches = len(sources[0])
  _check_stages(stages, len(sources) + 1)
  for block, rows in enumerate(sources, start=2):
    if len(rows) != branches:
      raise ValueError(f'block {block}: {len(rows)} branches, not {branches}')
    for branch, row in enumerate(rows, start=1):
      if not _distinct(row, branches):
        raise ValueError(
          f'branch {block}.{branch}: {row} are not distinct branches'
        )
  _check_mask(real_mask, (len(sources), branches, branches))


def runs_of(stages: Ints) -> list[tuple[int, int, int]]:
  """Returns (stage, first block, last block) of every stage; blocks from 1."""
  numbers = list(map(int, stages))
  return [
    (
      stage,
      numbers.index(stage) + 1,
      numbers.index(stage) + numbers.count(stage),
    )
    for stage in dict.fromkeys(numbers)
  ]


def _tints(
  theme: Theme, stages: Ints | None, live: Sequence[Any], blocks: int
) -> list[str]:
  """Returns the colours of the stem, the blocks and the head."""
  if len(live) != blocks:
    raise ValueError(f'live: {len(live)} entries for {blocks} blocks')
  tints = [theme.tint(stage) for stage in stages or [0] * blocks]
  return [theme.ink, *tints, theme.ink]


def _row_of_blocks(
  sources: BlockSources,
  live: Sequence[Any],
  tints: Sequence[str],
  real_mask: np.ndarray | None,
) -> _Graph:
  """Places blocks in a row and edges as arcs above it."""
  count = len(sources)
  pairs = [(int(i), t) for t, row in enumerate(sources, start=1) for i in row]
  columns = _places(count)
  size = float(np.clip(0.66 * (columns[1] - columns[0]), 6, 24))
  base = _STAGE + 16 + size / 2 + 14 * (not _holds_text(size))
  names = ['stem', *map(str, range(1, count + 1)), 'head']
  alive = [True, *map(bool, live), True]
  nodes = [
    _Node(name, x, base, tint, kept)
    for name, x, tint, kept in zip(names, columns, tints, alive, strict=True)
  ]
  longest = max(target - source for source, target in pairs)
  peak = float(np.clip(0.6 * (columns[1] - columns[0]) * longest, 20, 190))
  starts, ends = _arc_feet(pairs, columns, size)
  edges = []
  for source, target in pairs:
    curve = _level_curve(nodes[source], nodes[target])
    if target - source > 1:
      # The power is below 1, or short arcs would vanish among 54 blocks.
      rise = peak * 4 / 3 * ((target - source) / longest) ** 0.75
      start, end = starts[source, target], ends[source, target]
      bend = 0.12 * (end - start)
      over = [(start + bend, base + rise), (end - bend, base + rise)]
      curve = [(start, base), *over, (end, base)]
    real = None if real_mask is None else float(real_mask[target - 1, source])
    edges.append(_Edge(nodes[source], nodes[target], curve, real))
  spans = [t - i for i, t in pairs if alive[i] and alive[t]]
  edges.append(_fixed_edge(nodes[-2], nodes[-1]))
  return _Graph(
    nodes=nodes,
    edges=edges,
    columns=columns,
    size=size,
    low=base,
    high=base + peak + 12,
    subtitle=f'{count} blocks, {alive.count(False)} pruned, {len(spans):,}'
    f' edges, mean reach {sum(spans) / max(len(spans), 1):.1f} blocks',
  )


def _arc_feet(
  pairs: Sequence[tuple[int, int]], columns: Sequence[float], size: float
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
  """Returns where the arc of each (source, target) starts and where it ends.

  Arcs leave a node on its right and come in on its left, the longest in the
  middle, so that those of one node do not cross.
  """
  starts, ends = {}, {}
  for node, x in enumerate(columns):
    out = sorted(t for i, t in pairs if i == node and t - i > 1)[::-1]
    into = sorted(i for i, t in pairs if t == node and t - i > 1)
    for rank, target in enumerate(out):
      starts[node, target] = x + 0.36 * size * (rank + 0.5) / len(out)
    for rank, source in enumerate(into):
      ends[source, node] = x - 0.36 * size * (rank + 0.5) / len(into)
  return starts, ends


def _columns_of_branches(
  sources: BranchSources,
  live: Sequence[Any],
  tints: Sequence[str],
  real_mask: np.ndarray | None,
) -> _Graph:
  """Places every block as a column of branches, the first one on top."""
  blocks, branches = len(sources) + 1, len(sources[0])
  columns = _places(blocks)
  row = min(34.0, 330 / branches)
  size = float(np.clip(0.62 * min(row, columns[1] - columns[0]), 3, 20))
  low = _STAGE + 30 + size / 2
  middle = low + row * (branches - 1) / 2
  stem = _Node('stem', columns[0], middle, tints[0])
  head = _Node('head', columns[-1], middle, tints[-1])
  rows = [
    [
      _Node(
        name=f'{block}.{branch + 1}',
        x=columns[block],
        y=low + row * (branches - 1 - branch),
        color=tints[block],
        live=branch in set(alive),
      )
      for branch in range(branches)
    ]
    for block, alive in enumerate(live, start=1)
  ]
  edges = [_fixed_edge(stem, node) for node in rows[0]]
  for junction, taken in enumerate(sources):
    for branch, picked in enumerate(taken):
      for k in picked:
        source, target = rows[junction][k], rows[junction + 1][branch]
        real = None if real_mask is None else real_mask[junction, branch, k]
        curve = _level_curve(source, target)
        edges.append(_Edge(source, target, curve, real))
  kept = sum(edge.live and edge.chosen for edge in edges)
  edges += [_fixed_edge(node, head) for node in rows[-1]]
  gone = sum(not node.live for block in rows for node in block)
  return _Graph(
    nodes=[stem, *(node for block in rows for node in block), head],
    edges=edges,
    columns=columns,
    size=size,
    low=low,
    high=low + row * (branches - 1) + size / 2 + 12,
    subtitle=f'{blocks} blocks of {branches} branches, the first on top, {gone}'
    f' branches pruned, {kept:,} edges',
  )


def _places(blocks: int) -> list[float]:
  """Returns the places of the stem, the blocks and the head."""
  gap = _WIDTH / (blocks + 1)
  return [_LEFT + gap * i for i in range(blocks + 2)]


def _fixed_edge(source: _Node, target: _Node) -> _Edge:
  return _Edge(source, target, _level_curve(source, target), chosen=False)


def _level_curve(source: _Node, target: _Node) -> list[tuple[float, float]]:
  """Returns a curve that leaves and arrives level."""
  middle = (source.x + target.x) / 2
  return [
    (source.x, source.y),
    (middle, source.y),
    (middle, target.y),
    (target.x, target.y),
  ]


def _holds_text(size: float) -> bool:
  """Whether a number of two digits fits into a node."""
  return size >= 16


def _draw_bands(page: Page, graph: _Graph, stages: Ints) -> None:
  """Draws a band behind the blocks of every stage, its name at the foot."""
  for stage, first, last in runs_of(stages):
    left = graph.columns[first] - graph.gap / 2 + 1.5
    right = graph.columns[last] + graph.gap / 2 - 1.5
    tint = page.theme.tint(stage)
    band = patches.FancyBboxPatch(
      (left, _STAGE - 11),
      right - left,
      graph.high - _STAGE + 11,
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
      _STAGE,
      paper.stage_name(stage, right - left),
      color=tint,
      size=10,
      weight='bold',
    )


def _draw_edges(page: Page, graph: _Graph) -> None:
  """Draws every edge, the long and the weak ones below the others."""
  for edge in sorted(graph.edges, key=_depth):
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


def _depth(edge: _Edge) -> tuple[float, float]:
  """Sorts edges from the back to the front."""
  return edge.source.x - edge.target.x, edge.real or 0


def _strength(real: float | None, boldness: float) -> Look:
  """Returns the width and opacity of an edge of entry r, or of an unknown."""
  share = _UNKNOWN if real is None else real
  return {
    'lw': (0.6 + 2.8 * share) * (0.3 + 0.7 * boldness),
    'alpha': (0.35 + 0.55 * share) * (0.4 + 0.6 * boldness),
  }


def _draw_nodes(page: Page, graph: _Graph) -> None:
  """Draws stem, head and every block or branch, and writes their numbers."""
  inside = _holds_text(graph.size)
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
      page.write(
        node.x,
        node.y,
        node.name.rpartition('.')[2],
        color=page.theme.paper if node.live else page.theme.soft,
        size=9.5,
        weight='bold',
        va='center_baseline',
        zorder=5,
      )
  # Flush with the squares, so that no edge and no band runs into the words.
  half = max(graph.size, 12) / 2
  stem, head = graph.nodes[0], graph.nodes[-1]
  page.write(stem.x + half, stem.y - half - 10, 'stem', ha='right')
  page.write(head.x - half, head.y - half - 10, 'head', ha='left')
  _write_blocks(page, graph)


def _write_blocks(page: Page, graph: _Graph) -> None:
  """Writes the numbers of the blocks below them, unless they hold theirs."""
  by_branches = any('.' in node.name for node in graph.nodes)
  if _holds_text(graph.size) and not by_branches:
    return
  every = 1 if graph.gap >= 16 else 5
  word = 'block ' if graph.gap >= 46 else ''
  *places, head = graph.columns
  for block, x in enumerate(places):
    near = every > 1 and head - x < 24  # the word 'head' stands there
    if block and block % every == 0 and not near:
      page.write(x, graph.low - graph.size / 2 - 10, f'{word}{block}')


def _draw_key(page: Page, graph: _Graph, edge: str, tint: str) -> None:
  """Draws the key: an edge, its strengths if known, and what is pruned."""
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


def _check_stages(stages: Ints | None, blocks: int) -> None:
  if stages is None and blocks:
    return
  if not stages or len(stages) != blocks:
    raise ValueError(f'{len(stages or ())} stages for {blocks} blocks')
  if sorted(stages) != list(stages):
    raise ValueError(f'stages {list(stages)} decrease')


def _distinct(row: Ints, below: int) -> bool:
  """Whether a row holds one number or more, all different, 0..below-1."""
  return 0 < len(set(row)) == len(row) and 0 <= min(row) <= max(row) < below


def _check_mask(real_mask: np.ndarray | None, shape: tuple[int, ...]) -> None:
  if real_mask is not None and np.shape(real_mask) != shape:
    raise ValueError(f'real_mask has shape {np.shape(real_mask)}, not {shape}')
