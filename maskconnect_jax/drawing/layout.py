"""Places the blocks, branches and edges of a topology on a page.

Nothing is drawn here. Places and sizes are in points; places are measured from
the lower left corner of the page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Ints = Sequence[int]
BlockSources = Sequence[Ints]
BranchSources = Sequence[Sequence[Ints]]
Sources = Sequence[Sequence[Any]]  # BlockSources or BranchSources
Point = tuple[float, float]

STAGE = 47  # y of the stages' names
LEFT = 44  # x of the stem
WIDTH = 632  # distance from stem to head
_UNKNOWN = 0.6  # the r that the strength of an edge stands for if r is unknown


@dataclasses.dataclass(frozen=True)
class Node:
  """The stem, a block, a branch or the head, and its place.

  Attributes:
    name: 'stem', 'head', a block such as '3', or a branch such as '3.2'.
    x: of the node's middle, in points.
    y: of the node's middle, in points.
    color: of its stage, or ink.
    live: whether the network's output depends on the node.
  """

  name: str
  x: float
  y: float
  color: str
  live: bool = True

  @property
  def fixed(self) -> bool:
    """Whether the node is the stem or the head."""
    return self.name in ('stem', 'head')

  @property
  def block(self) -> int:
    """The number of the node's block, from 1; not for stem and head."""
    return int(self.name.partition('.')[0])

  @property
  def gid(self) -> str:
    """The node's id in the SVG."""
    if self.fixed:
      return self.name
    kind = 'branch' if '.' in self.name else 'block'
    return f'{kind}-{self.name}{"" if self.live else "-pruned"}'


@dataclasses.dataclass(frozen=True)
class Edge:
  """An edge: a source that a target takes.

  Attributes:
    source: the node where the edge begins.
    target: the node where the edge ends.
    curve: the four points of a Bézier curve from source to target.
    real: the edge's entry r of the real mask; None: unknown.
    chosen: False for an edge that every topology has.
  """

  source: Node
  target: Node
  curve: list[Point]
  real: float | None = None
  chosen: bool = True

  @property
  def live(self) -> bool:
    """Whether the network's output depends on the edge."""
    return self.source.live and self.target.live


@dataclasses.dataclass(frozen=True)
class Graph:
  """The nodes and edges of a topology, each in its place.

  Attributes:
    nodes: all nodes: first the stem, last the head.
    edges: all edges.
    columns: [L + 2], x of stem, blocks and head in points.
    size: diameter of a node in points.
    low: y of the lowest node's middle.
    high: y of the top of the drawing.
    subtitle: the counts of nodes and edges.
  """

  nodes: list[Node]
  edges: list[Edge]
  columns: list[float]
  size: float
  low: float
  high: float
  subtitle: str

  @property
  def gap(self) -> float:
    """Distance between the middles of neighbouring blocks, in points."""
    return self.columns[1] - self.columns[0]

  @property
  def boldness(self) -> float:
    """A factor up to 1 that makes many edges thin and light."""
    return min(1.0, (60 / len(self.edges)) ** 0.5)


def strength(real: float | None, boldness: float) -> tuple[float, float]:
  """Returns the width in points and the opacity of an edge.

  Args:
    real: the edge's entry r of the real mask; None: unknown.
    boldness: of the graph.
  """
  share = _UNKNOWN if real is None else real
  return (
    (0.6 + 2.8 * share) * (0.3 + 0.7 * boldness),
    (0.35 + 0.55 * share) * (0.4 + 0.6 * boldness),
  )


def depth(edge: Edge) -> tuple[float, float]:
  """Returns a key that sorts edges from the back to the front.

  Long edges lie behind short ones, and weak edges behind strong ones.
  """
  return edge.source.x - edge.target.x, edge.real or 0


def has_branches(sources: Sources) -> bool:
  """Returns whether sources are of branches: rows of rows of numbers."""
  return any(
    isinstance(one, Sequence | np.ndarray) for row in sources for one in row
  )


