"""The picture of how a real mask moved, block by block."""

import re

import numpy as np
import pytest

from maskconnect_jax.figures import page
from maskconnect_jax.figures.dynamics import history_figure

STEPS = [0, 10, 20, 40]


@pytest.fixture
def moving(six_blocks):
  real = np.random.default_rng(0).random((len(STEPS), 6, 6), dtype=np.float32)
  given = {'steps': STEPS, 'masks': real, 'sources': six_blocks.sources}
  return given | {'stages': six_blocks.stages, 'title': 'history'}


def test_blocks_with_a_choice_are_shown_and_ties_go_to_the_latest(
  moving, svg_of
):
  moving['masks'][:, 5] = 1  # all of block 6's sources tie: the latest two
  figure = history_figure(**moving)
  _, texts = svg_of(figure)
  shown = [text for text in texts if re.fullmatch(r'block \d+', text)]
  assert shown == ['block 3', 'block 4', 'block 5', 'block 6']
  strip = figure.axes[0].child_axes[3]
  marked = [
    np.isfinite(stairs.get_data().values).tolist() for stairs in strip.patches
  ]
  assert marked == [[False] * 4] * 4 + [[True] * 4] * 2
  (kept,) = [line for line in strip.lines if line.get_marker() == 'o']
  assert list(kept.get_ydata()) == moving['sources'][5]
  (cells,) = strip.collections
  np.testing.assert_array_equal(
    np.reshape(cells.get_array(), (6, 4)), moving['masks'][:, 5].T
  )


def test_one_recorded_step_and_no_choice_at_all_are_drawn(moving, tmp_path):
  everything = [list(range(t)) for t in range(1, 7)]
  moving |= {'steps': [5], 'masks': moving['masks'][:1], 'sources': everything}
  figure = history_figure(**moving)
  assert all(p.stat().st_size for p in page.save(figure, tmp_path / 'one'))


@pytest.mark.parametrize(('count', 'fan_in'), [(9, 3), (54, 10)])
def test_no_text_is_cut_off_or_overlaps(
  count, fan_in, random_blocks, check_texts
):
  wired = random_blocks(count, fan_in)
  masks = np.stack([wired.real_mask] * len(STEPS))
  for stages in (wired.stages, None):
    check_texts(
      history_figure(STEPS, masks, wired.sources, stages=stages, title='r')
    )


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'masks': np.zeros((3, 6, 6))}, r'\(3, 6, 6\)'),
    ({'masks': np.zeros((0, 6, 6)), 'steps': []}, r'\(0, 6, 6\)'),
    ({'steps': [0, 10, 10, 40]}, 'increase'),
    ({'stages': [0] * 5}, '5 stages for 6 blocks'),
    ({'sources': [[0]] * 5 + [[6]]}, 'block 6'),
  ],
)
def test_inconsistent_input_is_refused(moving, changed, message):
  with pytest.raises(ValueError, match=message):
    history_figure(**moving | changed)
