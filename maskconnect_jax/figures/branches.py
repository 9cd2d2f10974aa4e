"""Pictures of a branch-level topology: a column per block, a row per branch.

They look like those of `plots` and are saved by `plots.save`. Blocks and
branches count from 1 in the pictures, from 0 in arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from maskconnect_jax.figures import page as plots

Junctions = Sequence[Sequence[Sequence[int]]]


@style.context(plots.STYLE)
def topology_figure(
  sources: Junctions,
  *,
  stages: Sequence[int],
  live: Sequence[Sequence[int]],
  title: str,
) -> Figure:
  """Draws every branch as a dot and what it takes as lines from the left.

  In the SVG, each link has the id `link-BLOCK-BRANCH-SOURCE`, each branch one
  `branch-BLOCK-BRANCH`; the ids of what is pruned end in `-pruned`.

  Args:
    sources: `[L-1]` junctions of `[C]` branches; `sources[i][c]` are the
      branches of block i that branch c of block i + 1 takes.
    stages: `[L]` stage numbers.
    live: `[L]`, the branches of each block that the output depends on.
    title: the headline, one line.
  """
  blocks, branches = len(stages), len(sources[0])
  if len(sources) != blocks - 1 or len(live) != blocks:
    raise ValueError(
      f'{len(sources)} junctions and {len(live)} rows of live branches for'
      f' {blocks} blocks'
    )
  gap, row = 600 / blocks, min(34.0, 360 / branches)
  base = 84.0
  alive = [set(block) for block in live]
  gone = sum(branches - len(block) for block in alive)
  figure, page = plots.new_page(
    720,
    base + row * branches + 64,
    title,
    f'{blocks} blocks of {branches} branches, {gone} branches pruned,'
    f' {sum(len(row) for rows in sources for row in rows)} links',
  )
  x = [70 + gap * (i + 0.5) for i in range(blocks)]
  y = [base + row * (branches - 1 - c) for c in range(branches)]
  size = float(np.clip(0.6 * row, 3, 18))
  for i, rows in enumerate(sources):
    for c, picked in enumerate(rows):
      for k in picked:
        kept = c in alive[i + 1] and k in alive[i]
        look: plots.Look = (
          {'color': plots.tint_of(stages[i + 1]), 'lw': 1.3, 'alpha': 0.6}
          if kept
          else plots.PRUNED_LOOK
        )
        (line,) = page.plot(
          [x[i], x[i + 1]], [y[k], y[c]], zorder=2 if kept else 1, **look
        )
        line.set_gid(f'link-{i + 2}-{c + 1}-{k + 1}' + '-pruned' * (not kept))
  for i, stage in enumerate(stages):
    for c in range(branches):
      kept = c in alive[i]
      look = {'color': plots.tint_of(stage), 'marker': 'o', 'ms': size}
      if not kept:
        look |= {'color': plots.FAINT, 'mfc': 'white'}
      (dot,) = page.plot(x[i], y[c], zorder=3, **look)
      dot.set_gid(f'branch-{i + 1}-{c + 1}' + '-pruned' * (not kept))
    page.text(x[i], base - 24, str(i + 1), ha='center', va='center')
  for c in range(branches):
    if branches <= 16 or c % 8 == 0:
      page.text(x[0] - 22, y[c], str(c + 1), ha='right', va='center')
  page.text(34, base - 24, 'block', ha='left', va='center')
  page.text(
    30, base + row * (branches - 1) / 2, 'branch', rotation=90, va='center'
  )
  for stage, first, last in plots.runs_of(stages):
    plots.add_stage_bar(
      page, stage, x[first - 1] - gap / 2, x[last - 1] + gap / 2, base - 40
    )
  keys: dict[str, plots.Look] = {
    'taken, in the colour of the stage it feeds': {
      'color': plots.tint_of(stages[-1]),
      'lw': 1.6,
    }
  }
  if gone:
    keys['pruned'] = plots.PRUNED_LOOK | {'marker': 'o', 'mfc': 'white'}
  plots.add_legend(page, 24, 12, keys)
  return figure


@style.context(plots.STYLE)
def mask_figure(
  real_mask: np.ndarray, sources: Junctions, *, title: str
) -> Figure:
  """Draws the real mask of every junction, the chosen sources marked.

  Args:
    real_mask: float `[L-1, C, C]` (junction, target, source) in [0, 1].
    sources: see `topology_figure`.
    title: the headline, one line.
  """
  junctions, branches, _ = real_mask.shape
  if len(sources) != junctions:
    raise ValueError(f'{len(sources)} rows of sources for {junctions} masks')
  columns = min(4, junctions)
  rows = -(-junctions // columns)
  side, pad = 640 / columns - 40, 40
  height = rows * (side + pad) + 100
  figure, page = plots.new_page(
    720, height, title, 'real mask r between blocks: a row per branch'
  )
  dot = float(np.clip(side / branches * 0.42, 1.5, 9))
  for j in range(junctions):
    left = 44 + (j % columns) * (side + pad)
    low = height - 96 - (j // columns + 1) * (side + pad) + pad
    grid = page.inset_axes((left, low, side, side), transform=page.transData)
    image = grid.imshow(
      real_mask[j], cmap=plots.REAL_MASK, vmin=0, vmax=1, aspect='auto'
    )
    for c, picked in enumerate(sources[j]):
      grid.plot(
        picked, [c] * len(picked), ms=dot, mew=dot / 10, **plots.DOT_LOOK
      )
    ticks = range(0, branches, 1 if branches <= 8 else 8)
    grid.set_xticks(ticks, [str(t + 1) for t in ticks])
    grid.set_yticks(ticks, [str(t + 1) for t in ticks])
    grid.set_frame_on(False)
    page.text(
      left + side / 2, low + side + 10, f'block {j + 1} to {j + 2}', ha='center'
    )
  plots.add_color_bar(page, image, 520, 34)
  plots.add_legend(
    page, 24, 16, {'chosen at the freeze': plots.DOT_LOOK | {'ms': 9}}
  )
  return figure
