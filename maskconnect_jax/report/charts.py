"""Charts: lines over steps, dots in rows, bars.

A chart of lines is 360 units wide, which is about its width in pixels on a
phone, so that its text has the size of other text there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maskconnect_jax.report import html

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 20, 24
_LEAST_SPREAD = 0.02  # of an axis of shares
_ACROSS, _UP = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a chart.

  Attributes:
    name: in the key; '' leaves it out of the key.
    x: steps, in rising order.
    y: a value for each step; None: not measured.
    tint: number of its colour.
    dots: whether each value is a dot, as of values that are far apart.
    stair: whether the value holds until the next step.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float | None]
  tint: int = 0
  dots: bool = False
  stair: bool = False

  @property
  def points(self) -> list[tuple[float, float]]:
    """The measured values, as (step, value)."""
    return [
      (float(x), float(y))
      for x, y in zip(self.x, self.y, strict=True)
      if y is not None and math.isfinite(y)
    ]


def lines(
  title: str,
  drawn: Sequence[Line],
  *,
  total: int,
  freeze: int = 0,
  percent: bool = False,
  log: bool = False,
  whole: bool = False,
  about: str = '',
) -> str:
  """Returns a chart of values over steps, the phases marked.

  Args:
    title: above the chart.
    drawn: the lines; those without a value are left out.
    total: the last step of the axis.
    freeze: where the connectivity phase ends; 0: it is not marked.
    percent: whether values are shares, written in per cent.
    log: whether the scale is logarithmic, if the values span much; values
      that are not positive are left out.
    whole: whether values are whole numbers, from 0.
    about: a line below the chart.

  Returns:
    A `<figure>`; '' without a value.
  """
  kept = []
  for line in drawn:
    points = [p for p in line.points if not log or p[1] > 0]
    if points:
      kept.append((line, points))
  if not kept:
    return ''
  values = [y for _, points in kept for _, y in points]
  log = log and max(values) > 8 * min(values)
  ticks = _ticks(values, log=log, percent=percent, whole=whole)
  low, high = ticks[0], ticks[-1]

  def right(step: float) -> float:
    return _LEFT + _ACROSS * step / max(total, 1)

  def down(value: float) -> float:
    a, b, c = (math.log(v) if log else v for v in (low, high, value))
    return _TOP + _UP * (1 - (c - a) / ((b - a) or 1))

  parts = []
  if freeze:
    parts.append(_phases(right(0), right(min(freeze, total)), freeze < total))
  for tick in ticks:
    parts.append(
      f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}"'
      f' y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
      f'<text x="{_LEFT - 6}" y="{down(tick) + 3.5:.1f}" text-anchor="end">'
      f'{_short(tick, percent)}</text>'
    )
  for step in _steps(total):
    anchor = 'end' if step > 0.9 * total else 'middle'
    parts.append(
      f'<text x="{right(step):.1f}" y="{_HEIGHT - 7}" text-anchor="{anchor}">'
      f'{step:,.0f}{" steps" if step == _steps(total)[-1] else ""}</text>'
    )
  for line, points in kept:
    places = [(right(x), down(y)) for x, y in points]
    parts.append(_trace(line, points, places, percent))
  spoken = '; '.join(
    f'{line.name or title} from {_short(points[0][1], percent)} to'
    f' {_short(points[-1][1], percent)}'
    for line, points in kept[:4]
  )
  drawing = (
    f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
    f' aria-label="{html.text(title)} over steps: {html.text(spoken)}.">'
    f'{"".join(parts)}</svg>'
  )
  return html.figure(title, _key(kept) + drawing, about=about)


def _key(kept: Sequence[tuple[Line, object]]) -> str:
  named = [line for line, _ in kept if line.name]
  if len(named) < 2:
    return ''
  return (
    '<ul class="key" aria-hidden="true">'
    + ''.join(
      f'<li class="t{line.tint}{" dot" if line.dots else ""}">'
      f'{html.text(line.name)}</li>'
      for line in named
    )
    + '</ul>'
  )


def _phases(left: float, freeze: float, more: bool) -> str:
  """Returns the band of the connectivity phase, and the phases' names."""
  after = (
    f'<text class="phase" x="{freeze + 5:.1f}" y="{_TOP - 8}">fine-tuning'
    '</text>'
  )
  return (
    f'<rect class="phase" x="{left:.1f}" y="{_TOP}"'
    f' width="{freeze - left:.1f}" height="{_UP}"/>'
    f'<line class="freeze" x1="{freeze:.1f}" x2="{freeze:.1f}" y1="{_TOP - 4}"'
    f' y2="{_TOP + _UP}"/>'
    f'<text class="phase" x="{freeze - 5:.1f}" y="{_TOP - 8}"'
    f' text-anchor="end">wiring</text>{after if more else ""}'
  )


