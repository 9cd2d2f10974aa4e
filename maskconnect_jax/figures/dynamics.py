"""Pictures of how real masks moved: block by block, or in several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import cm, collections, colormaps, colors, style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskconnect_jax.drawing.sources import BlockSources, Ints, check
from maskconnect_jax.figures import page as paper
from maskconnect_jax.figures.masks import source_name
from maskconnect_jax.figures.page import Page

MOST = 6  # runs in a figure
_WIDTH, _HEIGHT = 470, 226  # of a run's two panels, in points
_SIDE = 158  # of a panel, in points
# The yellow end is left out: yellow is invisible on white.
_DEPTH = colors.ListedColormap(colormaps['viridis'](np.linspace(0, 0.88, 256)))

_STRIPS = 9  # most blocks in a history
_MOMENTS = 120  # most steps in a strip


class Panel(NamedTuple):
  """The data of a run's panels: T records, J rows with a choice, S sources.

  Attributes:
    title: one line.
    progress: float [T], the share of the connectivity phase at each record, 0
      to 1.
    entropy: float [T, B], entropy of the draw in each of the B blocks, relative
      to a uniform draw.
    real_mask: float [J, S], r at the end of the connectivity phase.
    valid: bool [J, S], whether the row may choose the source.
    chosen: bool [J, S], whether the row chose the source.
    blocks: int [J], the block of each row, never decreasing; B different ones.
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
    """Whether rows are branches, so that a block has several rows."""
    return len(np.unique(self.blocks)) < len(self.blocks)


