"""A picture of a table of runs: a line for each row, a dot for each seed.

It looks like those of `plots` and is saved by `plots.save`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib import style, ticker
from matplotlib.figure import Figure

from maskconnect_jax.figures import page as plots

ROW, PANEL, LETTER = 19, 330, 5.1  # in points; of a letter about
LONGEST = 64  # letters of a name; the middle of a longer one is left out


@style.context(plots.STYLE)
def figure(
  names: Sequence[str], accuracies: Sequence[Sequence[float]], title: str
) -> Figure:
  """Draws accuracies, and the mean of each row as a bar across its line.

  A row far below the others, as of a network that learned nothing, is written.
  In the SVG, the dots of a row have the id `row-NUMBER`, its mean
  `row-NUMBER-mean`.

  Args:
    names: of the rows, drawn from top to bottom.
    accuracies: of each row one or more, as fractions.
    title: one line.

  Raises:
    ValueError: not as many rows as names, none at all, or an empty one.
  """
  if len(names) != len(accuracies) or not all(map(len, accuracies)):
    raise ValueError(f'{len(names)} names for {len(accuracies)} rows')
  if not names:
    raise ValueError('no rows')
  names = [
    name
    if len(name) <= LONGEST
    else f'{name[: LONGEST // 2 - 2]} … {name[1 - LONGEST // 2 :]}'
    for name in names
  ]
  left = 34 + LETTER * max(map(len, names))
  height = 112 + ROW * len(names)
  result, page = plots.new_page(
    *(left + PANEL + 30, height, title), 'a dot for each seed, a bar the mean'
  )
  axes = page.inset_axes(
    (left, 48, PANEL, ROW * len(names)), transform=page.transData
  )
  low, high = np.percentile(100 * np.concatenate(accuracies), (25, 75))
  low -= max(3 * (high - low), 10)
  for row, values in enumerate(accuracies):
    percent = 100 * np.asarray(values)
    if min(percent) < low:  # it would press all others together
      text = ', '.join(f'{one:.1f} %' for one in percent)
      place = (left + 4, 48 + ROW * (len(names) - row - 0.5))
      page.text(*place, f'◂ {text}', va='center', color=plots.INK)
      continue
    axes.plot(
      *(percent, np.full(len(percent), row)),
      **(plots.DOT_LOOK | {'ms': 6.5, 'mew': 0.6}),
      gid=f'row-{row + 1}',
      zorder=3,
    )
    axes.plot(
      *([fmean(percent)] * 2, [row - 0.36, row + 0.36]),
      color=plots.INK,
      lw=1.6,
      gid=f'row-{row + 1}-mean',
    )
  axes.set_yticks(range(len(names)), names)
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.margins(x=0.04)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter('{x:g} %')
  axes.grid(axis='x', color='#E6E6E6', lw=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(plots.FAINT)
  return result
