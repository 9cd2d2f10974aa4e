"""The page of many runs."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import urllib.parse
from collections.abc import Sequence
from typing import Any

from maskconnect_jax.drawing import svg
from maskconnect_jax.drawing.sources import Ints, Sources, has_branches
from maskconnect_jax.report import charts, html

_MOST_DRAWN = 24  # topologies
_MOST_EDGES = 1_000  # of a topology that is drawn
_CAPTION = (
  'Test {} is that of the model after the last step, never of the best'
  ' epoch: mean ± sample standard deviation over the seeds. Parameters: mean'
  ' over the seeds. Images per second, in training: median.'
)


@dataclasses.dataclass(frozen=True)
class Wired:
  """The topology of a run.

  Attributes:
    sources: as in `drawing.svg`.
    stages: `[L]` stage numbers from 0.
    live: as in `drawing.svg`.
    seed: of the run.
    link: the address of the run's own page; '' without one.
  """

  sources: Sources
  stages: Ints
  live: Sequence[Any]
  seed: int
  link: str


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How many of the chosen sources the seeds of a row share.

  Attributes:
    pairs: the share for each pair of seeds, in the order of
      `itertools.combinations`.
    mean: over the pairs.
    chance: the share that uniform choices would have.
    deviation: standard deviation of the share of a pair of uniform choices.
    sigmas: how far the mean is from chance, in its standard deviations.
  """

  pairs: Sequence[float]
  mean: float
  chance: float
  deviation: float
  sigmas: float


@dataclasses.dataclass(frozen=True)
class Row:
  """Runs whose configs differ only in the seed.

  Attributes:
    name: the fields that tell this row from the others.
    kind: the rule; rows of a rule have one colour.
    seeds: in rising order.
    scores: of each seed, on the images that the page compares.
    test_mean: mean score on the test images after pruning.
    test_std: its standard deviation over the seeds; None for one seed.
    parameters: after pruning, of each seed.
    rate: images per second, the median.
    device: what they were trained on.
    wired: the topology of each seed.
    agreement: None where every seed has the same topology, or there is one.
  """

  name: str
  kind: str
  seeds: Sequence[int]
  scores: Sequence[float]
  test_mean: float
  test_std: float | None
  parameters: Sequence[int]
  rate: float
  device: str
  wired: Sequence[Wired]
  agreement: Agreement | None


def page(
  title: str,
  rows: Sequence[Row],
  *,
  validation: bool,
  unfinished: Sequence[str],
  metric: str = 'accuracy',
) -> str:
  """Returns the page that compares some rows of runs.

  Args:
    title: the folders of the runs.
    rows: at least one.
    validation: whether `scores` are on held out images.
    unfinished: workdirs of runs that are in no row.
    metric: what the scores are, in words.
  """
  kinds = list(dict.fromkeys(row.kind for row in rows))
  tints = {kind: at % 6 for at, kind in enumerate(kinds)}
  runs = sum(len(row.seeds) for row in rows)
  head = (
    f'<header><p class="eyebrow">{html.text(title)}</p><h1>{len(rows)}'
    f' {"config" if len(rows) == 1 else "configs"}, {runs}'
    f' {"run" if runs == 1 else "runs"}</h1></header>'
  )
  note = ''
  if unfinished:
    names = html.text(', '.join(unfinished))
    note = f'<p class="note">Not finished, and in no row: {names}.</p>'
  return html.page(
    title,
    [head, _scores(rows, tints, validation, metric), note,
     _agreements(rows, tints), _topologies(rows)],
  )  # fmt: skip


def _scores(
  rows: Sequence[Row], tints: dict[str, int], validation: bool, metric: str
) -> str:
  name = f'{"Validation" if validation else "Test"} {metric}'
  dots = charts.dots(
    f'{name}: a dot for each seed, a bar for the mean',
    [
      charts.Row(
        row.name,
        row.scores,
        [f'seed {seed}' for seed in row.seeds],
        tint=tints[row.kind],
      )
      for row in rows
    ],
  )
  table = html.table(
    [
      '',
      'seeds',
      f'test {metric}',
      'parameters',
      'images per second',
      'device',
    ],
    [
      (
        row.name,
        f'{len(row.seeds)} ({", ".join(map(str, row.seeds))})',
        f'{100 * row.test_mean:.2f}'
        + (f' ± {100 * row.test_std:.2f}' if row.test_std is not None else '')
        + ' %',
        f'{statistics.fmean(row.parameters):,.0f}',
        f'{row.rate:,.0f}',
        row.device,
      )
      for row in rows
    ],
    caption='Finished models, after fine-tuning and pruning',
  )
  return html.section(
    'accuracy', html.heading(metric), dots, table,
    f'<p class="note">{_CAPTION.format(metric)}</p>',
  )  # fmt: skip


def _agreements(rows: Sequence[Row], tints: dict[str, int]) -> str:
  shown = [(row, row.agreement) for row in rows if row.agreement]
  dots = charts.dots(
    'Common sources of two seeds: a dot for each pair',
    [
      charts.Row(
        row.name,
        own.pairs,
        [f'seeds {a} and {b}' for a, b in itertools.combinations(row.seeds, 2)],
        band=(
          own.chance - 2 * own.deviation,
          own.chance + 2 * own.deviation,
        ),
        tint=tints[row.kind],
        note=f'mean {100 * own.mean:.1f} %, chance {100 * own.chance:.1f} %:'
        f' {own.sigmas:+.1f} σ'.replace('-', '−'),
      )
      for row, own in shown
    ],
    about='The grey band is where two random choices mostly lie: two standard'
    ' deviations to each side of chance. σ counts how far the mean is from'
    ' chance, in standard deviations of the mean. Blocks and branches that read'
    ' all that they can are left out.',
  )
  return html.section('agreement', 'Do seeds agree on a topology?', dots)


def _topologies(rows: Sequence[Row]) -> str:
  parts: list[str] = []
  drawn = left = 0
  for row in rows:
    pictures = []
    for one in row.wired:
      if drawn >= _MOST_DRAWN or _edges(one.sources) > _MOST_EDGES:
        left += 1
        continue
      drawn += 1
      pictures.append(_picture(row, one))
    if pictures:
      parts.append(
        f'<h3>{html.text(row.name)}</h3>'
        f'<div class="thumbs">{"".join(pictures)}</div>'
      )
  about = f'{left} more are not drawn.' if left else ''
  return html.section('topologies', 'Topologies', *parts, about=about)


def _edges(sources: Sources) -> int:
  if has_branches(sources):
    return sum(len(row) for junction in sources for row in junction)
  return sum(map(len, sources))


def _picture(row: Row, one: Wired) -> str:
  picture = svg.topology_svg(
    one.sources,
    stages=one.stages,
    live=one.live,
    title=f'Topology of {row.name}, seed {one.seed}',
    width=max(320.0, 14.0 * len(one.stages)),
    standalone=False,
  )
  words = f'seed {one.seed}'
  if one.link:
    address = html.text(urllib.parse.quote(one.link))
    words = f'<a href="{address}">{words}</a>'
  return f'<figure>{picture}<figcaption>{words}</figcaption></figure>'
