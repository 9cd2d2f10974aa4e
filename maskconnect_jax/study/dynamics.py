r"""The dynamics of the real masks in the connectivity phase: a table of runs.

  python -m maskconnect_jax.main --mode=dynamics --workdirs=runs/rules \
      --figure=dynamics.png

takes the workdirs of runs, finished or not, or folders that hold workdirs at
any depth. It reads config.json, plan.json, real_masks.npz and, if it exists,
topology.json. Without a plan.json it reads the length of an epoch from
metrics.jsonl.

A row j of the real mask r belongs to a block, or at branch level to a branch.
Its n_j valid sources i have the entries r[j,i]. **Only rows with n_j > K are
counted:** the other rows take all their sources, for any r. The chosen sources
of a row are those of its K largest entries; the latest source wins a tie. At
the freeze the chosen sources are those of topology.json. The start is r before
the first step, computed again from the config. A share of the connectivity
phase stands for the recorded step nearest to it, and 100 % for the last
recorded step.

  recorded        the share of the phase that the records reach; the last line
                  of the log may lie before the freeze
  at 0, at 1      share of the valid entries that end at exactly 0 or 1
  zero rows       rows whose entries all end at 0
  entropy         mean over j of -sum_i p log p / log n_j, with p ∝ r^(1/T); T
                  and the floor of r are those of the draw at that step; 1 is
                  the entropy of a uniform draw
  changed         sources chosen at the freeze that were not chosen at 25, 50,
                  75 %
  drift           sum_j n_j mean_i(d)^2 / sum_ji d^2, with d = r - r at the
                  start; 1: all entries of a row move alike, which orders no
                  sources; 0: the entries of a row move against each other
  reach           mean of j - i over the chosen sources, where source i is the
                  output of block i; in brackets the mean of a uniform choice
  live            blocks, or branches, that the output depends on

Agreement compares runs whose configs differ only in the seed. It is the mean
over the pairs of seeds a, b of sum_j |chosen_a,j and chosen_b,j| / sum_j K. For
two uniform choices, the number of common sources in row j is hypergeometric,
with mean K^2 / n_j and variance

  K (K / n_j) (1 - K / n_j) (n_j - K) / (n_j - 1).

Rows are independent. Pairs of seeds are pairwise independent too, since the
overlap of a uniform choice with a fixed choice has the same distribution for
every fixed choice. So the standard deviation of the mean over P pairs is
sqrt(variance / P).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskconnect_jax.errors import InputError
from maskconnect_jax.study import summarize, trajectories
from maskconnect_jax.study.trajectories import Trajectory

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Agreement:
  """The agreement of several seeds, as shares of the chosen sources.

  Attributes:
    name: the config fields that tell these runs from the others.
    seeds: in rising order, at least two.
    mean: agreement, the mean over the pairs of seeds.
    chance: expected agreement of uniform choices.
    deviation: standard deviation of the agreement of uniform choices.
    pairs: the agreement of each pair of seeds.
  """

  name: str
  seeds: list[int]
  mean: float
  chance: float
  deviation: float
  pairs: tuple[float, ...]


def agreement(
  name: str,
  seeds: Sequence[int],
  chosen: Sequence[np.ndarray],
  valid: np.ndarray,
  fan_in: int,
) -> Agreement | None:
  """Compares the choices of several seeds.

  Args:
    name: of the config.
    seeds: in rising order.
    chosen: for each seed bool [J, S], whether row j takes source i.
    valid: bool [J, S]; each row has more valid sources than K.
    fan_in: K.

  Returns:
    None for less than two seeds.
  """
  k, n = fan_in, valid.sum(-1)
  total = k * len(n)
  pairs = [
    float(np.sum(a & b)) / total for a, b in itertools.combinations(chosen, 2)
  ]
  if not pairs:
    return None
  variance = np.sum(k * (k / n) * (1 - k / n) * (n - k) / (n - 1))
  return Agreement(
    name,
    list(seeds),
    float(np.mean(pairs)),
    float(np.sum(k**2 / n) / total),
    float(np.sqrt(variance / len(pairs)) / total),
    tuple(pairs),
  )


def agreements(runs: Sequence[Trajectory]) -> list[Agreement]:
  """Compares the seeds of equal configs at the freeze.

  Args:
    runs: runs whose records do not reach the freeze are left out.

  Returns:
    One agreement for each config that has two seeds or more.

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
    over = [run for run in group if run.over]
    own = agreement(
      name,
      [run.seed for run in over],
      [run.chosen for run in over],
      group[0].valid,
      group[0].fan_in,
    )
    if own:
      found.append(own)
  return found


def markdown(runs: Sequence[Trajectory]) -> str:
  """Returns the table of some runs, and below it the agreement of seeds."""
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
  """Draws up to six runs.

  Args:
    runs: one panel each.
    path: FILE.png; FILE.svg is written beside it.
  """
  from maskconnect_jax.figures import dynamics as dynamics_plots
  from maskconnect_jax.figures import page as plots

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
    folders: each the workdir of a run, or a folder that holds workdirs at any
      depth.
    figure: FILE.png for a figure of up to six runs, with FILE.svg beside it;
      None draws no figure.

  Raises:
    InputError: no run has a recorded real mask, a run's files are damaged, or
      the figure cannot be drawn.
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
  if figure:
    from maskconnect_jax.figures import dynamics as dynamics_plots

    if len(masked) > dynamics_plots.MOST:
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
