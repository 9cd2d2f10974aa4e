"""The colours of every drawing: two themes, and both as style sheets."""

from __future__ import annotations

import dataclasses
from typing import Any

Look = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Theme:
  """The colours of a page.

  Attributes:
    paper: the background.
    ink: the title, and lines that belong to no stage.
    soft: all other text.
    faint: pruned parts, and frames.
    tints: the colours of the stages, used in turn. Colour-blind readers can
      tell them apart.
    numbers: the colour of text on each tint, with a contrast of 4.5 or more.
    band: the opacity of a stage's band.
  """

  paper: str
  ink: str
  soft: str
  faint: str
  tints: tuple[str, ...]
  numbers: tuple[str, ...]
  band: float

  def tint(self, stage: int) -> str:
    """Returns the colour of a stage, which counts from 0."""
    return self.tints[int(stage) % len(self.tints)]

  def number(self, stage: int) -> str:
    """Returns the colour of text on the colour of a stage."""
    return self.numbers[int(stage) % len(self.numbers)]

  @property
  def pruned(self) -> Look:
    """The look of a pruned edge."""
    return {'color': self.faint, 'lw': 0.8, 'ls': (0, (3, 2))}


# The colours of Okabe and Ito, except the orange: it marks a choice.
LIGHT = Theme(
  paper='#FFFFFF',
  ink='#262626',
  soft='#5F5F5F',
  faint='#A6A6A6',
  tints=('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#7F7F3F'),
  numbers=('#FFFFFF', *['#000000'] * 5),
  band=0.07,
)
# The same hues, light enough for dark slides.
DARK = Theme(
  paper='#14171C',
  ink='#F0F2F5',
  soft='#B3B9C3',
  faint='#6C7480',
  tints=('#5CB8F2', '#FF9A4D', '#2FCF9F', '#EFA3CD', '#A9DBFF', '#C9C96A'),
  numbers=('#14171C',) * 6,
  band=0.11,
)
CHOSEN = '#F0A000'


def style(selector: str) -> str:
  """Returns CSS that gives an element the colours of both themes.

  They are custom properties: `--paper`, `--ink`, `--soft`, `--faint`, `--band`,
  `--chosen`, `--tint-0` to `--tint-5`, and `--on-0` to `--on-5` for text on
  these. The reader's own choice between light and dark decides.

  Args:
    selector: of the element, such as ':root'.
  """
  light, dark = _properties(LIGHT), _properties(DARK)
  return (
    f'{selector}{{{light}}}'
    f'@media(prefers-color-scheme:dark){{{selector}{{{dark}}}}}'
  )


def _properties(theme: Theme) -> str:
  named = {
    'paper': theme.paper,
    'ink': theme.ink,
    'soft': theme.soft,
    'faint': theme.faint,
    'band': theme.band,
    'chosen': CHOSEN,
    **{f'tint-{n}': tint for n, tint in enumerate(theme.tints)},
    **{f'on-{n}': number for n, number in enumerate(theme.numbers)},
  }
  return ''.join(f'--{name}:{value};' for name, value in named.items())
