"""The picture of a topology: each part, its place and its strength."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from maskconnect_jax.drawing.layout import runs_of
from maskconnect_jax.figures import page
from maskconnect_jax.figures.topology import topology_figure


def draw(wired, **changed):
  given = {
    'stages': wired.stages,
    'live': wired.live,
    'real_mask': wired.real_mask,
    'title': 'a title',
  }
  return topology_figure(wired.sources, **given | changed)


def parts(figure, prefix):
  """Returns the parts whose id starts so, by the rest of the id."""
  axes = figure.axes[0]
  return {
    part.get_gid().removeprefix(prefix): part
    for part in [*axes.patches, *axes.lines]
    if (part.get_gid() or '').startswith(prefix)
  }


def place(mark):
  return mark.get_xdata()[0], mark.get_ydata()[0]


def test_an_edge_for_each_source_of_each_block(six_blocks, svg_of):
  figure = draw(six_blocks)
  kept = {'stem-1', 'stem-2', '1-2', 'stem-4', '2-4', '2-6', '4-6', '6-head'}
  lost = {'1-3-pruned', '2-3-pruned', '3-5-pruned', '4-5-pruned'}
  assert set(parts(figure, 'edge-')) == kept | lost
  by_id, _ = svg_of(figure)
  for name in kept | lost:
    edge = by_id[f'edge-{name}']
    assert sum(e.tag.endswith('}path') for e in edge.iter()) == 1
    dashed = 'stroke-dasharray' in ET.tostring(edge, encoding='unicode')
    assert dashed == (name in lost)


def test_an_edge_for_each_source_of_each_branch(three_by_two):
  assert set(parts(draw(three_by_two), 'edge-')) == {
    'stem-1.1', 'stem-1.2-pruned',
    '1.1-2.1-pruned', '1.2-2.1-pruned', '1.1-2.2',
    '2.2-3.1', '2.2-3.2',
    '3.1-head', '3.2-head',
  }  # fmt: skip


def test_blocks_stand_in_order_in_the_bands_of_their_stages(six_blocks):
  figure = draw(six_blocks)
  blocks = parts(figure, 'block-')
  assert list(blocks) == ['1', '2', '3-pruned', '4', '5-pruned', '6']
  marks = [figure.axes[0].lines[0], *blocks.values(), figure.axes[0].lines[-1]]
  assert [marks[0].get_gid(), marks[-1].get_gid()] == ['stem', 'head']
  x, y = np.transpose([place(mark) for mark in marks])
  np.testing.assert_allclose(np.diff(x), x[1] - x[0])
  assert len(set(y)) == 1
  bands = list(parts(figure, 'stage-').values())
  for block, stage in zip(x[1:-1], six_blocks.stages, strict=True):
    inside = [
      band.get_x() < block < band.get_x() + band.get_width() for band in bands
    ]
    assert inside == [number == stage for number in range(3)]


def test_branches_stand_in_columns_the_first_on_top(three_by_two):
  figure = draw(three_by_two)
  marks = parts(figure, 'branch-')
  assert list(marks) == [
    '1.1', '1.2-pruned', '2.1-pruned', '2.2', '3.1', '3.2',
  ]  # fmt: skip
  places = np.array([place(mark) for mark in marks.values()]).reshape(3, 2, 2)
  assert np.all(places[:, 0, 0] == places[:, 1, 0])
  assert np.all(np.diff(places[:, 0, 0]) > 0)
  assert np.all(places[:, 0, 1] > places[:, 1, 1])


@pytest.mark.parametrize('level', ['block', 'branch'])
def test_an_edge_goes_from_its_source_to_its_target(
  level, random_blocks, random_branches
):
  wired = random_blocks(9, 3) if level == 'block' else random_branches(6, 8, 3)
  figure = draw(wired)
  marks = {
    name.removesuffix('-pruned'): mark
    for name, mark in parts(figure, f'{level}-').items()
  }
  for line in figure.axes[0].lines:
    if line.get_gid() in ('stem', 'head'):
      marks[line.get_gid()] = line
  size = marks['stem'].get_markersize()
  rising = 0
  for name, arc in parts(figure, 'edge-').items():
    ends = name.removesuffix('-pruned').split('-')
    points = arc.get_path().vertices
    for end, point in zip(ends, points[[0, -1]], strict=True):
      np.testing.assert_allclose(point, place(marks[end]), atol=0.4 * size)
    rising += points[:, 1].max() > points[[0, -1], 1].max() + 1
  skipping = 0
  if level == 'block':
    skipping = sum(
      t - i > 1 for t, row in enumerate(wired.sources, 1) for i in row
    )
  assert rising == skipping


def test_arcs_over_more_blocks_are_higher(random_blocks):
  wired = random_blocks(18, 4)
  heights = {}
  for name, arc in parts(draw(wired, real_mask=None), 'edge-').items():
    source, target = name.removesuffix('-pruned').split('-')
    if target != 'head':
      reach = int(target) - (0 if source == 'stem' else int(source))
      points = arc.get_path().vertices[:, 1]
      heights.setdefault(reach, set()).add(round(np.ptp(points), 6))
  assert all(len(found) == 1 for found in heights.values())
  ordered = [heights[reach].pop() for reach in sorted(heights)]
  assert ordered == sorted(ordered)
  assert ordered[0] == 0 < ordered[1]


@pytest.mark.parametrize('level', ['block', 'branch'])
def test_edges_are_as_strong_as_the_real_mask(level, six_blocks, three_by_two):
  wired = six_blocks if level == 'block' else three_by_two
  drawn = parts(draw(wired), 'edge-')
  if level == 'block':
    real = {
      f'{i or "stem"}-{t}': wired.real_mask[t - 1, i]
      for t, row in enumerate(wired.sources, start=1)
      for i in row
    }
  else:
    real = {
      f'{j + 1}.{k + 1}-{j + 2}.{c + 1}': wired.real_mask[j, c, k]
      for j, rows in enumerate(wired.sources)
      for c, row in enumerate(rows)
      for k in row
    }
  kept = sorted(real.keys() & drawn.keys(), key=real.__getitem__)
  assert len(kept) >= 3
  for look in ('get_linewidth', 'get_alpha'):
    values = [getattr(drawn[name], look)() for name in kept]
    assert np.all(np.diff(values) > 0)
  plain = parts(draw(wired, real_mask=None), 'edge-')
  assert len({plain[name].get_linewidth() for name in kept}) == 1


@pytest.mark.parametrize('level', ['block', 'branch'])
def test_edges_have_the_colour_of_the_stage_they_feed(
  level, six_blocks, three_by_two
):
  wired = six_blocks if level == 'block' else three_by_two
  for theme in (page.LIGHT, page.DARK):
    for name, arc in parts(draw(wired, theme=theme), 'edge-').items():
      target = name.removesuffix('-pruned').split('-')[1]
      color = theme.faint
      if not name.endswith('-pruned'):
        color = theme.soft
        if target != 'head' and not name.startswith('stem-1.'):
          stage = wired.stages[int(target.partition('.')[0]) - 1]
          color = theme.tint(stage)
      assert arc.get_edgecolor()[:3] == page.colors.to_rgb(color)


def test_what_is_pruned_is_hollow(six_blocks, three_by_two):
  for wired, kind in ((six_blocks, 'block-'), (three_by_two, 'branch-')):
    for name, mark in parts(draw(wired), kind).items():
      paper = mark.get_markerfacecolor() == page.LIGHT.paper
      assert paper == name.endswith('-pruned')


def test_texts_say_what_is_shown(six_blocks, three_by_two, svg_of):
  _, texts = svg_of(draw(six_blocks))
  # Reaches of the edges kept: 1 2 1 4 2 4 2, on average 16 / 7.
  for text in (
    'a title',
    '6 blocks, 2 pruned, 7 edges, mean reach 2.3 blocks',
    *('stem', 'head', 'pruned', 'stage 1', 'stage 2', 'stage 3'),
    *('1', '2', '3', '4', '5', '6', 'r = 0', 'r = 0.5', 'r = 1'),
  ):
    assert texts.count(text) == 1, text
  _, texts = svg_of(draw(three_by_two))
  assert (
    '3 blocks of 2 branches, the first on top, 2 branches pruned, 3 edges'
    in texts
  )
  assert [texts.count(number) for number in '12'] == [3, 3]
  for text in ('block 1', 'block 2', 'block 3', 'stage 1', 'stage 2'):
    assert texts.count(text) == 1, text


def test_nothing_is_said_of_what_is_not_there(svg_of):
  chain = [[block] for block in range(6)]
  figure = topology_figure(chain, stages=None, live=[True] * 6, title='chain')
  by_id, texts = svg_of(figure)
  assert '6 blocks, 0 pruned, 6 edges, mean reach 1.0 blocks' in texts
  assert not {'pruned', 'r = 1', 'stage 1'} & set(texts)
  assert not [name for name in by_id if name.startswith('stage-')]
  assert sum(name.startswith('edge-') for name in by_id) == 7


@pytest.mark.parametrize('count', [1, 2, 9, 18, 54, 55, 110])
def test_no_text_of_blocks_is_cut_off_or_overlaps(
  count, random_blocks, check_texts
):
  check_texts(draw(random_blocks(count, min(count, 10))))


@pytest.mark.parametrize(
  ('blocks', 'branches'), [(2, 2), (3, 8), (6, 8), (9, 8), (16, 32), (36, 4)]
)
def test_no_text_of_branches_is_cut_off_or_overlaps(
  blocks, branches, random_branches, check_texts
):
  check_texts(draw(random_branches(blocks, branches, 2)))


def test_runs_of_stages():
  assert runs_of([0, 0, 2, 2, 2]) == [(0, 1, 2), (2, 3, 5)]


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'stages': [0] * 5}, '5 stages for 6 blocks'),
    ({'stages': [2, 1, 1, 1, 0, 0]}, 'decrease'),
    ({'sources': []}, '6 stages for 0 blocks'),
    ({'sources': [[0]] * 5 + [[6]]}, 'block 6'),
    ({'sources': [[0]] * 5 + [[-1]]}, 'block 6'),
    ({'sources': [[0]] * 5 + [[2, 2]]}, 'block 6'),
    ({'sources': [[0], [], *[[0]] * 4]}, 'block 2'),
    ({'live': [True] * 5}, 'live: 5 entries for 6 blocks'),
    ({'real_mask': np.zeros((6, 7))}, r'\(6, 7\)'),
  ],
)
def test_inconsistent_blocks_are_refused(six_blocks, changed, message):
  given = {'sources': six_blocks.sources, 'stages': six_blocks.stages}
  given |= {'live': six_blocks.live, 'title': 'bad'}
  with pytest.raises(ValueError, match=message):
    topology_figure(**given | changed)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'stages': [0, 0]}, '2 stages for 3 blocks'),
    ({'sources': [[[0], [0]], [[1]]]}, 'block 3: 1 branches, not 2'),
    ({'sources': [[[0], [0]], [[1], [2]]]}, 'branch 3.2'),
    ({'sources': [[[0], []], [[1], [1]]]}, 'branch 2.2'),
    ({'live': [[0], [1]]}, 'live: 2 entries for 3 blocks'),
    ({'real_mask': np.zeros((2, 2, 3))}, r'\(2, 2, 3\)'),
  ],
)
def test_inconsistent_branches_are_refused(three_by_two, changed, message):
  given = {'sources': three_by_two.sources, 'stages': three_by_two.stages}
  given |= {'live': three_by_two.live, 'title': 'bad'}
  with pytest.raises(ValueError, match=message):
    topology_figure(**given | changed)
