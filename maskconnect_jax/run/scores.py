"""What is measured on a split: of one class an image, or of several labels."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from maskconnect_jax import names
from maskconnect_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Metric:
  """The score that chooses the best checkpoint and stands first in a result.

  Attributes:
    field: its name in summary.json, between 'test_' and such as '_pruned'.
    words: its name in a text.
  """

  field: str
  words: str


ACCURACY = Metric('accuracy', 'accuracy')
MAP = Metric('map', 'mAP')


def metric(multi_label: bool) -> Metric:
  """Returns the metric of a run; see `config.data.multi_label`."""
  return MAP if multi_label else ACCURACY


def metric_of(summary: dict[str, Any]) -> Metric:
  """Returns the metric of a finished run, from its summary.json."""
  return metric(f'test_{MAP.field}_pruned' in summary)


@dataclasses.dataclass(frozen=True)
class OneClass:
  """Means over the examples of a split, each of one class.

  Attributes:
    accuracy: in [0, 1].
    top5_accuracy: share of the examples whose label is among the five best
      classes, in [0, 1].
    loss: cross-entropy of the label, in nats, without smoothing.
    count: number of examples, without the damaged ones that are skipped.
    confused: int64 [M, 3], (class, class it was taken for, how many examples);
      all that occurred, the diagonal included, in order.
  """

  accuracy: float
  top5_accuracy: float
  loss: float
  count: int
  confused: np.ndarray

  @property
  def headline(self) -> float:
    """The accuracy, see `Metric`."""
    return self.accuracy

  def named(self, prefix: str) -> dict[str, float | None]:
    """Returns {'test_accuracy': ..., ...} for the prefix 'test'.

    A value that is not finite becomes None, as JSON has no number for it.
    """
    return _finite(
      {
        f'{prefix}_accuracy': self.accuracy,
        f'{prefix}_top5_accuracy': self.top5_accuracy,
        f'{prefix}_loss': self.loss,
      }
    )

  def by_class(self, classes: Sequence[str]) -> dict[str, Any]:
    """Returns the scores of each class, as JSON values.

    Args:
      classes: the name of each class. A name that two classes have is followed
        by the class's number.

    Returns:
      {'class_accuracy': {class: accuracy, or None for a class without
      examples}, 'confusion': {class: {class it was taken for: how many
      examples}}}. Only counts above 0 are there.
    """
    shown = _distinct(classes)
    confusion: dict[str, dict[str, int]] = {}
    for label, taken, count in self.confused.tolist():
      confusion.setdefault(shown[label], {})[shown[taken]] = count
    accuracy = {
      name: row.get(name, 0) / sum(row.values()) if row else None
      for name, row in ((name, confusion.get(name, {})) for name in shown)
    }
    return {'class_accuracy': accuracy, 'confusion': confusion}


@dataclasses.dataclass(frozen=True)
class SeveralLabels:
  """Scores over the examples of a split, each with several labels.

  A label is predicted if its probability is above 0.5.

  Attributes:
    average_precisions: float64 [classes], see `average_precision`; NaN for a
      class that no example has.
    label_accuracy: share of the pairs of an example and a class that are
      right, in [0, 1].
    f1: 2 T / (2 T + F), where T is the number of such pairs that are rightly
      predicted and F that of the pairs that are wrong; 0 if T is 0.
    loss: see `objective.losses`, without smoothing; mean over the examples.
    count: number of examples, without the damaged ones that are skipped.
  """

  average_precisions: np.ndarray
  label_accuracy: float
  f1: float
  loss: float
  count: int

  @property
  def headline(self) -> float:
    """The mAP: the mean over the classes that an example has, see `Metric`."""
    return float(np.nanmean(self.average_precisions))

  def named(self, prefix: str) -> dict[str, float | None]:
    """Returns {'test_map': ..., ...} for the prefix 'test', see `OneClass`."""
    return _finite(
      {
        f'{prefix}_map': self.headline,
        f'{prefix}_label_accuracy': self.label_accuracy,
        f'{prefix}_f1': self.f1,
        f'{prefix}_loss': self.loss,
      }
    )

  def by_class(self, classes: Sequence[str]) -> dict[str, Any]:
    """Returns the average precision of each class, as JSON values.

    Args:
      classes: see `OneClass.by_class`.

    Returns:
      {'class_average_precision': {class: value, or None for a class that no
      example has}}.
    """
    values = self.average_precisions.tolist()
    pairs = zip(_distinct(classes), values, strict=True)
    return {'class_average_precision': _finite(dict(pairs))}


Scores: TypeAlias = OneClass | SeveralLabels


def of_batches(found: list[dict[str, Any]], *, multi_label: bool) -> Scores:
  """Returns the scores of a split.

  Args:
    found: of each batch `objective.scores` and, as 'outcomes', its
      `objective.outcomes`; arrays of NumPy.
    multi_label: whether an image has several labels.

  Raises:
    InputError: no example counts, or none has a label.
  """
  total = {
    name: sum(one[name].item() for one in found)
    for name in found[0]
    if name != 'outcomes'
  }
  count = total['count']
  if not count:
    raise InputError('of the images to evaluate on none can be read')
  pairs = np.concatenate([one['outcomes'] for one in found])
  if multi_label:
    return _of_several(pairs[pairs[:, 0, 0] >= 0], total['loss'] / count)
  pairs, counts = np.unique(pairs[pairs[:, 0] >= 0], axis=0, return_counts=True)
  return OneClass(
    total['correct'] / count,
    total['correct_of_5'] / count,
    total['loss'] / count,
    count,
    np.column_stack([pairs, counts]).astype(np.int64),
  )


def _of_several(pairs: np.ndarray, loss: float) -> SeveralLabels:
  labels, logits = pairs[:, 0] > 0, pairs[:, 1]
  if not labels.any():
    raise InputError('of the images to evaluate on none has a label')
  taken = logits > 0
  right, wrong = int((labels & taken).sum()), int((labels != taken).sum())
  return SeveralLabels(
    average_precisions=np.array(
      [
        average_precision(*both)
        for both in zip(labels.T, logits.T, strict=True)
      ]
    ),
    label_accuracy=1 - wrong / labels.size,
    f1=2 * right / (2 * right + wrong) if right else 0.0,
    loss=loss,
    count=len(labels),
  )


def average_precision(labels: np.ndarray, logits: np.ndarray) -> float:
  """Returns the average precision of a class, without interpolation.

  It is sum_n (R_n - R_(n-1)) P_n over the distinct values t_n of the logits,
  the largest first. P_n and R_n are precision and recall of the examples with a
  logit of at least t_n, and R_0 = 0. It is scikit-learn's
  `average_precision_score`.

  Args:
    labels: bool [N], whether an example has the class.
    logits: float [N]. NaN counts as the lowest of all.

  Returns:
    A value in [0, 1]; NaN if no example has the class.
  """
  from sklearn import metrics  # takes a second, and only this needs it

  if not labels.any():
    return math.nan
  scores = np.nan_to_num(logits, nan=np.finfo(logits.dtype).min)
  return float(metrics.average_precision_score(labels, scores))


def _finite(values: dict[str, float]) -> dict[str, float | None]:
  return {
    name: value if math.isfinite(value) else None
    for name, value in values.items()
  }


def _distinct(classes: Sequence[str]) -> list[str]:
  shown = [names.encodable(name) for name in classes]
  twice = {name for name, n in collections.Counter(shown).items() if n > 1}
  return [
    f'{name} ({number})' if name in twice else name
    for number, name in enumerate(shown)
  ]
