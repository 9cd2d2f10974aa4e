"""The table of many runs, against NumPy and by hand."""

import csv
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from maskconnect_jax import config as config_lib
from maskconnect_jax.figures import summary as summary_plots
from maskconnect_jax.study import summarize

SUMMARY = {
  'test_accuracy': 0.5,  # before pruning: not what the table is of
  'test_accuracy_at_freeze': 0.9999,
  'parameters': 1000,
  'parameters_pruned': 900,
  'images_per_second': 10.0,
  'device': 'cpu',
  'num_devices': 1,
}


@pytest.fixture
def run(tmp_path):
  """Makes the workdir of a run; without an accuracy it is unfinished."""

  def make(path, accuracy=None, *, summary=None, **fields):
    workdir = tmp_path / path
    workdir.mkdir(parents=True)
    config = config_lib.default()
    fields = {name.replace('__', '.'): v for name, v in fields.items()}
    config.update_from_flattened_dict(fields)
    (workdir / 'config.json').write_text(config.to_json())
    if accuracy is not None:
      record = SUMMARY | {'test_accuracy_pruned': accuracy} | (summary or {})
      (workdir / 'summary.json').write_text(json.dumps(record))
    return workdir

  return make


def test_against_numpy(run, tmp_path, cli):
  rng = np.random.default_rng(0)
  expected = {}
  for rule, count in (('learned', 5), ('fixed_prev', 2), ('fixed_all', 1)):
    accuracy = rng.uniform(size=count)
    pruned = rng.integers(100, 1000, size=count)
    speed = rng.uniform(100, 1000, size=count)
    for seed in rng.permutation(count):
      run(
        f'deep/er/{rule}{seed}',
        accuracy[seed],
        seed=int(seed) + 3,
        connectivity__rule=rule,
        summary={
          'parameters_pruned': int(pruned[seed]),
          'images_per_second': speed[seed],
        },
      )
    expected[f'rule={rule}'] = accuracy, pruned, speed
  ran = cli(
    '--mode=summarize', f'--workdirs={tmp_path}', f'--csv={tmp_path / "t.csv"}'
  )
  assert ran.code == 0
  with (tmp_path / 't.csv').open(newline='') as file:
    rows = {row['row']: row for row in csv.DictReader(file)}
  assert rows.keys() == expected.keys()
  for name, (accuracy, pruned, speed) in expected.items():
    row = rows[name]
    numbers = {
      'test_accuracy_mean': np.mean(accuracy),
      'test_accuracy_best': np.max(accuracy),
      'parameters_mean': 1000,
      'parameters_pruned_mean': np.mean(pruned),
      'parameters_pruned_min': np.min(pruned),
      'parameters_pruned_max': np.max(pruned),
      'images_per_second': np.median(speed),
      'num_seeds': len(accuracy),
    }
    for field, value in numbers.items():
      assert float(row[field]) == pytest.approx(float(value), rel=1e-12)
    assert row['seeds'].split() == [str(s + 3) for s in range(len(accuracy))]
    if len(accuracy) > 1:
      std = np.std(accuracy, ddof=1)
      assert float(row['test_accuracy_std']) == pytest.approx(std, rel=1e-12)
      shown = f'{100 * np.mean(accuracy):.2f} ± {100 * std:.2f} %'
    else:
      assert row['test_accuracy_std'] == ''
      shown = f'{100 * accuracy[0]:.2f} ± - %'
    (line,) = [x for x in ran.out.splitlines() if x.startswith(f'| {name} |')]
    assert f' {shown} ' in line


def test_the_table_by_hand(run, tmp_path):
  fields = {'model__name': 'resnet20', 'optimizer__steps_at': ('50%',)}
  for seed, accuracy, pruned in ((0, 0.99, 900), (1, 0.98, 1100), (4, 0.97, 1)):
    run(
      f'{seed}', accuracy, seed=seed, duration='30 epochs', **fields,
      summary={'parameters_pruned': pruned, 'parameters': 1234567},
    )  # fmt: skip
  text = summarize.summarize([tmp_path]).markdown()
  assert text.splitlines()[2] == (
    '| resnet20 learned | 3 (0, 1, 4) | 30 epochs | 98.00 ± 1.00 % | 99.00 %'
    ' | 1,234,567 | 667 (1 to 1,100) | 10 | 1 x cpu |'
  )
  assert 'never that of the best epoch' in text
  assert 'Devices differ' not in text
  assert 'Not finished' not in text


