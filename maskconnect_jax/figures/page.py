"""Pictures of a topology and of how it came about.

Entry `t` of every argument is block `t + 1`; source 0 is the stem's output and
source `i` is block `i`'s. Stages count from 0 in arguments, from 1 in pictures.
Figures are plain `matplotlib.figure.Figure` objects: no pyplot, no window, and
the user's own matplotlib style neither changes them nor is changed. Lengths
that differ and sources that are not earlier ones raise a `ValueError`.

  figure = topology_figure(
    [[0], [0, 1], [0, 2]], stages=[0, 0, 1], live=[True] * 3, title='three'
  )
  save(figure, 'figures/topology')  # topology.png and topology.svg
"""

import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import collections, colors, lines, patches, path, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

Ints = Sequence[int]
Sources = Sequence[Ints]
Look = dict[str, Any]

# Okabe and Ito's colour-blind safe set, less the orange that marks choices.
STAGES = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#7F7F3F'
CHOSEN, INK, SOFT, FAINT = '#F0A000', '#262626', '#5F5F5F', '#A6A6A6'
# Starts off white, so that 0 differs from an entry that does not exist.
REAL_MASK = colors.LinearSegmentedColormap.from_list(
  'real_mask', ['#E8EEF5', '#9DBEDD', '#4382BA', '#08306B']
)
DOT_LOOK: Look = {'ls': '', 'marker': 'o', 'color': CHOSEN, 'mec': 'white'}
PRUNED_LOOK: Look = {'color': FAINT, 'lw': 0.8, 'ls': (0, (3, 2))}
NAME_LOOK: Look = {'ha': 'center', 'va': 'center', 'size': 10, 'weight': 'bold'}
# Text stays text in the SVG; the salt fixes ids that would be random.
STYLE: Any = ['default', {'svg.fonttype': 'none', 'svg.hashsalt': 'plots'}]
STYLE[1] |= {f'{axis}tick.labelcolor': SOFT for axis in 'xy'}
STYLE[1] |= {f'{axis}tick.labelsize': 9 for axis in 'xy'}
STYLE[1] |= {f'{axis}tick.major.size': 0 for axis in 'xy'}
STYLE[1] |= {'text.color': SOFT, 'text.parse_math': False, 'font.size': 9.5}
STYLE[1] |= {'axes.facecolor': 'none', 'axes.formatter.limits': (-9, 9)}


@style.context(STYLE)
def topology_figure(
  sources: Sources, *, stages: Ints, live: Sequence[bool], title: str
) -> Figure:
  """Draws which sources every block takes, as an arc diagram 10 inches wide.

  In the SVG, each link is a group with the id `link-SOURCE-TARGET`, each block
  one with the id `block-NUMBER`; the ids of what is pruned end in `-pruned`.

  Args:
    sources: `[L]` sequences; `sources[t]` are the sources of block `t + 1`.
    stages: `[L]` stage numbers from 0, never decreasing.
    live: `[L]`; False for a block from which the output cannot be reached.
    title: the headline, one line.
  """
  count, edges = len(sources), _links(sources, stages)
  if len(live) != count:
    raise ValueError(f'live: {len(live)} entries for {count} blocks')
  alive = [True, *map(bool, live), True]  # from the stem to the head
  kept = {(i, t) for i, t in edges if alive[i] and alive[t]}
  reach = sum(t - i for i, t in kept) / max(len(kept), 1)
  longest = max(t - i for i, t in edges)
  gap = 640 / (count + 1)
  base, peak = 76, float(np.clip(0.6 * gap * longest, 20, 176))
  figure, page = new_page(
    *(720, base + peak + 70, title),
    f'{count} blocks, {alive.count(False)} pruned, {len(kept)} links, '
    f'mean reach {reach:.1f} blocks',
  )
  x = [40 + gap * i for i in range(count + 2)]
  tints = [INK, *map(tint_of, stages), INK]
  names = ['stem', *map(str, range(1, count + 1)), 'head']
  bold = min(1, (60 / len(edges)) ** 0.5)  # 540 links must be thin and light

  for i, t in sorted([*edges, (count, count + 1)], key=lambda e: e[0] - e[1]):
    look: Look = {'color': INK, 'lw': 2.4}
    bend, rise = 0.12 * (x[t] - x[i]), 0.0
    if t - i > 1:  # Slower than the span, or short arcs would vanish at L = 54.
      rise = peak * 4 / 3 * ((t - i) / longest) ** 0.75
      look = {'color': tints[t], 'lw': 0.6 + 1.2 * bold}
      look['alpha'] = 0.3 + 0.55 * bold
    faint = t <= count and (i, t) not in kept
    ends = [(x[i], base), (x[i] + bend, base + rise)]
    ends += [(x[t] - bend, base + rise), (x[t], base)]
    curve = path.Path(ends, [1, 4, 4, 4])
    arc = patches.PathPatch(
      curve, **(PRUNED_LOOK if faint else look), fill=False
    )
    arc.set_gid(f'link-{i}-{names[t]}' + '-pruned' * faint)
    page.add_patch(arc).set_zorder(1 if faint else 2)

  size, inside = float(np.clip(gap * 0.66, 6, 24)), gap >= 28
  for i, name in enumerate(names):
    end, faint = not name.isdigit(), not alive[i]
    look = {'color': tints[i], 'marker': 's' if end else 'o', 'ms': size * 0.9}
    if faint:
      look |= {'color': FAINT, 'mfc': 'white', 'mew': min(1.6, size / 7)}
    (node,) = page.plot(x[i], base, zorder=4, **look)
    node.set_gid(name if end else f'block-{name}' + '-pruned' * faint)
    if inside and not end:
      look = NAME_LOOK | {'size': 9.5, 'va': 'center_baseline', 'zorder': 5}
      page.text(x[i], base, name, color=SOFT if faint else 'white', **look)
    elif end or gap >= 16 or i % 5 == 0:
      page.text(x[i], base - size / 2 - 9, name, ha='center', va='center')
  for stage, first, last in runs_of(stages):
    low = base - size / 2 - (12 if inside else 21)
    add_stage_bar(page, stage, x[first] - gap / 2, x[last] + gap / 2, low)
  keys: dict[str, Look] = {'from the block before': {'color': INK, 'lw': 2.4}}
  back = 'from further back, in the colour of the stage it feeds'
  keys[back] = {'color': tints[count], 'lw': 1.6}
  if len(kept) < len(edges) or not all(alive):
    keys['pruned'] = PRUNED_LOOK | {'marker': 'o', 'mfc': 'white'}
  add_legend(page, 24, 12, keys)
  return figure


