"""What a page shows of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskconnect_jax.report import wiring


@dataclasses.dataclass(frozen=True)
class Examples:
  """Some test images, and what the finished model takes them for.

  Attributes:
    images: uint8 [N, H, W, C], C being 1 or 3.
    labels: int [N], the classes of the images; or bool [N, classes], which
      labels each of them has.
    predicted: the labels that the model gives them, of the same form.
  """

  images: np.ndarray
  labels: np.ndarray
  predicted: np.ndarray

  @property
  def right(self) -> np.ndarray:
    """Whether all of an image's labels are right, bool [N]."""
    same = self.labels == self.predicted
    every: np.ndarray = np.asarray(same.reshape(len(same), -1).all(1))
    return every


@dataclasses.dataclass(frozen=True)
class Record:
  """What a page shows of a run.

  Attributes:
    workdir: the folder of the run, in words.
    config: every field of its config, by path.
    changed: the fields that differ from their defaults.
    learner: in words, such as 'measured'; '' for a fixed rule.
    metrics: the records of metrics.jsonl.
    total: the steps of the run; 0: unknown.
    freeze: the steps of the connectivity phase; 0: none.
    summary: the content of summary.json; None while the run goes on.
    wiring: None before anything of it is written.
    entropies: float [T], at each record of the real mask the mean entropy of
      its rows, divided by that of a uniform draw; None for a wiring that
      narrows.
    shares: float [T], the share of the K largest entries in the sum of a row;
      None for a wiring that narrows.
    changes: int [T], edges that differ from those at the record before.
    classes: the names of the classes.
    examples: None if there are none.
    metric: the name of the score that chooses the best checkpoint, in the files
      and in words: ('accuracy', 'accuracy').
    versions: name and version of the software that the run ended with, as
      far as it is recorded.
  """

  workdir: str
  config: dict[str, Any]
  changed: Sequence[str]
  learner: str
  metrics: Sequence[dict[str, Any]]
  total: int
  freeze: int
  summary: dict[str, Any] | None
  wiring: wiring.Wiring | None
  entropies: np.ndarray | None
  shares: np.ndarray | None
  changes: np.ndarray | None
  classes: Sequence[str]
  examples: Examples | None
  versions: dict[str, str]
  metric: tuple[str, str] = ('accuracy', 'accuracy')

  @property
  def name(self) -> str:
    """The network and its rule."""
    rule = str(self.config['connectivity.rule']).replace('_', '-')
    return f'{self.config["model.name"]}, {rule}'
