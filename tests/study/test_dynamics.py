"""What real masks did, against plain loops and against enumeration."""

import itertools
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from maskconnect_jax import config as config_lib
from maskconnect_jax import files
from maskconnect_jax.errors import InputError
from maskconnect_jax.figures import dynamics as dynamics_plots
from maskconnect_jax.method import topology
from maskconnect_jax.networks import models
from maskconnect_jax.run import metrics, plan
from maskconnect_jax.study import dynamics, trajectories

BLOCKS, BRANCHES, PER_EPOCH, FREEZE = 6, 8, 10, 20
STEPS = (3, 6, 9, 12, 15, 18)  # at 25, 50, 75 %, steps 5, 10, 15: 6, 9, 15
NEAREST = {0.25: 1, 0.5: 2, 0.75: 4}
START = 0.4


def random_masks(seed, *, level='block', count=6):
  """Values of many ties, 0 and 1 among them; a row of zeros at the end."""
  rng = np.random.default_rng(seed)
  shape = (BLOCKS, BLOCKS)
  if level == 'branch':
    shape = (BLOCKS - 1, BRANCHES, BRANCHES)
  masks = rng.integers(0, 5, (count, *shape)).astype(np.float32) / 4
  if level == 'block':
    masks *= np.tri(BLOCKS, dtype=np.float32)
    masks[-1, 4] = 0
  else:
    masks[-1, 2, 1] = 0
  return masks


def random_sources(seed, fan_in=2, *, level='block'):
  rng = np.random.default_rng(seed)

  def pick(n):
    return tuple(sorted(rng.permutation(n)[:fan_in].tolist()))

  if level == 'block':
    return tuple(pick(target + 1) for target in range(BLOCKS))
  return tuple(
    tuple(pick(BRANCHES) for _ in range(BRANCHES)) for _ in range(BLOCKS - 1)
  )


@pytest.fixture
def write(tmp_path):
  """Writes what a run leaves; without sources it has not finished."""

  def make(name, masks, sources=None, *, level='block', **fields):
    workdir = tmp_path / name
    workdir.mkdir()
    config = config_lib.default()
    config.duration, config.log_every = '4 epochs', '3 steps'
    config.model.name = 'resnet14' if level == 'block' else 'resnext20_8x4d'
    config.connectivity.level = level
    config.connectivity.learner = 'draws'
    config.connectivity.fan_in = 2
    config.connectivity.initial = START
    config.connectivity.phase = '50%'
    config.connectivity.temperature = 1.0
    fields = {path.replace('__', '.'): v for path, v in fields.items()}
    config.update_from_flattened_dict(fields)
    files.write_text(workdir / 'config.json', config.to_json())
    record = {'step': 3, 'phase': 'connectivity', 'epoch': 3 / PER_EPOCH}
    files.write_text(workdir / 'metrics.jsonl', json.dumps(record) + '\n')
    history = metrics.MaskHistory(workdir, 0)
    for step, mask in zip(STEPS, masks, strict=False):
      history.add(step, mask)
    history.save()
    if sources is not None:
      kind = topology.Topology
      if level == 'branch':
        kind = topology.BranchTopology
      files.write_json(workdir / 'topology.json', kind(sources).to_dict())
    return workdir

  return make


@pytest.fixture
def table():
  """Returns the cells of each row that is printed, by the first of them."""

  def run(*arguments):
    text = dynamics.report(arguments)
    lines = [line for line in text.splitlines() if line[:2] == '| ']
    cells = [line[2:-2].split(' | ') for line in lines]
    return {row[0]: row[1:] for row in cells if row[0] not in ('', '---')}, text

  return run


def numbers(cell):
  return [float(number) for number in re.findall(r'-?\d+(?:\.\d+)?', cell)]


def rows_of(masks, level, fan_in=2):
  """Yields, for rows with a choice, (block, index, values at every record)."""
  for t in range(BLOCKS):
    if level == 'block' and t + 1 > fan_in:
      yield t + 1, (t,), [[float(v) for v in m[t][: t + 1]] for m in masks]
  if level == 'branch':
    for i, c in itertools.product(range(BLOCKS - 1), range(BRANCHES)):
      yield i + 2, (i, c), [[float(v) for v in m[i][c]] for m in masks]


def entropy(values, temperature=1.0):
  values = [max(value, 1e-6) for value in values]
  values = [(value / max(values)) ** (1 / temperature) for value in values]
  shares = [value / math.fsum(values) for value in values]
  terms = [p * math.log(p) for p in shares if p]
  return -math.fsum(terms) / math.log(len(shares))


def largest(values, count):
  order = sorted(range(len(values)), key=lambda i: (-values[i], -i))
  return set(order[:count])


