"""A frozen mask as plain Python: known before anything is compiled.

`from_mask` makes a topology from a binary mask. `to_dict` writes its JSON form,
which docs/running.md documents, and `from_dict` reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from maskconnect_jax import files, limits
from maskconnect_jax.drawing import svg
from maskconnect_jax.errors import InputError

# Which sources each row may take: bool, of the shape of the mask.
Valid = Sequence[Any]

SCHEMA = 'maskconnect_jax.topology/1'


# The schema of the JSON form. Its other fields follow from these and are not
# read.

_Sources = list[Annotated[int, msgspec.Meta(ge=0, lt=limits.MAX_BLOCKS)]]
_Number = Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_BLOCKS)]
_Blocks = msgspec.Meta(min_length=1, max_length=limits.MAX_BLOCKS)


class _BlockRow(msgspec.Struct):
  sources: _Sources
  block: _Number | None = None


class _BranchRow(msgspec.Struct):
  sources: _Sources
  branch: _Number | None = None


class _BranchRows(msgspec.Struct):
  branches: list[_BranchRow]
  block: _Number | None = None


class _BlockForm(msgspec.Struct, tag_field='form', tag='block'):
  schema: Literal['maskconnect_jax.topology/1']
  blocks: Annotated[list[_BlockRow], _Blocks]


class _BranchForm(msgspec.Struct, tag_field='form', tag='branch'):
  schema: Literal['maskconnect_jax.topology/1']
  blocks: Annotated[list[_BranchRows], _Blocks]


@dataclasses.dataclass(frozen=True)
class Topology:
  """A frozen mask: plain Python, hashable, known before anything is compiled.

  Attributes:
    sources: for each block j = 1..L the sources it takes, in rising order.

  Raises:
    ValueError: a block has no source, one that is no whole number or does not
      come before it, or sources that are not distinct and in rising order.
  """

  sources: tuple[tuple[int, ...], ...]

  def __post_init__(self) -> None:
    for target, sources in enumerate(self.sources):
      _check_whole(f'block {target + 1}', sources)
      if not sources or list(sources) != sorted(set(sources)):
        raise ValueError(
          f'block {target + 1} takes {sources}: its sources must'
          ' be distinct, in rising order, and at least one'
        )
      if sources[0] < 0 or sources[-1] > target:
        raise ValueError(
          f'block {target + 1} takes {sources}: only sources'
          f' 0..{target} come before it'
        )

  def _repr_svg_(self) -> str:
    """Shows the topology in a notebook."""
    return svg.of_topology(self, f'Topology of {len(self.sources)} blocks')

  @property
  def num_links(self) -> int:
    """The number of edges (source, block)."""
    return sum(map(len, self.sources))

  @property
  def live(self) -> tuple[bool, ...]:
    """For each block, whether the last block's output depends on it."""
    needed = {len(self.sources)}
    for block in range(len(self.sources), 0, -1):
      if block in needed:
        needed.update(self.sources[block - 1])
    return tuple(block in needed for block in range(1, len(self.sources) + 1))

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the mask, (L, L)."""
    return len(self.sources), len(self.sources)

  def check(self, valid: Valid) -> None:
    """Checks that a network can have this topology.

    Args:
      valid: bool [L, L], the sources that each of the network's blocks may
        take.

    Raises:
      InputError: the network has another number of blocks, or a block takes a
        source that is not valid.
    """
    _check_shape(self.shape, valid)
    for j, row in enumerate(self.sources):
      for i in row:
        if not valid[j][i]:
          raise InputError(
            f'block {j + 1} takes source {i}, which this network does not let'
            ' it take (connectivity.stem_source, connectivity.adapter)'
          )

  def shuffled(self, rng: np.random.Generator, valid: Valid) -> Topology:
    """Returns a topology with the rows in a random order, as distances.

    Block j gets the distances j' - i of the sources i of another block j', the
    shortest first. A distance may lead to a source that is not valid or is
    already taken; then block j takes the nearest free source. Block j keeps its
    number of sources: it drops the last ones, or adds the latest free ones.

    Args:
      rng: draws the order.
      valid: bool [L, L], the sources that each block may take.
    """
    rows = []
    for j, other in enumerate(rng.permutation(len(self.sources))):
      free = {i for i in range(j + 1) if valid[j][i]}
      row: list[int] = []
      for i in reversed(self.sources[other]):
        if free:
          row.append(min(free, key=lambda f: (abs(f - (j - other + i)), -f)))
          free.remove(row[-1])
      # The other row was shorter: block j takes the latest free sources, too.
      while len(row) < len(self.sources[j]):
        row.append(max(free))
        free.remove(row[-1])
      rows.append(tuple(sorted(row[: len(self.sources[j])])))
    return Topology(tuple(rows))

  def to_dict(self) -> dict[str, Any]:
    """Returns the JSON form; docs/running.md documents it."""
    return {
      'schema': SCHEMA,
      'form': 'block',
      'num_blocks': len(self.sources),
      'blocks': [
        {'block': block, 'sources': list(sources), 'pruned': not live}
        for block, (sources, live) in enumerate(
          zip(self.sources, self.live, strict=True), start=1
        )
      ],
    }


@dataclasses.dataclass(frozen=True)
class BranchTopology:
  """Frozen masks between the branches of consecutive blocks.

  Attributes:
    sources: `sources[i][c]` are the branches of block i + 1 that branch c of
      block i + 2 takes, in rising order; i = 0..L-2, branches from 0.

  Raises:
    ValueError: there are fewer than two blocks, blocks differ in their number
      of branches, or a branch takes none, one that is not there, or branches
      that are not distinct whole numbers in rising order.
  """

  sources: tuple[tuple[tuple[int, ...], ...], ...]

  def __post_init__(self) -> None:
    if len({len(rows) for rows in self.sources}) != 1:
      raise ValueError(
        'there must be two blocks or more, all with as many branches'
      )
    for junction, rows in enumerate(self.sources):
      for branch, row in enumerate(rows):
        _check_whole(f'branch {branch} of block {junction + 2}', row)
        if not row or list(row) != sorted(set(row)) or row[0] < 0:
          raise ValueError(
            f'branch {branch} of block {junction + 2} takes {row}: its sources'
            ' must be distinct, in rising order, and at least one'
          )
        if row[-1] >= len(self.sources[0]):
          raise ValueError(
            f'branch {branch} of block {junction + 2} takes {row}: there are'
            f' only {len(self.sources[0])} branches'
          )

  def _repr_svg_(self) -> str:
    """Shows the topology in a notebook."""
    return svg.of_topology(
      self, f'Topology of {len(self.sources) + 1} blocks of branches'
    )

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the mask, (L - 1, C, C)."""
    return len(self.sources), len(self.sources[0]), len(self.sources[0])

  @property
  def fan_in(self) -> int:
    """K, the largest number of branches that a branch takes."""
    return max(len(row) for rows in self.sources for row in rows)

  def check(self, valid: Valid) -> None:
    """Checks that a network can have this topology.

    Args:
      valid: bool [L-1, C, C], all True: a branch may take any branch of the
        block before.

    Raises:
      InputError: the network has another number of blocks or branches.
    """
    _check_shape(self.shape, valid)

  def shuffled(self, rng: np.random.Generator, valid: Valid) -> BranchTopology:
    """Returns a topology with each block's rows in a random order."""
    del valid  # every branch of the block before is valid
    return BranchTopology(
      tuple(
        tuple(rows[c] for c in rng.permutation(len(rows)))
        for rows in self.sources
      )
    )

  @property
  def num_links(self) -> int:
    """The number of edges between branches."""
    return sum(len(row) for rows in self.sources for row in rows)

  @property
  def live(self) -> tuple[bool, ...]:
    """True for each block: every block keeps at least one branch."""
    return (True,) * (len(self.sources) + 1)

  @property
  def live_branches(self) -> tuple[tuple[int, ...], ...]:
    """For each block, the branches on which the last block's sum depends."""
    live = [set(range(len(self.sources[-1])))]
    for rows in reversed(self.sources):
      live.append({k for c in live[-1] for k in rows[c]})
    return tuple(tuple(sorted(branches)) for branches in reversed(live))

  def to_dict(self) -> dict[str, Any]:
    """Returns the JSON form; docs/running.md documents it."""
    live = self.live_branches
    count = len(self.sources[0])
    first: tuple[tuple[int, ...], ...] = ((),) * count  # they take the stem
    return {
      'schema': SCHEMA,
      'form': 'branch',
      'num_blocks': len(live),
      'num_branches': count,
      'blocks': [
        {
          'block': block,
          'branches': [
            {
              'branch': branch,
              'sources': list(row),
              'pruned': branch not in live[block - 1],
            }
            for branch, row in enumerate(rows)
          ],
        }
        for block, rows in enumerate((first, *self.sources), start=1)
      ],
    }


