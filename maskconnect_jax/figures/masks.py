"""The picture of a real mask, with the chosen sources marked.

At block level it is one triangle with a row for each block. At branch level it
is a square for each junction between two blocks, with a row for each branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import collections, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskconnect_jax.drawing import layout
from maskconnect_jax.drawing.sources import (
  BlockSources,
  BranchSources,
  Ints,
  Sources,
  check,
  has_branches,
)
from maskconnect_jax.figures import page as paper
from maskconnect_jax.figures.page import Page

_SIDE = 432  # of the triangle, in points
_ACROSS = 4  # most junctions side by side
_MOST_CELLS = 5_000  # a mask with more cells is drawn as pixels in the SVG
_SUBTITLE = 'real mask r: a row per'


def mask_figure(
  real_mask: np.ndarray,
  sources: Sources,
  *,
  stages: Ints | None,
  title: str,
) -> Figure:
  """Draws the real mask as heat maps, the chosen sources marked.

  Args:
    real_mask: float in [0, 1]: `[L, L]` (target block, source), or
      `[L-1, C, C]` (junction, target branch, source branch). At block level,
      entries right of the diagonal do not exist and stay blank.
    sources: `[L]` or `[L-1][C]` rows, as in `topology.topology_figure`.
    stages: `[L]` stage numbers from 0, never decreasing; None: unknown.
    title: the headline, one line.

  Returns:
    The figure.

  Raises:
    ValueError: lengths or shapes differ, stages decrease, or a source is not
      earlier than its block.
  """
  real = np.asarray(real_mask)
  with style.context(paper.STYLE):
    check(sources, stages, real)
    if has_branches(sources):
      return _squares(real, sources, stages, title).figure
    return _triangle(real, sources, stages, title).figure


def source_name(source: float, _: float = 0) -> str:
  """Returns the label of a block's source on an axis; source 0 is the stem.

  Args:
    source: the number of the source.
    _: the tick's position, which matplotlib passes.
  """
  return f'{source:g}' if source else 'stem'


def _triangle(
  real: np.ndarray, sources: BlockSources, stages: Ints | None, title: str
) -> Page:
  """Draws the mask of blocks: targets 1..L down, sources 0..L-1 across."""
  count = len(sources)
  left, low, high = 84, 74, 74 + _SIDE
  page = Page(540, high + 64, title, f'{_SUBTITLE} block')
  grid = page.inset(left, low, _SIDE, _SIDE)
  edges = [(i, t) for t, row in enumerate(sources, start=1) for i in row]
  exists = np.tri(count, dtype=bool)
  cells = _draw_cells(grid, _SIDE, real, exists, edges)
  every = 1 if count <= 20 else 5
  grid.set_yticks(range(every, count + 1, every))
  grid.set_xticks(range(0, count, every))
  grid.xaxis.set_major_formatter(source_name)
  if stages:
    _mark_stages(page, grid, stages, left, low)
  page.write(
    left - 56, low + _SIDE / 2, 'block', ink=True, rotation=90, size=10
  )
  page.write(left + _SIDE / 2, low - 50, 'source', ink=True, size=10)
  # The key lies where entries do not exist.
  page.real_mask_bar(cells, left + _SIDE - 150, high - 30)
  page.legend(358, high - 76, {'chosen at the freeze': paper.DOT | {'ms': 9}})
  return page


def _mark_stages(
  page: Page, grid: Axes, stages: Ints, left: float, low: float
) -> None:
  """Draws a bar for each stage, and a stepped line where a stage begins."""
  count = len(stages)
  cell = _SIDE / count
  for stage, first, last in layout.runs_of(stages):
    top = low + _SIDE - cell * (first - 1)
    bottom = low + _SIDE - cell * last
    page.stage_bar(stage, bottom, top, left - 28, upright=True)
    if first < count:  # The last block is no block's source.
      start = left + cell * first
      page.stage_bar(stage, start, left + cell * min(last + 1, count), low - 22)
    if first > 1:
      at = first - 0.5
      grid.plot(
        [-0.5, at, at], [at, at, count + 0.5], color=page.theme.ink, lw=0.9
      )


def _squares(
  real: np.ndarray, sources: BranchSources, stages: Ints | None, title: str
) -> Page:
  """Draws a square for each junction, in reading order."""
  junctions, branches, _ = real.shape
  across = min(_ACROSS, junctions)
  pad = 40
  side = (656 + pad) / max(across, 2) - pad
  height = -(-junctions // across) * (side + pad) + 110
  page = Page(
    720, height, title, f'{_SUBTITLE} branch, its sources in the block before'
  )
  exists = np.ones((branches, branches), bool)
  ticks = range(1, branches + 1, 1 if branches <= 8 else 8)
  for junction, rows in enumerate(sources):
    left = 44 + junction % across * (side + pad)
    low = height - 66 - (junction // across + 1) * (side + pad) + pad - 12
    grid = page.inset(left, low, side, side)
    edges = [(k + 1, c) for c, row in enumerate(rows, start=1) for k in row]
    cells = _draw_cells(grid, side, real[junction], exists, edges, first=1)
    cells.set_rasterized(real.size > _MOST_CELLS)
    grid.set_xticks(ticks)
    grid.set_yticks(ticks)
    tint = page.theme.tint(stages[junction + 1]) if stages else page.theme.ink
    page.write(
      left + side / 2,
      low + side + 10,
      f'block {junction + 1} to {junction + 2}',
      color=tint,
      size=10,
      weight='bold',
    )
  page.legend(44, 20, {'chosen at the freeze': paper.DOT | {'ms': 9}})
  page.real_mask_bar(cells, 520, 26)
  return page


def _draw_cells(
  grid: Axes,
  side: float,
  real: np.ndarray,
  exists: np.ndarray,
  edges: Sequence[tuple[int, int]],
  *,
  first: int = 0,
) -> collections.PolyCollection:
  """Draws a heat map with a dot on each chosen entry.

  Args:
    grid: the axes of the panel.
    side: width and height of the panel in points.
    real: float [N, N] (target, source), r.
    exists: bool [N, N]; entries that do not exist stay blank.
    edges: (source, target) of each chosen entry. Targets count from 1.
    first: the number of the first source.

  Returns:
    The cells, which a scale of colours needs.
  """
  rows, columns = np.nonzero(exists)
  size = len(real)
  cell = side / size
  corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
  middles = np.stack([columns + first, rows + 1], axis=1)
  cells = collections.PolyCollection(
    list(middles[:, None] + corners), array=real[rows, columns]
  )
  cells.set(
    cmap=paper.REAL_MASK,
    clim=(0, 1),
    edgecolor=paper.LIGHT.paper,
    linewidth=min(1.2, cell / 20),
  )
  grid.add_collection(cells)
  grid.set(
    xlim=(first - 0.5, first + size - 0.5),
    ylim=(size + 0.5, 0.5),
    frame_on=False,
  )
  # In small cells, only dots that fill more of the cell are visible.
  dot = float(np.clip(0.42 * cell, min(3.4, 0.75 * cell), 13))
  across, down = np.transpose(edges)
  grid.plot(
    across, down, gid='chosen', **(paper.DOT | {'ms': dot, 'mew': dot / 10})
  )
  return cells
