"""The page of many runs: rules compared, and whether seeds agree."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskconnect_jax import files
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.networks import architectures
from maskconnect_jax.report import study as page
from maskconnect_jax.run import report as run_report
from maskconnect_jax.study import dynamics, summarize

# Rules that choose K sources; the others give every seed the same topology.
_CHOOSING = ('learned', 'fixed_random')
_REMEDY = 'train again: the run goes on from its last checkpoint'


def write(folders: Sequence[Path], path: Path | None = None) -> Path:
  """Writes a page that compares the finished runs in some folders.

  Args:
    folders: each the workdir of a run, or a folder that holds workdirs at any
      depth.
    path: of the page; None: report.html in the one folder that is given.

  Returns:
    The path of the page.

  Raises:
    InputError: no path is given for several folders, a folder holds no run, no
      run is finished, a file of a run is damaged, or the page cannot be
      written.
  """
  if path is None:
    if len(folders) > 1:
      raise InputError(
        'several --workdirs need --html=FILE.html, where the page is written'
      )
    path = folders[0] / run_report.NAME
    if (folders[0] / 'config.json').is_file():  # a run has a page of its own
      raise InputError(
        f'{folders[0]} is one run, whose page is {path}; give it as --workdir,'
        ' or give --html=FILE.html'
      )
  if path.suffix != '.html':
    raise InputError(f'--html={path} must end in .html')
  files.check_output(path)
  table = summarize.summarize(folders)
  if not table.rows:
    raise InputError(
      f'none of the runs in {folders[0]} is finished; --mode=train'
      ' --workdir=... goes on with one'
    )
  held_out = all(row.held_out for row in table.rows)
  rows = [_row(row, held_out, path.parent) for row in table.rows]
  files.write_text(
    path,
    page.page(
      ', '.join(map(str, folders)),
      rows,
      validation=held_out,
      metric=table.metric.words,
      unfinished=[str(run) for run in table.unfinished],
    ),
  )
  return path


def _row(row: summarize.Row, held_out: bool, beside: Path) -> page.Row:
  fields = row.runs[0].fields
  wired = []
  for run in row.runs:
    found = topology_lib.read(run.workdir / 'topology.json', remedy=_REMEDY)
    linked = run.workdir / run_report.NAME
    wired.append(
      page.Wired(
        sources=found.sources,
        stages=architectures.architecture_of(fields['model.name']).stages,
        live=getattr(found, 'live_branches', found.live),
        seed=run.seed,
        link=os.path.relpath(linked, beside) if linked.is_file() else '',
      )
    )
  record = row.record()
  return page.Row(
    name=row.name,
    kind=row.kind,
    seeds=[run.seed for run in row.runs],
    scores=row.held_out if held_out else row.tested,
    test_mean=statistics.fmean(row.tested),
    test_std=statistics.stdev(row.tested) if len(row.tested) > 1 else None,
    parameters=row.values('parameters_pruned'),
    rate=record['images_per_second'],
    device=row.devices,
    wired=wired,
    agreement=_agreement(row, wired),
  )


def _agreement(
  row: summarize.Row, wired: Sequence[page.Wired]
) -> page.Agreement | None:
  fields = row.runs[0].fields
  if fields['connectivity.rule'] not in _CHOOSING:
    return None
  fan_in = fields['connectivity.fan_in']
  valid = np.asarray(
    architectures.architecture_of(fields['model.name']).valid_sources(
      fields['connectivity.level'],
      stem_source=fields['connectivity.stem_source'],
      adapter=fields['connectivity.adapter'],
    )
  )
  sources = valid.shape[-1]
  valid = valid.reshape(-1, sources)
  able = valid.sum(-1) > fan_in
  if not able.any():
    return None
  chosen = []
  for one in wired:
    rows = [
      source_row
      for part in one.sources
      for source_row in (
        part if fields['connectivity.level'] == 'branch' else [part]
      )
    ]
    taken = np.array([np.isin(np.arange(sources), own) for own in rows])
    chosen.append(taken[able])
  found = dynamics.agreement(
    row.name, [run.seed for run in row.runs], chosen, valid[able], fan_in
  )
  if found is None:
    return None
  # The band is that of one pair; the mean over the pairs has a smaller one.
  one_pair = found.deviation * len(found.pairs) ** 0.5
  return page.Agreement(
    pairs=found.pairs,
    mean=found.mean,
    chance=found.chance,
    deviation=one_pair,
    sigmas=(found.mean - found.chance) / found.deviation,
  )
