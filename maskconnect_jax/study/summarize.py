"""One table of many runs: a row per config, over its seeds."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from maskconnect_jax import config as config_lib
from maskconnect_jax import files
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import scores, workdirs

_CAPTION = (
  'Test {} is that of the finished model, after the last step,'
  ' fine-tuning and pruning; never that of the best epoch. Mean ± sample'
  ' standard deviation, and the best, over the seeds. Parameters: mean over'
  ' the seeds (least to most). Images per second: median.'
)


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Summary(msgspec.Struct):
  """The fields of summary.json that the table reads, with their bounds."""

  parameters: _Count
  parameters_pruned: _Count
  images_per_second: Annotated[float, msgspec.Meta(ge=0)]
  num_devices: _Count
  device: str
  test_accuracy_pruned: _Share | None = None
  test_map_pruned: _Share | None = None
  validation_accuracy: _Share | None = None
  validation_map: _Share | None = None
  multiply_adds_pruned: _Count | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    workdir: the folder of the run.
    seed: the seed of the run.
    fields: every other field of its config, by path.
    summary: the content of its summary.json.
    inputs: the content of its inputs.json, or None.
  """

  workdir: Path
  seed: int
  fields: dict[str, Any]
  summary: dict[str, Any]
  inputs: dict[str, Any] | None = None

  @property
  def metric(self) -> scores.Metric:
    """What its test and validation images were measured by."""
    return scores.metric(self.fields['data.multi_label'])

  @property
  def tested(self) -> float:
    """The score of the finished model on the test images."""
    return float(self.summary[f'test_{self.metric.field}_pruned'])

  @property
  def device(self) -> str:
    """Number and kind of the devices, for example '1 x cpu'."""
    return f'{self.summary["num_devices"]} x {self.summary["device"]}'

  def same_but_for_seed(self, other: Run) -> bool:
    """Whether two runs belong in one row.

    Equal images in different folders count as the same images.
    """
    ours, theirs = dict(self.fields), dict(other.fields)
    if self.inputs and other.inputs:
      ours['data.dir'] = self.inputs['data']
      theirs['data.dir'] = other.inputs['data']
    return ours == theirs


@dataclasses.dataclass(frozen=True)
class Row:
  """Runs whose configs differ only in the seed.

  Attributes:
    name: the config fields that tell this row from the others.
    runs: in the order of their seeds; at least one.
  """

  name: str
  runs: list[Run]

  def values(self, name: str) -> list[Any]:
    """Returns the values of a field of summary.json, one per run."""
    return [run.summary[name] for run in self.runs]

  @property
  def metric(self) -> scores.Metric:
    """See `Run.metric`; its runs have one."""
    return self.runs[0].metric

  @property
  def tested(self) -> list[float]:
    """The scores of the finished models on the test images."""
    return [run.tested for run in self.runs]

  @property
  def held_out(self) -> list[float]:
    """Scores on held out training images; [] if none were held out."""
    if not self.runs[0].fields['data.validation']:
      return []
    return self.values(f'validation_{self.metric.field}')

  @property
  def kind(self) -> str:
    """The rule; if it is 'learned', the learner."""
    fields = self.runs[0].fields
    rule = fields['connectivity.rule']
    if rule == 'learned':
      return f'learned, {fields["connectivity.learner"]}'
    return str(rule).replace('_', '-')

  @property
  def short(self) -> str:
    """The fan-in; or the network, where the rule has no fan-in."""
    fields = self.runs[0].fields
    if fields['connectivity.rule'] in ('fixed_prev', 'fixed_all'):
      width = f', width {w}' if (w := fields['model.width']) else ''
      return f'{fields["model.name"]}{width}'
    live = fields.get('connectivity.live', 0)
    text = f'K = {fields["connectivity.fan_in"]}'
    return f'{text}, {live} live' if live else text

  @property
  def devices(self) -> str:
    """All devices that runs of this row were trained on."""
    return ', '.join(dict.fromkeys(run.device for run in self.runs))

  def record(self) -> dict[str, Any]:
    """Returns the row of the CSV file; scores are fractions."""
    tested, own = self.tested, self.metric.field
    return {
      'row': self.name,
      'num_seeds': len(self.runs),
      'seeds': ' '.join(str(run.seed) for run in self.runs),
      'duration': self.runs[0].fields['duration'],
      f'test_{own}_best': max(tested),
      f'test_{own}_mean': statistics.fmean(tested),
      f'test_{own}_std': statistics.stdev(tested) if len(tested) > 1 else '',
      f'validation_{own}_mean': (
        statistics.fmean(self.held_out) if self.held_out else ''
      ),
      f'validation_{own}_std': (
        statistics.stdev(self.held_out) if len(self.held_out) > 1 else ''
      ),
      **{
        f'{name}_{statistic.__name__.removeprefix("f")}': statistic(
          self.values(name)
        )
        for name in ('parameters', 'parameters_pruned')
        for statistic in (statistics.fmean, min, max)
      },
      'images_per_second': statistics.median(self.values('images_per_second')),
      'device': self.devices,
    }