@style.context(STYLE)
def mask_figure(
  real_mask: np.ndarray, sources: Sources, *, stages: Ints, title: str
) -> Figure:
  """Draws the real mask as a heat map, the chosen sources marked.

  Args:
    real_mask: float `[L, L]` (target block, source) in [0, 1]; entries right
      of the diagonal do not exist and stay blank.
    sources: `[L]` sequences; `sources[t]` are the sources of block `t + 1`.
    stages: `[L]` stage numbers from 0, never decreasing.
    title: the headline, one line.
  """
  count, edges = len(sources), _links(sources, stages)
  real = np.asarray(real_mask)
  if real.shape != (count, count):
    raise ValueError(f'real_mask has shape {real.shape} for {count} blocks')
  left, low, side = 84, 74, 432
  cell, high = side / count, low + side
  figure, page = new_page(540, high + 64, title, 'real mask r: a row per block')
  grid = page.inset_axes((left, low, side, side), transform=page.transData)
  grid.set(xlim=(-0.5, count - 0.5), ylim=(count + 0.5, 0.5), frame_on=False)
  rows, columns = np.tril_indices(count)
  corners = np.array([(-0.5, 0.5), (0.5, 0.5), (0.5, 1.5), (-0.5, 1.5)])
  boxes = np.stack([columns, rows], 1)[:, None] + corners
  cells = collections.PolyCollection(list(boxes), array=real[rows, columns])
  cells.set(cmap=REAL_MASK, clim=(0, 1), ec='white', lw=min(1.2, cell / 20))
  grid.add_collection(cells)
  dot = float(np.clip(cell * 0.42, 3, 13))
  grid.plot(
    *np.transpose(edges), ms=dot, mew=dot / 10, gid='chosen', **DOT_LOOK
  )
  every = 1 if count <= 20 else 5
  grid.set_yticks(range(every, count + 1, every))
  grid.set_xticks(range(0, count, every))
  grid.xaxis.set_major_formatter(_source_name)
  for stage, first, last in runs_of(stages):
    start, stop = high - cell * last, high - cell * (first - 1)
    add_stage_bar(page, stage, start, stop, left - 28, upright=True)
    if first < count:  # The last block is nobody's source.
      start, stop = left + cell * first, left + cell * min(last + 1, count)
      add_stage_bar(page, stage, start, stop, low - 22)
    if first > 1:
      x, y = [-0.5, first - 0.5, first - 0.5], [first - 0.5, first - 0.5]
      grid.plot(x, [*y, count + 0.5], color=INK, lw=0.9)
  look = NAME_LOOK | {'color': INK, 'weight': 'normal'}
  page.text(left - 56, low + side / 2, 'block', rotation=90, **look)
  page.text(left + side / 2, low - 50, 'source', **look)
  # The triangle that does not exist has room for the key.
  add_color_bar(page, cells, left + side - 150, high - 30)
  add_legend(
    page, 358, high - 76, {'chosen at the freeze': DOT_LOOK | {'ms': 9}}
  )
  return figure


