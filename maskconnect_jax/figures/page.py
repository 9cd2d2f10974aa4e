"""The page that every picture is drawn on, and how a picture is saved.

A page is measured in points from its lower left corner; an inch has 72 points.

  with style.context(STYLE):  # replaces the user's own style
    page = Page(720, 300, 'a title', 'a line below it')
    page.write(24, 100, 'some text')
  save(page.figure, 'figures/text')  # text.png and text.svg
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from matplotlib import colors, lines, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from maskconnect_jax import files
from maskconnect_jax.drawing.theme import CHOSEN as CHOSEN
from maskconnect_jax.drawing.theme import DARK as DARK
from maskconnect_jax.drawing.theme import LIGHT as LIGHT
from maskconnect_jax.drawing.theme import Look as Look
from maskconnect_jax.drawing.theme import Theme as Theme

# Text stays text in the SVG. Without the salt, ids would be random.
STYLE: Any = [
  'default',
  {
    'axes.facecolor': 'none',
    'axes.formatter.limits': (-9, 9),
    'font.size': 9.5,
    'svg.fonttype': 'none',
    'svg.hashsalt': 'maskconnect_jax',
    'text.parse_math': False,
  },
]


DOT: Look = {'ls': '', 'marker': 'o', 'color': CHOSEN, 'mec': 'white'}
# The first colour is no pure white, so that r = 0 differs from an entry that
# does not exist.
REAL_MASK = colors.LinearSegmentedColormap.from_list(
  'real_mask', ['#E8EEF5', '#9DBEDD', '#4382BA', '#08306B']
)


class Page:
  """A titled figure with axes that cover it, in units of points.

  Attributes:
    figure: the figure; `save` writes it.
    axes: the axes that cover the figure.
    theme: the colours of the page.
  """

  def __init__(
    self,
    width: float,
    height: float,
    title: str,
    subtitle: str,
    theme: Theme = LIGHT,
  ) -> None:
    self.theme = theme
    self.figure = Figure((width / 72, height / 72), facecolor=theme.paper)
    self.axes = self.figure.add_axes(
      (0, 0, 1, 1), xlim=(0, width), ylim=(0, height)
    )
    self.axes.set_axis_off()
    size = min(13, 1.5 * (width - 48) / max(len(title), 1))
    self.write(
      24, height - 24, title, ha='left', size=size, weight='bold', ink=True
    )
    self.write(24, height - 42, subtitle, ha='left', size=10)

  def write(
    self, x: float, y: float, text: str, *, ink: bool = False, **look: Any
  ) -> None:
    """Writes text with its middle at (x, y).

    Args:
      x: in points.
      y: in points.
      text: one line.
      ink: whether the text has the colour `theme.ink` or `theme.soft`.
      **look: properties of matplotlib's Text, which override these.
    """
    usual: Look = {
      'ha': 'center',
      'va': 'center',
      'color': self.theme.ink if ink else self.theme.soft,
    }
    self.axes.text(x, y, text, **(usual | look))

  def inset(self, x: float, y: float, width: float, height: float) -> Axes:
    """Returns axes for a panel, without tick marks.

    Args:
      x: left edge in points.
      y: lower edge in points.
      width: in points.
      height: in points.
    """
    panel = self.axes.inset_axes(
      (x, y, width, height), transform=self.axes.transData
    )
    self._quieten(panel)
    return panel

  def stage_bar(
    self, stage: int, low: float, high: float, at: float, upright: bool = False
  ) -> None:
    """Draws the bar of a stage and writes its name beside it.

    Args:
      stage: the stage's number, from 0.
      low: where the bar begins, in points: x, or y of an upright bar.
      high: where the bar ends, in points: x, or y of an upright bar.
      at: y of the bar in points, or x of an upright bar.
      upright: whether the bar is vertical, with its name on the left. The name
        of a horizontal bar is below it.
    """
    along, across = [low + 2, high - 2], [at, at]
    middle = (low + high) / 2
    tint = self.theme.tint(stage)
    x, y = (across, along) if upright else (along, across)
    self.axes.plot(x, y, color=tint, lw=2.5)
    self.write(
      at - 10 if upright else middle,
      middle if upright else at - 10,
      stage_name(stage, high - low),
      rotation=90 * upright,
      color=tint,
      size=10,
      weight='bold',
    )

  def legend(self, x: float, y: float, keys: dict[str, Look]) -> None:
    """Draws a key of lines and markers, side by side.

    Args:
      x: left edge in points.
      y: lower edge in points.
      keys: {name: properties of its matplotlib Line2D}.
    """
    handles = [
      lines.Line2D([], [], label=name, **look) for name, look in keys.items()
    ]
    self.axes.legend(
      handles=handles,
      ncol=len(keys),
      loc='lower left',
      bbox_to_anchor=(x, y),
      bbox_transform=self.axes.transData,
      borderaxespad=0,
      borderpad=0,
      columnspacing=1.6,
      frameon=False,
      labelcolor=self.theme.soft,
    )

  def color_bar(
    self,
    cells: ScalarMappable,
    box: tuple[float, float, float, float],
    ticks: dict[float, str],
  ) -> None:
    """Draws a scale of colours.

    Args:
      cells: the artist that is drawn in these colours.
      box: left, bottom, width and height in points.
      ticks: {value: its label}.
    """
    panel = self.inset(*box)
    bar = self.figure.colorbar(cells, cax=panel, orientation='horizontal')
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.outline.set_visible(False)
    self._quieten(panel)

  def real_mask_bar(self, cells: ScalarMappable, x: float, y: float) -> None:
    """Draws the scale of the real mask at (x, y), 150 points wide."""
    self.color_bar(cells, (x, y, 150, 9), {0: 'r = 0', 0.5: '0.5', 1: '1'})

  def _quieten(self, panel: Axes) -> None:
    panel.tick_params(length=0, labelsize=9, labelcolor=self.theme.soft)


def stage_name(stage: int, room: float) -> str:
  """Returns the name of a stage, short enough for its place.

  Args:
    stage: the stage's number, from 0; the name counts from 1.
    room: width of the place in points.
  """
  return f'stage {stage + 1}' if room > 42 else f'{stage + 1}'


def save(
  figure: Figure, path_without_suffix: str | os.PathLike[str]
) -> list[Path]:
  """Writes a figure as PNG and SVG; equal figures give equal bytes.

  Each file is written completely or not at all. Missing folders are made.

  Args:
    figure: the figure.
    path_without_suffix: path of the files; `.png` and `.svg` are added.

  Returns:
    The paths of the PNG and of the SVG.

  Raises:
    InputError: a file cannot be written, as on a full disk.
  """
  target = Path(path_without_suffix)
  rendered: dict[Path, bytes] = {}
  # The PNG would hold matplotlib's version, and the SVG the date.
  for suffix, changing in (('png', 'Software'), ('svg', 'Date')):
    buffer = io.BytesIO()
    with style.context(STYLE):
      figure.savefig(buffer, format=suffix, dpi=180, metadata={changing: None})
    rendered[target.with_name(f'{target.name}.{suffix}')] = buffer.getvalue()
  for path, content in rendered.items():
    with files.replacing(path, len(content)) as temporary:
      temporary.write_bytes(content)
  return list(rendered)
