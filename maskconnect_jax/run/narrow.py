"""A moment of a narrowing wiring: measure the edges, drop the least useful.

The batches are those of the next training steps. So a moment is a function of
the state alone, and a run that is resumed before it repeats it exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from maskconnect_jax.method import narrowing
from maskconnect_jax.networks import streams
from maskconnect_jax.run import (
  distributed,
  evaluation,
  experiment,
  measure,
  train_state,
)
from maskconnect_jax.run.plan import Plan
from maskconnect_jax.run.progress import Run

EDGES_AT_ONCE = 16  # in a call, between two looks for a signal
# Below this a line says how to measure each edge on more.
FEW_IMAGES = 16
FORWARDS = 3  # of a training step: backward costs as much as two


@dataclasses.dataclass(frozen=True)
class Budget:
  """How many images the edges of a run are measured on.

  Attributes:
    edges: edges measured at all moments together.
    images: images of a batch that are used.
    batches: batches in the first round; each round takes twice as many.
    share: of the arithmetic of the whole run.
  """

  edges: int
  images: int
  batches: int
  share: float


def budget(plan: Plan, stack: Any, batch_size: int, devices: int) -> Budget:
  """Returns the images for each edge that `plan.measuring` pays for.

  Args:
    plan: the durations.
    stack: the wiring.
    batch_size: images in a training step.
    devices: number of devices, which share the images of a batch.
  """
  edges = narrowing.edges_measured(stack.valid, stack.fan_in, plan.moments)
  paid = FORWARDS * plan.measuring * batch_size
  each = paid // max(1, narrowing.ROUNDS * edges)
  images = min(batch_size, max(1, each // devices) * devices)
  batches = max(1, each // batch_size)
  spent = edges * narrowing.ROUNDS * images * batches
  share = spent / (FORWARDS * plan.total * batch_size)
  return Budget(edges, images, batches, share)


def narrow(run: Run, number: int) -> str:
  """Drops sources from every block that has too many.

  Args:
    run: its state's real mask changes. If no block has too many sources, as
      when a run is resumed just after this moment, nothing changes.
    number: n, the number of the moment.

  Returns:
    A line for the user; '' if nothing changed.

  Raises:
    Stopped: a signal came; the run is unchanged.
  """
  job, plan = run.job, run.job.plan
  stack = job.model.stack
  (held,) = jax.tree.leaves(run.state.masks)
  real_mask = np.asarray(jax.device_get(held))
  mask = np.asarray(narrowing.kept(real_mask, stack.valid))
  left = narrowing.left_after(stack.valid, stack.fan_in, number / plan.moments)
  edges = narrowing.losing(mask, left)
  if not len(edges):
    return ''
  done = int(run.state.step)
  found = None
  if stack.spec.learner == 'random':
    key = run.recipe.key(streams.NARROWING, done)
    scores = np.asarray(jax.random.uniform(key, mask.shape), np.float64)
  elif stack.spec.learner == 'fisher':
    scores = _estimated(run, mask)
  else:
    paid = budget(plan, stack, job.config.batch_size, job.mesh.size)
    found = narrowing.race(_Measurement(run, mask, paid), mask, left)
    scores = found.on(mask, found.mean)
  after = narrowing.narrowed(
    real_mask,
    stack.valid,
    scores,
    left,
    number / (plan.moments + 1),
    keep_readers=job.config.connectivity.keep_readers,
  )
  masks = distributed.to_global(
    jax.tree.map(lambda _: after, run.state.masks),
    distributed.replicated(job.mesh),
  )
  run.state = dataclasses.replace(run.state, masks=masks)
  kept = np.asarray(narrowing.kept(after, stack.valid))
  most = int(kept.sum(-1).max())
  line = (
    f'step {done}: {int(mask.sum() - kept.sum())} of {int(mask.sum())} edges'
    f' went; a {stack.spec.level} reads at most {most}'
  )
  if found is not None:
    margins = narrowing.margins(found, mask, kept)
    run.progress.margins = dataclasses.asdict(margins)
    line += (
      f'. Each was measured on {int(found.count.min())} to'
      f' {int(found.count.max())} images; {margins.choices_clear} of'
      f' {margins.choices} choices are clear by two standard errors'
    )
  return line


def _estimated(run: Run, mask: np.ndarray) -> np.ndarray:
  """Returns `narrowing.estimate` over the next batches."""
  plan, state, step = run.job.plan, run.state, int(run.state.step)
  variables = state.weights, state.masks, state.statistics
  program = jax.jit(measure.mask_gradient, static_argnums=0)
  batches = max(2, plan.measuring // plan.moments)
  gradients = []
  upcoming = itertools.islice(run.batches.starting_at(step), batches)
  for at, (images, labels) in enumerate(upcoming, step):
    if run.preemption.noticed():
      raise evaluation.Stopped
    arguments = run.recipe, variables, images, labels, at, mask
    if at == step:
      run.compile(program, *arguments)
    gradients.append(jax.device_get(program(*arguments)))
  return narrowing.estimate(
    np.stack(gradients), mask, run.job.config.batch_size
  )


class _Measurement:
  """Measures masks on the batches of the next steps, all with the same ones."""

  def __init__(self, run: Run, mask: np.ndarray, paid: Budget) -> None:
    self._run, self._mask, self._paid = run, mask, paid
    self._step = int(run.state.step)
    self._upcoming = run.batches.starting_at(self._step)
    state = run.state
    self._variables = state.weights, state.masks, state.statistics
    self._program = jax.jit(_differences, static_argnums=(0, 7, 8))
    self._at_once = 1 if jax.default_backend() == 'cpu' else 4

  def __call__(self, masks: np.ndarray, number: int) -> tuple[np.ndarray, int]:
    """Returns the sums of `narrowing.Differences.add`, and the images."""
    del number  # the sets of images are asked for in order
    total = np.zeros((len(masks), 2))
    taken = itertools.islice(self._upcoming, self._paid.batches)
    for images, labels in taken:
      for start in range(0, len(masks), EDGES_AT_ONCE):
        if self._run.preemption.noticed():
          raise evaluation.Stopped
        some = masks[start : start + EDGES_AT_ONCE]
        # All calls have one shape, and the last ones compute fewer masks.
        given = np.zeros((1 + EDGES_AT_ONCE, *self._mask.shape), np.float32)
        given[0], given[1 : 1 + len(some)] = self._mask, some
        arguments = (
          self._run.recipe,
          self._variables,
          images,
          labels,
          self._step,
          given,
          len(some),
          self._paid.images,
          self._at_once,
        )
        if not start:
          self._run.compile(self._program, *arguments)
        sums = self._program(*arguments)
        total[start : start + len(some)] += np.asarray(
          jax.device_get(sums), np.float64
        )[: len(some)]
      self._step += 1
    return total, self._paid.images * self._paid.batches


def _differences(
  recipe: train_state.Recipe,
  variables: tuple[Any, Any, Any],
  images: jax.Array,
  labels: jax.Array,
  step: Any,
  masks: jax.Array,
  count: jax.Array | int,
  images_used: int,
  at_once: int,
) -> jax.Array:
  return measure.differences(
    recipe,
    variables,
    images[:images_used],
    labels[:images_used],
    step,
    masks,
    count,
    at_once,
  )


def cost_in_words(job: experiment.Experiment) -> str:
  """Returns a line on what measuring costs; '' if nothing is measured."""
  plan, stack = job.plan, job.model.stack
  if not plan.moments or stack.spec.learner == 'random':
    return ''
  if stack.spec.learner == 'fisher':
    share = plan.measuring / plan.total
    return f"{plan.moments} moments, {share:.1%} of the run's arithmetic"
  paid = budget(plan, stack, job.config.batch_size, job.mesh.size)
  images = paid.images * paid.batches
  line = (
    f'{plan.moments} moments, {paid.edges:,} edges, each on {images:,} images,'
    f' the undecided ones on up to {(2**narrowing.ROUNDS - 1) * images:,}:'
    f" {paid.share:.1%} of the run's arithmetic"
  )
  if images < FEW_IMAGES:
    line += (
      '. That is few images: fewer config.connectivity.moments, a larger'
      ' config.connectivity.measuring or a longer config.duration give more'
    )
  return line