def _trace(
  line: Line,
  points: Sequence[tuple[float, float]],
  places: Sequence[tuple[float, float]],
  percent: bool,
) -> str:
  name = f'{html.text(line.name)} ' if line.name else ''
  if line.dots:
    marks = ''.join(
      f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2"><title>{name}'
      f'{_short(y, percent, exact=True)} after step {x:,.0f}</title></circle>'
      for (a, b), (x, y) in zip(places, points, strict=True)
    )
    path = ''.join(f'{a:.1f} {b:.1f} ' for a, b in places)
    joined = f'<polyline class="thin" points="{path.strip()}"/>'
    return f'<g class="t{line.tint} dots">{joined}{marks}</g>'
  if line.stair:
    path = f'M{places[0][0]:.1f} {places[0][1]:.1f}' + ''.join(
      f'H{a:.1f}V{b:.1f}' for a, b in places[1:]
    )
  else:
    path = 'M' + 'L'.join(f'{a:.1f} {b:.1f}' for a, b in places)
  last = _short(points[-1][1], percent, exact=True)
  return (
    f'<path class="t{line.tint} line{" stair" if line.stair else ""}"'
    f' d="{path}"><title>{name}{last} at the end</title></path>'
  )


def _ticks(
  values: Sequence[float], *, log: bool, percent: bool, whole: bool
) -> list[float]:
  low, high = min(values), max(values)
  if log:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = -(-(last - first) // 5)
    powers = [10.0**n for n in range(first, last + 1, every)]
    return powers if powers[-1] >= high else [*powers, powers[-1] * 10**every]
  if whole or not percent:
    low = min(low, 0.0)
  if percent and high - low < _LEAST_SPREAD:
    # Labels of many digits would say nothing, and be cut off.
    middle = (low + high) / 2
    low, high = middle - _LEAST_SPREAD / 2, middle + _LEAST_SPREAD / 2
  high = high if high > low else low + 1
  steps = [1, 2, 2.5, 5, 10]
  found = np.array(_round(low, high, 5, steps, integer=whole, min_n_ticks=2))
  if percent:
    found = np.unique(np.clip(found, 0, 1))
  kept = [float(v) for v in found]
  return kept if len(kept) > 1 else [0.0, 1.0]


def _steps(total: int) -> list[float]:
  """Returns the steps to label: round ones, and the last."""
  found = _round(0, total, 4, [1, 2, 5, 10], integer=True)
  return [*(v for v in found if 0 <= v <= 0.72 * total), float(total)]


def _round(
  low: float, high: float, count: int, steps: list[float], **how: Any
) -> list[float]:
  """Returns round numbers from below `low` to above `high`."""
  from matplotlib import ticker  # half a second, which no start should wait for

  locator = ticker.MaxNLocator(count, steps=steps, **how)
  return [float(v) for v in locator.tick_values(low, high)]


def _short(value: float, percent: bool, *, exact: bool = False) -> str:
  if percent:
    return f'{100 * value:.2f} %' if exact else f'{100 * value:g} %'.strip()
  size = abs(value)
  if 1e3 <= size < 1e5:
    return f'{value:,.0f}'
  if 1e5 <= size < 1e9:
    return f'{value / 1e6:.4g} M' if size >= 1e6 else f'{value / 1e3:.4g} k'
  if value and not 1e-3 <= size < 1e9:
    return f'{value:.0e}'.replace('e-0', 'e-').replace('e+0', 'e')
  return f'{value:.4g}'


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of dots.

  Attributes:
    name: of the row.
    values: one or more, a dot each.
    names: of the dots, for those who point at them.
    band: an interval drawn behind the dots, such as that of chance; None: none.
    tint: number of its colour.
    note: a line below the name.
  """

  name: str
  values: Sequence[float]
  names: Sequence[str]
  band: tuple[float, float] | None = None
  tint: int = 0
  note: str = ''


def dots(title: str, rows: Sequence[Row], *, about: str = '') -> str:
  """Returns shares as dots, a row each, and the mean of a row as a bar.

  It is HTML, not SVG: names keep the size of other text, and stand above their
  dots on a phone. A value far below the others is drawn at the left end.

  Args:
    title: above the chart.
    rows: from top to bottom.
    about: a line below the chart.
  """
  if not rows:
    return ''
  ends = [v for row in rows for v in (*row.values, *(row.band or ()))]
  quarter, three = np.percentile(ends, (25, 75))
  lowest = max(min(ends), quarter - max(3 * (three - quarter), 0.1))
  spread = max(max(ends) - lowest, 0.01)
  found = _round(lowest - 0.02 * spread, max(ends), 4, [1, 2, 5, 10])
  ticks = [v for v in found if -1e-9 <= v <= 1 + 1e-9]
  if len(ticks) < 2:
    ticks = [0.0, 1.0]
  low, high = ticks[0], max(ticks[-1], max(ends))

  def place(value: float) -> str:
    share = (min(max(value, low), high) - low) / (high - low)
    return f'left:{100 * share:.2f}%'

  rules = ''.join(f'<s style="{place(v)}"></s>' for v in ticks)
  lines = [_strip(row, place, rules) for row in rows]
  scale = ''.join(
    f'<span style="{place(v)}">{100 * v:g} %</span>' for v in ticks
  )
  axis = (
    '<li class="axis" aria-hidden="true"><span class="name"></span>'
    f'<div class="strip">{scale}</div></li>'
  )
  return html.figure(
    title, f'<ul class="strips">{"".join(lines)}{axis}</ul>', about=about
  )


def _strip(row: Row, place: Callable[[float], str], rules: str) -> str:
  """Returns a row of dots.

  Args:
    row: of the chart.
    place: gives the CSS of a value's place.
    rules: the HTML of the rules behind the dots.
  """
  parts = [rules]
  spoken = [f'mean {100 * float(np.mean(row.values)):.2f} %']
  if row.band:
    a, b = (float(place(v)[5:-1]) for v in row.band)
    chance = f'{100 * row.band[0]:.1f} to {100 * row.band[1]:.1f} %'
    spoken.append(f'chance {chance}')
    parts.append(
      f'<em style="left:{a:.2f}%;width:{b - a:.2f}%" title="chance {chance}">'
      '</em>'
    )
  for value, name in zip(row.values, row.names, strict=True):
    words = f'{html.text(name)}: {100 * value:.2f} %'
    spoken.append(words)
    parts.append(f'<i style="{place(value)}" title="{words}"></i>')
  mean = float(np.mean(row.values))
  parts.append(f'<b style="{place(mean)}" title="mean {100 * mean:.2f} %"></b>')
  note = f'<small>{html.text(row.note)}</small>' if row.note else ''
  return (
    f'<li class="t{row.tint}"><span class="name">{html.text(row.name)}{note}'
    f'</span><div class="strip" role="img" aria-label="{"; ".join(spoken)}">'
    f'{"".join(parts)}</div></li>'
  )


def bars(
  title: str, rows: Sequence[tuple[str, float, str]], *, about: str = ''
) -> str:
  """Returns shares as bars: (name, share in [0, 1], the words beside it)."""
  if not rows:
    return ''
  lines = ''.join(
    f'<li><span>{html.text(name)}</span><span class="bar" aria-hidden="true">'
    f'<i style="width:{100 * min(max(share, 0), 1):.2f}%"></i></span>'
    f'<b>{html.text(words)}</b></li>'
    for name, share, words in rows
  )
  return html.figure(title, f'<ul class="bars">{lines}</ul>', about=about)
