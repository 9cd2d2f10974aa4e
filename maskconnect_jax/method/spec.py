"""The choices of a wiring and their defaults, in one object.

A config becomes a `WiringSpec`, `create_model` and the stacks take one, and
model.json stores one. The tuples below list the values of each choice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from maskconnect_jax import limits
from maskconnect_jax.errors import InputError

RULES = (
  'learned',
  'fixed_prev',
  'fixed_near',
  'fixed_random',
  'fixed_all',
  'fixed_given',
)
LEVELS = ('block', 'branch')
# How a wiring is learned. 'draws' and 'as_published' draw a mask in each step.
# The others narrow: a block begins with all sources and loses some of them at
# a time, those that a score finds the least useful.
NARROWING = ('measured', 'fisher', 'random')
LEARNERS = ('draws', 'as_published', *NARROWING)
STARTS = ('all', 'previous')  # the sources that a narrowing wiring begins with
GRADIENTS = ('all', 'drawn', 'centered', 'normalized')
SCALES = ('mean', 'sum')  # of the K terms
IDENTITIES = ('1/K', '1/C', '1')  # s, at the branch level

# Choices of the network around the wiring.
ADAPTERS = ('pool', 'projection', 'same_stage')
REMATS = ('none', 'block')
VERSIONS = ('1', '2')
DTYPES = ('float32', 'bfloat16')
PRECISIONS = ('default', 'high', 'highest')

_CHOICES = {
  'level': LEVELS,
  'rule': RULES,
  'learner': LEARNERS,
  'start': STARTS,
  'gradient': GRADIENTS,
  'scale': SCALES,
  'identity': IDENTITIES,
}
_BOUNDS = {
  'temperature': (1e-6, 1),  # scores are divided by it
  'initial': (0, 1),
  'initial_spread': (0, math.inf),
}
# Fields that only one level has.
_LEVEL_OF = {'start': 'block', 'scale': 'block', 'identity': 'branch'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WiringSpec:
  """How a stack of blocks is wired.

  Attributes:
    level: 'block': each block picks sources; or 'branch': each branch of a
      ResNeXt picks branches of the block before.
    fan_in: K >= 1, the sources of each block or branch. A block with fewer
      valid sources takes all of them.
    rule: which sources a block or branch takes. 'learned': the learned ones;
      'fixed_prev': the block before, or the branch of the same number;
      'fixed_near': the K blocks before; 'fixed_random': K sources, drawn once;
      'fixed_all': every valid source;
      'fixed_given': the sources of a topology that is passed beside the spec.
    live: under rule 'fixed_random', on how many blocks, or branches, the output
      depends: wirings are drawn until one does. 0: on any number.
    learner: how rule 'learned' finds the sources. 'draws': each step draws K
      sources of each block and trains the real mask; 'as_published': the same,
      as the authors wrote it down, see `connectivity`; 'measured': blocks
      narrow to the sources without which the loss is larger, see `narrowing`;
      'random': they narrow at random, for comparison.
    start: what a narrowing wiring begins with, at level 'block'. 'all': the
      mean of all sources. 'previous': the block before alone, as an ordinary
      network does; the other sources then fade in, see `narrowing.fading_in`.
    gradient: how dloss/db reaches the real mask; see `connectivity.proxy`. Like
      the next three it is for learner 'draws'.
    temperature: T of the last draws, in [1e-6, 1]; see `temperature_at`.
    initial: the first value of the real mask's entries, in [0, 1].
    initial_spread: half the width of the uniform noise added to `initial`.
    scale: c, at level 'block': 'mean' (1/k_j) or 'sum' (1).
    identity: s, at level 'branch': '1/K', '1/C' or '1'.

  Raises:
    InputError: a value is not allowed, or a field of the other level is not at
      its default.
  """

  level: str = 'block'
  fan_in: int = 4
  rule: str = 'learned'
  live: int = 0
  learner: str = 'measured'
  start: str = 'all'
  gradient: str = 'normalized'
  temperature: float = 0.1
  initial: float = 0.5
  initial_spread: float = 0.0
  scale: str = 'mean'
  identity: str = '1/K'

  def __post_init__(self) -> None:
    for name, known in _CHOICES.items():
      limits.choice(name, getattr(self, name), known)
    number = limits.whole('fan_in', self.fan_in, 1, limits.MAX_FAN_IN)
    object.__setattr__(self, 'fan_in', number)  # a Python int, for JSON
    most = limits.MAX_BLOCKS * limits.MAX_FAN_IN
    object.__setattr__(self, 'live', limits.whole('live', self.live, 0, most))
    for name, bounds in _BOUNDS.items():
      value = limits.number(name, getattr(self, name), *bounds)
      object.__setattr__(self, name, value)
    if self.start != 'all' and self.learner not in NARROWING:
      raise InputError(
        f'start={self.start!r} is for the learners that narrow:'
        f' {", ".join(NARROWING)}'
      )
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name not in fields_of(self.level) and value != field.default:
        raise InputError(
          f'{field.name}={limits.shown(value)} is for level='
          f'{_LEVEL_OF[field.name]!r} alone; leave it at {field.default!r}'
        )

  @property
  def has_mask_of_step(self) -> bool:
    """Whether a training step has a mask of its own, other than `Wiring.mask`.

    It is drawn, or its sources fade in.
    """
    return self.learner not in NARROWING or self.start == 'previous'

  def temperature_at(self, progress: Any) -> Any:
    """Returns T = temperature^progress, which falls from 1 to `temperature`.

    Args:
      progress: the share of the connectivity phase that is over, in [0, 1]; a
        number, or an array of any library.
    """
    return self.temperature**progress

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields of the spec's level by name, as JSON values."""
    return {name: getattr(self, name) for name in fields_of(self.level)}


def fields_of(level: str) -> tuple[str, ...]:
  """Returns the names of the fields that a level has."""
  return tuple(
    field.name
    for field in dataclasses.fields(WiringSpec)
    if _LEVEL_OF.get(field.name, level) == level
  )