@dataclasses.dataclass(frozen=True)
class Table:
  """The table of some runs.

  Attributes:
    rows: in the order in which their first runs were found.
    unfinished: workdirs of runs without a summary; these runs are in no row.
  """

  rows: list[Row]
  unfinished: list[Path]

  @property
  def metric(self) -> scores.Metric:
    """See `Run.metric`; all rows have one."""
    return self.rows[0].metric if self.rows else scores.ACCURACY

  @property
  def caption(self) -> str:
    """What the columns mean."""
    return _CAPTION.format(self.metric.words)

  def markdown(self) -> str:
    """Returns the table in Markdown, with its caption below."""
    validated = ['validation'] * any(row.held_out for row in self.rows)
    tested = f'test {self.metric.words}'
    head = ['', 'seeds', 'duration', *validated, tested, 'best']
    head += ['parameters', 'after pruning', 'images/s', 'device']
    lines = [line(head), line(['---'] * len(head))]
    for row in self.rows:
      record = row.record()
      cells = [
        row.name,
        f'{len(row.runs)} ({", ".join(str(run.seed) for run in row.runs)})',
        record['duration'],
        *(_mean(row.held_out) for _ in validated),
        _mean(row.tested),
        f'{max(row.tested):.2%}'.replace('%', ' %'),
        _count(row.values('parameters')),
        _count(row.values('parameters_pruned')),
        f'{record["images_per_second"]:,.0f}',
        record['device'],
      ]
      lines.append(line(cells))
    lines += ['', self.caption]
    if common := usual([row.runs[0].fields for row in self.rows]):
      own = ', '.join(f'{short(path)}={v}' for path, v in common.items())
      lines.append(f'Where a row does not say otherwise: {own}.')
    if len({run.device for row in self.rows for run in row.runs}) > 1:
      lines.append('Devices differ: their images per second do not compare.')
    if self.unfinished:
      names = ', '.join(map(str, self.unfinished))
      lines.append(f'Not finished, and in no row: {names}.')
    return '\n'.join(lines) + '\n'

  def draw(self, path: Path, against: str | None = None) -> None:
    """Draws the accuracies of the runs.

    They are those on the held out images if every row held out images, else
    those on the test images.

    Args:
      path: FILE.png; FILE.svg is written beside it.
      against: 'parameters' or 'multiply_adds', counted after pruning: a point
        for each row, with test accuracy; None: a line for each row.

    Raises:
      InputError: the path has another suffix, no run is finished, or the
        multiply-adds of a run were not counted.
    """
    from maskconnect_jax.figures import page as plots
    from maskconnect_jax.figures import summary as summary_plots

    check_figure(path)
    if not self.rows:
      raise InputError(f'--figure={path} needs a run that is finished')
    if against:
      plots.save(self._trade(against), path.with_suffix(''))
      return
    held_out = all(row.held_out for row in self.rows)
    figure = summary_plots.figure(
      [row.name for row in self.rows],
      [row.held_out if held_out else row.tested for row in self.rows],
      f'{"Validation" if held_out else "Test"} {self.metric.words}',
    )
    plots.save(figure, path.with_suffix(''))

  def _trade(self, against: str) -> Any:
    from maskconnect_jax.figures import trade as trade_plots

    field, words = f'{against}_pruned', against.replace('_', '-')
    for row in self.rows:
      for run in row.runs:
        if run.summary.get(field) is None:
          raise InputError(
            f'{run.workdir}/summary.json has no {field}; a newer version writes'
            ' it'
          )
    return trade_plots.figure(
      [row.short for row in self.rows],
      [row.kind for row in self.rows],
      [row.values(field) for row in self.rows],
      [row.tested for row in self.rows],
      title=f'Test {self.metric.words} against {words}',
      cost=f'{words} after pruning',
    )

  def csv(self) -> str:
    """Returns the same rows as CSV, with unrounded numbers."""
    records = [row.record() for row in self.rows]
    text = io.StringIO()
    if records:
      writer = csv.DictWriter(text, list(records[0]), lineterminator='\n')
      writer.writeheader()
      writer.writerows(records)
    return text.getvalue()


def check_figure(path: Path) -> None:
  """Checks the path of a figure.

  Raises:
    InputError: the path does not end in .png, or it or the .svg beside it
      cannot be written.
  """
  if path.suffix != '.png':
    raise InputError(f'--figure={path} must end in .png')
  for one in (path, path.with_suffix('.svg')):
    files.check_output(one)