def test_rows_are_named_by_what_differs(run, tmp_path):
  run('a', 0.1, connectivity__fan_in=2, masks__learning_rate=0.1)
  run('b', 0.1, connectivity__fan_in=3, masks__learning_rate=0.2)
  names = [row.name for row in summarize.summarize([tmp_path]).rows]
  assert names == [
    'fan_in=2 masks.learning_rate=0.1',  # the optimizer has a rate too
    'fan_in=3 masks.learning_rate=0.2',
  ]


def test_a_study_of_one_factor_at_a_time(run, tmp_path):
  for n, fields in enumerate(
    (
      {},
      {'connectivity__fan_in': 2},
      {'masks__learning_rate': 0.3},
      {'masks__learning_rate': 0.3, 'connectivity__scale': 'sum'},
      {'connectivity__fan_in': 8},
    )
  ):
    run(f'{n}', 0.5, **fields)
  table = summarize.summarize([tmp_path])
  assert [row.name for row in table.rows] == [
    'resnet38 learned',
    'fan_in=2',
    'masks.learning_rate=0.3',
    'scale=sum masks.learning_rate=0.3',
    'fan_in=8',
  ]
  assert (
    'Where a row does not say otherwise: fan_in=4, scale=mean,'
    ' masks.learning_rate=1.0.'
  ) in table.markdown()


def test_the_figure_of_accuracy_against_cost(run, tmp_path, cli):
  for name, fields in {
    'one': {'connectivity__fan_in': 1},
    'two': {'connectivity__fan_in': 2},
    'chain': {'connectivity__rule': 'fixed_prev', 'model__width': 8},
  }.items():
    run(
      f'runs/{name}', 0.5, **fields,
      summary={'parameters_pruned': 1000, 'multiply_adds_pruned': 2000},
    )  # fmt: skip
  path = tmp_path / 'trade.png'
  command = (
    '--mode=summarize', f'--workdirs={tmp_path / "runs"}', f'--figure={path}',
  )  # fmt: skip
  for against, words in (
    ('parameters', 'parameters'), ('multiply_adds', 'multiply-adds'),
  ):  # fmt: skip
    assert cli(*command, f'--against={against}').code == 0
    svg = ElementTree.parse(path.with_suffix('.svg'))
    text = [one.text for one in svg.iter() if one.text]
    assert f'Test accuracy against {words}' in text
    assert {'K = 1', 'K = 2', 'resnet38, width 8', 'fixed-prev'} <= set(text)
  run('runs/old', 0.5, connectivity__fan_in=4)
  ran = cli(*command, '--against=multiply_adds')
  assert ran.code == 2
  assert 'old/summary.json has no multiply_adds_pruned' in ran.err


@pytest.mark.parametrize('held_out', [0, 1000])
def test_the_figure_has_a_dot_for_every_seed(run, tmp_path, cli, held_out):
  accuracies = {1: (0.5, 0.625), 2: (0.75,), 3: (0.25, 0.375, 0.5)}
  for fan_in, values in accuracies.items():
    for seed, accuracy in enumerate(values):
      run(
        f'runs/{fan_in}-{seed}', 0.01 if held_out else accuracy, seed=seed,
        connectivity__fan_in=fan_in, data__validation=held_out,
        summary={'validation_accuracy': accuracy},
      )  # fmt: skip
  path = tmp_path / 'accuracy.png'
  summarize_runs = '--mode=summarize', f'--workdirs={tmp_path / "runs"}'
  assert cli(*summarize_runs, f'--figure={path}').code == 0
  assert path.stat().st_size
  svg = ElementTree.parse(path.with_suffix('.svg'))
  text = [one.text for one in svg.iter() if one.text]
  assert f'{"Validation" if held_out else "Test"} accuracy' in text

  def across(name):  # x of each dot
    (group,) = (one for one in svg.iter() if one.get('id') == name)
    return [float(x) for one in group.iter() if (x := one.get('x'))]

  dots = [across(f'row-{row}') for row in (1, 2, 3)]
  expected = list(accuracies.values())
  assert [len(row) for row in dots] == [2, 1, 3]
  # One line brings fractions to points.
  a, b = np.polyfit(np.concatenate(expected), np.concatenate(dots), 1)
  assert a > 0
  for row, values in zip(dots, expected, strict=True):
    np.testing.assert_allclose(row, a * np.array(values) + b, atol=1e-3)
  bars = [a * np.mean(values) + b for values in expected]
  means = [
    re.findall(r'd="M ([\d.]+) ', ElementTree.tostring(one, 'unicode'))
    for row in (1, 2, 3)
    for one in svg.iter()
    if one.get('id') == f'row-{row}-mean'
  ]
  assert [float(x) for (x,) in means] == pytest.approx(bars, abs=0.02)
  names = [one for one in text if one.startswith('fan_in')]
  assert names == [f'fan_in={k}' for k in accuracies]


