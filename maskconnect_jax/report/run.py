"""The page of one run: its head, its topology and its origin.

The other sections are in `curves`, `results` and `examples`.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from maskconnect_jax.report import curves, examples, html, results, wiring
from maskconnect_jax.report.record import Record


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
      curves.real_mask(record),
      curves.training(record),
      results.results(record),
      examples.examples(record),
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
      f'Test {record.metric[1]}',
      results.percent(summary[f'test_{record.metric[0]}_pruned']),
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
  whole, left = results.counts(before, after)
  if before == after:
    return name, left, 'nothing pruned'
  return name, left, f'of {whole} before pruning'


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
