"""The picture of accuracy against cost: a point for each row of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib import style, ticker
from matplotlib.figure import Figure

from maskconnect_jax.figures import page as paper
from maskconnect_jax.figures.page import Page

_PANEL, _LEFT, _FOOT = (560, 330), 66, 74  # in points
_TURN = 0.7  # a name right of this stands left of its point
_LETTER, _LINE = 5.4, 13  # width and height of the names' text, in points
_GAP = 8  # between a point and its name


def figure(
  names: Sequence[str],
  groups: Sequence[str],
  costs: Sequence[Sequence[float]],
  accuracies: Sequence[Sequence[float]],
  *,
  title: str,
  cost: str,
) -> Figure:
  """Draws mean accuracy over mean cost, with a line through each group.

  Bars span the seeds, in both directions. The step in the background is the
  front: no row is both cheaper and better than a row on it. In the SVG a row's
  point has the id `row-NUMBER`.

  Args:
    names: short names of the rows, written beside their points.
    groups: the group of each row; rows of a group have one colour and are
      joined in the order of their costs.
    costs: one or more for each row, above 0.
    accuracies: as many for each row, as fractions in [0, 1].
    title: one line.
    cost: what the costs are, such as 'parameters after pruning'.

  Returns:
    The figure.

  Raises:
    ValueError: the numbers of names, groups, costs and accuracies differ, or
      there are none.
  """
  if not len(names) == len(groups) == len(costs) == len(accuracies) > 0:
    raise ValueError('a row needs a name, a group, costs and accuracies')
  x = np.array([fmean(values) for values in costs])
  y = 100 * np.array([fmean(values) for values in accuracies])
  x_limits = _limits(np.concatenate([*map(np.asarray, costs)]), log=True)
  y_limits = _limits(
    100 * np.concatenate([*map(np.asarray, accuracies)]), log=False
  )
  with style.context(paper.STYLE):
    page = Page(
      _LEFT + _PANEL[0] + 40,
      _FOOT + _PANEL[1] + 66,
      title,
      'a point is a row, its bars the seeds; the step is what nothing beats',
    )
    panel = page.inset(_LEFT, _FOOT, *_PANEL)
    front = front_of(x, y)
    panel.step(
      x[front], y[front], where='post', color='#D9D9D9', lw=5, zorder=1,
      solid_capstyle='round',
    )  # fmt: skip
    tints = dict.fromkeys(groups)
    for number, group in enumerate(tints):
      tint = page.theme.tint(number)
      tints[group] = tint
      own = [i for i, other in enumerate(groups) if other == group]
      own.sort(key=lambda i: x[i])
      panel.plot(x[own], y[own], color=tint, lw=1, alpha=0.5, zorder=2)
      for i in own:
        across = [min(costs[i]), max(costs[i])], [y[i], y[i]]
        up = (
          [x[i], x[i]],
          100 * np.array([min(accuracies[i]), max(accuracies[i])]),
        )
        for bar in (across, up):
          panel.plot(*bar, color=tint, lw=1.2, alpha=0.6, zorder=3)
        panel.plot(
          x[i], y[i], ls='', marker='o', ms=7, color=tint, mec='white',
          gid=f'row-{i + 1}', zorder=4,
        )  # fmt: skip
    panel.set_xscale('log')
    panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    panel.xaxis.set_major_formatter(ticker.FuncFormatter(_short))
    panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.yaxis.set_major_formatter('{x:g} %')
    panel.set_xlim(*x_limits)
    panel.set_ylim(*y_limits)
    panel.grid(color='#EEEEEE', lw=0.8)
    panel.set_axisbelow(True)
    panel.spines[['top', 'right', 'left']].set_visible(False)
    panel.spines['bottom'].set_color(paper.LIGHT.faint)
    places = _places(names, x, y, across=x_limits, up=y_limits)
    for i, (right, height) in enumerate(places):
      left = right > _TURN * _PANEL[0]
      page.write(
        _LEFT + right + (-_GAP if left else _GAP),
        _FOOT + height + 7,
        names[i],
        size=9,
        color=tints[groups[i]], ha='right' if left else 'left', zorder=9,
      )  # fmt: skip
    page.write(_LEFT + _PANEL[0] / 2, _FOOT - 30, cost)
    page.legend(
      _LEFT, 16,
      {name: paper.DOT | {'color': tint} for name, tint in tints.items()},
    )  # fmt: skip
  return page.figure


def _limits(values: np.ndarray, *, log: bool) -> tuple[float, float]:
  """Returns the ends of an axis, with a margin on both sides."""
  values = np.log(values) if log else values
  margin = 0.07 * max(float(np.ptp(values)), 0.1)
  low, high = float(values.min() - margin), float(values.max() + margin)
  return (math.exp(low), math.exp(high)) if log else (low, high)


def _places(
  names: Sequence[str],
  x: np.ndarray,
  y: np.ndarray,
  *,
  across: tuple[float, float],
  up: tuple[float, float],
) -> list[tuple[float, float]]:
  """Returns where the names go, in points from the panel's corner.

  A name stands beside its point, and below the names that are in its way.

  Args:
    names: the names.
    x: costs, on a logarithmic axis.
    y: accuracies.
    across: the limits of the costs' axis.
    up: the limits of the accuracies' axis.
  """
  low, high = np.log(across)
  right = (np.log(x) - low) / (high - low) * _PANEL[0]
  height = (y - up[0]) / (up[1] - up[0]) * _PANEL[1]
  wide = _LETTER * np.array([len(name) for name in names])
  turned = right > _TURN * _PANEL[0]
  begin = np.where(turned, right - _GAP - wide, right + _GAP)
  placed: list[int] = []
  for i in np.argsort(-height, kind='stable').tolist():
    near = [
      j
      for j in placed
      if begin[j] < begin[i] + wide[i] and begin[i] < begin[j] + wide[j]
    ]
    if near:
      height[i] = min(height[i], min(height[j] for j in near) - _LINE)
    placed.append(i)
  return [(float(a), float(b)) for a, b in zip(right, height, strict=True)]


def front_of(costs: np.ndarray, accuracies: np.ndarray) -> list[int]:
  """Returns the rows that no row beats in both, in the order of their costs."""
  front: list[int] = []
  for i in np.lexsort((-accuracies, costs)):
    if not front or accuracies[i] > accuracies[front[-1]]:
      front.append(int(i))
  return front


def _short(value: float, position: int | None = None) -> str:
  del position
  for unit, name in ((1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
    if value >= unit:
      return f'{value / unit:g}{name}'
  return f'{value:g}'
