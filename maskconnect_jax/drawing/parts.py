"""The parts of a drawing, each in its place: nodes, edges and their graph."""

from __future__ import annotations

import dataclasses

Point = tuple[float, float]


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
