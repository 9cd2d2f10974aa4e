"""The picture of a confusion matrix: which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colors, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskconnect_jax.figures import page as paper
from maskconnect_jax.figures.page import Page

_SIDE = 420  # of the matrix, in points; more for many classes
_MOST_NUMBERS = 20  # classes; with more, no number fits into a cell
_MOST_NAMES = 120  # classes; with more, names would lie upon each other
_LONGEST = 22  # characters of a name
_LISTED = 12  # pairs beside the matrix


def confusion_figure(
  counts: np.ndarray, classes: Sequence[str], *, title: str
) -> Figure:
  """Draws a confusion matrix, in shares of each class's images.

  Args:
    counts: int [C, C]; entry (c, d) is how many images of class c were taken
      for class d.
    classes: the C names, each one line.
    title: the headline, one line.

  Returns:
    The figure.

  Raises:
    ValueError: the matrix is not C x C.
  """
  count = len(classes)
  counts = np.asarray(counts)
  if counts.shape != (count, count):
    raise ValueError(f'{count} classes, but a matrix {counts.shape}')
  totals = counts.sum(1, keepdims=True)
  shares = counts / np.maximum(totals, 1)
  shown = [_short(name) for name in classes]
  side = max(_SIDE, min(7.5 * count, 900))
  size = float(np.clip(0.8 * side / count, 4.5, 9.5))
  named = count <= _MOST_NAMES
  longest = max(map(len, shown)) if named else 5
  margin = 44 + 0.62 * size * longest
  left, low = margin, margin
  right = left + side
  pairs = _pairs(counts, shown)
  with style.context(paper.STYLE):
    page = Page(
      right + 28 + max(200, 5.2 * max(map(len, pairs)) + 20),
      low + side + 64,
      title,
      f'test images: a row per class, a column per class it was taken for;'
      f' {_percent(np.trace(counts), counts.sum())} are right',
    )
    grid = page.inset(left, low, side, side)
    # By the square root, so that the small shares beside the diagonal show.
    scale = colors.PowerNorm(0.5, 0, 1)
    cells = grid.imshow(shares, cmap=paper.REAL_MASK, norm=scale)
    grid.set_aspect('auto')
    for spine in grid.spines.values():
      spine.set_visible(False)
    if named:
      places = range(count)
      grid.set_yticks(places, labels=shown, size=size)
      grid.set_xticks(places, labels=shown, size=size, rotation=90)
    if count <= _MOST_NUMBERS:
      _write_numbers(grid, counts, shares, size)
    page.write(20, low + side / 2, 'class', ink=True, rotation=90, size=10)
    page.write(left + side / 2, 18, 'taken for', ink=True, size=10)
    page.color_bar(
      cells,
      (right + 36, low + 12, 150, 9),
      {0: '0 %', 0.1: '10', 0.4: '40', 1: '100 %'},
    )
    top = low + side - 8
    page.write(right + 28, top, 'most often', ha='left', ink=True, size=10)
    for line, pair in enumerate(pairs, start=1):
      page.write(right + 28, top - 4 - 15 * line, pair, ha='left', size=8.5)
  return page.figure


def _write_numbers(
  grid: Axes, counts: np.ndarray, shares: np.ndarray, size: float
) -> None:
  for row, column in np.argwhere(counts):
    grid.text(
      column,
      row,
      str(counts[row, column]),
      ha='center',
      va='center',
      size=size,
      color='white' if shares[row, column] > 0.3 else paper.LIGHT.ink,
    )


def _pairs(counts: np.ndarray, shown: Sequence[str]) -> list[str]:
  """Returns a line for each of the pairs that are confused most often."""
  wrong = counts * ~np.eye(len(counts), dtype=bool)
  order = np.argsort(-wrong, axis=None, kind='stable')[:_LISTED]
  return [
    f'{shown[c]} taken for {shown[d]}: {wrong[c, d]:,}'
    f' ({_percent(wrong[c, d], counts[c].sum())})'
    for c, d in (divmod(int(place), len(counts)) for place in order)
    if wrong[c, d]
  ] or ['no image is taken for another class']


def _short(name: str) -> str:
  """Returns a name, without its middle if it is long."""
  half = _LONGEST // 2
  return name if len(name) <= _LONGEST else f'{name[:half]}…{name[-half:]}'


def _percent(part: float, whole: float) -> str:
  return f'{part / max(whole, 1):.1%}'.replace('%', ' %')
