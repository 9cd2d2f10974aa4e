"""Topologies for the tests of pictures, and readers of a figure."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from maskconnect_jax.figures import page


@dataclasses.dataclass(frozen=True)
class Wired:
  """A topology, and the real mask that it was chosen by."""

  sources: list[Any]
  stages: list[int]
  live: list[Any]
  real_mask: np.ndarray


@pytest.fixture(scope='session')
def six_blocks():
  # Nobody takes blocks 3 and 5, but block 4, which is kept, takes neither.
  return Wired(
    [[0], [0, 1], [1, 2], [0, 2], [3, 4], [2, 4]],
    [0, 0, 1, 1, 2, 2],
    [True, True, False, True, False, True],
    np.arange(36, dtype=np.float32).reshape(6, 6) / 36,
  )


@pytest.fixture(scope='session')
def three_by_two():
  # Block 3 takes branch 2 of block 2 alone, and that takes branch 1 alone.
  return Wired(
    [[[0, 1], [0]], [[1], [1]]],
    [0, 1, 1],
    [[0], [1], [0, 1]],
    np.arange(8, dtype=np.float32).reshape(2, 2, 2) / 8,
  )


@pytest.fixture(scope='session')
def random_blocks():
  """Makes a block-level topology of random sources, some blocks pruned."""

  def make(count, fan_in, seed=0):
    rng = np.random.default_rng(seed)
    sources = [
      sorted(rng.choice(t, min(fan_in, t), replace=False).tolist())
      for t in range(1, count + 1)
    ]
    stages = [t * 3 // count for t in range(count)]
    live = [t % 4 != 1 for t in range(count)]
    return Wired(sources, stages, live, rng.random((count, count)))

  return make


@pytest.fixture(scope='session')
def random_branches():
  """Makes a branch-level topology of random sources, some branches pruned."""

  def make(blocks, branches, fan_in, seed=0):
    rng = np.random.default_rng(seed)
    real = rng.random((blocks - 1, branches, branches))
    order = np.argsort(-real, axis=-1)[..., :fan_in]
    stages = [t * 3 // blocks for t in range(blocks)]
    live = [list(range(t % 2, branches)) for t in range(blocks)]
    return Wired(np.sort(order, axis=-1).tolist(), stages, live, real)

  return make


@pytest.fixture(scope='session')
def svg_of(tmp_path_factory):
  """Saves a figure; returns the SVG's elements with an id, and its texts."""

  def read(figure):
    path = page.save(figure, tmp_path_factory.mktemp('svg') / 'figure')[1]
    root = ET.parse(path).getroot()
    found = [e for e in root.iter() if e.get('id')]
    by_id = {e.get('id'): e for e in found}
    assert len(by_id) == len(found)
    texts = [
      ''.join(e.itertext()).strip()
      for e in root.iter()
      if e.tag.endswith('}text')
    ]
    return by_id, texts

  return read


@pytest.fixture(scope='session')
def check_texts():
  """Fails if a text of a figure is cut off or runs into another one."""

  def check(figure):
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    texts = [*axes.texts, *axes.get_legend().get_texts()]
    for panel in axes.child_axes:
      for axis in (panel.xaxis, panel.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        texts += [label for at, label in ticks if low <= at <= high]
    texts = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for n, box in enumerate(boxes):
      assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, texts[n]
      assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, texts[n]
      assert not box.count_overlaps(boxes[n + 1 :]), texts[n]

  return check