def live(sources, level):
  """Follows every link back from the output."""
  if level == 'branch':
    needed = {(BLOCKS, c) for c in range(BRANCHES)}
    for block in range(BLOCKS, 1, -1):
      for c in range(BRANCHES):
        if (block, c) in needed:
          needed |= {(block - 1, k) for k in sources[block - 2][c]}
    return [len(needed), BLOCKS * BRANCHES]
  needed = {BLOCKS}
  for block in range(BLOCKS, 0, -1):
    if block in needed:
      needed |= {source for source in sources[block - 1] if source}
  return [len(needed), BLOCKS]


@pytest.mark.parametrize('level', ['block', 'branch'])
def test_against_loops(level, write, table):
  masks = random_masks(1, level=level)
  sources = random_sources(2, level=level)  # not the last record's largest
  workdir = write('run', masks, sources, level=level)
  cells = table(workdir)[0][str(workdir)]
  rows = list(rows_of(masks, level))
  last = [value for _, _, values in rows for value in values[-1]]
  means = [
    math.fsum(entropy(values[at]) for _, _, values in rows) / len(rows)
    for at in (1, 2, 4, 5)
  ]
  changed = dict.fromkeys(NEAREST, 0)
  total = common = everything = 0.0
  taken, uniform = [], []
  for block, index, values in rows:
    chosen = (
      sources[index[0]] if level == 'block' else sources[index[0]][index[1]]
    )
    total += len(chosen)
    for share, at in NEAREST.items():
      changed[share] += len(set(chosen) - largest(values[at], 2))
    moved = [value - np.float32(START) for value in values[-1]]
    common += len(moved) * (math.fsum(moved) / len(moved)) ** 2
    everything += math.fsum(value**2 for value in moved)
    taken += [block - i for i in chosen]
    uniform.append(math.fsum(block - i for i in range(block)) / block)
  expected = [
    ([90], 0.5),
    ([100 * last.count(0) / len(last)], 0.05),
    ([100 * last.count(1) / len(last)], 0.05),
    ([sum(not any(values[-1]) for _, _, values in rows), len(rows)], 0),
    ([1, *means], 5e-5),
    ([*changed.values(), total], 0),
    ([100 * common / everything], 0.5),
    ([sum(taken) / len(taken), sum(uniform) / len(uniform)], 0.05),
    (live(sources, level), 0),
  ]
  if level == 'branch':
    expected[7] = ([], 0)
    assert cells[7] == '-'
  assert expected[3][0][0] == 1
  assert len(cells) == len(expected)
  for cell, (values, tolerance) in zip(cells, expected, strict=True):
    assert numbers(cell) == pytest.approx(values, abs=1.001 * tolerance), cell


@pytest.mark.parametrize('last', [0.1, 0.01])
def test_entropy_is_of_the_draw_at_its_temperature(last, write, table):
  masks = random_masks(1)
  workdir = write('run', masks, connectivity__temperature=last)
  cells = table(workdir)[0][str(workdir)]
  rows = list(rows_of(masks, 'block'))
  means = [
    math.fsum(
      entropy(values[at], last ** (STEPS[at] / FREEZE)) for _, _, values in rows
    )
    / len(rows)
    for at in (1, 2, 4, 5)
  ]
  assert numbers(cells[4]) == pytest.approx([1, *means], abs=5.1e-5)


def test_a_narrowing_wiring_draws_nothing(write, table):
  """Its entropy is that of a uniform choice among the sources still kept."""
  masks = [np.tri(BLOCKS, dtype=np.float32) for _ in STEPS]
  for at, mask in enumerate(masks):
    for row in range(2, BLOCKS):
      mask[row, : min(at, row - 1)] = 0.25  # lost, the earliest first
  workdir = write('run', masks, connectivity__learner='measured')
  cells = table(workdir)[0][str(workdir)]
  means = [
    np.mean(
      [
        np.log(row + 1 - min(at, row - 1)) / np.log(row + 1)
        for row in range(2, BLOCKS)
      ]
    )
    for at in (1, 2, 4, 5)
  ]
  assert numbers(cells[4]) == pytest.approx([1, *means], abs=5.1e-5)


