import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from maskconnect_jax.figures import page as plots

# Nobody takes blocks 3 and 5, but block 4, which is kept, takes no pruned one.
SOURCES = [[0], [0, 1], [1, 2], [0, 2], [3, 4], [2, 4]]
STAGES = [0, 0, 1, 1, 2, 2]
LIVE = [True, True, False, True, False, True]
STEPS = [0, 10, 20, 40]


def random_topology(count, fan_in, seed=0):
  rng = np.random.default_rng(seed)
  sources = [
    sorted(rng.choice(t, min(fan_in, t), replace=False).tolist())
    for t in range(1, count + 1)
  ]
  return sources, [t * 3 // count for t in range(count)]


def random_masks(count, seed=0):
  shape = (len(STEPS), count, count)
  return np.random.default_rng(seed).random(shape, dtype=np.float32)


def figures(seed=0):
  masks = random_masks(6, seed)
  common = {'stages': STAGES, 'title': 'six blocks'}
  yield 'topology', plots.topology_figure(SOURCES, live=LIVE, **common)
  yield 'mask', plots.mask_figure(masks[-1], SOURCES, **common)
  yield 'history', plots.history_figure(STEPS, masks, SOURCES, **common)


def parse(svg):
  """Returns the root, all ids and all texts of an SVG file."""
  root = ET.parse(svg).getroot()
  ids = [e.get('id') for e in root.iter() if e.get('id')]
  texts = [''.join(e.itertext()).strip() for e in root.iter() if tag(e, 'text')]
  return root, ids, texts


def tag(element, name):
  return element.tag == '{http://www.w3.org/2000/svg}' + name


@pytest.fixture(scope='module')
def topology_svg(tmp_path_factory):
  figure = dict(figures())['topology']
  return plots.save(figure, tmp_path_factory.mktemp('svg') / 'topology')[1]


def test_save_writes_both_files_and_nothing_else(tmp_path):
  figure = dict(figures())['topology']
  # A dot in the name is no suffix to be replaced.
  paths = plots.save(figure, tmp_path / 'new' / 'run.v1')
  assert [p.name for p in paths] == ['run.v1.png', 'run.v1.svg']
  assert sorted(tmp_path.rglob('*.*')) == paths
  assert paths[0].read_bytes().startswith(b'\x89PNG')
  assert plots.save(figure, str(tmp_path / 'new' / 'run.v1')) == paths
  assert sorted(tmp_path.rglob('*.*')) == paths


def test_save_that_fails_leaves_the_old_file_and_no_other(
  tmp_path, monkeypatch
):
  figure = dict(figures())['topology']
  old = tmp_path / 'topology.png'
  old.write_bytes(b'old')

  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(plots.os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    plots.save(figure, tmp_path / 'topology')
  assert list(tmp_path.iterdir()) == [old]
  assert old.read_bytes() == b'old'


def test_equal_input_gives_equal_bytes_whatever_the_users_style(tmp_path):
  def save_all(folder):
    paths = [plots.save(f, tmp_path / folder / n) for n, f in figures()]
    return [p.read_bytes() for pair in paths for p in pair]

  first = save_all('a')
  with matplotlib.rc_context(
    {
      'svg.hashsalt': None,
      'font.size': 30,
      'figure.facecolor': 'black',
      'savefig.bbox': 'tight',
    }
  ):
    before = dict(matplotlib.rcParams)
    assert save_all('b') == first
    assert dict(matplotlib.rcParams) == before
  assert len(set(first)) == len(first)
  other = plots.mask_figure(
    random_masks(6, seed=1)[-1], SOURCES, stages=STAGES, title='six blocks'
  )
  changed = [p.read_bytes() for p in plots.save(other, tmp_path / 'c')]
  assert not set(changed) & set(first)


def test_saving_a_figure_twice_gives_equal_bytes(tmp_path):
  figure = dict(figures())['mask']
  once = plots.save(figure, tmp_path / 'once')
  again = plots.save(figure, tmp_path / 'again')
  for a, b in zip(once, again, strict=True):
    assert a.read_bytes() == b.read_bytes()


def test_svg_has_one_path_per_link_by_name(topology_svg):
  root, ids, _ = parse(topology_svg)
  kept = {'0-1', '0-2', '1-2', '0-4', '2-4', '2-6', '4-6', '6-head'}
  lost = {'1-3', '2-3', '3-5', '4-5'}
  expected = {f'link-{e}' for e in kept} | {f'link-{e}-pruned' for e in lost}
  links = [e for e in root.iter() if (e.get('id') or '').startswith('link-')]
  assert sorted(e.get('id') for e in links) == sorted(expected)
  assert len(ids) == len(set(ids))
  for link in links:
    assert sum(tag(e, 'path') for e in link.iter()) == 1
    dashed = 'stroke-dasharray' in ET.tostring(link, encoding='unicode')
    assert dashed == link.get('id').endswith('-pruned')


def test_svg_marks_stem_head_and_every_block(topology_svg):
  _, ids, _ = parse(topology_svg)
  assert {'stem', 'head'} <= set(ids)
  assert sorted(i for i in ids if i.startswith('block-')) == [
    'block-1', 'block-2', 'block-3-pruned', 'block-4', 'block-5-pruned',
    'block-6',
  ]  # fmt: skip


def test_topology_says_what_it_shows(topology_svg):
  _, _, texts = parse(topology_svg)
  # Reaches of the links kept: 1 2 1 4 2 4 2, on average 16 / 7.
  counts = '6 blocks, 2 pruned, 7 links, mean reach 2.3 blocks'
  stages = ['stage 1', 'stage 2', 'stage 3']
  numbers = [str(t) for t in range(1, 7)]
  for text in [
    'six blocks',
    counts,
    'stem',
    'head',
    'pruned',
    *stages,
    *numbers,
  ]:
    assert texts.count(text) == 1, text


def test_nothing_pruned_nothing_said_of_it(tmp_path):
  figure = plots.topology_figure(
    [[t] for t in range(6)], stages=STAGES, live=[True] * 6, title='chain'
  )
  _, ids, texts = parse(plots.save(figure, tmp_path / 'chain')[1])
  assert '6 blocks, 0 pruned, 6 links, mean reach 1.0 blocks' in texts
  assert 'pruned' not in texts
  assert not [i for i in ids if i.endswith('-pruned')]
  assert sum(i.startswith('link-') for i in ids) == 7


def test_title_is_text_and_not_mathematics(tmp_path):
  title = 'K = $3$, r_0 <&> 50 %'
  figure = plots.topology_figure(SOURCES, stages=STAGES, live=LIVE, title=title)
  assert title in parse(plots.save(figure, tmp_path / 'title')[1])[2]


def test_mask_shows_the_values_that_exist_and_the_chosen_ones(tmp_path):
  real = np.arange(36, dtype=np.float32).reshape(6, 6) / 36
  figure = plots.mask_figure(real, SOURCES, stages=STAGES, title='mask')
  grid = figure.axes[0].child_axes[0]
  (cells,) = grid.collections
  shown = {
    tuple(p.vertices[:4].mean(0)): value
    for p, value in zip(cells.get_paths(), cells.get_array(), strict=True)
  }
  assert shown == {
    (i, t): real[t - 1, i] for t in range(1, 7) for i in range(t)
  }
  assert cells.get_clim() == (0, 1)
  (chosen,) = [line for line in grid.lines if line.get_gid() == 'chosen']
  pairs = zip(chosen.get_xdata(), chosen.get_ydata(), strict=True)
  assert set(pairs) == {(i, t) for t, r in enumerate(SOURCES, 1) for i in r}
  root, _, texts = parse(plots.save(figure, tmp_path / 'mask')[1])
  (group,) = [e for e in root.iter() if e.get('id') == 'chosen']
  assert sum(tag(e, 'use') for e in group.iter()) == 11
  # The cells are vectors; the one image is the colour bar.
  assert sum(tag(e, 'image') for e in root.iter()) <= 1
  for text in ('stem', 'block', 'source', 'r = 0', 'chosen at the freeze'):
    assert text in texts
  assert texts.count('stage 1') == texts.count('stage 2') == 2


def test_history_shows_blocks_with_a_choice_and_breaks_ties_late(tmp_path):
  masks = random_masks(6)
  masks[:, 5] = 1  # All of block 6's sources tie: the latest two are marked.
  figure = plots.history_figure(
    STEPS, masks, SOURCES, stages=STAGES, title='history'
  )
  texts = parse(plots.save(figure, tmp_path / 'history')[1])[2]
  shown = [t for t in texts if re.fullmatch(r'block \d+', t)]
  assert shown == ['block 3', 'block 4', 'block 5', 'block 6']
  panel = figure.axes[0].child_axes[3]
  marked = [
    np.isfinite(stairs.get_data().values).tolist() for stairs in panel.patches
  ]
  assert marked == [[False] * 4] * 4 + [[True] * 4] * 2
  kept = next(line for line in panel.lines if line.get_marker() == 'o')
  assert list(kept.get_ydata()) == SOURCES[5]


@pytest.mark.parametrize(('count', 'fan_in'), [(9, 3), (54, 10)])
def test_no_text_is_cut_off_or_overlaps(count, fan_in):
  sources, stages = random_topology(count, fan_in)
  masks = random_masks(count)
  common = {'stages': stages, 'title': 'resnet on CIFAR-100, learned, seed 0'}
  live = [True] * count
  live[count // 2] = False
  for figure in (
    plots.topology_figure(sources, live=live, **common),
    plots.mask_figure(masks[-1], sources, **common),
    plots.history_figure(STEPS, masks, sources, **common),
  ):
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    page = figure.axes[0]
    texts = [*page.texts, *page.get_legend().get_texts()]
    for panel in page.child_axes:
      texts += [*panel.get_xticklabels(), *panel.get_yticklabels()]
    boxes = [t.get_window_extent(renderer) for t in texts if t.get_text()]
    for n, box in enumerate(boxes):
      assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, texts[n]
      assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, texts[n]
      assert not box.count_overlaps(boxes[n + 1 :]), texts[n]


def test_one_recorded_step_and_no_choice_at_all_are_drawn(tmp_path):
  everything = [list(range(t)) for t in range(1, 7)]
  figure = plots.history_figure(
    [5], random_masks(6)[:1], everything, stages=STAGES, title='one'
  )
  assert all(p.stat().st_size for p in plots.save(figure, tmp_path / 'one'))


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'stages': STAGES[1:]}, '5 stages for 6 blocks'),
    ({'stages': STAGES[::-1]}, 'decrease'),
    ({'sources': []}, '6 stages for 0 blocks'),
    ({'sources': [*SOURCES[:5], [6]]}, 'block 6'),
    ({'sources': [*SOURCES[:5], [-1]]}, 'block 6'),
    ({'sources': [*SOURCES[:5], [2, 2]]}, 'block 6'),
    ({'sources': [[0], [], *SOURCES[2:]]}, 'block 2'),
    ({'live': LIVE[1:]}, 'live: 5 entries for 6 blocks'),
    ({'real_mask': np.zeros((6, 7))}, r'\(6, 7\)'),
    ({'masks': np.zeros((3, 6, 6))}, r'\(3, 6, 6\)'),
    ({'masks': np.zeros((0, 6, 6)), 'steps': []}, r'\(0, 6, 6\)'),
    ({'steps': [0, 10, 10, 40]}, 'increase'),
  ],
)
def test_inconsistent_input_is_refused(changed, message):
  given = {'sources': SOURCES, 'stages': STAGES, 'title': 'bad'}
  shared = set(changed) & set(given)
  given |= {name: changed[name] for name in shared}
  calls = [
    (plots.topology_figure, {'live': LIVE}),
    (plots.mask_figure, {'real_mask': np.zeros((6, 6))}),
    (plots.history_figure, {'steps': STEPS, 'masks': np.zeros((4, 6, 6))}),
  ]
  for function, own in calls:
    if shared or set(changed) <= set(own):
      with pytest.raises(ValueError, match=message):
        function(**given, **own | (changed if not shared else {}))


def test_imports_neither_jax_nor_pyplot():
  code = (
    'import runpy, sys; runpy.run_path(sys.argv[1]);'
    'sys.exit(str({"jax", "matplotlib.pyplot"} & set(sys.modules)))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, plots.__file__],
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.stderr.strip() == 'set()'