def test_outputs_are_looked_at_before_the_runs(tmp_path, cli, monkeypatch):
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'file').write_text('')
  (tmp_path / 'drawn.svg').mkdir()
  monkeypatch.chdir(tmp_path)

  def never(folders):
    raise AssertionError('it has begun')

  monkeypatch.setattr(summarize, 'summarize', never)
  for argument, says in (
    ('--csv=folder', 'folder is a folder'),
    ('--csv=file/t.csv', 'file is not a folder'),
    ('--csv=', '--csv='),
    ('--figure=folder', 'must end in .png'),
    ('--figure=a.pdf', 'must end in .png'),
    ('--figure=file/a.png', 'file is not a folder'),
    ('--figure=drawn.png', 'drawn.svg is a folder'),
  ):
    ran = cli('--mode=summarize', f'--workdirs={tmp_path}', argument)
    assert ran.code == 2, ran
    assert says in ran.err
    assert ran.err.count('\n') == 1
    assert ran.out == ''


def test_a_tilde_in_every_path(run, tmp_path, cli, monkeypatch):
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  monkeypatch.setenv('HOME', str(tmp_path))
  run('runs/a', 0.5)
  ran = cli(
    '--mode=summarize', '--workdirs=~/runs', '--csv=~/new/t.csv',
    '--figure=~/f.png',
  )  # fmt: skip
  assert ran.code == 0, ran.err
  for name in ('new/t.csv', 'f.png', 'f.svg'):
    assert (tmp_path / name).is_file()
  assert not list((tmp_path / 'here').iterdir())


def test_what_learned_nothing_does_not_stretch_the_figure():
  rows = [[0.7, 0.71], [0.72, 0.71, 0.7, 0.71], [0.1, 0.12], [0.69, 0.7]]
  whole = summary_plots.figure(list('abcd'), rows, 'title')
  (panel,) = whole.axes[0].child_axes
  assert 60 < panel.get_xlim()[0] < 69
  assert not any(line.get_gid().startswith('row-3') for line in panel.lines)
  assert '◂ 10.0 %, 12.0 %' in [text.get_text() for text in whole.axes[0].texts]


def test_no_figure(run, tmp_path, cli):
  run('a')
  arguments = '--mode=summarize', f'--workdirs={tmp_path}'
  for name, message in (('a.png', 'needs a run'), ('a.pdf', 'end in .png')):
    ran = cli(*arguments, f'--figure={tmp_path / name}')
    assert ran.code == 2
    assert message in ran.err
  with pytest.raises(ValueError, match='no rows'):
    summary_plots.figure([], [], '')
  with pytest.raises(ValueError, match='2 names for 1'):
    summary_plots.figure(['a', 'b'], [[0.5]], '')


def test_unfinished_and_other_devices(run, tmp_path):
  run('a', 0.5)
  run('b', 0.7, seed=1, summary={'device': 'TPU v4', 'num_devices': 4})
  unfinished = run('c', seed=2)
  table = summarize.summarize([tmp_path])
  (row,) = table.rows
  assert row.record()['test_accuracy_mean'] == pytest.approx(0.6)
  assert row.record()['device'] == '1 x cpu, 4 x TPU v4'
  assert f'Not finished, and in no row: {unfinished}.' in table.markdown()
  assert 'Devices differ' in table.markdown()


def test_only_unfinished(run, tmp_path):
  run('a')
  table = summarize.summarize([tmp_path])
  assert table.rows == []
  assert table.csv() == ''
  assert 'in no row' in table.markdown()


def test_a_run_given_twice_counts_once(run, tmp_path):
  workdir = run('a', 0.5)
  (row,) = summarize.summarize([workdir, tmp_path]).rows
  assert len(row.runs) == 1


