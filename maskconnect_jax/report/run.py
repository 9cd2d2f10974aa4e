"""The page of one run."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from maskconnect_jax.report import charts, html, wiring
from maskconnect_jax.report.charts import Line

_MOST_CLASSES = 100  # of a confusion matrix with cells
_LISTED = 20  # classes and pairs in a list
_NAMED, _LETTERS = 20, 12  # classes of a matrix with names, and their letters
# What the margin is, by whether the wiring was measured.
_MARGIN = {
  True: 'Margin: by how much the training loss misses the last source that'
  ' stays more than the first that goes.',
  False: 'Margin: the entry of the last source that stays, less that of the'
  ' first that goes.',
}


@dataclasses.dataclass(frozen=True)
class Examples:
  """Some test images, and what the finished model takes them for.

  Attributes:
    images: uint8 [N, H, W, C], C being 1 or 3.
    labels: int [N], the classes of the images.
    predicted: int [N], the classes that the model gives them.
  """

  images: np.ndarray
  labels: np.ndarray
  predicted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Record:
  """What a page shows of a run.

  Attributes:
    workdir: the folder of the run, in words.
    config: every field of its config, by path.
    changed: the fields that differ from their defaults.
    learner: in words, such as 'measured'; '' for a fixed rule.
    metrics: the records of metrics.jsonl.
    total: the steps of the run; 0: unknown.
    freeze: the steps of the connectivity phase; 0: none.
    summary: the content of summary.json; None while the run goes on.
    wiring: None before anything of it is written.
    entropies: float [T], at each record of the real mask the mean entropy of
      its rows, divided by that of a uniform draw; None for a wiring that
      narrows.
    shares: float [T], the share of the K largest entries in the sum of a row;
      None for a wiring that narrows.
    changes: int [T], edges that differ from those at the record before.
    classes: the names of the classes.
    examples: None if there are none.
    versions: name and version of the software that the run ended with, as
      far as it is recorded.
  """

  workdir: str
  config: dict[str, Any]
  changed: Sequence[str]
  learner: str
  metrics: Sequence[dict[str, Any]]
  total: int
  freeze: int
  summary: dict[str, Any] | None
  wiring: wiring.Wiring | None
  entropies: np.ndarray | None
  shares: np.ndarray | None
  changes: np.ndarray | None
  classes: Sequence[str]
  examples: Examples | None
  versions: dict[str, str]

  @property
  def name(self) -> str:
    """The network and its rule."""
    rule = str(self.config['connectivity.rule']).replace('_', '-')
    return f'{self.config["model.name"]}, {rule}'


def page(record: Record, *, reload_seconds: int = 0) -> str:
  """Returns the page of a run.

  Args:
    record: of the run.
    reload_seconds: see `html.page`.
  """
  title = f'{record.name}: {record.workdir}'
  return html.page(
    title,
    [
      _head(record),
      _wiring(record),
      _mask(record),
      _training(record),
      _scores(record),
      _examples(record),
      _origin(record),
    ],
    reload_seconds=reload_seconds,
  )


def _head(record: Record) -> str:
  config, summary = record.config, record.summary
  parts = [f'{config["connectivity.level"]} level']
  if record.learner:
    parts.append(f'learner {record.learner}')
  if config['connectivity.rule'] not in ('fixed_prev', 'fixed_all'):
    parts.append(f'fan-in {config["connectivity.fan_in"]}')
  parts += [f'seed {config["seed"]}', str(config['duration'])]
  if summary:
    parts.append(f'{summary["num_train_examples"]:,} training images')
  head = (
    f'<header><p class="eyebrow">{html.text(record.workdir)}</p>'
    f'<h1>{html.text(record.name)}</h1>'
    f'<p class="about parts">{html.unbroken(parts)}</p>'
  )
  return f'{head}{_facts(record)}</header>'


def _facts(record: Record) -> str:
  summary = record.summary
  if summary is None:
    done = record.metrics[-1]['step'] if record.metrics else 0
    of = f'of {record.total:,}' if record.total else 'steps'
    shown = [('Step', f'{done:,}', of)]
    if record.metrics:
      last = record.metrics[-1]
      shown.append(('Phase', str(last['phase']), f'loss {last["loss"]:.4g}'))
    share = done / record.total if record.total else 0
    return (
      html.facts(shown)
      + f'<progress max="1" value="{share:.4f}" aria-label="steps done">'
      '</progress>'
    )
  shown = [
    (
      'Test accuracy',
      _percent(summary['test_accuracy_pruned']),
      f'{summary["num_test_examples"]:,} images, pruned network',
    ),
    _before_after('Blocks', summary, 'blocks'),
    _before_after('Parameters', summary, 'parameters'),
    _before_after('Multiply-adds per image', summary, 'multiply_adds'),
  ]
  if 'branches' in summary:
    shown[1] = _before_after('Branches', summary, 'branches')
  return html.facts(shown)


def _before_after(
  name: str, summary: dict[str, Any], field: str
) -> tuple[str, str, str]:
  before, after = summary.get(field), summary.get(f'{field}_pruned')
  if before is None or after is None:
    return name, 'unknown', ''
  whole, left = _counts(before, after)
  if before == after:
    return name, left, 'nothing pruned'
  return name, left, f'of {whole} before pruning'


def _counts(before: int, after: int) -> tuple[str, str]:
  """Returns two counts in words, in the unit that suits the first."""
  for least, unit, word in ((1e9, 1e9, 'G'), (1e6, 1e6, 'M'), (1e5, 1e3, 'k')):
    if before >= least:
      return f'{before / unit:.4g} {word}', f'{after / unit:.4g} {word}'
  return f'{before:,}', f'{after:,}'


def _percent(share: float | None) -> str:
  return '–' if share is None else f'{100 * share:.2f} %'


def _wiring(record: Record) -> str:
  own = record.wiring
  if own is None:
    return ''
  part = 'branch' if own.by_branch else 'block'
  gone = (
    sum(len(rows) for rows in own.sources[:1]) * len(own.stages)
    - sum(map(len, own.live))
    if own.by_branch
    else len(own.live) - sum(map(bool, own.live))
  )
  about = f'{own.edges:,} edges; {_pruned(gone, part)}.'
  if own.real_mask is not None and not own.narrows:
    about += ' A bold edge has a large entry r of the real mask.'
  if not own.frozen:
    about = f'As it stands while it is learned: {about}'
  title = 'What each branch reads' if own.by_branch else 'What each block reads'
  return html.section(
    'topology',
    title,
    wiring.drawing(own, f'Topology of {record.name}: {about}'),
    html.folded('As a table', table) if (table := wiring.listing(own)) else '',
    about=about,
  )


def _pruned(gone: int, part: str) -> str:
  if not gone:
    return 'nothing is pruned'
  many = f'{part}es' if part == 'branch' else f'{part}s'
  return f'{gone} {part if gone == 1 else many} pruned, drawn hollow and dashed'


def _mask(record: Record) -> str:
  own = record.wiring
  if own is None or own.real_mask is None:
    return ''
  part = 'branch' if own.by_branch else 'block'
  about = (
    'r = 1: the source is still read. A source that went keeps the share of the'
    ' moments that it lasted.'
    if own.narrows
    else f'r says how much a {part} wants each source, from 0 to 1.'
  )
  beside = ''.join([_sources_left(record), *_sharpness(record)])
  words = _clarity(record)
  return html.section(
    'real-mask',
    'The real mask, and how it moved',
    f'<div class="beside"><div>{wiring.matrix(own)}</div>'
    f'<div>{beside}{words}</div></div>',
    about=about,
  )


def _sources_left(record: Record) -> str:
  """Returns how many sources each block has left over steps, if it narrows."""
  own = record.wiring
  if own is None or not own.narrows:
    return ''
  left = (own.masks >= 1).sum(-1, where=own.valid)
  before = own.valid.sum(-1)
  counts = np.concatenate([before[None], left])
  steps = [0, *own.steps.tolist()]
  drawn = []
  for row in range(counts.shape[1]):
    block = row + own.by_branch
    values = counts[:, row].astype(float)
    values = values.mean(-1) if own.by_branch else values
    stage = int(own.stages[block])
    drawn.append(
      Line(f'block {block + 1}', steps, values.tolist(), stage % 6, stair=True)
    )
  part = 'branch' if own.by_branch else 'block'
  total = counts.reshape(len(counts), -1).sum(1)
  chart = charts.lines(
    f'Sources left of each {part}',
    [dataclasses.replace(line, name='') for line in drawn],
    total=record.freeze or steps[-1],
    whole=True,
    about=f'{total[0]:,} edges at the start, {total[-1]:,} at step'
    f' {steps[-1]:,}. In the colours of the stages.',
  )
  return chart


def _sharpness(record: Record) -> list[str]:
  own = record.wiring
  if own is None:
    return []
  steps = own.steps.tolist()
  many = 'branches' if own.by_branch else 'blocks'
  found = []
  for title, values, percent, about in (
    (
      'Entropy of the draw, relative to a uniform draw',
      record.entropies,
      False,
      f'1: every source is as likely. Mean over the {many} with a choice.',
    ),
    (
      'Share of the K largest entries',
      record.shares,
      True,
      f'In the sum of a row of r. Mean over the {many} with a choice.',
    ),
    (
      'Edges that changed',
      record.changes,
      False,
      'Among the K largest of each row, since the recorded step before.',
    ),
  ):
    if values is not None:
      found.append(
        charts.lines(
          title,
          [Line('', steps, values.tolist())],
          total=record.freeze or steps[-1],
          percent=percent,
          whole=title == 'Edges that changed',
          about=about,
        )
      )
  return found


def _clarity(record: Record) -> str:
  """Returns how clear the last choice was, in words; see summary.json."""
  summary = record.summary or {}
  if 'choices' not in summary:
    return ''
  measured = 'choices_clear' in summary
  level = record.config['connectivity.level']
  many = 'Branches' if level == 'branch' else 'Blocks'
  last = ' at the last moment' if measured else ''
  pairs = [(f'{many} with a choice{last}', f'{summary["choices"]:,}')]
  if measured:
    pairs.append(
      ('Clear by two standard errors', f'{summary["choices_clear"]:,}')
    )
  if summary.get('margin') is not None:
    error = summary.get('margin_standard_error')
    text = f'{summary["margin"]:.4f}'.replace('-', '−')
    text += f' ± {error:.4f} nats' if error is not None else ''
    pairs.append(('Mean margin' if measured else 'Mean margin in r', text))
  lines = ''.join(
    f'<div><dt>{html.text(name)}</dt><dd>{html.text(value)}</dd></div>'
    for name, value in pairs
  )
  return (
    f'<figure><figcaption>How clear the choice was</figcaption>'
    f'<dl class="pairs">{lines}</dl><p class="note">'
    f'{_MARGIN[measured]}</p></figure>'
  )


def _training(record: Record) -> str:
  if not record.metrics:
    return ''
  steps = [row['step'] for row in record.metrics]
  about = ''
  if summary := record.summary:
    about = (
      f'{summary["steps"]:,} steps in {_time(summary["train_seconds"])},'
      f' {summary["images_per_second"]:,.0f} images per second on'
      f' {summary["num_devices"]} × {summary["device"]}.'
    )

  def column(name: str) -> list[float | None]:
    return [row.get(name) for row in record.metrics]

  held = 'validation' if record.config['data.validation'] else 'test'
  chart = functools.partial(
    charts.lines, total=record.total or steps[-1], freeze=record.freeze
  )
  rates = [Line('weights', steps, column('learning_rate'))]
  if record.learner in ('draws', 'as_published'):
    rates.append(Line('real mask', steps, column('mask_learning_rate'), 1))
  return html.section(
    'training',
    'Training',
    html.grid(
      chart(
        'Accuracy',
        [
          Line('training batches', steps, column('accuracy')),
          Line(held, steps, column(f'{held}_accuracy'), 1, dots=True),
        ],
        percent=True,
      ),
      chart(
        'Loss',
        [
          Line('training batches', steps, column('loss')),
          Line(held, steps, column(f'{held}_loss'), 1, dots=True),
        ],
        log=True,
      ),
      chart('Learning rate', rates),
      chart(
        'Images per second',
        [Line('', steps, column('images_per_second'))],
      ),
    ),
    about=about,
  )


def _time(seconds: float) -> str:
  if seconds < 120:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  return f'{minutes} min' if minutes < 120 else f'{seconds / 3600:.1f} h'


def _scores(record: Record) -> str:
  summary = record.summary
  if summary is None:
    return ''
  held = 'validation' if 'validation_accuracy' in summary else 'test'
  rows = [
    ('before the freeze', summary.get(f'{held}_accuracy_drawn'), held),
    ('at the freeze', summary.get(f'{held}_accuracy_at_freeze'), held),
    ('after fine-tuning', summary.get(f'{held}_accuracy'), held),
    ('after pruning', summary.get('test_accuracy_pruned'), 'test'),
  ]
  steps = charts.bars(
    'Accuracy along the run',
    [
      (f'{name}, {images}', value, _percent(value))
      for name, value, images in rows
      if value is not None
    ],
  )
  sizes = []
  for field in ('blocks', 'branches', 'parameters', 'multiply_adds'):
    before, after = summary.get(field), summary.get(f'{field}_pruned')
    if before and after is not None:
      whole, left = _counts(before, after)
      sizes.append(
        (field.replace('_', '-'), after / before, f'{left} of {whole}')
      )
  return html.section(
    'results',
    'Results',
    html.grid(
      steps,
      charts.bars('What pruning left', sizes, about=_cost(summary)),
      _per_class(summary),
      _confusion(record, summary),
    ),
  )


def _cost(summary: dict[str, Any]) -> str:
  """Returns what the bars of the sizes count, in words."""
  words = 'Multiply-adds are those of an image; each is two FLOPs.'
  batch = summary.get('batch_images')
  if batch:
    before, after = (
      f'{1e3 * summary[name]:.3g} ms'
      for name in ('batch_seconds', 'batch_seconds_pruned')
    )
    words += f' A batch of {batch:,} test images takes {before}'
    if summary['parameters'] == summary['parameters_pruned']:
      return f'{words}.'
    words += f' before pruning and {after} after.'
    if 'branches' not in summary:
      words += ' Blocks that nothing reads are skipped before it, too.'
  return words


def _class(record: Record, number: Any) -> str:
  at = int(number)
  return record.classes[at] if at < len(record.classes) else str(at)


def _per_class(summary: dict[str, Any]) -> str:
  """Returns the accuracy of each class, the lowest first."""
  found = summary.get('class_accuracy', summary.get('per_class_accuracy'))
  if not found:
    return ''
  known = [(name, value) for name, value in found.items() if value is not None]
  known.sort(key=lambda pair: pair[1])
  title = 'Accuracy of each class'
  if len(known) > _LISTED:
    title = f'The {_LISTED} classes with the lowest accuracy'
  return charts.bars(title, [(n, v, _percent(v)) for n, v in known[:_LISTED]])


def _confusion(record: Record, summary: dict[str, Any]) -> str:
  """Returns the confusion matrix, and the classes that are confused most."""
  found = summary.get('confusion')
  if not found:
    return ''
  wrong = [
    (count, label, taken)
    for label, row in found.items()
    for taken, count in row.items()
    if taken != label
  ]
  wrong.sort(key=lambda one: -one[0])
  listed = html.table(
    ['class', 'taken for', 'images'],
    [(label, taken, f'{count:,}') for count, label, taken in wrong[:_LISTED]],
    caption='Most frequent confusions',
  )
  # Names of twins end in their number there, so the record's own come first.
  known = {*record.classes} >= {*found}
  order = list(record.classes) if known else sorted(found)
  order += sorted({t for row in found.values() for t in row} - {*order})
  size = len(order)
  if size > _MOST_CLASSES:
    return listed if wrong else ''
  place = {name: at for at, name in enumerate(order)}
  cells = []
  for label, row in found.items():
    for taken, count in row.items():
      words = f'{label} taken for {taken}: {count:,}'
      cells.append(
        f'<rect class="cell" x="{place[taken]}" y="{place[label]}"'
        f' style="--r:{count / sum(row.values()):.3g}">'
        f'<title>{html.text(words)}</title></rect>'
      )
  room = below = 0
  names = ''
  if size <= _NAMED:
    shown = [
      name if len(name) <= _LETTERS else f'{name[: _LETTERS - 1]}…'
      for name in order
    ]
    longest = max(map(len, shown))
    room = 8 + round(5.8 * longest)
    below = 12 + round(4.5 * longest)
    # Short names stand below their columns, long ones lean.
    lean = longest > 2
    for at, name in enumerate(map(html.text, shown)):
      middle = 1 + 320 / size * (at + 0.5)
      down = f'{middle + (4 if lean else 0):.1f} {324 + 9}'
      turned = ' rotate(-45)' if lean else ''
      names += (
        f'<text x="-6" y="{middle + 3.5:.1f}" text-anchor="end">{name}</text>'
        f'<text transform="translate({down}){turned}"'
        f' text-anchor="{"end" if lean else "middle"}">{name}</text>'
      )
  drawing = (
    f'<svg class="matrix confusion" role="img"'
    f' viewBox="{-room} 0 {322 + room} {322 + below}"'
    ' aria-label="Confusion matrix: a row for each class, a column for what it'
    ' is taken for"><rect class="frame" x="1" y="1" width="320" height="320"/>'
    f'<g transform="translate(1 1) scale({320 / size:.4f})">{"".join(cells)}'
    f'</g>{names}</svg>'
  )
  return html.figure(
    'Confusion matrix',
    drawing
    + (html.folded('Most frequent confusions', listed) if wrong else ''),
    about='A row for each class, a column for each class that its images are'
    ' taken for. The stronger the colour, the larger the share of the row.',
  )


def _examples(record: Record) -> str:
  own = record.examples
  if own is None or not len(own.labels):
    return ''
  right = own.labels == own.predicted
  parts = []
  for title, chosen in (('Wrong', ~right), ('Right', right)):
    shown = [_example(record, own, int(at)) for at in np.flatnonzero(chosen)]
    if shown:
      parts.append(
        f'<h3>{title}</h3><ul class="examples">{"".join(shown)}</ul>'
      )
  return html.section(
    'examples',
    'Test images',
    *parts,
    about='Some that the pruned network gets wrong, and some that it gets'
    ' right.',
  )


def _example(record: Record, own: Examples, at: int) -> str:
  image = own.images[at]
  buffer = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
    buffer, 'PNG', optimize=True
  )
  content = base64.b64encode(buffer.getvalue()).decode()
  label, found = (
    _class(record, n) for n in (own.labels[at], own.predicted[at])
  )
  words = label
  if own.labels[at] != own.predicted[at]:
    words = f'{label}, taken for {found}'
  small = ' class="small"' if image.shape[0] < 64 else ''
  return (
    f'<li><img{small} src="data:image/png;base64,{content}" width="96"'
    f' height="96" alt=""><span>{html.text(words)}</span></li>'
  )


def _origin(record: Record) -> str:
  """Returns the config, the versions and the command that repeats the run."""
  folder = shlex.quote(record.workdir)
  new = shlex.quote(f'{record.workdir}-again')
  again = (
    f'mkdir -p {new} && cp {folder}/config.json {new}\n'
    f'python -m maskconnect_jax.main --workdir={new}'
  )
  predict = (
    f'python -m maskconnect_jax.main --mode=predict --workdir={folder}'
    ' --images=photo.png'
  )
  changed = [
    (path, _value(record.config[path])) for path in sorted(record.changed)
  ]
  every = [(path, _value(v)) for path, v in sorted(record.config.items())]
  return html.section(
    'origin',
    'Config, versions, command',
    html.table(
      ['field', 'value'], changed, caption='Fields that differ from defaults'
    )
    if changed
    else '',
    html.folded(
      'All fields', html.table(['field', 'value'], every, caption='Config')
    ),
    html.table(
      ['software', 'version'],
      list(record.versions.items()),
      caption='Versions that the run ended with',
    )
    if record.versions
    else '',
    html.figure('Train it again', html.commands(again)),
    html.figure('Use the model', html.commands(predict))
    if record.summary
    else '',
  )


def _value(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)
