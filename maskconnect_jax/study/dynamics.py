r"""What the real masks did while they were learned: a table of runs.

  python -m maskconnect_jax.main --mode=dynamics --workdirs=runs/rules \
      --figure=dynamics.png

takes the workdirs of runs, finished or not, or folders of such, and reads
config.json, metrics.jsonl, real_masks.npz and, where there is one,
topology.json. A row j is a block's, or at branch level a branch's; its n_j
valid sources i have the entries r[j,i]. **Only rows with n_j > K are counted:**
the others take all they have, whatever r. The chosen are the K largest of a
row, of equals the latest; at the freeze those of topology.json. The start is r
before the first step, made anew from the config; a share of the connectivity
phase is the recorded step nearest to it, and 100 % the last recorded one.

  recorded        share of the phase; the last line of the log before the freeze
                  may lie before it
  at 0, at 1      share of the valid entries that end there exactly
  zero rows       rows whose entries all end at 0
  entropy         mean over j of -sum_i p log p / log n_j, with p ∝ r^(1/T) as
                  the draw has it then, and its floor: 1 is a draw that knows
                  nothing
  changed         chosen at the freeze that were not yet at 25, 50, 75 %
  drift           with d = r - r at the start, sum_j n_j mean_i(d)^2 over
                  sum_ji d^2: 1 is rows that move as a whole, which orders
                  nothing, 0 entries that move against each other
  reach           mean of j - i over the chosen, source i being block i's
                  output; in brackets that of a uniform choice
  live            blocks, or branches, that the output depends on

Of runs whose configs are equal but for the seed, agreement is the mean over
pairs of seeds a, b of sum_j |chosen_a,j and chosen_b,j| / sum_j K. Two uniform
choices agree in a hypergeometric number for each row, of mean K^2 / n_j and
variance

  K (K / n_j) (1 - K / n_j) (n_j - K) / (n_j - 1)

and rows are independent; so are the pairs, two by two, for the overlap of a
uniform choice with another one is distributed alike whatever that other is. The
standard deviation of the mean over P pairs is thus sqrt(variance / P).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskconnect_jax.errors import InputError
from maskconnect_jax.figures import dynamics as dynamics_plots
from maskconnect_jax.figures import page as plots
from maskconnect_jax.study import summarize, trajectories
from maskconnect_jax.study.trajectories import Trajectory

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far the choices of several seeds agree, as shares of the chosen.

  Attributes:
    name: what tells these runs from the others.
    seeds: in rising order, at least two.
    mean: over the pairs of seeds.
    chance: what uniform choices would give.
    deviation: its standard deviation.
  """

  name: str
  seeds: list[int]
  mean: float
  chance: float
  deviation: float


def agreements(runs: Sequence[Trajectory]) -> list[Agreement]:
  """Compares the seeds of equal configs, after the freeze.

  Raises:
    InputError: two runs are of the same config and seed.
  """
  groups: dict[str, list[Trajectory]] = {}
  for run in runs:
    groups.setdefault(json.dumps(run.fields, sort_keys=True), []).append(run)
  found = []
  for name, group in zip(
    summarize.names([group[0].fields for group in groups.values()]),
    groups.values(),
    strict=True,
  ):
    group.sort(key=lambda run: run.seed)
    for one, other in itertools.pairwise(group):
      if one.seed == other.seed:
        raise InputError(
          f'{one.workdir} and {other.workdir} are the same config and seed;'
          ' leave one of them out'
        )
    pairs = list(itertools.combinations([r for r in group if r.over], 2))
    if not pairs:
      continue
    k, n = group[0].fan_in, group[0].valid.sum(-1)
    total = k * len(n)
    variance = np.sum(k * (k / n) * (1 - k / n) * (n - k) / (n - 1))
    found.append(
      Agreement(
        name,
        [run.seed for run in group if run.over],
        float(np.mean([np.sum(a.chosen & b.chosen) for a, b in pairs]) / total),
        float(np.sum(k**2 / n) / total),
        float(np.sqrt(variance / len(pairs)) / total),
      )
    )
  return found