def from_dict(record: Any) -> Topology | BranchTopology:
  """Returns the topology of a JSON form that `to_dict` wrote.

  Raises:
    InputError: another schema or form, or an impossible topology.
  """
  form = files.of_kind(record, _BlockForm | _BranchForm)
  _check_order('block', [row.block for row in form.blocks], 1)
  try:
    if isinstance(form, _BlockForm):
      return Topology(tuple(tuple(row.sources) for row in form.blocks))
    for rows in form.blocks:
      _check_order('branch', [row.branch for row in rows.branches], 0)
    if any(row.sources for row in form.blocks[0].branches):
      raise InputError('the branches of block 1 take the stem, not branches')
    return BranchTopology(
      tuple(
        tuple(tuple(row.sources) for row in rows.branches)
        for rows in form.blocks[1:]
      )
    )
  except ValueError as error:
    raise InputError(str(error)) from error


def read(path: Path, *, remedy: str) -> Topology | BranchTopology:
  """Reads a topology.json.

  Args:
    path: the file.
    remedy: the end of the error's message; see `files.read_json`.

  Raises:
    InputError: the file cannot be read or holds no topology.
  """
  record = files.read_json(path, remedy=remedy)
  try:
    return from_dict(record)
  except InputError as error:
    raise InputError(f'{path} is damaged: {error}; {remedy}') from error


