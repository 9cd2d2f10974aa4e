"""The end of a run: prune, measure, write model, pictures and summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from maskconnect_jax import files, names
from maskconnect_jax.data import datasets
from maskconnect_jax.method import connectivity, wiring
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.method.spec import NARROWING
from maskconnect_jax.method.topology import BranchTopology, Topology
from maskconnect_jax.networks import cost
from maskconnect_jax.run import (
  card,
  distributed,
  experiment,
  inference,
  metrics,
  report,
  scores,
  software,
  train_state,
)
from maskconnect_jax.run.progress import Run

# Classes of a confusion matrix that is drawn. Of C classes a picture takes
# several arrays [C, C]: gigabytes for ten thousand, and no cell could be seen.
_MOST_CLASSES = 1_000


def at_freeze(run: Run) -> str:
  """Returns the line that a run prints right after the freeze."""
  watched, _ = experiment.held_out(run.job)
  metric = scores.metric(run.recipe.multi_label)
  drawn, frozen = (
    run.progress.accuracies[f'{watched}_{metric.field}_{name}']
    for name in ('drawn', 'at_freeze')
  )
  return (
    f'froze the topology after step {int(run.state.step)}:'
    f' {watched} {metric.words}'
    f' {drawn:.2%} {_before_the_freeze(run.job.config.connectivity.learner)},'
    f' {frozen:.2%} with the frozen one'
  )


def _before_the_freeze(learner: str) -> str:
  return 'before the freeze' if learner in NARROWING else 'with drawn masks'


def finish(run: Run) -> tuple[dict[str, Any], Any]:
  """Prunes the model, measures it, and writes the files of a finished run.

  Args:
    run: a run after its last step, with a frozen topology.

  Returns:
    The content of summary.json, and the pruned model.

  Raises:
    InputError: a file cannot be written, as on a full disk.
  """
  job, test = run.job, run.job.dataset.test
  variables = train_state.gathered(run.recipe, run.state)
  frozen = nnx.merge(run.recipe.network, *variables)
  pruned = wiring.prune(frozen)
  network, *kept = train_state.split(pruned)
  tested = run.evaluate(run.recipe.network, variables, test)
  watched, _ = experiment.held_out(job)
  metric = scores.metric(run.recipe.multi_label).field
  accuracies = {
    name: run.progress.accuracies.get(name)
    for name in (f'{watched}_{metric}_drawn', f'{watched}_{metric}_at_freeze')
  } | {
    **tested.named('test'),
    f'test_{metric}_pruned': run.evaluate(network, tuple(kept), test).headline,
    'num_test_examples': tested.count,
  }
  measured = [(test, tested)]
  if validation := job.dataset.validation:
    held = run.evaluate(run.recipe.network, variables, validation)
    accuracies |= held.named('validation')
    measured.append((validation, held))
  if lost := [
    name
    for name, value in accuracies.items()
    if name.endswith('_loss') and value is None
  ]:
    run.bar.say(
      f'{", ".join(lost)} is not finite, and null in summary.json: the run'
      ' diverged. Try a lower config.optimizer.learning_rate or a longer'
      ' config.optimizer.warmup'
    )
  summary = (
    summarize(
      job,
      frozen,
      pruned,
      accuracies,
      job.dataset.skipped + damaged(run.progress.damaged, measured),
      run.progress.clock,
    )
    | batch_times(run, (run.recipe.network, variables), (network, tuple(kept)))
    | run.progress.margins
    | tested.by_class(job.dataset.classes)
  )
  shown = run.evaluate.examples(network, tuple(kept), test)
  if not jax.process_index():
    report.write_examples(run.workdir, *shown)
    write(run.workdir, job, frozen, pruned, summary, run.history, tested)
  return summary, pruned


def damaged(
  trained: set[int],
  measured: Sequence[tuple[datasets.Split | datasets.LazySplit, scores.Scores]],
) -> int:
  """Returns how many images were found damaged while the run decoded them.

  All processes call it together.

  Args:
    trained: numbers of the training images that this process found damaged.
    measured: splits, and the scores of them, which leave out damaged images.
  """
  return len(distributed.union(trained)) + sum(
    len(split) - found.count for split, found in measured
  )


def summarize(
  job: experiment.Experiment,
  frozen: Any,
  pruned: Any,
  accuracies: dict[str, float | None],
  skipped: int,
  clock: metrics.Throughput,
) -> dict[str, Any]:
  """Returns the content of summary.json; see docs/running.md, "The workdir".

  Args:
    job: the experiment.
    frozen: the network before pruning.
    pruned: the network after pruning.
    accuracies: scores and number of test examples, by name.
    skipped: number of files and records left out as damaged.
    clock: the run's time and speed.
  """
  own, shape = job.config.connectivity, job.dataset.image_shape
  # A frozen network leaves out the blocks that pruning cuts out. In the chain
  # every block runs, and sums cost no products.
  chain = topology_lib.from_mask(connectivity.fixed_prev(frozen.stack.valid))
  whole = wiring.freeze(frozen, chain)
  return {
    'model': job.config.model.name,
    'rule': own.rule,
    **({'learner': own.learner} if own.rule == 'learned' else {}),
    'fan_in': own.fan_in,
    'seed': job.config.seed,
    'steps': job.plan.total,
    **accuracies,
    'num_train_examples': len(job.dataset.train),
    'skipped_files': skipped,
    'parameters': cost.count_parameters(frozen),
    'parameters_pruned': cost.count_parameters(pruned),
    'multiply_adds': cost.forward_products(whole, shape),
    'multiply_adds_pruned': cost.forward_products(pruned, shape),
    'blocks': len(frozen.stack.blocks),
    'blocks_pruned': sum(frozen.topology.live),
    **branches_of(frozen),
    'reads_previous': reads_previous(frozen.topology),
    'images_per_second': clock.images_per_second,
    'train_seconds': clock.seconds,
    'device': jax.devices()[0].device_kind,
    'num_devices': jax.device_count(),
    **software.versions(),
  }


def batch_times(
  run: Run, frozen: tuple[Any, Any], pruned: tuple[Any, Any]
) -> dict[str, float]:
  """Returns how long a batch of test images takes, before and after pruning.

  Args:
    run: a run after its last step.
    frozen: the network before pruning: its graph and its variables.
    pruned: the same after pruning.
  """
  images, (before, after) = run.evaluate.seconds(
    (frozen, pruned), run.job.dataset.test
  )
  return {
    'batch_images': images,
    'batch_seconds': before,
    'batch_seconds_pruned': after,
  }


def reads_previous(topology: Topology | BranchTopology) -> int:
  """Returns how many blocks read the block before them.

  At the branch level: how many branches read the branch of their own number.
  """
  if isinstance(topology, Topology):
    return sum(block in row for block, row in enumerate(topology.sources))
  return sum(
    branch in row
    for rows in topology.sources
    for branch, row in enumerate(rows)
  )


def branches_of(frozen: Any) -> dict[str, int]:
  """Returns the numbers of branches before and after pruning.

  Returns:
    {} for a block-level network.
  """
  if not isinstance(frozen.topology, BranchTopology):
    return {}
  live = frozen.topology.live_branches
  return {
    'branches': sum(block.branches for block in frozen.stack.blocks),
    'branches_pruned': sum(map(len, live)),
  }


def write(
  workdir: Path,
  job: experiment.Experiment,
  frozen: Any,
  pruned: Any,
  summary: dict[str, Any],
  history: metrics.MaskHistory,
  tested: scores.Scores,
) -> None:
  """Writes model, masks, topology, pictures, page and, last, the summary.

  The summary marks a finished run: without it, the same command writes all of
  it again. The model card holds the picture of the topology, so that is drawn
  before the model is written; all that can wait comes after the model. Of
  several processes the first one calls it.

  Args:
    workdir: the run's folder.
    job: the experiment.
    frozen: the network before pruning.
    pruned: the network after pruning.
    summary: from `summarize`.
    history: the real masks at the logged steps.
    tested: the scores on the test images after fine-tuning.

  Raises:
    InputError: a file cannot be written, as on a full disk.
  """
  draw_figures(workdir, job.config, frozen, history)
  about = card.text(
    job.config,
    summary,
    classes=job.dataset.classes,
    image_shape=job.dataset.image_shape,
  )
  picture = workdir / 'figures' / card.PICTURE
  inference.save(
    workdir / 'model',
    pruned,
    **experiment.served_as(job),
    extra={card.NAME: about.encode(), card.PICTURE: picture.read_bytes()},
  )
  history.save()
  files.write_json(workdir / 'topology.json', frozen.topology.to_dict())
  if isinstance(tested, scores.OneClass):
    draw_confusion(
      workdir / 'figures' / 'confusion',
      tested,
      job.dataset.classes,
      title=f'{job.config.model.name}, after fine-tuning',
    )
  report.write(workdir, summary=summary)
  files.write_json(workdir / 'summary.json', summary)


def draw_figures(
  workdir: Path,
  config: ml_collections.ConfigDict,
  frozen: Any,
  history: metrics.MaskHistory,
) -> None:
  """Draws the topology; if it was learned, the real mask too.

  If masks were drawn, the history of the real mask is drawn as well.

  The pictures go into `workdir/figures`.

  Args:
    workdir: the run's folder.
    config: the run's config.
    frozen: the network before pruning.
    history: the real masks at the logged steps.
  """
  # matplotlib takes half a second, which no start should wait for.
  from maskconnect_jax.figures import dynamics, masks, page
  from maskconnect_jax.figures import topology as topology_picture

  topology = frozen.topology
  own = config.connectivity
  title = f'{config.model.name}, {own.rule.replace("_", "-")}'
  if own.rule in ('learned', 'fixed_random'):
    title += f', fan-in {own.fan_in}'
  real = (
    np.asarray(frozen.stack.real_mask[...]) if own.rule == 'learned' else None
  )
  # There all chosen edges have the value 1, and entries only fall, once.
  narrows = own.learner in NARROWING
  live = topology.live
  if isinstance(topology, BranchTopology):
    live = topology.live_branches
  sources, stages = topology.sources, frozen.stages
  figures = {
    name: topology_picture.topology_figure(
      sources,
      stages=stages,
      live=live,
      real_mask=None if narrows else real,
      title=title,
      theme=theme,
    )
    for name, theme in (('topology', page.LIGHT), ('topology_dark', page.DARK))
  }
  if real is not None:
    figures['real_mask'] = masks.mask_figure(
      real,
      sources,
      stages=stages,
      title=f'{title}: how long each source was kept' if narrows else title,
    )
    if real.ndim == 2 and len(history) > 1 and not narrows:
      figures['real_mask_history'] = dynamics.history_figure(
        history.steps, history.masks, sources, stages=stages, title=title
      )
  for name, figure in figures.items():
    page.save(figure, workdir / 'figures' / name)


def draw_confusion(
  path: Path, tested: scores.OneClass, classes: Sequence[str], *, title: str
) -> None:
  """Draws which classes are taken for which, unless the classes are too many.

  Args:
    path: the picture, without a suffix.
    tested: the scores on the test images.
    classes: name of each class.
    title: the headline, one line.
  """
  if len(classes) > _MOST_CLASSES:
    return
  from maskconnect_jax.figures import confusion, page

  counts = np.zeros((len(classes), len(classes)), np.int64)
  label, taken, count = tested.confused.T
  counts[label, taken] = count
  figure = confusion.confusion_figure(
    counts,
    [names.one_line(name) for name in classes],
    title=title,
  )
  page.save(figure, path)


def table(summary: dict[str, Any], workdir: Path | str) -> str:
  """Returns the table that a run prints at its end."""
  metric = scores.metric_of(summary)
  own = metric.field
  watched = 'validation' if f'validation_{own}' in summary else 'test'
  tested = f'test {metric.words} ({summary["num_test_examples"]:,} images)'
  rows = [
    (
      _before_the_freeze(summary.get('learner', '')),
      summary[f'{watched}_{own}_drawn'],
    ),
    ('at the freeze', summary[f'{watched}_{own}_at_freeze']),
    ('after fine-tuning', summary[f'{watched}_{own}']),
    ('after pruning', summary[f'test_{own}_pruned']),
  ]
  lines = [
    f'  {name:<20}{value:>9.2%}' for name, value in rows if value is not None
  ]
  if watched == 'test':
    lines.insert(0, tested)
  else:
    lines = [f'validation {metric.words}', *lines[:-1], tested, lines[-1]]
  files = [
    ('summary', 'summary.json'),
    ('topology', 'topology.json'),
    ('page', 'report.html'),
    ('pictures', 'figures/'),
    ('model', 'model/'),
    ('metrics', 'metrics.jsonl'),
    ('TensorBoard', 'tensorboard/'),
    ('checkpoints', 'checkpoints/'),
    ('config', 'config.json'),
  ]
  return '\n'.join(
    [
      '',
      f'{summary["model"]}, {summary["rule"]}, fan-in {summary["fan_in"]},'
      f' seed {summary["seed"]}: {summary["steps"]:,} steps in'
      f' {summary["train_seconds"]:.0f} s,'
      f' {summary["images_per_second"]:,.0f} images per second'
      f' ({summary["num_devices"]} x {summary["device"]})',
      '',
      *lines,
      '',
      f'  {"":<20}{"blocks":>9}{"parameters":>13}',
      f'  {"before pruning":<20}{summary["blocks"]:>9}'
      f'{summary["parameters"]:>13,}',
      f'  {"after pruning":<20}{summary["blocks_pruned"]:>9}'
      f'{summary["parameters_pruned"]:>13,}',
      '',
      *(f'  {name:<20}{workdir}/{path}' for name, path in files),
    ]
  )