def test_a_field_that_did_not_exist_yet_has_its_default(run, tmp_path):
  run('a', 0.5)
  older = run('b', 0.5, seed=1)
  record = json.loads((older / 'config.json').read_text())
  del record['seeds'], record['connectivity']['scale']
  (older / 'config.json').write_text(json.dumps(record))
  assert len(summarize.summarize([tmp_path]).rows) == 1


def test_images_that_lie_elsewhere_are_the_same_row(run, tmp_path):
  def inputs(digest):
    data = {'train': 3, 'test': 2, 'classes': ['a', 'b'], 'digest': digest}
    return {
      'schema': 'maskconnect_jax.inputs/1', 'data': data, 'topology': None
    }  # fmt: skip

  for seed, digest in enumerate(('one', 'one', 'two', None)):
    workdir = run(f'{seed}', 0.5, seed=seed, data__dir=f'/job{seed}')
    if digest:
      (workdir / 'inputs.json').write_text(json.dumps(inputs(digest)))
  run('4', 0.5, seed=4, data__dir='/job0')  # known by its config alone
  # A copy of the same images, asked for beside them, is a row of its own.
  copy = run('5', 0.5, seed=0, data__dir='/copy')
  (copy / 'inputs.json').write_text(json.dumps(inputs('one')))
  table = summarize.summarize([tmp_path])
  assert [[r.seed for r in row.runs] for row in table.rows] == [
    [0, 1, 4], [2], [3], [0],
  ]  # fmt: skip


def test_refusals(run, tmp_path, cli):
  def refused(*arguments):
    ran = cli('--mode=summarize', *arguments)
    assert ran.code == 2
    assert ran.out == ''
    assert ran.err.count('\n') == 1
    return ran.err

  assert 'needs --workdirs' in refused()
  assert f'{tmp_path} holds no run' in refused(f'--workdirs={tmp_path}')
  first, second = run('a', 0.5), run('b', 0.6)
  said = refused(f'--workdirs={first}', f'--workdirs={second}')
  assert f'{first} and {second} are the same config and seed' in said
  whole = json.loads((first / 'summary.json').read_text())
  for damaged in (
    '{', '{}', '[]', 'null', '[' * 10**5, '\ufeff{}',
    json.dumps(whole | {'parameters': 10**400}),
    json.dumps(whole | {'test_accuracy_pruned': None}),
    json.dumps(whole | {'test_accuracy_pruned': True}),
    json.dumps(whole | {'images_per_second': float('nan')}),
    json.dumps(whole | {'device': ['cpu']}),
  ):  # fmt: skip
    (first / 'summary.json').write_text(damaged)
    assert f'{first / "summary.json"} is' in refused(f'--workdirs={first}')
  (second / 'config.json').write_text('{')
  assert 'config.json is damaged' in refused(f'--workdirs={second}')


def test_a_real_run(finished):
  (row,) = summarize.summarize([finished.workdir]).rows
  record = row.record()
  summary = finished.summary
  assert row.name == 'resnet8 learned'
  assert record['seeds'] == '6'
  assert record['test_accuracy_mean'] == summary['test_accuracy_pruned']
  assert record['parameters_pruned_mean'] == summary['parameters_pruned']
  assert summary['parameters_pruned'] < record['parameters_mean']


def test_held_out_accuracy_has_a_column_of_its_own(run, tmp_path):
  for seed, accuracy in ((0, 0.5), (1, 0.6)):
    run(
      f'held{seed}', 0.4, seed=seed, data__validation=100,
      summary={'validation_accuracy': accuracy},
    )  # fmt: skip
  run('all', 0.3)
  table = summarize.summarize([tmp_path])
  head, _, everything, held = table.markdown().splitlines()[:4]
  assert '| validation | test accuracy |' in head
  assert '|  | 30.00 ± - % |' in everything
  assert '| 55.00 ± 7.07 % | 40.00 ± 0.00 % |' in held
  rows = {
    row['num_seeds']: row for row in csv.DictReader(table.csv().split('\n'))
  }
  assert float(rows['2']['validation_accuracy_std']) == pytest.approx(
    np.std([0.5, 0.6], ddof=1)
  )
  assert rows['1']['validation_accuracy_mean'] == ''
