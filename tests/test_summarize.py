"""The table of many runs, against NumPy and by hand."""

import csv
import json

import numpy as np
import pytest

from maskconnect_jax import config as config_lib
from maskconnect_jax import summarize

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
  said = refused(f'--workdirs={first},{second}')
  assert f'{first} and {second} are the same config and seed' in said
  for damaged in ('{', '{}', '[]'):
    (first / 'summary.json').write_text(damaged)
    assert f'{first / "summary.json"} is' in refused(f'--workdirs={first}')
  (second / 'config.json').write_text('{')
  assert 'config.json is damaged' in refused(f'--workdirs={second}')


def test_a_real_run(finished):
  (row,) = summarize.summarize([finished.workdir]).rows
  record = row.record()
  summary = finished.summary
  assert row.name == 'resnet8 learned'
  assert record['seeds'] == '5'
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
