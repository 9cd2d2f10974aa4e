"""The freeze: the top K of the real mask becomes the topology, for good.

While the wiring is learned, BatchNorm sees sums of the sources that drawn masks
select. So its statistics are measured anew on the frozen network.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maskconnect_jax.method import connectivity, wiring
from maskconnect_jax.method.spec import NARROWING
from maskconnect_jax.run import experiment, scores, steps, train_state
from maskconnect_jax.run.progress import Run


def freeze(run: Run) -> None:
  """Freezes the topology and recomputes BatchNorm; measures before and after.

  The result depends on the state alone. So a run that is resumed just before
  the freeze repeats it exactly. The two accuracies go into the progress, and so
  into every later checkpoint.

  Args:
    run: a run at the end of the connectivity phase; its recipe, state and
      progress become those of fine-tuning.

  Raises:
    Stopped: a signal came; the run is unchanged.
  """
  watched, split = experiment.held_out(run.job)
  state = run.state
  # The program of earlier evaluations serves where a step has their mask.
  own = run.job.model.stack.spec.has_mask_of_step
  drawn = run.evaluate(
    run.recipe.network,
    state.variables(),
    split,
    draw_at=int(state.step) if own else None,
  )
  recipe = frozen_recipe(run.recipe, state)
  if count := run.job.config.connectivity.batchnorm_batches:
    state = measured_anew(run, recipe, count)
  frozen = run.evaluate(recipe.network, state.variables(), split)
  if run.job.model.stack.spec.learner not in NARROWING:
    run.progress.margins = margins_of(run)
  run.recipe, run.state = recipe, state
  metric = scores.metric(recipe.multi_label).field
  run.progress.accuracies |= {
    f'{watched}_{metric}_drawn': drawn.headline,
    f'{watched}_{metric}_at_freeze': frozen.headline,
  }


def margins_of(run: Run) -> dict[str, float]:
  """Returns how clear the choice is: rows that choose, and their mean gap."""
  stack = run.job.model.stack
  (real_mask,) = jax.device_get(jax.tree.leaves(run.state.masks))
  gaps = connectivity.gaps(real_mask, stack.valid, stack.fan_in)
  margin = float(gaps.mean()) if len(gaps) else 0.0
  return {'choices': len(gaps), 'margin': margin}


def frozen_recipe(
  recipe: train_state.Recipe, state: train_state.TrainState
) -> train_state.Recipe:
  """Returns the recipe with the top K of the real mask as the topology."""
  model = nnx.merge(recipe.network, *state.variables())
  network, *_ = train_state.split(wiring.freeze(model))
  return dataclasses.replace(recipe, network=network)


def measured_anew(
  run: Run, recipe: train_state.Recipe, count: int
) -> train_state.TrainState:
  """Returns the state with BatchNorm's statistics over the next batches.

  The new statistics are the means over `count` batches. A run that averages its
  weights also has statistics of the averaged weights. They are measured in the
  same way.

  Args:
    run: at the freeze; it stays as it is.
    recipe: the recipe with the frozen network.
    count: number of batches to measure on.
  """
  state = run.state
  measure = jax.jit(steps.batch_statistics, static_argnums=0)
  both = {False: (state.weights, state.masks, state.statistics)}
  if state.average:
    both[True] = state.variables()
  add = jax.jit(functools.partial(jax.tree.map, jnp.add))
  totals: dict[bool, Any] = {}
  start = int(state.step)
  upcoming = itertools.islice(run.batches.starting_at(start), count)
  for step, (images, _) in enumerate(upcoming, start):
    for kind, variables in both.items():
      if step == start:
        run.compile(measure, recipe, variables, images, step)
      one = measure(recipe, variables, images, step)
      totals[kind] = add(totals[kind], one) if kind in totals else one
  mean = jax.jit(lambda total, n: jax.tree.map(lambda t: t / n, total))
  means = {kind: mean(total, float(count)) for kind, total in totals.items()}
  average = state.average and state.average | {'statistics': means[True]}
  return dataclasses.replace(state, statistics=means[False], average=average)
