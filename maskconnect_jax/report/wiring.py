"""The wiring on a page: a drawing, a table, and the real mask over steps."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskconnect_jax.drawing import layout, svg
from maskconnect_jax.drawing.sources import Ints, Sources, has_branches
from maskconnect_jax.report import html

# More edges or cells would make a page of megabytes that no one can read.
MOST_EDGES, MOST_CELLS = 6_000, 16_000
_MOST_RECORDED = 400_000  # entries of real masks in a page, of a byte each
LEVELS = 100  # an entry is written as a hundredth, as it is shown
# The narrow drawing: the least distance between blocks, and from stem to head.
_GAP, _NARROW = 28.0, 280.0


@dataclasses.dataclass(frozen=True)
class Wiring:
  """A topology, frozen or as it stands, and what it was chosen by.

  Attributes:
    sources: `[L]` or `[L-1][C]` rows, as in `drawing.svg`.
    stages: `[L]` stage numbers from 0.
    live: `[L]`, as in `drawing.svg`.
    frozen: False while the wiring is learned.
    valid: bool of the mask's shape, the edges that may be taken.
    steps: int [T], the steps at which the real mask was recorded; T may be 0.
    masks: float32 [T, ...], the real mask at these steps.
    narrows: whether the real mask says how long each source was kept.
    fan_in: K.
  """

  sources: Sources
  stages: Ints
  live: Sequence[Any]
  frozen: bool
  valid: np.ndarray
  steps: np.ndarray
  masks: np.ndarray
  narrows: bool
  fan_in: int

  @property
  def by_branch(self) -> bool:
    """Whether branches read branches."""
    return has_branches(self.sources)

  @property
  def edges(self) -> int:
    """The number of edges."""
    rows = self.sources
    if self.by_branch:
      return sum(len(row) for junction in rows for row in junction)
    return sum(map(len, rows))

  @property
  def real_mask(self) -> np.ndarray | None:
    """The last recorded real mask, or None."""
    return self.masks[-1] if len(self.masks) else None


def drawing(wiring: Wiring, title: str) -> str:
  """Returns the topology: wide, and narrow for phones, with a line of words.

  The page's script fills the line for the block that is pointed at or focused.

  Args:
    wiring: to be drawn.
    title: what a screen reader calls it.
  """
  if wiring.edges > MOST_EDGES:
    return (
      f'<p class="note">{wiring.edges:,} edges are too many for a page;'
      ' figures/topology.svg has the drawing.</p>'
    )
  blocks = len(wiring.stages)
  widths = {
    'broad': float(layout.WIDTH),
    'narrow': max(_GAP * (blocks + 1), _NARROW),
  }
  if blocks > 20:  # there the broad drawing can be moved aside as well
    del widths['narrow']
  drawn = [
    f'<div class="wide {name if len(widths) > 1 else ""}" tabindex="-1">'
    + svg.topology_svg(
      wiring.sources,
      stages=wiring.stages,
      live=wiring.live,
      title=f'{title}. Arrow keys go from block to block.',
      real_mask=wiring.real_mask,
      width=width,
      standalone=False,
    )
    + '</div>'
    for name, width in widths.items()
  ]
  part = 'branch' if wiring.by_branch else 'block'
  return (
    '<figure class="wiring">'
    + ''.join(drawn)
    + f'<output class="about-node" data-empty="Point at a {part}, or press Tab'
    f' and the arrow keys, to see what it reads."></output></figure>'
  )


def listing(wiring: Wiring) -> str:
  """Returns the topology as a table, one row per block or branch."""
  if wiring.edges > MOST_EDGES:
    return ''
  real = wiring.real_mask
  rows: list[tuple[Any, ...]] = []
  for place, name, stage, live, row in _rows(wiring):
    read = [
      _source(wiring, name, source)
      + ('' if real is None else f' ({real[*place, source]:.2f})')
      for source in row
    ]
    rows.append((name, stage + 1, ', '.join(read), '' if live else 'pruned'))
  return html.table(
    ['branch' if wiring.by_branch else 'block', 'stage', 'reads', ''],
    rows,
    caption='Topology' + ('' if real is None else ', with the real mask'),
  )


def _rows(
  wiring: Wiring,
) -> list[tuple[tuple[int, ...], str, int, bool, Sequence[int]]]:
  """Returns (place in the mask, name, stage, live, sources) of every row."""
  if not wiring.by_branch:
    return [
      ((at,), str(at + 1), wiring.stages[at], bool(wiring.live[at]), row)
      for at, row in enumerate(wiring.sources)
    ]
  return [
    (
      (at, branch),
      f'{at + 2}.{branch + 1}',
      wiring.stages[at + 1],
      branch in wiring.live[at + 1],
      row,
    )
    for at, rows in enumerate(wiring.sources)
    for branch, row in enumerate(rows)
  ]


def _source(wiring: Wiring, target: str, source: int) -> str:
  if wiring.by_branch:
    return f'{int(target.partition(".")[0]) - 1}.{source + 1}'
  return str(source) if source else 'stem'


def matrix(wiring: Wiring) -> str:
  """Returns the real mask as cells, and a slider over the recorded steps.

  Returns:
    '' if no real mask was recorded.
  """
  if wiring.real_mask is None:
    return ''
  if wiring.valid.sum() > MOST_CELLS:
    return (
      f'<p class="note">{wiring.valid.sum():,} entries are too many for a page;'
      ' figures/real_mask.png has them.</p>'
    )
  grids = (
    [_grid(wiring, at) for at in range(len(wiring.sources))]
    if wiring.by_branch
    else [_grid(wiring, None)]
  )
  kept = _thinned(wiring)
  levels = np.rint(LEVELS * wiring.masks[kept][:, wiring.valid])
  record = {
    'steps': wiring.steps[kept].tolist(),
    'cells': int(wiring.valid.sum()),
    'levels': base64.b64encode(levels.astype(np.uint8).tobytes()).decode(),
    'narrows': wiring.narrows,
  }
  last = len(kept) - 1
  slider = (
    '<div class="slider"><label for="step">Step</label>'
    f'<input id="step" type="range" min="0" max="{last}" value="{last}"'
    f' aria-valuetext="step {wiring.steps[-1]}">'
    f'<output for="step" id="step-at">{wiring.steps[-1]:,}</output></div>'
    if last
    else ''
  )
  kind = 'several' if wiring.by_branch else 'one'
  scale = (
    '<p class="scale" aria-hidden="true"><span>r = 0</span><i></i>'
    '<span>1</span><span class="dot"></span><span>'
    f'{"in the topology" if wiring.frozen else "read now"}</span></p>'
  )
  return (
    f'<div class="masks">{slider}<div class="{kind}">{"".join(grids)}</div>'
    f'{scale}<output class="about-cell" data-empty="Point at an entry, or press'
    ' Tab and the arrow keys, to read it."></output>'
    f'{html.data("masks", record)}</div>'
  )


def _thinned(wiring: Wiring) -> np.ndarray:
  """Returns which records a page holds: the first, the last, and even ones."""
  count = len(wiring.steps)
  most = max(2, int(_MOST_RECORDED / wiring.valid.sum()))
  return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def _grid(wiring: Wiring, junction: int | None) -> str:
  """Returns the cells of a mask, a row for each target."""
  real = wiring.masks[-1] if junction is None else wiring.masks[-1][junction]
  valid = wiring.valid if junction is None else wiring.valid[junction]
  rows = wiring.sources if junction is None else wiring.sources[junction]
  size = len(real)
  room = 22 if junction is None else 14
  cell = (360 if junction is None else 160) / size
  every = 1 if size <= 20 else 5
  parts = []
  for at, source in np.argwhere(valid):
    if junction is None:
      target, name = f'{at + 1}', _source(wiring, f'{at + 1}', source)
    else:
      target = f'{junction + 2}.{at + 1}'
      name = _source(wiring, target, source)
    parts.append(
      f'<rect class="cell" x="{source}" y="{at}" data-at="{target} {name}"'
      f' style="--r:{np.rint(LEVELS * real[at, source]) / LEVELS:g}"/>'
    )
  for at, row in enumerate(rows):
    parts += [
      f'<circle class="chosen" cx="{i + 0.47}" cy="{at + 0.47}" r=".17"/>'
      for i in row
    ]
  labels = []
  first = 0 if junction is None else 1
  for n in range(size):
    middle = room + cell * (n + 0.5)
    if (n + 1) % every == 0:
      labels.append(
        f'<text x="{room - 8}" y="{middle + 3.5:.1f}" text-anchor="end">'
        f'{n + 1}</text>'
      )
    if (n + first) % every == 0:
      word = 'stem' if junction is None and not n else str(n + first)
      labels.append(
        f'<text x="{middle:.1f}" y="{room + cell * size + 12:.1f}"'
        f' text-anchor="middle">{word}</text>'
      )
  title = 'Real mask: a row for each block, a column for each source'
  if junction is None:
    labels += _stage_bars(wiring.stages, cell, room)
  else:
    title = f'block {junction + 1} to {junction + 2}'
  extent = room + cell * size + 16
  labels = [f'<g transform="translate(0 {-room + 2})">{"".join(labels)}</g>']
  drawn = (
    f'<svg class="matrix" viewBox="0 0 {extent - 12:.1f} {extent - room:.1f}"'
    f' tabindex="0" role="application" aria-roledescription="matrix"'
    f' aria-label="{title}. Arrow keys read the entries.">'
    f'<g transform="translate({room} 2) scale({cell:.4f})">{"".join(parts)}</g>'
    f'{"".join(labels)}</svg>'
  )
  if junction is None:
    return drawn
  tint = int(wiring.stages[junction + 1]) % 6
  return (
    f'<figure><figcaption class="t{tint}">{title}</figcaption>{drawn}</figure>'
  )


def _stage_bars(stages: Ints, cell: float, room: float) -> list[str]:
  return [
    f'<rect x="{room - 5}" y="{room + cell * (first - 1) + 1:.1f}" width="2.5"'
    f' height="{cell * (last - first + 1) - 2:.1f}" rx="1"'
    f' style="fill:var(--tint-{stage % 6})"><title>stage {stage + 1}</title>'
    '</rect>'
    for stage, first, last in layout.runs_of(stages)
  ]
