"""Accuracy against cost: what is drawn, read back from the figure."""

import numpy as np
import pytest

from maskconnect_jax.figures import trade

ROWS = {
  'names': ['K = 1', 'K = 2', 'K = 1', '20 layers'],
  'groups': ['learned', 'learned', 'random', 'ordinary'],
  'costs': [[40e3, 60e3], [90e3, 90e3], [30e3, 40e3], [60e3, 60e3]],
  'accuracies': [[0.63, 0.65], [0.67, 0.66], [0.61, 0.62], [0.6, 0.61]],
}


def lines_of(figure, gid):
  found = [
    line
    for axes in figure.axes
    for child in (axes, *axes.child_axes)
    for line in child.lines
    if line.get_gid() == gid
  ]
  assert len(found) == 1
  return found[0]


def test_a_point_stands_at_the_means():
  figure = trade.figure(**ROWS, title='a title', cost='parameters')
  for number in range(4):
    line = lines_of(figure, f'row-{number + 1}')
    assert line.get_xdata()[0] == np.mean(ROWS['costs'][number])
    assert line.get_ydata()[0] == pytest.approx(
      100 * np.mean(ROWS['accuracies'][number])
    )
  colours = [lines_of(figure, f'row-{n}').get_color() for n in range(1, 5)]
  assert colours[0] == colours[1] != colours[2] != colours[3]


def test_nothing_beats_a_row_of_the_front():
  rng = np.random.default_rng(0)
  for _ in range(20):
    costs, accuracies = rng.integers(1, 9, (2, 12)).astype(float)
    front = set(trade.front_of(costs, accuracies))
    for i in range(12):
      beaten = any(
        costs[j] <= costs[i]
        and accuracies[j] >= accuracies[i]
        and (costs[j], accuracies[j]) != (costs[i], accuracies[i])
        for j in range(12)
      )
      twin = any(
        (costs[j], accuracies[j]) == (costs[i], accuracies[i])
        for j in front - {i}
      )
      assert (i in front) == (not beaten and not twin)


def test_rows_need_all_of_their_parts():
  with pytest.raises(ValueError, match='a row needs'):
    trade.figure(['one'], [], [], [], title='', cost='')
