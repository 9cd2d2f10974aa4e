"""The section of a page that shows what a run came to."""

from __future__ import annotations

from typing import Any

from maskconnect_jax.report import charts, html
from maskconnect_jax.report.record import Record

_MOST_CLASSES = 100  # of a confusion matrix with cells
_LISTED = 20  # classes and pairs in a list
_NAMED, _LETTERS = 20, 12  # classes of a matrix with names, and their letters


def counts(before: int, after: int) -> tuple[str, str]:
  """Returns two counts in words, in the unit that suits the first."""
  for least, unit, word in ((1e9, 1e9, 'G'), (1e6, 1e6, 'M'), (1e5, 1e3, 'k')):
    if before >= least:
      return f'{before / unit:.4g} {word}', f'{after / unit:.4g} {word}'
  return f'{before:,}', f'{after:,}'


def percent(share: float | None) -> str:
  """Returns a share in words; a dash if it is unknown."""
  return '–' if share is None else f'{100 * share:.2f} %'


def results(record: Record) -> str:
  """Returns the section of the results; '' before the run is finished."""
  summary = record.summary
  if summary is None:
    return ''
  own, words = record.metric
  held = 'validation' if f'validation_{own}' in summary else 'test'
  rows = [
    ('before the freeze', summary.get(f'{held}_{own}_drawn'), held),
    ('at the freeze', summary.get(f'{held}_{own}_at_freeze'), held),
    ('after fine-tuning', summary.get(f'{held}_{own}'), held),
    ('after pruning', summary.get(f'test_{own}_pruned'), 'test'),
  ]
  steps = charts.bars(
    f'{html.heading(words)} along the run',
    [
      (f'{name}, {images}', value, percent(value))
      for name, value, images in rows
      if value is not None
    ],
  )
  sizes = []
  for field in ('blocks', 'branches', 'parameters', 'multiply_adds'):
    before, after = summary.get(field), summary.get(f'{field}_pruned')
    if before and after is not None:
      whole, left = counts(before, after)
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


def _per_class(summary: dict[str, Any]) -> str:
  """Returns the accuracy or the AP of each class, the lowest first."""
  words = 'accuracy'
  found = summary.get('class_accuracy', summary.get('per_class_accuracy'))
  if 'class_average_precision' in summary:
    words, found = 'average precision', summary['class_average_precision']
  if not found:
    return ''
  known = [(name, value) for name, value in found.items() if value is not None]
  known.sort(key=lambda pair: pair[1])
  title = f'{html.heading(words)} of each class'
  if len(known) > _LISTED:
    title = f'The {_LISTED} classes with the lowest {words}'
  return charts.bars(title, [(n, v, percent(v)) for n, v in known[:_LISTED]])


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
