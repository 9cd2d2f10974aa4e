"""The report page of a run, made from the files of its workdir."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from maskconnect_jax import config as config_lib
from maskconnect_jax import files, signals
from maskconnect_jax.drawing import svg
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import connectivity, narrowing
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.method.spec import NARROWING
from maskconnect_jax.networks import architectures
from maskconnect_jax.report import html
from maskconnect_jax.report import run as page
from maskconnect_jax.report.record import Examples, Record
from maskconnect_jax.report.wiring import Wiring
from maskconnect_jax.run import metrics, scores, sharpness, software, workdirs
from maskconnect_jax.run import plan as plan_lib

NAME = 'report.html'
EXAMPLES = 'examples.npz'
POLL_SECONDS = 2.0
_OF_A_KIND = 12  # images of each kind, wrong and right
_SIDE = 96  # pixels of an image on the page
# What a page is made of and changes while a run goes on.
_WATCHED = (
  'metrics.jsonl', 'real_masks.npz', 'topology.json', 'summary.json', EXAMPLES,
)  # fmt: skip
_REMEDY = 'delete it and train again: the run goes on from its last checkpoint'


def write(
  workdir: Path,
  *,
  summary: dict[str, Any] | None = None,
  reload_seconds: int = 0,
) -> Path:
  """Writes the page of a run, finished or not, into its workdir.

  Args:
    workdir: the folder of the run.
    summary: the content of summary.json, where it is not written yet.
    reload_seconds: how often a browser reads the page again; 0: never.

  Returns:
    The path of the page.

  Raises:
    InputError: the folder holds no run, one of its files is damaged, or the
      page cannot be written.
  """
  path = workdir / NAME
  record = read(workdir, summary)
  files.write_text(path, page.page(record, reload_seconds=reload_seconds))
  return path


def follow(
  workdir: Path,
  tell: Callable[[str], None],
  *,
  seconds: float = POLL_SECONDS,
) -> Path:
  """Writes the page again whenever a run has written, until it is finished.

  Ctrl-C ends it, too. Meanwhile the page asks the browser to read it again.

  Args:
    workdir: the folder of the run.
    tell: is given a line once the first page is written.
    seconds: between two looks at the workdir.

  Returns:
    The path of the page.

  Raises:
    InputError: see `write`.
  """
  seen: list[Any] = []
  stopped = threading.Event()
  with signals.caught(lambda number, frame: stopped.set()):
    while not ((workdir / 'summary.json').is_file() or stopped.is_set()):
      now = [_state_of(workdir / name) for name in _WATCHED]
      if now != seen:
        path = write(workdir, reload_seconds=max(1, round(2 * seconds)))
        if not seen:
          tell(f'{path} follows the run; Ctrl-C ends this, not the run')
        seen = now
      stopped.wait(seconds)
    # The last page asks for nothing. It is written before the handlers from
    # before are back, which would end the process by the same signal.
    return write(workdir)


def _state_of(path: Path) -> tuple[int, int] | None:
  try:
    status = path.stat()
  except OSError:
    return None
  return status.st_mtime_ns, status.st_size


def read(workdir: Path, summary: dict[str, Any] | None = None) -> Record:
  """Reads what a page shows of a run.

  Args:
    workdir: the folder of the run.
    summary: see `write`.

  Raises:
    InputError: the folder holds no run, or one of its files is damaged.
  """
  config, _ = config_lib.record_of(workdir)
  given = workdir / 'summary.json'
  if summary is None and given.is_file():
    summary = files.read_json(given, dict[str, Any], remedy=_REMEDY)
  plan = plan_lib.read(workdir)
  own = config.connectivity
  learner = own.learner if own.rule == 'learned' else ''
  log = metrics.read(workdir)
  wired = _wiring(workdir, config)
  inputs = workdirs.read_inputs(workdir) or {}
  plain = config_lib.flat(
    ml_collections.ConfigDict(json.loads(config.to_json()))
  )
  usual = config_lib.default()
  usual = config_lib.flat(
    ml_collections.ConfigDict(json.loads(usual.to_json()))
  )
  freeze = plan.freeze if plan else 0
  entropy, shares, changes = _sharpness(wired, learner, config, freeze)
  return Record(
    workdir=str(workdir),
    config=plain,
    changed=[path for path, value in plain.items() if value != usual[path]],
    learner=learner,
    metrics=log,
    total=plan.total if plan else 0,
    freeze=freeze,
    summary=summary,
    wiring=wired,
    entropies=entropy,
    shares=shares,
    changes=changes,
    classes=inputs.get('data', {}).get('classes') or [],
    metric=dataclasses.astuple(scores.metric(config.data.multi_label)),
    examples=_examples(workdir / EXAMPLES),
    versions=software.recorded(summary),
  )


def _wiring(workdir: Path, config: ml_collections.ConfigDict) -> Wiring | None:
  """Returns the wiring of a run; None before anything of it is written."""
  own = config.connectivity
  architecture = architectures.architecture_of(config.model.name)
  valid = np.asarray(
    architecture.valid_sources(
      own.level, stem_source=own.stem_source, adapter=own.adapter
    )
  )
  narrows = own.learner in NARROWING
  steps, masks = np.zeros(0, np.int64), np.zeros((0, *valid.shape), np.float32)
  recorded = workdir / 'real_masks.npz'
  if recorded.is_file():
    steps, masks = metrics.read_masks(recorded)
    if masks.shape[1:] != valid.shape:
      raise InputError(
        f'{recorded} holds masks of shape {masks.shape[1:]}, and the network of'
        f' config.json takes {valid.shape}; {_REMEDY}'
      )
  path = workdir / 'topology.json'
  frozen = path.is_file()
  if frozen:
    found = topology_lib.read(path, remedy=_REMEDY)
    if found.shape != valid.shape:
      raise InputError(
        f'{path} is of a mask of shape {found.shape}, and the network of'
        f' config.json takes {valid.shape}; {_REMEDY}'
      )
  elif len(masks):
    found = topology_lib.from_mask(
      narrowing.kept(masks[-1], valid)
      if narrows
      else connectivity.top_k(masks[-1], valid, own.fan_in)
    )
  else:
    return None
  return Wiring(
    sources=found.sources,
    stages=architecture.stages,
    live=getattr(found, 'live_branches', found.live),
    frozen=frozen,
    valid=valid,
    steps=steps,
    masks=masks,
    narrows=narrows,
    fan_in=own.fan_in,
  )


def _sharpness(
  wired: Wiring | None,
  learner: str,
  config: ml_collections.ConfigDict,
  freeze: int,
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
  """Returns entropies, top-K shares and changed edges, see `Record`."""
  if wired is None or not len(wired.masks) or wired.narrows:
    return None, None, None
  sources = wired.valid.shape[-1]
  valid = wired.valid.reshape(-1, sources)
  able = valid.sum(-1) > wired.fan_in
  if not able.any():
    return None, None, None
  masks = wired.masks.reshape(len(wired.masks), -1, sources)[:, able]
  valid = valid[able]
  heat = sharpness.temperatures(
    learner,
    config.connectivity.temperature,
    wired.steps / max(freeze or wired.steps[-1], 1),
  )
  chosen = np.asarray(connectivity.top_k(masks, valid, wired.fan_in)) > 0
  changed = np.sum(chosen[1:] & ~chosen[:-1], axis=(1, 2))
  return (
    sharpness.entropies(masks, valid, heat).mean(-1),
    sharpness.top_shares(masks, valid, wired.fan_in).mean(-1),
    np.array([0, *changed]),
  )


def snippet(summary: dict[str, Any], model: Any) -> str:
  """Returns HTML that shows a finished run in a notebook.

  Args:
    summary: the content of summary.json.
    model: the pruned model.
  """
  own, metric = model.topology, scores.metric_of(summary)
  drawing = svg.topology_svg(
    own.sources,
    stages=model.stages,
    live=getattr(own, 'live_branches', own.live),
    title=f'Topology of {summary["model"]}',
  )
  return (
    '<figure style="max-width:720px;margin:0">'
    f'<figcaption><b>{html.text(summary["model"])}</b>,'
    f' {html.text(summary["rule"])}, fan-in {summary["fan_in"]}, seed'
    f' {summary["seed"]}: test {metric.words}'
    f' {summary[f"test_{metric.field}_pruned"]:.2%},'
    f' {summary["blocks_pruned"]} of {summary["blocks"]} blocks,'
    f' {summary["parameters_pruned"]:,} parameters</figcaption>'
    f'{drawing}</figure>'
  )


def write_examples(
  workdir: Path, images: np.ndarray, labels: np.ndarray, predicted: np.ndarray
) -> None:
  """Writes a few test images, wrong and right ones, for the page.

  Args:
    workdir: the folder of the run.
    images: uint8 [N, H, W, C], C being 1 or 3.
    labels: int [N], the classes of the images; or bool [N, classes].
    predicted: the labels that the model gives them, of the same form.

  Raises:
    InputError: the file cannot be written.
  """
  right = (labels == predicted).reshape(len(labels), -1).all(1)
  chosen = np.concatenate(
    [np.flatnonzero(part)[:_OF_A_KIND] for part in (~right, right)]
  )
  record = Examples(
    np.stack([_small(images[at]) for at in chosen])
    if len(chosen)
    else images[:0],
    labels[chosen],
    predicted[chosen],
  )
  with (
    files.replacing(workdir / EXAMPLES) as temporary,
    temporary.open('wb') as file,
  ):
    np.savez_compressed(file, **vars(record))


def _small(image: np.ndarray) -> np.ndarray:
  """Returns an image of at most the side that the page shows."""
  height, width, channels = image.shape
  scale = _SIDE / max(height, width)
  if scale >= 1:
    return image
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  squeezed = image[..., 0] if channels == 1 else image
  small = np.asarray(Image.fromarray(squeezed).resize(size))
  return small.reshape(*small.shape[:2], channels)


def _examples(path: Path) -> Examples | None:
  if not path.is_file():
    return None
  try:
    with np.load(path) as file:
      found = Examples(file['images'], file['labels'], file['predicted'])
    if found.images.ndim != 4 or found.images.shape[-1] not in (1, 3):
      raise ValueError(f'images of shape {found.images.shape}')
    if not len(found.images) == len(found.labels) == len(found.predicted):
      raise ValueError('its arrays differ in length')
    if found.labels.shape != found.predicted.shape:
      raise ValueError('labels and predicted differ in shape')
  except Exception as error:  # NumPy raises many kinds for a broken archive
    raise InputError(
      f'{path} is damaged ({error!r}); delete it: the page is then without'
      ' images'
    ) from error
  return found
