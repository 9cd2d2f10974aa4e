"""The picture of a table of runs: a line for each row, a dot for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib import style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskconnect_jax.figures import page as paper
from maskconnect_jax.figures.page import Page

# Height of a row, width of the panel, mean width of a letter; in points.
_ROW, _PANEL, _LETTER = 19, 330, 5.1
_LONGEST = 64  # most letters of a name
_FOOT = 48  # room below the panel, in points


def figure(
  names: Sequence[str], accuracies: Sequence[Sequence[float]], title: str
) -> Figure:
  """Draws accuracies as dots, and the mean of each row as a bar.

  A row far below the others, as of a network that learned nothing, is written
  in numbers. The middle of a long name is left out. In the SVG, the dots of a
  row have the id `row-NUMBER` and its mean has the id `row-NUMBER-mean`.

  Args:
    names: names of the rows, drawn from top to bottom.
    accuracies: one or more for each row, as fractions in [0, 1].
    title: one line.

  Returns:
    The figure.

  Raises:
    ValueError: the numbers of rows and names differ, there are no rows, or a
      row is empty.
  """
  if len(names) != len(accuracies) or not all(map(len, accuracies)):
    raise ValueError(f'{len(names)} names for {len(accuracies)} rows')
  if not names:
    raise ValueError('no rows')
  names = [_shortened(name) for name in names]
  left = 34 + _LETTER * max(map(len, names))
  low, high = np.percentile(100 * np.concatenate(accuracies), (25, 75))
  low -= max(3 * (high - low), 10)
  with style.context(paper.STYLE):
    page = Page(
      left + _PANEL + 30,
      112 + _ROW * len(names),
      title,
      'a dot for each seed, a bar the mean',
    )
    panel = page.inset(left, _FOOT, _PANEL, _ROW * len(names))
    for row, values in enumerate(accuracies):
      percent = 100 * np.asarray(values)
      if min(percent) < low:  # drawing it would squeeze all other rows
        text = ', '.join(f'{one:.1f} %' for one in percent)
        y = _FOOT + _ROW * (len(names) - row - 0.5)
        page.write(left + 4, y, f'◂ {text}', ink=True, ha='left')
      else:
        _draw_row(panel, row, percent)
    _set_scales(panel, names)
  return page.figure


def _shortened(name: str) -> str:
  """Returns a name of up to `_LONGEST` letters, its middle left out if long."""
  if len(name) <= _LONGEST:
    return name
  half = _LONGEST // 2
  return f'{name[: half - 2]} … {name[1 - half :]}'


def _draw_row(panel: Axes, row: int, percent: np.ndarray) -> None:
  """Draws the dots of a row, which counts from 0, and their mean."""
  panel.plot(
    percent,
    np.full(len(percent), row),
    gid=f'row-{row + 1}',
    zorder=3,
    **(paper.DOT | {'ms': 6.5, 'mew': 0.6}),
  )
  mean = fmean(percent)
  panel.plot(
    [mean, mean],
    [row - 0.36, row + 0.36],
    color=paper.LIGHT.ink,
    lw=1.6,
    gid=f'row-{row + 1}-mean',
  )


def _set_scales(panel: Axes, names: Sequence[str]) -> None:
  """Labels the rows, and draws a grid of percentages behind them."""
  panel.set_yticks(range(len(names)), names)
  panel.set_ylim(len(names) - 0.5, -0.5)
  panel.margins(x=0.04)
  panel.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
  panel.xaxis.set_major_formatter('{x:g} %')
  panel.grid(axis='x', color='#E6E6E6', lw=0.8)
  panel.set_axisbelow(True)
  panel.spines[['top', 'right', 'left']].set_visible(False)
  panel.spines['bottom'].set_color(paper.LIGHT.faint)
