"""The picture of a real mask: each value and each choice in its place."""

import numpy as np
import pytest

from maskconnect_jax.figures.masks import mask_figure


def values_of(grid):
  """Returns the values that a panel shows by (source, target)."""
  (cells,) = grid.collections
  assert cells.get_clim() == (0, 1)
  return {
    tuple(path.vertices[:4].mean(0)): value
    for path, value in zip(cells.get_paths(), cells.get_array(), strict=True)
  }


def chosen_of(grid):
  (dots,) = [line for line in grid.lines if line.get_gid() == 'chosen']
  return sorted(zip(dots.get_xdata(), dots.get_ydata(), strict=True))


def test_blocks_show_the_values_that_exist_and_the_chosen_ones(
  six_blocks, svg_of
):
  real = six_blocks.real_mask
  figure = mask_figure(
    real, six_blocks.sources, stages=six_blocks.stages, title='mask'
  )
  grid = figure.axes[0].child_axes[0]
  assert values_of(grid) == {
    (i, t): real[t - 1, i] for t in range(1, 7) for i in range(t)
  }
  assert chosen_of(grid) == sorted(
    (i, t) for t, row in enumerate(six_blocks.sources, 1) for i in row
  )
  by_id, texts = svg_of(figure)
  assert sum(e.tag.endswith('}use') for e in by_id['chosen'].iter()) == 11
  # The cells are vectors; the one image is the scale of colours.
  images = [e for e in by_id.values() if e.tag.endswith('}image')]
  assert len(images) <= 1
  for text in ('stem', 'block', 'source', 'r = 0', 'chosen at the freeze'):
    assert text in texts
  assert texts.count('stage 1') == texts.count('stage 2') == 2


def test_branches_show_a_square_for_each_junction(random_branches):
  wired = random_branches(6, 8, 3)
  figure = mask_figure(
    wired.real_mask, wired.sources, stages=wired.stages, title='mask'
  )
  axes = figure.axes[0]
  grids = [panel for panel in axes.child_axes if panel.lines]
  assert len(grids) == 5
  for junction, grid in enumerate(grids):
    assert values_of(grid) == {
      (k + 1, c + 1): wired.real_mask[junction, c, k]
      for c in range(8)
      for k in range(8)
    }
    assert chosen_of(grid) == sorted(
      (k + 1, c)
      for c, row in enumerate(wired.sources[junction], start=1)
      for k in row
    )
    # Row 1 is on top, column 1 on the left.
    assert np.diff(grid.get_ylim()) < 0 < np.diff(grid.get_xlim())
  names = [text.get_text() for text in axes.texts]
  assert names[2:] == [f'block {b} to {b + 1}' for b in range(1, 6)]


def test_a_picture_of_very_many_cells_holds_them_as_pixels(random_branches):
  for branches, as_pixels in ((8, False), (64, True)):
    wired = random_branches(3, branches, 2)
    figure = mask_figure(
      wired.real_mask, wired.sources, stages=None, title='mask'
    )
    (cells,) = figure.axes[0].child_axes[0].collections
    assert bool(cells.get_rasterized()) == as_pixels


@pytest.mark.parametrize('count', [1, 2, 9, 18, 54])
def test_no_text_of_blocks_is_cut_off_or_overlaps(
  count, random_blocks, check_texts
):
  wired = random_blocks(count, min(count, 10))
  for stages in (wired.stages, None):
    check_texts(
      mask_figure(wired.real_mask, wired.sources, stages=stages, title='mask')
    )


@pytest.mark.parametrize(
  ('blocks', 'branches'), [(2, 2), (3, 8), (6, 8), (16, 32)]
)
def test_no_text_of_branches_is_cut_off_or_overlaps(
  blocks, branches, random_branches, check_texts
):
  wired = random_branches(blocks, branches, 2)
  check_texts(
    mask_figure(
      wired.real_mask, wired.sources, stages=wired.stages, title='mask'
    )
  )


def test_a_mask_of_another_shape_is_refused(six_blocks, three_by_two):
  for wired in (six_blocks, three_by_two):
    with pytest.raises(ValueError, match='real_mask has shape'):
      mask_figure(
        wired.real_mask[..., :-1], wired.sources, stages=None, title='bad'
      )
    with pytest.raises(ValueError, match='1 stages for'):
      mask_figure(wired.real_mask, wired.sources, stages=[0], title='bad')
