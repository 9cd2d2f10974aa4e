"""The sources of blocks or of branches, rows of numbers, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Ints = Sequence[int]
BlockSources = Sequence[Ints]
BranchSources = Sequence[Sequence[Ints]]
Sources = Sequence[Sequence[Any]]  # BlockSources or BranchSources


def has_branches(sources: Sources) -> bool:
  """Returns whether sources are of branches: rows of rows of numbers."""
  return any(
    isinstance(one, Sequence | np.ndarray) for row in sources for one in row
  )


def check(
  sources: Sources, stages: Ints | None, real_mask: np.ndarray | None
) -> None:
  """Checks a topology.

  Args:
    sources: of blocks `[L]` rows: `sources[t]` are the sources of block t + 1.
      Of branches `[L-1][C]` rows: `sources[i][c]` are the sources of branch c
      of block i + 2.
    stages: `[L]` stage numbers; None: unknown.
    real_mask: `[L, L]` (target block, source), or `[L-1, C, C]` (junction,
      target branch, source branch); None: unknown.

  Raises:
    ValueError: lengths or shapes differ, stages decrease, a row is empty or
      names a source twice, or a source is not earlier than its block, or is no
      branch.
  """
  if has_branches(sources):
    size = len(sources[0])
    _check_stages(stages, len(sources) + 1)
    for block, rows in enumerate(sources, start=2):
      if len(rows) != size:
        raise ValueError(f'block {block}: {len(rows)} branches, not {size}')
      for branch, row in enumerate(rows, start=1):
        _check_row(row, size, f'branch {block}.{branch}', 'branches')
    shape: tuple[int, ...] = (len(sources), size, size)
  else:
    _check_stages(stages, len(sources))
    for block, row in enumerate(sources, start=1):
      _check_row(row, block, f'block {block}', 'earlier sources')
    shape = (len(sources), len(sources))
  if real_mask is not None and np.shape(real_mask) != shape:
    raise ValueError(f'real_mask has shape {np.shape(real_mask)}, not {shape}')


def _check_stages(stages: Ints | None, blocks: int) -> None:
  if stages is None and blocks:
    return
  if not stages or len(stages) != blocks:
    raise ValueError(f'{len(stages or ())} stages for {blocks} blocks')
  if sorted(stages) != list(stages):
    raise ValueError(f'stages {list(stages)} decrease')


def _check_row(row: Ints, below: int, name: str, kind: str) -> None:
  """Checks that a row is not empty, with distinct numbers in 0..below-1."""
  if not (0 < len(set(row)) == len(row) and 0 <= min(row) <= max(row) < below):
    raise ValueError(f'{name}: {row} are not distinct {kind}')
