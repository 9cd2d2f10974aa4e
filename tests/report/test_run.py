"""The page of a run, parsed, against the files of the run."""

import json
import math
import re
import threading
import time

import numpy as np
import pytest

from maskconnect_jax.errors import InputError
from maskconnect_jax.report import charts, wiring
from maskconnect_jax.run import inference, report


@pytest.fixture(scope='module')
def page(narrowed, parsed):
  return parsed(report.write(narrowed))


@pytest.fixture(scope='module')
def branch_page(branched, parsed):
  return parsed(report.write(branched))


def facts(page):
  (found,) = page.all('facts')
  return {
    next(part.all('dt')).text: next(part.all('dd')).text
    for part in found.children
  }


def figure(page, title):
  return next(
    e
    for e in page.all('figure')
    if any(c.name == 'figcaption' and c.text == title for c in e.children)
  )


def test_its_numbers_are_those_of_the_summary(page):
  assert facts(page) == {
    'Test accuracy': '90.50 % 360 images, pruned network',
    'Blocks': '8 of 9 before pruning',
    'Parameters': '200 k of 269.4 k before pruning',
    'Multiply-adds per image': '2 M of 2.517 M before pruning',
  }
  pairs = next(page.all('pairs')).text
  assert pairs == (
    'Blocks with a choice at the last moment 7 Clear by two standard errors 3'
    ' Mean margin −0.2500 ± 0.1250 nats'
  )


def test_the_topology_is_drawn_wide_and_narrow(page, narrowed):
  record = json.loads((narrowed / 'topology.json').read_text())
  expected = {
    (str(i) if i else 'stem', str(block['block']))
    for block in record['blocks']
    for i in block['sources']
  } | {('9', 'head')}
  drawings = list(page.all('topology'))
  assert len(drawings) == 2
  for drawing in drawings:
    edges = list(drawing.all('edge'))
    assert len(edges) == len(expected)
    assert {(e.get('data-from'), e.get('data-to')) for e in edges} == expected
    nodes = list(drawing.all('node'))
    assert [n.get('data-node') for n in nodes] == ['stem', *'123456789', 'head']
    gone = [n.get('data-node') for n in nodes if 'pruned' in n.get('class')]
    assert gone == ['5']


def test_the_table_says_the_same(page, narrowed):
  record = json.loads((narrowed / 'topology.json').read_text())
  rows = [
    [cell.text for cell in row.children]
    for row in next(page.all('table')).all('tr')
  ][1:]
  assert [row[0] for row in rows] == [*'123456789']
  for row, block in zip(rows, record['blocks'], strict=True):
    read = [f'{i or "stem"} (1.00)' for i in block['sources']]
    assert row[2] == ', '.join(read)
    assert row[3] == ('pruned' if block['block'] == 5 else '')


def test_the_matrix_holds_every_recorded_mask(page, narrowed, levels_of):
  with np.load(narrowed / 'real_masks.npz') as file:
    steps, masks = file['steps'], file['masks']
  cells = list(next(page.all('matrix')).all('cell'))
  names = [cell.get('data-at') for cell in cells]
  assert names == [
    f'{j + 1} {i or "stem"}' for j in range(9) for i in range(j + 1)
  ]
  found, levels = levels_of(page)
  assert found == steps.tolist()
  below = np.tril_indices(9)
  for level, mask in zip(levels, masks, strict=True):
    assert level.tolist() == [round(100 * float(r)) for r in mask[below]]
  shown = [float(cell.get('style').partition(':')[2]) for cell in cells]
  np.testing.assert_allclose(shown, masks[-1][below], atol=1e-6)
  assert len(list(page.all('chosen'))) == 17


def test_how_many_sources_are_left(page, narrowed):
  with np.load(narrowed / 'real_masks.npz') as file:
    masks = file['masks']
  own = figure(page, 'Sources left of each block')
  assert len(list(own.all('stair'))) == 9
  last = int((masks[-1] == 1).sum())
  assert own.text.endswith(
    f'45 edges at the start, {last} at step 40. In the colours of the stages.'
  )


