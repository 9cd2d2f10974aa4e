"""The page of many runs, parsed, against their files."""

import itertools
import json
import statistics

import pytest

OTHER = [[0], [0, 1], [1, 2], [1, 3], [0, 4], [3, 4], [5, 6], [6, 7], [2, 8]]
ACCURACIES = {'learned': [0.9, 0.92, 0.97], 'fixed_prev': [0.8, 0.85, 0.81]}


@pytest.fixture(scope='module')
def folder(tmp_path_factory, make_run, narrowing_rows):
  """Two rules with three seeds each, and a run that is not finished."""
  runs = tmp_path_factory.mktemp('study')
  learned = [narrowing_rows, OTHER, narrowing_rows]
  for rule, accuracies in ACCURACIES.items():
    for seed, accuracy in enumerate(accuracies):
      rows = learned[seed] if rule == 'learned' else [[j] for j in range(9)]
      make_run(
        runs / rule / f'seed{seed}', rows=rows, seed=seed, rule=rule,
        summary={'test_accuracy_pruned': accuracy},
      )  # fmt: skip
  make_run(runs / 'late', rows=OTHER, seed=9)
  return runs


@pytest.fixture(scope='module')
def page(folder, parsed):
  from maskconnect_jax.study import report

  (folder / 'learned' / 'seed1' / 'report.html').write_text('its own')
  return parsed(report.write([folder]))


def rows_of(page, section):
  (found,) = (e for e in page.all('section') if e.get('id') == section)
  return [
    row
    for row in next(found.all('strips')).children
    if 'axis' not in row.get('class')
  ]


def test_every_seed_is_a_dot_at_its_accuracy(page):
  found = {next(row.all('name')).text: row for row in rows_of(page, 'accuracy')}
  assert set(found) == {'rule=learned', 'rule=fixed_prev'}
  places, values = [], []
  for rule, accuracies in ACCURACIES.items():
    dots = list(found[f'rule={rule}'].all('i'))
    assert [dot.get('title') for dot in dots] == [
      f'seed {seed}: {100 * accuracy:.2f} %'
      for seed, accuracy in enumerate(accuracies)
    ]
    (mean,) = found[f'rule={rule}'].all('b')
    dots.append(mean)
    assert (
      mean.get('title') == f'mean {100 * statistics.fmean(accuracies):.2f} %'
    )
    places += [float(dot.get('style')[5:-1]) for dot in dots]
    values += [*accuracies, statistics.fmean(accuracies)]
  assert min(places) >= 0
  assert max(places) <= 100
  # Places rise with the accuracies, in proportion.
  low, high = values.index(min(values)), values.index(max(values))
  scale = (places[high] - places[low]) / (values[high] - values[low])
  for place, value in zip(places, values, strict=True):
    expected = places[low] + scale * (value - values[low])
    assert place == pytest.approx(expected, abs=0.05)


def test_the_table(page):
  rows = {
    row.children[0].text: [cell.text for cell in row.children[1:]]
    for row in next(page.all('tbody')).children
  }
  deviation = 100 * statistics.stdev(ACCURACIES['learned'])
  assert rows['rule=learned'][:3] == [
    '3 (0, 1, 2)', f'93.00 ± {deviation:.2f} %', '200,000',
  ]  # fmt: skip
  assert 'late' in page.text.partition('Not finished')[2]


def test_agreement_of_seeds_against_chance(page, narrowing_rows):
  """Sets of edges; blocks 1 and 2 take all they have, and do not count."""
  edges = [
    {(j, i) for j, row in enumerate(rows) if j > 1 for i in row}
    for rows in (narrowing_rows, OTHER, narrowing_rows)
  ]
  shares = [len(a & b) / 14 for a, b in itertools.combinations(edges, 2)]
  (row,) = rows_of(page, 'agreement')
  assert [dot.get('title') for dot in row.all('i')] == [
    f'seeds {a} and {b}: {100 * share:.2f} %'
    for (a, b), share in zip([(0, 1), (0, 2), (1, 2)], shares, strict=True)
  ]
  # Two uniform choices of 2 of n share each of the 2 with probability 2 / n.
  chance = statistics.fmean(2 / n for n in range(3, 10))
  assert f'chance {100 * chance:.1f} %' in row.text
  assert f'mean {100 * statistics.fmean(shares):.1f} %' in row.text


def test_a_topology_for_each_run_with_a_link_to_its_page(page, folder):
  drawings = list(page.all('topology'))
  labels = [drawing.get('aria-label') for drawing in drawings]
  assert len(labels) == len(set(labels)) == 6
  for drawing in drawings:
    rule, _, seed = drawing.get('aria-label')[17:].partition(', seed ')
    path = folder / rule / f'seed{seed}' / 'topology.json'
    blocks = json.loads(path.read_text())['blocks']
    count = sum(len(block['sources']) for block in blocks)
    assert len(list(drawing.all('edge'))) == count + 1
  links = [a.get('href') for a in page.all('a')]
  assert links == ['learned/seed1/report.html']


def test_flags(cli, folder, tmp_path):
  ran = cli(
    '--mode=report', f'--workdirs={folder}', f'--html={tmp_path}/a.html'
  )
  assert (ran.code, ran.out) == (0, f'{tmp_path}/a.html\n')
  one = folder / 'learned' / 'seed0'
  for flags, message in (
    ([f'--workdirs={folder}', f'--workdirs={one}'], 'need --html=FILE.html'),
    ([f'--workdirs={one}'], 'give it as --workdir'),
    ([f'--workdirs={folder}', '--html=a.png'], 'must end in .html'),
    (
      [f'--workdirs={folder / "late"}', f'--html={tmp_path}/b.html'],
      'finished',
    ),
  ):
    ran = cli('--mode=report', *flags)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count('\n') == 1