def markdown(runs: Sequence[Trajectory]) -> str:
  """Returns the table of some runs, and below it how far seeds agree."""
  head = ['', 'recorded', 'at 0', 'at 1', 'zero rows', 'entropy at']
  lines = _table(
    [*head, 'changed since', 'drift', 'reach', 'live'],
    [
      [
        str(run.workdir),
        _percent(run.progress[-1], 0) + ', running' * (not run.over),
        _percent(run.share_at(0)),
        _percent(run.share_at(1)),
        f'{run.zero_rows} of {len(run.valid)}',
        ' / '.join(
          '-' if at is None else f'{run.entropies[at].mean():.4f}'
          for at in map(run.record, QUARTERS)
        ),
        ' / '.join(
          '-' if count is None else str(count)
          for count in map(run.changed, QUARTERS[1:-1])
        )
        + f' of {run.chosen.sum()}',
        '-' if run.drift is None else _percent(run.drift, 0),
        '-' if run.reach is None else '{:.1f} ({:.1f})'.format(*run.reach),
        run.live,
      ]
      for run in runs
    ],
  )
  lines += [
    '',
    'Entropy at 0 / 25 / 50 / 75 / 100 % of the connectivity phase, relative to'
    ' a uniform draw; changed since 25 / 50 / 75 %.',
  ]
  if found := agreements(runs):
    lines += [
      '',
      *_table(
        ['', 'seeds', 'agreement', 'chance', 'sigmas'],
        [
          [
            own.name,
            f'{len(own.seeds)} ({", ".join(map(str, own.seeds))})',
            _percent(own.mean),
            f'{100 * own.chance:.1f} ± {_percent(own.deviation)}',
            f'{(own.mean - own.chance) / own.deviation:+.1f}',
          ]
          for own in found
        ],
      ),
    ]
  return '\n'.join(lines) + '\n'


def draw(runs: Sequence[Trajectory], path: Path) -> None:
  """Draws up to six runs as FILE.png, and beside it FILE.svg."""
  panels = []
  for run in runs:
    blocks = np.unique(run.blocks)
    panels.append(
      dynamics_plots.Panel(
        '/'.join(run.workdir.resolve().parts[-2:]),
        run.progress,
        np.stack(
          [run.entropies[:, run.blocks == b].mean(-1) for b in blocks], -1
        ),
        run.masks[-1],
        run.valid,
        run.chosen,
        run.blocks,
      )
    )
  plots.save(dynamics_plots.figure(panels), path.with_suffix(''))


def report(folders: Sequence[Path], figure: Path | None = None) -> str:
  """Returns the tables of the runs in some folders, and draws them.

  Args:
    folders: each the workdir of a run, or a folder with such at any depth.
    figure: FILE.png for a picture of up to six runs, with FILE.svg beside it;
      None draws none.

  Raises:
    InputError: no real mask was recorded there, a run's files are damaged, or
      there can be no such figure.
  """
  if figure:
    summarize.check_figure(figure)
  found = summarize.find_runs(folders)
  masked = [run for run in found if (run / 'real_masks.npz').is_file()]
  if not masked:
    raise InputError(
      f'{found[0]} holds no real_masks.npz; give runs with'
      ' connectivity.rule=learned that have saved a checkpoint'
    )
  if figure and len(masked) > dynamics_plots.MOST:
    raise InputError(
      f'--figure draws up to {dynamics_plots.MOST} runs, not {len(masked)};'
      ' give fewer --workdirs'
    )
  runs = [trajectories.read(workdir) for workdir in masked]
  text = markdown(runs)
  if figure:
    draw(runs, figure)
  if others := [run for run in found if run not in masked]:
    names = ', '.join(map(str, others))
    text += f'\nWithout a recorded real mask, and in no row: {names}.\n'
  return text


def _table(head: list[str], rows: Sequence[list[str]]) -> list[str]:
  return [summarize.line(row) for row in [head, ['---'] * len(head), *rows]]


def _percent(share: float, digits: int = 1) -> str:
  return f'{100 * share:.{digits}f} %'