def test_the_log_is_drawn_from_its_first_to_its_last_step(page, narrowed):
  lines = (narrowed / 'metrics.jsonl').read_text().splitlines()
  traces = figure(page, 'Accuracy').all('line')
  (path,) = (e for e in traces if e.name == 'path')
  points = re.findall(r'([\d.]+) ([\d.]+)', path.get('d'))
  assert len(points) == len(lines)
  x = [float(a) for a, _ in points]
  steps = [json.loads(line)['step'] for line in lines]
  scale = (x[-1] - x[0]) / (steps[-1] - steps[0])
  for at, step in zip(x, steps, strict=True):
    assert at == pytest.approx(x[0] + scale * (step - steps[0]), abs=0.1)
  # The phase ends at 40 of 100 steps.
  band = next(figure(page, 'Accuracy').all('phase'))
  assert float(band.get('width')) / scale == pytest.approx(40, abs=0.5)


def test_classes_confusions_and_images(page):
  bars = list(figure(page, 'Accuracy of each class').all('li'))
  assert [bar.text for bar in bars] == ['<i>cat</i> 50.00 %', 'dog 100.00 %']
  (matrix,) = page.all('confusion')
  cells = {
    (c.get('y'), c.get('x')): float(c.get('style').partition(':')[2])
    for c in matrix.all('cell')
  }
  assert cells == {('0', '0'): 0.5, ('0', '1'): 0.5, ('1', '1'): 1}
  shown = [e.text for part in page.all('examples') for e in part.all('li')]
  assert shown == ['<i>cat</i>, taken for dog', 'dog', 'dog']


def test_text_of_files_is_escaped(page, narrowed):
  text = (narrowed / 'report.html').read_text()
  assert '<i>cat' not in text
  assert 'a<b>' not in text
  assert 'a<b>&"run' in next(page.all('title')).text


def test_it_is_one_small_file_that_loads_nothing(page, narrowed):
  path = narrowed / 'report.html'
  assert path.stat().st_size < 3_000_000
  for element in page.all('link'):
    assert element.get('href').startswith('data:')
  for element in page.all('img'):
    assert element.get('src').startswith('data:')
  assert not [e for e in page.all('script') if e.get('src')]
  style = next(page.all('style')).words
  assert 'url(' not in style
  assert '@import' not in style
  addresses = set(re.findall(r'https?://[^"\'<> ]+', path.read_text()))
  assert addresses == {'http://www.w3.org/2000/svg'}


def test_a_large_network_keeps_the_page_small():
  """resnext50_32x4d with K = 16 and a thousand records of its real mask."""
  rng = np.random.default_rng(0)
  sources = [[list(range(c % 17, c % 17 + 16)) for c in range(32)]] * 15
  own = wiring.Wiring(
    sources=sources, stages=[0] * 3 + [1] * 4 + [2] * 6 + [3] * 3,
    live=[list(range(32))] * 16, frozen=True,
    valid=np.ones((15, 32, 32), bool), steps=np.arange(1000),
    masks=np.repeat(rng.random((1, 15, 32, 32), np.float32), 1000, 0),
    narrows=False, fan_in=16,
  )  # fmt: skip
  text = wiring.matrix(own)
  assert len(text) < 2_500_000
  assert text.count('class="cell"') == 15 * 32 * 32
  assert '7,680 edges are too many' in wiring.drawing(own, 'a title')


def test_ids_are_unique_and_labels_lead_somewhere(page, branch_page):
  for own in (page, branch_page):
    every = list(own.all_elements())
    ids = [e.get('id') for e in every if e.get('id')]
    assert len(ids) == len(set(ids))
    for element in every:
      for name in ('aria-labelledby', 'for'):
        assert set(element.get(name).split()) <= set(ids)
      if element.name == 'svg':
        assert element.get('aria-label')