def summarize(folders: Sequence[Path]) -> Table:
  """Makes the table of all runs in some folders.

  Args:
    folders: each the workdir of a run, or a folder that holds workdirs at any
      depth.

  Raises:
    InputError: a folder holds no run, a run's files cannot be read, two runs
      are of the same config and seed, or runs are measured by other scores.
  """
  finished, unfinished = [], []
  for workdir in find_runs(folders):
    if (workdir / 'summary.json').is_file():
      finished.append(read(workdir))
    else:
      unfinished.append(workdir)
  for run in finished:
    if run.metric != finished[0].metric:
      raise InputError(
        f'{finished[0].workdir} is measured by {finished[0].metric.words} and'
        f' {run.workdir} by {run.metric.words} (config.data.multi_label); leave'
        ' one of them out'
      )
  groups: list[list[Run]] = []
  for run in finished:
    # Groups of equal fields first: copies of the same images in another folder
    # may form a row of their own.
    same = sorted(
      (group for group in groups if group[0].same_but_for_seed(run)),
      key=lambda group: group[0].fields != run.fields,
    )
    for other in itertools.chain.from_iterable(same):
      if other.seed == run.seed and other.fields == run.fields:
        raise InputError(
          f'{other.workdir} and {run.workdir} are the same config and seed;'
          ' leave one of them out'
        )
    for group in same:
      if all(other.seed != run.seed for other in group):
        group.append(run)
        break
    else:
      groups.append([run])
  return Table(
    [
      Row(name, sorted(group, key=lambda run: run.seed))
      for name, group in zip(
        names([group[0].fields for group in groups]), groups, strict=True
      )
    ],
    unfinished,
  )


def find_runs(folders: Sequence[Path]) -> list[Path]:
  """Returns every workdir of a run in some folders, each once.

  Args:
    folders: each the workdir of a run, or a folder that holds workdirs at any
      depth.

  Raises:
    InputError: a folder holds no run.
  """
  found: dict[Path, Path] = {}
  for folder in folders:
    runs = list(_runs_below(folder))
    if not runs:
      raise InputError(
        f'{folder} holds no run; give the workdir of a run, or a folder of runs'
      )
    for run in runs:
      found.setdefault(run.resolve(), run)
  return list(found.values())


def read(workdir: Path) -> Run:
  """Reads a finished run.

  Raises:
    InputError: a file of the run is damaged.
  """
  config, removed = config_lib.record_of(workdir)
  fields = config_lib.essential(config) | removed
  seed = fields.pop('seed')
  path = workdir / 'summary.json'
  remedy = 'delete it and train again: the run goes on from its last checkpoint'
  record = files.read_json(path, dict[str, Any], remedy=remedy)
  try:
    files.of_kind(record, Summary)
    run = Run(workdir, seed, fields, record, workdirs.read_inputs(workdir))
    needed = [f'test_{run.metric.field}_pruned']
    if fields['data.validation']:
      needed.append(f'validation_{run.metric.field}')
    for name in needed:
      if record.get(name) is None:
        raise InputError(f'{name} is missing')
  except InputError as error:
    raise InputError(
      f'{path} is not the summary of a run ({error}); {remedy}'
    ) from error
  return run


def names(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Names each config by the fields in which it differs from most configs.

  Args:
    rows: the fields of each config, by path.

  Returns:
    'field=value ...' for each config; its network and rule if it differs in no
    field.
  """
  common = usual(rows)
  return [
    ' '.join(
      f'{short(path)}={row.get(path)}'
      for path in _differing(rows)
      if path not in common or row.get(path) != common[path]
    )
    or f'{row["model.name"]} {row["connectivity.rule"]}'
    for row in rows
  ]


def usual(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Returns the usual values of the fields in which some configs differ.

  A value is usual if more than half of the configs have it.

  Args:
    rows: the fields of each config, by path.

  Returns:
    The usual values, by path; fields without a usual value are left out.
  """
  common = {}
  for path, values in _differing(rows).items():
    most = max(values, key=values.count)
    if values.count(most) > len(rows) / 2:
      common[path] = most
  return common


def _differing(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
  """Returns the values of each field in which the configs differ, by path."""
  columns = {
    path: [row.get(path) for row in rows]
    for path in dict.fromkeys(path for row in rows for path in row)
  }
  return {
    path: values
    for path, values in columns.items()
    if values.count(values[0]) < len(values)
  }


def short(path: str) -> str:
  """Returns the last part of a field's path if it is unique, else the path."""
  last = path.rpartition('.')[2]
  known = [p.rpartition('.')[2] for p in config_lib.flat(config_lib.default())]
  return last if known.count(last) <= 1 else path


def _runs_below(folder: Path) -> Iterator[Path]:
  for path, folders, names_here in os.walk(folder):
    folders.sort()
    if 'config.json' in names_here:
      folders.clear()  # the many files of a workdir hold no other run
      yield Path(path)


def line(cells: Sequence[Any]) -> str:
  """Returns a row of a Markdown table."""
  text = ' | '.join(str(cell).replace('|', r'\|') for cell in cells)
  return f'| {text} |'


def _mean(accuracies: Sequence[float]) -> str:
  if not accuracies:
    return ''
  deviation = (
    f'{100 * statistics.stdev(accuracies):.2f}' if len(accuracies) > 1 else '-'
  )
  return f'{100 * statistics.fmean(accuracies):.2f} ± {deviation} %'


def _count(values: Sequence[int]) -> str:
  text = f'{statistics.fmean(values):,.0f}'
  if min(values) != max(values):
    text += f' ({min(values):,} to {max(values):,})'
  return text
