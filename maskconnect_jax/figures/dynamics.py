"""Pictures of what real masks did, a pair of panels for each run.

They look like those of `plots` and are saved by `plots.save`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import cm, colormaps, colors, style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskconnect_jax.figures import page as plots

MOST = 6  # runs in a figure
WIDTH, HEIGHT = 470, 226  # of a run, in points
SIDE = 158  # of a panel
# Yellow, which nobody sees on white, is left out.
DEPTH = colors.ListedColormap(colormaps['viridis'](np.linspace(0, 0.88, 256)))


class Panel(NamedTuple):
  """What is drawn of a run: T records, J rows with a choice, S sources.

  Attributes:
    title: one line.
    progress: float [T], the share of the connectivity phase at each record.
    entropy: float [T, B], of each of the B blocks, relative to uniform.
    real_mask: float [J, S], r at the end.
    valid: bool [J, S].
    chosen: bool [J, S].
    blocks: int [J], rising, the B blocks that the rows belong to.
  """

  title: str
  progress: np.ndarray
  entropy: np.ndarray
  real_mask: np.ndarray
  valid: np.ndarray
  chosen: np.ndarray
  blocks: np.ndarray

  @property
  def branches(self) -> bool:
    """Whether rows are branches, of which a block has several."""
    return len(np.unique(self.blocks)) < len(self.blocks)


@style.context(plots.STYLE)
def figure(panels: Sequence[Panel]) -> Figure:
  """Draws for each run how sure its draws became, and the r that it ended with.

  All runs share the scale of the entropy, which starts where their least is.
  In the SVG, a line has the id `run-NUMBER-entropy-BLOCK`.
  """
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  height = rows * HEIGHT + 104
  result, page = plots.new_page(
    *(columns * WIDTH + 20, height, 'Learning of the masks'),
    'entropy of the draw over the connectivity phase; r at its end',
  )
  least = min(panel.entropy.min() for panel in panels)
  low = least - 0.05 * max(1 - least, 1e-3)
  first = min(panel.blocks[0] for panel in panels)
  last = max(panel.blocks[-1] for panel in panels)
  depth = cm.ScalarMappable(colors.Normalize(first, max(last, first + 1)))
  depth.set_cmap(DEPTH)
  for n, panel in enumerate(panels):
    x = n % columns * WIDTH
    y = height - 52 - (n // columns + 1) * HEIGHT + 36
    look = plots.NAME_LOOK | {'ha': 'left', 'color': plots.INK}
    look['size'] = min(10, 1.5 * (WIDTH - 34) / max(len(panel.title), 1))
    page.text(x + 24, y + SIDE + 16, panel.title, **look)
    box = (x + 70, y, SIDE, SIDE)
    lines = page.inset_axes(box, transform=page.transData)
    _draw_entropy(lines, panel, depth, f'run-{n + 1}')
    lines.set_ylim(low, 1 + 0.02 * (1 - low))
    look = plots.NAME_LOOK | {'weight': 'normal', 'size': 9}
    page.text(x + 70 + SIDE / 2, y - 27, 'of the connectivity phase', **look)
    page.text(x + 24, y + SIDE / 2, 'relative entropy', rotation=90, **look)
    box = (x + 290, y, SIDE, SIDE)
    grid = page.inset_axes(box, transform=page.transData)
    cells = _draw_mask(grid, panel, f'run-{n + 1}')
    source = 'branch before' if panel.branches else 'source'
    page.text(x + 290 + SIDE / 2, y - 27, source, **look)
    page.text(x + 262, y + SIDE / 2, 'block', rotation=90, **look)
  axes = page.inset_axes((70, 24, SIDE, 9), transform=page.transData)
  bar = result.colorbar(depth, cax=axes, orientation='horizontal')
  bar.set_ticks([first, last], labels=[f'block {first}', f'block {last}'])
  bar.outline.set_visible(False)
  plots.add_color_bar(page, cells, 290, 24)
  keys: dict[str, plots.Look] = {'chosen': plots.DOT_LOOK | {'ms': 7}}
  plots.add_legend(page, 384, height - 64, keys)
  return result


def _draw_entropy(
  axes: Axes, panel: Panel, depth: cm.ScalarMappable, name: str
) -> None:
  for block, values in zip(
    np.unique(panel.blocks), panel.entropy.T, strict=True
  ):
    axes.plot(
      *(panel.progress, values),
      color=depth.to_rgba(block),
      lw=1.1,
      gid=f'{name}-entropy-{block}',
    )
  axes.set_xlim(0, 1)
  axes.set_xticks([0, 0.5, 1], ['0', '50 %', '100 %'])
  axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(plots.FAINT)


def _draw_mask(axes: Axes, panel: Panel, name: str) -> cm.ScalarMappable:
  rows, sources = panel.valid.shape
  cells = axes.imshow(
    np.ma.masked_where(~panel.valid, panel.real_mask),
    cmap=plots.REAL_MASK,
    vmin=0,
    vmax=1,
    aspect='auto',
    interpolation='nearest',
  )
  cell = SIDE / max(rows, sources)
  dot = float(np.clip(0.6 * cell, 1.6, 8))
  taken, picked = np.nonzero(panel.chosen)
  look = plots.DOT_LOOK | {'ms': dot, 'mew': dot / 12}
  axes.plot(picked, taken, gid=f'{name}-chosen', **look)
  blocks, starts = np.unique(panel.blocks, return_index=True)
  every = 1 if len(blocks) <= 9 else 2 if len(blocks) <= 20 else 5
  shown = [i for i, block in enumerate(blocks) if block % every == 0]
  axes.set_yticks(starts[shown], [str(blocks[i]) for i in shown])
  if panel.branches:  # they count from 1 in pictures
    axes.hlines(starts[1:] - 0.5, -0.5, sources - 0.5, color='white', lw=1)
  every = 1 if sources <= 8 else 4 if sources <= 24 else 10
  ticks = np.arange(0, sources, every)
  names = [str(t + panel.branches) for t in ticks]
  axes.set_xticks(ticks, names if panel.branches else ['stem', *names[1:]])
  axes.set_xlim(-0.5, sources - 0.5)
  axes.set_frame_on(False)
  return cells