def test_agreement_against_enumeration(write, table):
  choices = [random_sources(seed) for seed in range(3)]
  for seed, sources in enumerate(choices):
    write(f'a{seed}', random_masks(0), sources, seed=seed)
  write('b', random_masks(0), choices[0], seed=5, masks__momentum=0.9)
  write('running', random_masks(0)[:3], seed=6)
  folder = write('twin', random_masks(0), choices[0], seed=7, batch_size=64)
  write('twin2', random_masks(0), choices[0], seed=8, batch_size=64)
  rows, text = table(folder.parent)
  seeds, mean, chance, sigmas = rows['resnet14 learned']
  assert seeds == '3 (0, 1, 2)'
  total = 2 * (BLOCKS - 2)
  pairs = list(itertools.combinations(choices, 2))
  overlap = [
    sum(len(set(x) & set(y)) for x, y in zip(a[2:], b[2:], strict=True))
    for a, b in pairs
  ]
  observed = sum(overlap) / 3 / total
  # Of three uniform choices, every one there is.
  expected = variance = 0.0
  for n in range(3, BLOCKS + 1):
    subsets = [set(s) for s in itertools.combinations(range(n), 2)]
    means = [
      (len(a & b) + len(a & c) + len(b & c)) / 3
      for a, b, c in itertools.product(subsets, repeat=3)
    ]
    expected += np.mean(means) / total
    variance += np.var(means) / total**2
  assert numbers(mean) == pytest.approx([100 * observed], abs=0.051)
  assert numbers(chance) == pytest.approx(
    [100 * expected, 100 * variance**0.5], abs=0.051
  )
  assert numbers(sigmas) == pytest.approx(
    [(observed - expected) / variance**0.5], abs=0.051
  )
  assert rows['batch_size=64'][:2] == ['2 (7, 8)', '100.0 %']
  assert text.count('sigmas') == 1
  assert not any('0.9' in name for name in rows)  # a single seed


def test_a_run_that_goes_on(write, table):
  masks = random_masks(3, count=4)
  running = write('running', masks)
  none = write('none', [])
  rows, text = table(running, none)
  cells = rows[str(running)]
  assert cells[0] == '60 %, running'
  assert re.fullmatch(r'1\.0000( / 0\.\d{4}){2} / - / -', cells[4])
  assert re.fullmatch(r'\d+ / \d+ / - of 8', cells[5])
  sources = [
    sorted(largest([float(v) for v in masks[-1][t][: t + 1]], 2))
    for t in range(BLOCKS)
  ]
  assert numbers(cells[8]) == live(sources, 'block')
  assert text.endswith(f'and in no row: {none}.\n')


def test_the_plan_of_the_run_decides_and_not_its_log(write):
  workdir = write('run', random_masks(0))
  own = plan.make(config_lib.stored(workdir), 50 * 128)
  plan.write(own, workdir)
  (workdir / 'metrics.jsonl').write_text('')
  run = trajectories.read(workdir)
  np.testing.assert_allclose(run.progress, [0, *np.array(STEPS) / 100])
  assert not run.over
  (workdir / 'plan.json').write_text('{}')
  with pytest.raises(InputError, match='says how long an epoch is'):
    trajectories.read(workdir)


def test_the_start_is_the_networks_own(write):
  workdir = write(
    'run',
    [np.tri(3, dtype=np.float32)],
    model__name='resnet8',
    seed=4,
    connectivity__fan_in=1,
    connectivity__initial_spread=0.3,
    connectivity__adapter='projection',
  )
  network = models.create_model(
    'resnet8', num_classes=10, adapter='projection', initial=START,
    initial_spread=0.3, seed=4, learner='draws',
  )  # fmt: skip
  start = trajectories.read(workdir).masks[0]
  np.testing.assert_allclose(start, network.stack.real_mask[...][1:], rtol=1e-6)
  assert len(np.unique(start)) == 6  # 2 + 3 valid entries and the 0 of others


def test_sources_that_are_not_valid_do_not_count(write):
  run = trajectories.read(
    write(
      'run',
      random_masks(0),
      connectivity__adapter='same_stage',
      connectivity__fan_in=1,
    )
  )
  # Two blocks a stage, and the stem has the first one's shape; the block that
  # opens a stage takes the one before alone.
  valid = {
    block: np.flatnonzero(row).tolist()
    for block, row in zip(run.blocks, run.valid, strict=True)
  }
  assert valid == {2: [0, 1], 3: [0, 1, 2], 5: [3, 4]}


def test_picture(write, tmp_path):
  runs = [
    trajectories.read(write('a', random_masks(1), random_sources(1))),
    trajectories.read(
      write(
        'b',
        random_masks(2, level='branch'),
        random_sources(2, level='branch'),
        level='branch',
      )
    ),
  ]
  dynamics.draw(runs, tmp_path / 'out.png')
  assert (tmp_path / 'out.png').stat().st_size
  drawn = ElementTree.parse(tmp_path / 'out.svg')
  ids = [e.get('id') for e in drawn.iter() if 'entropy' in e.get('id', '')]
  assert ids == [
    *(f'run-1-entropy-{block}' for block in (3, 4, 5, 6)),
    *(f'run-2-entropy-{block}' for block in (2, 3, 4, 5, 6)),
  ]
  for run in runs:
    expected = [0, *(step / FREEZE for step in STEPS)]
    np.testing.assert_allclose(run.progress, expected)