def figure(panels: Sequence[Panel]) -> Figure:
  """Draws for each run the entropy of its draws, and its last real mask.

  All runs share the scale of the entropy, which begins just below the smallest
  entropy of all runs. In the SVG, a line has the id `run-NUMBER-entropy-BLOCK`
  and the chosen entries have the id `run-NUMBER-chosen`. Runs count from 1.

  Args:
    panels: one for each run, from 1 to `MOST`.

  Returns:
    The figure.
  """
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  height = rows * _HEIGHT + 104
  least = min(panel.entropy.min() for panel in panels)
  low = least - 0.05 * max(1 - least, 1e-3)
  first = min(panel.blocks[0] for panel in panels)
  last = max(panel.blocks[-1] for panel in panels)
  depth = cm.ScalarMappable(
    colors.Normalize(first, max(last, first + 1)), _DEPTH
  )
  with style.context(paper.STYLE):
    page = Page(
      columns * _WIDTH + 20,
      height,
      'Learning of the masks',
      'entropy of the draw over the connectivity phase; r at its end',
    )
    for number, panel in enumerate(panels):
      x = number % columns * _WIDTH
      y = height - 52 - (number // columns + 1) * _HEIGHT + 36
      name = f'run-{number + 1}'
      size = min(10, 1.5 * (_WIDTH - 34) / max(len(panel.title), 1))
      page.write(
        x + 24,
        y + _SIDE + 16,
        panel.title,
        ink=True,
        ha='left',
        size=size,
        weight='bold',
      )
      curves = _draw_entropy(page, x, y, panel, depth, name)
      curves.set_ylim(low, 1 + 0.02 * (1 - low))
      cells = _draw_mask(page, x, y, panel, name)
    page.color_bar(
      depth,
      (70, 24, _SIDE, 9),
      {first: f'block {first}', last: f'block {last}'},
    )
    page.real_mask_bar(cells, 290, 24)
    page.legend(384, height - 64, {'chosen': paper.DOT | {'ms': 7}})
  return page.figure


def history_figure(
  steps: Ints | np.ndarray,
  masks: np.ndarray,
  sources: BlockSources,
  *,
  stages: Ints | None,
  title: str,
) -> Figure:
  """Draws how the real mask of a run moved: one strip over the steps per block.

  At most nine blocks are drawn, spread evenly over the blocks that had a
  choice. A line marks a source while it was among the K largest of its block;
  of equals, the latest source counts as larger. A dot marks a source that was
  chosen at the freeze.

  Args:
    steps: `[T]` steps at which the mask was recorded, strictly increasing.
    masks: float `[T, L, L]` (step, target block, source) in [0, 1].
    sources: `[L]` rows: `sources[t]` are the sources of block t + 1.
    stages: `[L]` stage numbers from 0, never decreasing; None: unknown.
    title: the headline, one line.

  Returns:
    The figure.

  Raises:
    ValueError: lengths or shapes differ, steps do not increase, stages
      decrease, or a source is not earlier than its block.
  """
  check(sources, stages, None)
  count = len(sources)
  time, real = np.asarray(steps, float), np.asarray(masks)
  if not time.size or real.shape != (time.size, count, count):
    raise ValueError(f'masks is {real.shape}: must be [T, {count}, {count}]')
  if np.any(np.diff(time) <= 0):
    raise ValueError('steps must increase strictly')
  picked = np.linspace(0, time.size - 1, _MOMENTS).round().astype(int)
  time, real = time[np.unique(picked)], real[np.unique(picked)]
  # A strip's colour changes half way between two records.
  first = time[0] - 1 if time.size == 1 else time[0]
  bounds = np.array([first, *(time[1:] + time[:-1]) / 2, time[-1]])
  able = [t for t, row in enumerate(sources, start=1) if len(row) < t]
  able = able or [count]
  places = np.linspace(0, len(able) - 1, min(len(able), _STRIPS))
  shown = [able[place] for place in places.round().astype(int)]
  height = 104 + 150 * -(-len(shown) // 3)
  with style.context(paper.STYLE):
    page = Page(
      720,
      height,
      title,
      'real mask r over the training steps, a row per source: '
      f'{len(shown)} of the {len(able)} blocks that had a choice',
    )
    for number, block in enumerate(shown):
      x, y = 46 + number % 3 * 230, height - 190 - number // 3 * 150
      strip = page.inset(x, y, 184, 118)
      tint = page.theme.tint(stages[block - 1]) if stages else page.theme.ink
      page.write(
        x,
        y + 126,
        f'block {block}',
        ha='left',
        color=tint,
        weight='bold',
        size=10,
      )
      values = real[:, block - 1, :block].T
      cells = _draw_strip(strip, bounds, values, sources[block - 1])
    page.legend(
      46,
      17,
      {
        'among the K largest': {'color': paper.CHOSEN, 'lw': 2},
        'chosen at the freeze': paper.DOT | {'ms': 7},
      },
    )
    page.real_mask_bar(cells, 540, 24)
  return page.figure


def _draw_entropy(
  page: Page,
  x: float,
  y: float,
  panel: Panel,
  depth: cm.ScalarMappable,
  name: str,
) -> Axes:
  """Draws the left panel of the run at (x, y): a line for each block."""
  left = x + 70
  axes = page.inset(left, y, _SIDE, _SIDE)
  page.write(left + _SIDE / 2, y - 27, 'of the connectivity phase', size=9)
  page.write(x + 24, y + _SIDE / 2, 'relative entropy', rotation=90, size=9)
  blocks = np.unique(panel.blocks)
  for block, values in zip(blocks, panel.entropy.T, strict=True):
    axes.plot(
      panel.progress,
      values,
      color=depth.to_rgba(block),
      lw=1.1,
      gid=f'{name}-entropy-{block}',
    )
  axes.set_xlim(0, 1)
  axes.set_xticks([0, 0.5, 1], ['0', '50 %', '100 %'])
  axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(page.theme.faint)
  return axes


def _draw_mask(
  page: Page, x: float, y: float, panel: Panel, name: str
) -> cm.ScalarMappable:
  """Draws the right panel of the run at (x, y): r, with dots for the chosen."""
  left = x + 290
  axes = page.inset(left, y, _SIDE, _SIDE)
  source = 'branch before' if panel.branches else 'source'
  page.write(left + _SIDE / 2, y - 27, source, size=9)
  page.write(x + 262, y + _SIDE / 2, 'block', rotation=90, size=9)
  rows, sources = panel.valid.shape
  cells = axes.imshow(
    np.ma.masked_where(~panel.valid, panel.real_mask),
    cmap=paper.REAL_MASK,
    vmin=0,
    vmax=1,
    aspect='auto',
    interpolation='nearest',
  )
  dot = float(np.clip(0.6 * _SIDE / max(rows, sources), 1.6, 8))
  taken, picked = np.nonzero(panel.chosen)
  look = paper.DOT | {'ms': dot, 'mew': dot / 12}
  axes.plot(picked, taken, gid=f'{name}-chosen', **look)
  blocks, starts = np.unique(panel.blocks, return_index=True)
  every = 1 if len(blocks) <= 9 else 2 if len(blocks) <= 20 else 5
  shown = [i for i, block in enumerate(blocks) if block % every == 0]
  axes.set_yticks(starts[shown], [str(blocks[i]) for i in shown])
  every = 1 if sources <= 8 else 4 if sources <= 24 else 10
  ticks = range(0, sources, every)
  if panel.branches:  # which count from 1 in pictures
    axes.hlines(starts[1:] - 0.5, -0.5, sources - 0.5, color='white', lw=1)
    axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
  else:
    axes.set_xticks(ticks, [source_name(tick) for tick in ticks])
  axes.set_xlim(-0.5, sources - 0.5)
  axes.set_frame_on(False)
  return cells


def _draw_strip(
  strip: Axes, bounds: np.ndarray, values: np.ndarray, chosen: Ints
) -> collections.QuadMesh:
  """Draws the row of one block over the steps.

  Args:
    strip: the axes.
    bounds: float [T + 1]; value t lies between steps bounds[t] and
      bounds[t + 1].
    values: float [S, T], r of each source.
    chosen: the sources that were chosen at the freeze.

  Returns:
    The cells, which a scale of colours needs.
  """
  count = len(values)
  cells = strip.pcolormesh(
    bounds, np.arange(count + 1) - 0.5, values, cmap=paper.REAL_MASK
  )
  cells.set(clim=(0, 1), rasterized=True)
  # The source of each rank, [S, T]. Of equals, the latest comes first.
  order = count - 1 - np.argsort(-values[::-1], axis=0, kind='stable')
  width = float(np.clip(36 / count, 0.9, 2.2))
  for source in range(count):
    within = np.any(order[: len(chosen)] == source, axis=0)
    strip.stairs(
      np.where(within, float(source), np.nan),
      bounds,
      baseline=None,
      color=paper.CHOSEN,
      lw=width,
    )
  dots = paper.DOT | {'ms': max(3, 2.4 * width), 'mew': 0.5}
  strip.plot(
    [bounds[-1]] * len(chosen), chosen, clip_on=False, zorder=5, **dots
  )
  every = 1 if count < 7 else 2 if count < 13 else 5 if count < 31 else 10
  strip.set_yticks(range(0, count, every))
  strip.yaxis.set_major_formatter(source_name)
  strip.locator_params(axis='x', nbins=4, integer=True)
  strip.set(xlim=bounds[[0, -1]], ylim=(-0.5, count - 0.5), frame_on=False)
  return cells
