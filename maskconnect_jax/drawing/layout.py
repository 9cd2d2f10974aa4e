"""Places the blocks, branches and edges of a topology on a page.

Nothing is drawn here. Places and sizes are in points; places are measured from
the lower left corner of the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maskconnect_jax.drawing import sources as sources_lib
from maskconnect_jax.drawing.parts import Edge, Graph, Node, Point
from maskconnect_jax.drawing.sources import (
  BlockSources,
  BranchSources,
  Ints,
  Sources,
)

STAGE = 47  # y of the stages' names
LEFT = 44  # x of the stem
WIDTH = 632  # distance from stem to head
_UNKNOWN = 0.6  # the r that the strength of an edge stands for if r is unknown


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


def place(
  sources: Sources,
  stages: Ints | None,
  live: Sequence[Any],
  *,
  tint: Callable[[int], str],
  ink: str,
  real_mask: np.ndarray | None = None,
  width: float = WIDTH,
) -> Graph:
  """Checks a topology and places its parts.

  Args:
    sources: `[L]` or `[L-1][C]` rows, as in `sources.check`.
    stages: `[L]` stage numbers from 0; None: unknown.
    live: `[L]`, whether the network's output depends on each block; or the
      branches of each block that it depends on.
    tint: gives the colour of a stage.
    ink: the colour of stem and head.
    real_mask: as in `sources.check`.
    width: distance from stem to head, in points.

  Raises:
    ValueError: see `sources.check`; or `live` is of another length.
  """
  sources_lib.check(sources, stages, real_mask)
  branches = sources_lib.has_branches(sources)
  blocks = len(sources) + branches
  if len(live) != blocks:
    raise ValueError(f'live: {len(live)} entries for {blocks} blocks')
  tints = [ink, *(tint(stage) for stage in stages or [0] * blocks), ink]
  drawn = _columns_of_branches if branches else _row_of_blocks
  return drawn(sources, live, tints, real_mask, width)


def _row_of_blocks(
  sources: BlockSources,
  live: Sequence[Any],
  tints: Sequence[str],
  real_mask: np.ndarray | None,
  width: float,
) -> Graph:
  """Places blocks in a row, and edges as arcs above the row.

  Args:
    sources: `[L]` rows, as in `sources.check`.
    live: `[L]`, whether the network's output depends on each block.
    tints: `[L + 2]` colours of stem, blocks and head.
    real_mask: `[L, L]` or None, as in `sources.check`.
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


def _columns_of_branches(
  sources: BranchSources,
  live: Sequence[Any],
  tints: Sequence[str],
  real_mask: np.ndarray | None,
  width: float,
) -> Graph:
  """Places every block as a column of branches, the first branch on top.

  Args:
    sources: `[L-1][C]` rows, as in `sources.check`.
    live: `[L]` rows: the branches of each block that the network's output
      depends on.
    tints: `[L + 2]` colours of stem, blocks and head.
    real_mask: `[L-1, C, C]` or None, as in `sources.check`.
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
