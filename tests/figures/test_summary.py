"""The picture of a table of runs: each dot, mean and name in its place."""

import pytest

from maskconnect_jax.figures.summary import figure

ROWS = [[0.7, 0.72], [0.71], [0.1, 0.25], [0.7, 0.69, 0.71, 0.7]]


def test_dots_and_means_stand_at_their_per_cents():
  (panel,) = figure(['a', 'b', 'c', 'd'], ROWS, 'title').axes[0].child_axes
  drawn = {line.get_gid(): line for line in panel.lines}
  # The third row learned nothing: it is written, not drawn.
  assert set(drawn) == {
    f'row-{row}{mean}' for row in (1, 2, 4) for mean in ('', '-mean')
  }
  for row, percent, mean in ((1, [70, 72], 71), (2, [71], 71)):
    dots, bar = drawn[f'row-{row}'], drawn[f'row-{row}-mean']
    assert list(dots.get_xdata()) == pytest.approx(percent)
    assert list(bar.get_xdata()) == pytest.approx([mean, mean])
    assert set(dots.get_ydata()) == {row - 1}
    assert sum(bar.get_ydata()) == pytest.approx(2 * (row - 1))
  assert panel.get_ylim() == (3.5, -0.5)  # the first row is on top
  labels = [label.get_text() for label in panel.get_yticklabels()]
  assert labels == ['a', 'b', 'c', 'd']


def test_a_row_that_learned_nothing_is_written():
  axes = figure(['a', 'b', 'c', 'd'], ROWS, 'title').axes[0]
  assert '◂ 10.0 %, 25.0 %' in [text.get_text() for text in axes.texts]


def test_the_middle_of_a_long_name_is_left_out():
  name = 'begin ' + 'long ' * 20 + 'end'
  (panel,) = figure([name], [[0.5]], 'title').axes[0].child_axes
  (label,) = [label.get_text() for label in panel.get_yticklabels()]
  assert label.startswith('begin')
  assert label.endswith('end')
  assert ' … ' in label
  assert len(label) <= 64