def from_mask(mask: Any) -> Topology | BranchTopology:
  """Returns the topology of a binary mask, [L, L] or [L-1, C, C]."""
  ones = np.asarray(mask) > 0
  if ones.ndim == 2:
    return Topology(_ones_of(ones))
  return BranchTopology(tuple(map(_ones_of, ones)))


def _check_shape(own: tuple[int, ...], valid: Valid) -> None:
  if own != np.shape(valid):
    raise InputError(
      f'the topology is of a mask of shape {own}; that of this network is'
      f' {np.shape(valid)}'
    )


def _check_order(what: str, found: list[int | None], first: int) -> None:
  """Checks that the numbers count up from `first`; None is no number."""
  for expected, number in enumerate(found, first):
    if number not in (None, expected):
      raise InputError(
        f'{what} {number} stands where {what} {expected} belongs'
      )


def _check_whole(name: str, row: tuple[int, ...]) -> None:
  for source in row:
    if isinstance(source, bool) or not isinstance(source, int | np.integer):
      raise InputError(
        f'{name} takes {limits.shown(row)}: sources must be whole numbers'
      )


def _ones_of(matrix: np.ndarray) -> tuple[tuple[int, ...], ...]:
  """Returns the columns of the ones in each row of a binary matrix."""
  return tuple(tuple(np.flatnonzero(row).tolist()) for row in matrix)
