"""The confusion matrix: what is drawn, read back from the figure."""

import itertools

import numpy as np
import pytest

from maskconnect_jax.figures import confusion

COUNTS = np.array([[8, 2, 0], [0, 0, 0], [1, 6, 13]])


def drawn(counts, names):
  figure = confusion.confusion_figure(counts, names, title='a title')
  (axes,) = figure.axes
  grid = next(panel for panel in axes.child_axes if panel.images)
  return figure, axes, grid


def test_cells_are_the_shares_of_a_class():
  _, axes, grid = drawn(COUNTS, ['ant', 'bee', 'cow'])
  expected = [[0.8, 0.2, 0], [0, 0, 0], [0.05, 0.3, 0.65]]
  np.testing.assert_allclose(grid.images[0].get_array(), expected)
  numbers = {tuple(text.get_position()): text.get_text() for text in grid.texts}
  assert numbers == {
    (0, 0): '8', (1, 0): '2', (0, 2): '1', (1, 2): '6', (2, 2): '13',
  }  # fmt: skip
  assert [tick.get_text() for tick in grid.get_yticklabels()] == [
    'ant', 'bee', 'cow',
  ]  # fmt: skip
  written = [text.get_text() for text in axes.texts]
  assert any('70.0 % are right' in text for text in written)  # 21 of 30
  listed = [text for text in written if ' taken for ' in text]
  assert listed == [
    'cow taken for bee: 6 (30.0 %)',
    'ant taken for bee: 2 (20.0 %)',
    'cow taken for ant: 1 (5.0 %)',
  ]


def test_many_classes_of_long_names_stay_on_the_page():
  rng = np.random.default_rng(0)
  names = [f'a class of a long name, number {i}' for i in range(100)]
  figure, axes, grid = drawn(rng.integers(0, 9, (100, 100)), names)
  figure.draw_without_rendering()
  inside = figure.bbox
  labels = [*grid.get_yticklabels(), *grid.get_xticklabels()]
  for text in (*axes.texts, *labels):
    box = text.get_window_extent()
    assert inside.x0 <= box.x0 < box.x1 <= inside.x1, text
    assert inside.y0 <= box.y0 < box.y1 <= inside.y1, text
  shown = [label.get_text() for label in labels[:100]]
  assert len(set(shown)) == 100  # their ends differ, and stay
  boxes = [label.get_window_extent() for label in labels[:100]]
  for above, below in itertools.pairwise(boxes):
    assert below.y1 <= above.y1 - 0.8 * above.height


def test_more_classes_than_names_fit():
  _, _, grid = drawn(np.eye(300, dtype=int), [str(i) for i in range(300)])
  assert len(grid.get_yticklabels()) < 20
  assert not grid.texts


def test_a_matrix_of_another_shape():
  with pytest.raises(ValueError, match='3 classes, but a matrix'):
    confusion.confusion_figure(COUNTS[:2], ['a', 'b', 'c'], title='')
