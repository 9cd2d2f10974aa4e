"""The drawing of a topology: each part, in words too; parsed as XML."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from maskconnect_jax.drawing import svg, theme
from maskconnect_jax.method import topology

SVG = '{http://www.w3.org/2000/svg}'
# Nobody takes blocks 3 and 5.
BLOCKS = topology.Topology(((0,), (0, 1), (1, 2), (0, 2), (3, 4), (2, 4)))
STAGES = [0, 0, 1, 1, 2, 2]
# Block 3 takes branch 2 of block 2 alone, and that takes branch 1 alone.
BRANCHES = topology.BranchTopology((((0, 1), (0,)), ((1,), (1,))))


def drawn(own, **changed):
  given = {
    'stages': STAGES if own is BLOCKS else [0, 1, 1],
    'live': getattr(own, 'live_branches', own.live),
    'title': 'a title',
  }
  return ET.fromstring(svg.topology_svg(own.sources, **given | changed))


def parts(root, kind):
  return [e for e in root.iter() if kind in e.get('class', '').split()]


def test_an_edge_for_each_source_of_each_block():
  edges = parts(drawn(BLOCKS), 'edge')
  found = {
    (e.get('data-from'), e.get('data-to')): 'pruned' in e.get('class')
    for e in edges
  }
  expected = {
    (str(i) if i else 'stem', str(j)): {i, j} & {3, 5} != set()
    for j, row in enumerate(BLOCKS.sources, start=1)
    for i in row
  }
  assert found == expected | {('6', 'head'): False}
  assert len(edges) == len(found)


def test_an_edge_for_each_source_of_each_branch():
  found = {
    (e.get('data-from'), e.get('data-to')): 'pruned' in e.get('class')
    for e in parts(drawn(BRANCHES), 'edge')
  }
  assert found == {
    ('stem', '1.1'): False, ('stem', '1.2'): True,
    ('1.1', '2.1'): True, ('1.2', '2.1'): True, ('1.1', '2.2'): False,
    ('2.2', '3.1'): False, ('2.2', '3.2'): False,
    ('3.1', 'head'): False, ('3.2', 'head'): False,
  }  # fmt: skip


def test_nodes_stand_in_order_and_say_what_they_read():
  real = np.zeros((6, 6), np.float32)
  real[3, 0], real[3, 2] = 0.254, 1
  nodes = parts(drawn(BLOCKS, real_mask=real), 'node')
  assert [n.get('data-node') for n in nodes] == ['stem', *'123456', 'head']
  circles = [n.find(f'{SVG}circle') for n in nodes[1:-1]]
  places = [float(c.get('cx')) for c in circles]
  assert places == sorted(places)
  words = {n.get('data-node'): n.get('aria-label') for n in nodes}
  assert words['4'] == (
    'Block 4, stage 2. Reads stem (r = 0.25), 2 (r = 1.00). Read by 5, 6.'
  )
  assert words['5'].startswith('Block 5, stage 3, pruned. Reads 3')
  assert words['5'].endswith('Read by nothing.')
  assert words['stem'] == 'Stem. Read by 1, 2, 4.'
  assert words['head'] == 'Head. Reads 6.'
  gone = [n.get('data-node') for n in nodes if 'pruned' in n.get('class')]
  assert gone == ['3', '5']


def test_a_larger_entry_is_a_bolder_edge():
  real = np.zeros((6, 6), np.float32)
  real[3, 0], real[3, 2] = 0.25, 1
  widths = {
    e.get('data-from'): float(re.findall(r'width:([\d.]+)', e.get('style'))[0])
    for e in parts(drawn(BLOCKS, real_mask=real), 'edge')
    if e.get('data-to') == '4'
  }
  assert 0 < widths['stem'] < widths['2']


def test_a_band_for_each_stage():
  root = drawn(BLOCKS)
  bands = parts(root, 'band')
  names = [e.text for e in parts(root, 'stage')]
  assert len(bands) == 3
  assert names == ['stage 1', 'stage 2', 'stage 3']
  ends = [(float(b.get('x')), float(b.get('width'))) for b in bands]
  for node in parts(root, 'node')[1:-1]:
    x = float(node.find(f'{SVG}circle').get('cx'))
    (stage,) = [n for n, (left, wide) in enumerate(ends) if 0 < x - left < wide]
    assert stage == STAGES[int(node.get('data-node')) - 1]


def test_a_title_is_escaped():
  root = drawn(BLOCKS, title='<b>"&')
  assert root.get('aria-label') == '<b>"&'


def test_standing_alone_it_brings_both_themes():
  alone = drawn(BLOCKS).find(f'{SVG}style').text
  assert 'prefers-color-scheme:dark' in alone
  for own in (theme.LIGHT, theme.DARK):
    assert f'--paper:{own.paper};' in alone
  assert drawn(BLOCKS, standalone=False).find(f'{SVG}style') is None


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='live: 5 entries for 6 blocks'):
    drawn(BLOCKS, live=[True] * 5)
  with pytest.raises(ValueError, match='3 stages for 6 blocks'):
    drawn(BLOCKS, stages=[0, 1, 2])


@pytest.mark.parametrize('own', [BLOCKS, BRANCHES], ids=['blocks', 'branches'])
def test_a_topology_shows_itself(own):
  root = ET.fromstring(own._repr_svg_())
  edges = parts(root, 'edge')
  fixed = sum('head' in e.get('data-to') for e in edges)
  if own is BRANCHES:
    fixed += sum(e.get('data-from') == 'stem' for e in edges)
  assert len(edges) - fixed == own.num_links