def check_blocks(
  sources: BlockSources, stages: Ints | None, real_mask: np.ndarray | None
) -> None:
  """Checks a block-level topology.

  Args:
    sources: `[L]` rows: `sources[t]` are the sources of block t + 1.
    stages: `[L]` stage numbers; None: unknown.
    real_mask: `[L, L]` (target block, source); None: unknown.

  Raises:
    ValueError: lengths or shapes differ, stages decrease, a row is empty or
      names a source twice, or a source is not earlier than its block.
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
    sources: `[L-1][C]` rows: `sources[i][c]` are the sources of branch c of
      block i + 2.
    stages: `[L]` stage numbers; None: unknown.
    real_mask: `[L-1, C, C]` (junction, target branch, source branch); None:
      unknown.

  Raises:
    ValueError: lengths or shapes differ, stages decrease, a row is empty or
      names a source twice, or a source is no branch.
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


def row_of_blocks(
  sources: BlockSources,
  live: Sequence[Any],
  tints: Sequence[str],
  real_mask: np.ndarray | None,
  width: float = WIDTH,
) -> Graph:
  """Places blocks in a row, and edges as arcs above the row.

  Args:
    sources: `[L]` rows, as in `check_blocks`.
    live: `[L]`, whether the network's output depends on each block.
    tints: `[L + 2]` colours of stem, blocks and head.
    real_mask: `[L, L]` or None, as in `check_blocks`.
    width: distance from stem to head, in points.

  Returns:
    The graph.
  """
  count = len(sources)
  pairs = [(int(i), t) for t, row in enumerate(sources, start=1) for i in row]
  columns = _places(count, width)
  size = float(np.clip(0.66 * (columns[1] - columns[0]), 6, 24))
  base = STAGE + 16 + size / 2 + 14 * (not holds_text(size))
  names = ['stem', *map(str, range(1, count + 1)), 'head']
  alive = [True, *map(bool, live), True]
  nodes = [
    Node(name, x, base, tint, kept)
    for name, x, tint, kept in zip(names, columns, tints, alive, strict=True)
  ]
  longest = max(target - source for source, target in pairs)
  peak = float(np.clip(0.6 * (columns[1] - columns[0]) * longest, 20, 190))
  starts, ends = _arc_feet(pairs, columns, size)
  edges = []
  for source, target in pairs:
    curve = _level_curve(nodes[source], nodes[target])
    if target - source > 1:
      # With a power of 1, short arcs would vanish among 54 blocks.
      rise = peak * 4 / 3 * ((target - source) / longest) ** 0.75
      start, end = starts[source, target], ends[source, target]
      bend = 0.12 * (end - start)
      over = [(start + bend, base + rise), (end - bend, base + rise)]
      curve = [(start, base), *over, (end, base)]
    real = None if real_mask is None else float(real_mask[target - 1, source])
    edges.append(Edge(nodes[source], nodes[target], curve, real))
  spans = [t - i for i, t in pairs if alive[i] and alive[t]]
  edges.append(_fixed_edge(nodes[-2], nodes[-1]))
  return Graph(
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
  """Returns x of the start and of the end of the arc of each (source, target).

  Arcs leave a node on its right and arrive on its left. The longest arc is the
  nearest to the node's middle, so that the arcs of one node do not cross.
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


def columns_of_branches(
  sources: BranchSources,
  live: Sequence[Any],
  tints: Sequence[str],
  real_mask: np.ndarray | None,
  width: float = WIDTH,
) -> Graph:
  """Places every block as a column of branches, the first branch on top.

  Args:
    sources: `[L-1][C]` rows, as in `check_branches`.
    live: `[L]` rows: the branches of each block that the network's output
      depends on.
    tints: `[L + 2]` colours of stem, blocks and head.
    real_mask: `[L-1, C, C]` or None, as in `check_branches`.
    width: distance from stem to head, in points.

  Returns:
    The graph.
  """
  blocks, branches = len(sources) + 1, len(sources[0])
  columns = _places(blocks, width)
  row = min(34.0, 330 / branches)
  size = float(np.clip(0.62 * min(row, columns[1] - columns[0]), 3, 20))
  low = STAGE + 30 + size / 2
  middle = low + row * (branches - 1) / 2
  stem = Node('stem', columns[0], middle, tints[0])
  head = Node('head', columns[-1], middle, tints[-1])
  rows = [
    [
      Node(
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
        edges.append(Edge(source, target, curve, real))
  kept = sum(edge.live and edge.chosen for edge in edges)
  edges += [_fixed_edge(node, head) for node in rows[-1]]
  gone = sum(not node.live for block in rows for node in block)
  return Graph(
    nodes=[stem, *(node for block in rows for node in block), head],
    edges=edges,
    columns=columns,
    size=size,
    low=low,
    high=low + row * (branches - 1) + size / 2 + 12,
    subtitle=f'{blocks} blocks of {branches} branches, the first on top, {gone}'
    f' branches pruned, {kept:,} edges',
  )


def _places(blocks: int, width: float) -> list[float]:
  """Returns x of the stem, the blocks and the head, in points."""
  gap = width / (blocks + 1)
  return [LEFT + gap * i for i in range(blocks + 2)]


def _fixed_edge(source: Node, target: Node) -> Edge:
  return Edge(source, target, _level_curve(source, target), chosen=False)


def _level_curve(source: Node, target: Node) -> list[Point]:
  """Returns a Bézier curve that is horizontal at both ends."""
  middle = (source.x + target.x) / 2
  return [
    (source.x, source.y),
    (middle, source.y),
    (middle, target.y),
    (target.x, target.y),
  ]


def holds_text(size: float) -> bool:
  """Returns whether a number of two digits fits into a node of this size."""
  return size >= 16


def _check_stages(stages: Ints | None, blocks: int) -> None:
  if stages is None and blocks:
    return
  if not stages or len(stages) != blocks:
    raise ValueError(f'{len(stages or ())} stages for {blocks} blocks')
  if sorted(stages) != list(stages):
    raise ValueError(f'stages {list(stages)} decrease')


def _distinct(row: Ints, below: int) -> bool:
  """Returns whether a row is not empty, with distinct numbers in 0..below-1."""
  return 0 < len(set(row)) == len(row) and 0 <= min(row) <= max(row) < below


def _check_mask(real_mask: np.ndarray | None, shape: tuple[int, ...]) -> None:
  if real_mask is not None and np.shape(real_mask) != shape:
    raise ValueError(f'real_mask has shape {np.shape(real_mask)}, not {shape}')