def test_picture_shows_the_numbers_and_no_text_overlaps():
  masks = random_masks(1)
  rows = list(rows_of(masks, 'block'))
  lines = np.array(
    [[entropy(values[at]) for _, _, values in rows] for at in range(6)]
  )
  real = np.stack([masks[-1][block - 1] for block, _, _ in rows])
  valid = np.tri(BLOCKS, dtype=bool)[2:]
  chosen = np.zeros_like(valid)
  chosen[:, 1:3] = True
  panel = dynamics_plots.Panel(
    'a/run', np.linspace(0, 1, 6), lines, real, valid, chosen,
    np.arange(3, BLOCKS + 1),
  )  # fmt: skip
  branches = panel._replace(
    title='gradient=normalized,masks.learning_rate=1.0,' * 2 + '/seed1',
    entropy=lines[:, :2],
    blocks=np.array([2, 2, 3, 3]),
    valid=np.ones_like(valid),
  )
  for panels in ([panel], [panel, branches] * 3):
    figure = dynamics_plots.figure(panels)
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    page = figure.axes[0]
    curves, grid = page.child_axes[:2]
    drawn = np.array([line.get_ydata() for line in curves.lines])
    np.testing.assert_array_equal(drawn, lines.T)
    assert curves.get_ylim()[0] < lines.min()
    shown = grid.images[0].get_array()
    np.testing.assert_array_equal(shown.mask, ~valid)
    np.testing.assert_array_equal(shown.data[valid], real[valid])
    (dots,) = grid.lines
    assert {*zip(dots.get_ydata(), dots.get_xdata(), strict=True)} == {
      (row, source) for row in range(4) for source in (1, 2)
    }
    texts = [*page.texts, *page.get_legend().get_texts()]
    for axes in page.child_axes:
      for axis in (axes.xaxis, axes.yaxis):
        ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        low, high = sorted(axis.get_view_interval())
        texts += [text for at, text in ticks if low <= at <= high]
    boxes = [
      text.get_window_extent(canvas.get_renderer())
      for text in texts
      if text.get_text()
    ]
    for n, box in enumerate(boxes):
      assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, texts[n]
      assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, texts[n]
      assert not box.count_overlaps(boxes[n + 1 :]), texts[n]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'real_masks.npz': 'no archive'}, 'real_masks.npz is missing, damaged'),
    ({'real_masks.npz': None}, 'holds no real_masks.npz; give runs'),
    ({'metrics.jsonl': ''}, 'holds no metrics.jsonl'),
    ({'topology.json': '{'}, 'topology.json is damaged'),
    ({'topology.json': '[]'}, 'topology.json is damaged'),
    (
      {'topology.json': json.dumps(topology.Topology(((0,),)).to_dict())},
      'topology.json is damaged',
    ),
    ({'config.json': '{'}, 'config.json is damaged'),
    ({'config.json': None}, 'holds no run'),
    ({'model__name': 'resnet20'}, 'of another network than config.json'),
    ({'connectivity__fan_in': 6}, 'nothing has more sources than it takes'),
  ],
)
def test_bad_runs_are_one_line(change, message, write):
  fields = {k: v for k, v in change.items() if '__' in k}
  workdir = write('run', random_masks(0), random_sources(0), **fields)
  for name, text in change.items() - fields.items():
    (workdir / name).unlink()
    if text is not None:
      (workdir / name).write_text(text)
  assert message in refused(workdir)


def test_bad_arguments_are_one_line(write, tmp_path, cli):
  runs = [write(f'{n}', random_masks(0), seed=n) for n in range(7)]
  same = write('same', random_masks(0), seed=6)
  assert 'same config and seed' in refused(same, *runs[-1:])
  figure = tmp_path / 'a.png'
  assert 'up to 6 runs, not 7' in refused(*runs, figure=figure)
  assert not figure.exists()
  for given, says in (
    ([], 'error: --mode=dynamics needs --workdirs'),
    ([f'--workdirs={runs[0]}', '--figure=a.jpg'], 'must end in .png'),
  ):
    ran = cli('--mode=dynamics', *given)
    assert (ran.code, ran.out) == (2, '')
    assert says in ran.err
    assert ran.err.count('\n') == 1


def refused(*folders, figure=None):
  with pytest.raises(InputError) as error:
    dynamics.report(folders, figure)
  assert '\n' not in str(error.value)
  return str(error.value)