def test_branches_are_columns_and_matrices(branch_page, branched, levels_of):
  with np.load(branched / 'real_masks.npz') as file:
    masks = file['masks']
  for drawing in branch_page.all('topology'):
    assert len(list(drawing.all('node'))) == 50
    assert len(list(drawing.all('edge'))) == 5 * 16 + 16
  steps, levels = levels_of(branch_page)
  assert steps == [10, 20, 30, 40]
  assert levels.shape == (4, 5 * 64)
  expected = [round(100 * float(r)) for r in masks[2].ravel()]
  assert levels[2].tolist() == expected
  matrices = list(branch_page.all('matrix'))
  assert [len(list(m.all('cell'))) for m in matrices] == [64] * 5
  assert next(matrices[1].all('cell')).get('data-at') == '3.1 2.1'


def test_entropy_and_share_of_the_largest(branched):
  """By loops over rows, at the temperature of each step."""
  record = report.read(branched)
  with np.load(branched / 'real_masks.npz') as file:
    steps, masks = file['steps'], file['masks']
  before = None
  for at, (step, mask) in enumerate(zip(steps, masks, strict=True)):
    entropy, share, edges = [], [], set()
    for row, r in enumerate(mask.reshape(-1, 8).astype(np.float64)):
      weights = r ** (1 / 0.1 ** (step / 40))
      p = weights / weights.sum()
      entropy.append(-sum(a * math.log(a) for a in p) / math.log(8))
      largest = sorted(r)[-2:]
      share.append(sum(largest) / sum(r))
      edges |= {(row, i) for i in range(8) if r[i] in largest}
    assert record.entropies[at] == pytest.approx(np.mean(entropy), rel=1e-4)
    assert record.shares[at] == pytest.approx(np.mean(share), rel=1e-5)
    assert record.changes[at] == len(edges - (before or edges))
    before = edges


def test_a_run_writes_its_page(finished, parsed):
  page = parsed(finished.workdir / 'report.html')
  accuracy = finished.summary['test_accuracy_pruned']
  assert facts(page)['Test accuracy'].startswith(f'{100 * accuracy:.2f} %')
  with np.load(finished.workdir / 'examples.npz') as file:
    images, predicted = file['images'], file['predicted']
    right = file['labels'] == predicted
  model = inference.load(finished.workdir)
  assert predicted.tolist() == model.predict(images).argmax(-1).tolist()
  shown = [len(list(part.all('li'))) for part in page.all('examples')]
  assert shown == [n for n in ((~right).sum(), right.sum()) if n]
  assert sum(shown) <= 24
  # One more look at the workdir gives the same page.
  before = (finished.workdir / 'report.html').read_bytes()
  assert report.read(finished.workdir).summary == finished.summary
  assert report.page.page(report.read(finished.workdir)).encode() == before


def versions_of(page):
  (section,) = (e for e in page.all('section') if e.get('id') == 'origin')
  rows = [
    [cell.text for cell in row.children]
    for table in section.all('table')
    if next(table.all('th')).text == 'software'
    for row in list(table.all('tr'))[1:]
  ]
  return [tuple(row) for row in rows]


def test_the_versions_are_those_of_the_run(
  tmp_path, make_run, narrowing_rows, parsed
):
  recorded = {
    'python': '3.99.1', 'maskconnect_jax': '7', 'jax': '1', 'jaxlib': '2',
    'flax': '3', 'numpy': '4',
  }  # fmt: skip
  folder = make_run(tmp_path / 'run', rows=narrowing_rows, summary=recorded)
  assert versions_of(parsed(report.write(folder))) == [*recorded.items()]
  # Earlier runs recorded JAX's alone, and no time of a batch.
  old = make_run(tmp_path / 'old', rows=narrowing_rows, summary={})
  page = parsed(report.write(old))
  assert versions_of(page) == [('jax', '0.10.2')]
  assert figure(page, 'What pruning left').text.endswith('is two FLOPs.')
  going = make_run(tmp_path / 'going', rows=narrowing_rows)
  assert versions_of(parsed(report.write(going))) == []