@style.context(STYLE)
def history_figure(
  steps: Ints | np.ndarray,
  masks: np.ndarray,
  sources: Sources,
  *,
  stages: Ints,
  title: str,
) -> Figure:
  """Draws how the real mask moved, a strip over the steps for each block.

  Only blocks that had a choice are drawn, at most nine, spread evenly over the
  depth. A line marks a source while it was among its block's k largest (ties:
  the latest source first), a dot what the freeze kept.

  Args:
    steps: `[T]` steps at which the mask was recorded, strictly increasing.
    masks: float `[T, L, L]` (step, target block, source) in [0, 1].
    sources: `[L]` sequences; `sources[t]` are the sources of block `t + 1`.
    stages: `[L]` stage numbers from 0, never decreasing.
    title: the headline, one line.
  """
  count, edges = len(sources), _links(sources, stages)
  time, real = np.asarray(steps, float), np.asarray(masks)
  if not time.size or real.shape != (time.size, count, count):
    raise ValueError(f'masks is {real.shape}: must be [T, {count}, {count}]')
  if np.any(np.diff(time) <= 0):
    raise ValueError('steps must increase strictly')
  pick = np.unique(np.linspace(0, time.size - 1, 120).round().astype(int))
  time, real = time[pick], real[pick]
  middle = (time[1:] + time[:-1]) / 2
  bounds = np.array([time[0] - (time.size == 1), *middle, time[-1]])
  able = [t for t, row in enumerate(sources, 1) if len(row) < t] or [count]
  shown = np.linspace(0, len(able) - 1, min(len(able), 9))
  height = 104 + 150 * -(-len(shown) // 3)
  figure, page = new_page(
    *(720, height, title),
    'real mask r over the training steps, a row per source: '
    f'{len(shown)} of the {len(able)} blocks that had a choice',
  )
  for n, t in enumerate(able[i] for i in shown.round().astype(int)):
    box = (46 + n % 3 * 230, height - 190 - n // 3 * 150, 184, 118)
    panel = page.inset_axes(box, transform=page.transData, frame_on=False)
    look = NAME_LOOK | {'ha': 'left', 'color': tint_of(stages[t - 1])}
    page.text(box[0], box[1] + 126, f'block {t}', **look)
    values, chosen = real[:, t - 1, :t].T, [i for i, j in edges if j == t]
    rows = np.arange(t + 1) - 0.5
    cells = panel.pcolormesh(bounds, rows, values, cmap=REAL_MASK)
    cells.set(clim=(0, 1), rasterized=True)
    order = t - 1 - np.argsort(-values[::-1], axis=0, kind='stable')
    lw = float(np.clip(36 / t, 0.9, 2.2))
    for i in range(t):
      within = np.any(order[: len(chosen)] == i, axis=0)
      level = np.where(within, float(i), np.nan)
      panel.stairs(level, bounds, baseline=None, color=CHOSEN, lw=lw)
    look = DOT_LOOK | {'ms': max(3, 2.4 * lw), 'mew': 0.5, 'zorder': 5}
    panel.plot([bounds[-1]] * len(chosen), chosen, clip_on=False, **look)
    panel.set(xlim=bounds[[0, -1]], ylim=(-0.5, t - 0.5))
    every = 1 if t < 7 else 2 if t < 13 else 5 if t < 31 else 10
    panel.set_yticks(range(0, t, every))
    panel.yaxis.set_major_formatter(_source_name)
    panel.locator_params(axis='x', nbins=4, integer=True)
  keys: dict[str, Look] = {'among the k largest': {'color': CHOSEN, 'lw': 2}}
  add_legend(
    page, 46, 17, keys | {'chosen at the freeze': DOT_LOOK | {'ms': 7}}
  )
  add_color_bar(page, cells, 540, 24)
  return figure


def save(
  figure: Figure, path_without_suffix: str | os.PathLike[str]
) -> list[pathlib.Path]:
  """Writes a figure as PNG and SVG; equal figures give equal bytes.

  Each file is written beside its place and then moved there, so that it is
  complete or not there at all. Missing folders are made.

  Args:
    figure: what to write.
    path_without_suffix: where to; `.png` and `.svg` are added.

  Returns:
    The paths of the PNG and of the SVG.
  """
  target, rendered = pathlib.Path(path_without_suffix), {}
  for suffix, field in (('png', 'Software'), ('svg', 'Date')):
    buffer, nothing = io.BytesIO(), {field: None}
    with style.context(STYLE):
      figure.savefig(buffer, format=suffix, dpi=180, metadata=nothing)
    rendered[target.with_name(f'{target.name}.{suffix}')] = buffer.getvalue()
  target.parent.mkdir(parents=True, exist_ok=True)
  for place, content in rendered.items():
    # As in files.py: what a killed process left is written over.
    beside = place.with_name(f'.{place.name}.tmp')
    try:
      beside.write_bytes(content)
      os.replace(beside, place)
    finally:
      beside.unlink(missing_ok=True)
  return list(rendered)


def _links(sources: Sources, stages: Ints) -> list[tuple[int, int]]:
  """Returns all (source, target block) pairs."""
  if not sources or len(stages) != len(sources):
    raise ValueError(f'{len(stages)} stages for {len(sources)} blocks')
  if sorted(stages) != list(stages):
    raise ValueError(f'stages {list(stages)} decrease')
  for t, row in enumerate(sources, 1):
    if not 0 < len(set(row)) == len(row) or min(row) < 0 or max(row) >= t:
      raise ValueError(f'block {t}: {row} are not distinct earlier sources')
  return [(int(i), t) for t, row in enumerate(sources, 1) for i in row]


def runs_of(stages: Ints) -> list[tuple[int, int, int]]:
  """Returns (stage, first block, last block) of every stage."""
  ends = {int(stage): t for t, stage in enumerate(stages, 1)}
  return [(s, t - list(stages).count(s) + 1, t) for s, t in ends.items()]


def tint_of(stage: int) -> str:
  """Returns the colour of a stage."""
  return STAGES[int(stage) % len(STAGES)]


def _source_name(source: float, _: float = 0) -> str:
  return f'{source:g}' if source else 'stem'


def new_page(w: float, h: float, title: str, text: str) -> tuple[Figure, Axes]:
  """Returns a titled white figure and axes all over it, their units points."""
  figure = Figure((w / 72, h / 72), facecolor='white')
  page = figure.add_axes((0, 0, 1, 1), xlim=(0, w), ylim=(0, h))
  page.set_axis_off()
  look = NAME_LOOK | {'ha': 'left', 'color': INK}
  look['size'] = min(13, 1.5 * (w - 48) / max(len(title), 1))
  page.text(24, h - 24, title, **look)
  page.text(24, h - 42, text, size=10, va='center')
  return figure, page


def add_stage_bar(
  page: Axes, stage: int, a: float, b: float, at: float, upright: bool = False
) -> None:
  """Draws a stage's bar from a to b and its name, below or left of it."""
  turn, name = (-1 if upright else 1), f'stage {stage + 1}'
  page.plot(*([a + 2, b - 2], [at, at])[::turn], color=tint_of(stage), lw=2.5)
  x, y = ((a + b) / 2, at - 10)[::turn]
  look = NAME_LOOK | {'rotation': 90 * upright, 'color': tint_of(stage)}
  page.text(x, y, name if b - a > 42 else f'{stage + 1}', **look)


def add_legend(page: Axes, x: float, y: float, keys: dict[str, Look]) -> None:
  """Draws a key at (x, y), its entries side by side."""
  handles = [lines.Line2D([], [], label=k, **look) for k, look in keys.items()]
  look: Look = {'loc': 'lower left', 'frameon': False, 'borderpad': 0}
  look |= {'bbox_to_anchor': (x, y), 'bbox_transform': page.transData}
  page.legend(handles=handles, ncol=len(keys), borderaxespad=0, **look)


def add_color_bar(
  page: Axes, cells: ScalarMappable, x: float, y: float
) -> None:
  """Draws the scale of the real mask at (x, y)."""
  axes = page.inset_axes((x, y, 150, 9), transform=page.transData)
  bar = page.figure.colorbar(cells, cax=axes, orientation='horizontal')
  bar.set_ticks([0, 0.5, 1], labels=['r = 0', '0.5', '1'])
  bar.outline.set_visible(False)
