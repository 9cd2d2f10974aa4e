"""The sections of a page that show a run over its steps."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from maskconnect_jax.report import charts, html, wiring
from maskconnect_jax.report.charts import Line
from maskconnect_jax.report.record import Record

# What the margin is, by whether the wiring was measured.
_MARGIN = {
  True: 'Margin: by how much the training loss misses the last source that'
  ' stays more than the first that goes.',
  False: 'Margin: the entry of the last source that stays, less that of the'
  ' first that goes.',
}


def real_mask(record: Record) -> str:
  """Returns the section of the real mask; '' if none was recorded."""
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


def training(record: Record) -> str:
  """Returns the section of the training; '' before the first log line."""
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
  several = record.config['data.multi_label']
  accuracy = 'label_accuracy' if several else 'accuracy'
  means = chart(
    'Mean average precision',
    [Line(held, steps, column(f'{held}_map'), 1, dots=True)],
    percent=True,
  )
  return html.section(
    'training',
    'Training',
    html.grid(
      means if several else '',
      chart(
        'Accuracy of labels' if several else 'Accuracy',
        [
          Line('training batches', steps, column('accuracy')),
          Line(held, steps, column(f'{held}_{accuracy}'), 1, dots=True),
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