@pytest.mark.parametrize(
  ('left', 'words'),
  [
    (200000, ' A batch of 64 test images takes 20 ms before pruning and 15.2 ms'
     ' after. Blocks that nothing reads are skipped before it, too.'),
    (269434, ' A batch of 64 test images takes 20 ms.'),
  ],
)  # fmt: skip
def test_how_long_a_batch_takes(
  tmp_path, make_run, narrowing_rows, parsed, left, words
):
  folder = make_run(
    tmp_path / 'run', rows=narrowing_rows,
    summary={'batch_images': 64, 'batch_seconds': 0.02,
             'batch_seconds_pruned': 0.0152, 'parameters_pruned': left},
  )  # fmt: skip
  page = parsed(report.write(folder))
  own = figure(page, 'What pruning left').text
  assert own.endswith(f'each is two FLOPs.{words}')
  (training,) = (e for e in page.all('section') if e.get('id') == 'training')
  assert '100 steps in 25 s, 100 images per second on 1 × cpu.' in training.text


def test_labels_of_an_axis_are_short():
  """So short that none is cut off at the left of a phone."""
  for values in ([0.25, 0.25015], [0.9, 1.0], [1.0, 1.0]):
    drawn = charts.lines('a', [charts.Line('', [0, 9], values)], total=9,
                         percent=True)  # fmt: skip
    labels = re.findall(r'([\d.]+ %)</text>', drawn)
    assert len(labels) >= 2
    assert max(map(len, labels)) <= 6
  for most, label in ((8000, '8,000'), (4e5, '400 k'), (2e6, '2 M')):
    drawn = charts.lines('a', [charts.Line('', [0, 9], [0, most])], total=9)
    assert f'>{label}</text>' in drawn


def test_following_ends_with_the_run(tmp_path, make_run, narrowing_rows):
  folder = make_run(tmp_path / 'run', rows=narrowing_rows)
  said, written = [], []
  (folder / 'topology.json').rename(tmp_path / 'topology.json')

  def finish():
    while not said:
      time.sleep(0.02)
    written.append((folder / 'report.html').read_text())
    (tmp_path / 'topology.json').rename(folder / 'topology.json')
    make_run(tmp_path / 'other', rows=narrowing_rows, summary={})
    (tmp_path / 'other' / 'summary.json').rename(folder / 'summary.json')

  other = threading.Thread(target=finish)
  other.start()
  path = report.follow(folder, said.append, seconds=0.05)
  other.join()
  assert said == [f'{path} follows the run; Ctrl-C ends this, not the run']
  assert 'http-equiv="refresh"' in written[0]
  assert 'of 100' in written[0]
  assert 'http-equiv="refresh"' not in path.read_text()
  assert 'Test accuracy' in path.read_text()


def test_damage_is_named(tmp_path, make_run, narrowing_rows):
  folder = make_run(tmp_path / 'run', rows=narrowing_rows, summary={})
  (folder / 'examples.npz').write_bytes(b'PK')
  with pytest.raises(InputError, match='examples.npz is damaged.*delete it'):
    report.write(folder)
  (folder / 'examples.npz').unlink()
  np.savez(
    folder / 'real_masks.npz', steps=np.array([1]),
    masks=np.zeros((1, 3, 3), np.float32),
  )  # fmt: skip
  with pytest.raises(InputError, match=r'shape \(3, 3\).*takes \(9, 9\)'):
    report.write(folder)


def test_flags(cli, narrowed, tmp_path):
  ran = cli('--mode=report', f'--workdir={narrowed}')
  assert (ran.code, ran.out) == (0, f'{narrowed}/report.html\n')
  for flags, message in (
    ([f'--workdir={tmp_path}'], 'holds no config.json'),
    ([f'--workdir={narrowed}', '--html=a.html'], '--html is for several'),
    ([f'--workdirs={narrowed}', '--follow'], '--follow and --workdir are'),
    ([], 'needs --workdir'),
  ):
    ran = cli('--mode=report', *flags)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count('\n') == 1
