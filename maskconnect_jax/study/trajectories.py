"""The recorded real mask of a run over its connectivity phase.

Only rows with more valid sources than K are kept. The other rows take all their
sources, for any entries. `dynamics` defines the figures.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from maskconnect_jax import config as config_lib
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import connectivity, topology
from maskconnect_jax.method.spec import NARROWING
from maskconnect_jax.networks import models
from maskconnect_jax.run import experiment, metrics, sharpness
from maskconnect_jax.run import plan as plan_lib


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """The real mask of a run over its connectivity phase.

  J is the number of rows with a choice, S that of sources, T that of records.
  The first record is r before the first step.

  Attributes:
    workdir: the folder of the run.
    seed: the seed of the run.
    fields: every other field of its config, by path.
    progress: float64 [T], the share of the phase done at each record, from 0.
    over: whether the records reach the end of the phase.
    masks: float32 [T, J, S], r at each record.
    valid: bool [J, S], whether row j may take source i.
    chosen: bool [J, S], the sources chosen at the freeze; before it, those that
      the last record would choose.
    blocks: int64 [J], the block that each row belongs to, from 1.
    live: in words, how many blocks or branches the output depends on, and of
      how many.
  """

  workdir: Path
  seed: int
  fields: dict[str, Any]
  progress: np.ndarray
  over: bool
  masks: np.ndarray
  valid: np.ndarray
  chosen: np.ndarray
  blocks: np.ndarray
  live: str

  @property
  def fan_in(self) -> int:
    """The fan-in K."""
    return int(self.fields['connectivity.fan_in'])

  def record(self, share: float) -> int | None:
    """Returns the index of the record nearest to a share of the phase.

    Args:
      share: of the connectivity phase, from 0 to 1.

    Returns:
      None if the run has not reached this share.
    """
    if share > self.progress[-1] and not self.over:
      return None
    return int(np.argmin(np.abs(self.progress - share)))

  @functools.cached_property
  def entropies(self) -> np.ndarray:
    """Entropy of p, divided by that of a uniform draw, float64 [T, J].

    A wiring that narrows draws nothing; there p is uniform over the sources
    that are kept.
    """
    learner = self.fields['connectivity.learner']
    if learner in NARROWING:
      kept = (self.masks >= 1) & self.valid
      return np.asarray(np.log(kept.sum(-1)) / np.log(self.valid.sum(-1)))
    temperature = sharpness.temperatures(
      learner, self.fields['connectivity.temperature'], self.progress
    )
    return sharpness.entropies(self.masks, self.valid, temperature)

  def share_at(self, value: float) -> float:
    """Returns the share of valid entries that end at exactly this value."""
    return float(np.mean(self.masks[-1][self.valid] == value))

  @property
  def zero_rows(self) -> int:
    """The number of rows that end with all entries at 0."""
    return int(np.sum(~self.masks[-1].any(-1)))

  def changed(self, share: float) -> int | None:
    """Returns how many chosen sources were not chosen at a share of the phase.

    Args:
      share: of the connectivity phase, from 0 to 1.

    Returns:
      None if the run has not reached this share.
    """
    record = self.record(share)
    if record is None:
      return None
    before = connectivity.top_k(self.masks[record], self.valid, self.fan_in)
    return int(np.sum(self.chosen & (np.asarray(before) == 0)))

  @property
  def drift(self) -> float | None:
    """The drift, see `dynamics`; None if no entry moved."""
    moved = self.masks[-1].astype(np.float64) - self.masks[0]
    total = np.sum(moved**2)  # r is 0 where not valid, at all times
    common = np.sum(moved.sum(-1) ** 2 / self.valid.sum(-1))
    return float(common / total) if total else None

  @property
  def reach(self) -> tuple[float, float] | None:
    """Mean of j - i, over the chosen sources and over a uniform choice.

    None at branch level, where sources are branches.
    """
    if self.fields['connectivity.level'] == 'branch':
      return None
    distance = self.blocks[:, None] - np.arange(self.valid.shape[-1])
    uniform = np.sum(distance * self.valid, -1) / self.valid.sum(-1)
    return float(distance[self.chosen].mean()), float(uniform.mean())


def read(workdir: Path) -> Trajectory:
  """Reads the recorded real mask of a run.

  Raises:
    InputError: a file of the run is missing, damaged or of another network, or
      no row has a choice.
  """
  config, removed = config_lib.record_of(workdir)
  valid, start = _at_the_start(config)
  path = workdir / 'real_masks.npz'
  try:
    later, recorded = metrics.read_masks(path)
    masks = np.stack([start, *recorded])
    steps = np.array([0, *later])
  except ValueError as error:  # an InputError, or masks of another shape
    raise InputError(
      f'{path} is missing, damaged or of another network than config.json'
      f' ({error}); train again, or leave the run out'
    ) from error
  plan = plan_lib.read(workdir) or _plan_of_log(workdir, config)
  fan_in = config.connectivity.fan_in
  frozen = _frozen(workdir, masks[-1].shape)
  mask = connectivity.top_k(masks[-1], valid, fan_in)
  wiring = frozen or topology.from_mask(mask)
  if isinstance(wiring, topology.BranchTopology):
    kept = sum(map(len, wiring.live_branches))
    live = f'{kept} of {len(wiring.live_branches) * masks.shape[-1]} branches'
    blocks = np.repeat(np.arange(len(wiring.sources)) + 2, masks.shape[-1])
    rows = [row for junction in wiring.sources for row in junction]
  else:
    live = f'{sum(wiring.live)} of {len(wiring.live)} blocks'
    blocks = np.arange(len(wiring.sources)) + 1
    rows = list(wiring.sources)
  sources = masks.shape[-1]
  valid = valid.reshape(-1, sources)
  able = valid.sum(-1) > fan_in
  if not able.any():
    raise InputError(
      f'{workdir}: with connectivity.fan_in={fan_in} nothing has more sources'
      ' than it takes, so nothing was learned; leave the run out'
    )
  chosen = np.array([np.isin(np.arange(sources), row) for row in rows])
  fields = config_lib.essential(config) | removed
  return Trajectory(
    workdir,
    fields.pop('seed'),
    fields,
    plan.share(steps),
    bool(steps[-1] > plan.freeze - plan.log_every),
    masks.reshape(len(masks), -1, sources)[:, able],
    valid[able],
    chosen[able],
    blocks[able],
    live,
  )


def _at_the_start(
  config: ml_collections.ConfigDict,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the valid entries, bool, and r before training, of equal shape."""
  # Neither depends on the images, nor on the numbers of classes and channels.
  architecture = experiment.architecture_of(config, 1, 3)
  spec = config_lib.wiring_spec(config)
  valid = []

  # Under jit only r is computed: the weights are no result, so XLA drops them.
  @jax.jit
  def start() -> jax.Array:
    stack = models.create_model(**architecture, spec=spec).stack
    valid.append(np.array(stack.valid))
    return stack.real_mask[...]

  mask = np.asarray(start())
  return np.broadcast_to(valid[0], mask.shape), mask


def _plan_of_log(
  workdir: Path, config: ml_collections.ConfigDict
) -> plan_lib.Plan:
  """Returns the plan of a run of an earlier version, which wrote no plan.json.

  The log of the run gives the steps of an epoch.
  """
  records = [record for record in metrics.read(workdir) if record.get('epoch')]
  if not records:
    raise InputError(
      f'{workdir} holds no metrics.jsonl that says how long an epoch is; train'
      ' again, or leave the run out'
    )
  per_epoch = round(records[-1]['step'] / records[-1]['epoch'])
  return plan_lib.make(config, per_epoch * config.batch_size)


def _frozen(
  workdir: Path, shape: tuple[int, ...]
) -> topology.Topology | topology.BranchTopology | None:
  """Returns the frozen topology, or None if there is no topology.json."""
  path = workdir / 'topology.json'
  if not path.is_file():
    return None
  remedy = 'train again: the run goes on from its last checkpoint'
  frozen = topology.read(path, remedy=remedy)
  if frozen.shape != shape:
    raise InputError(
      f'{path} is damaged: not the topology of a mask of shape {shape};'
      f' {remedy}'
    )
  return frozen
