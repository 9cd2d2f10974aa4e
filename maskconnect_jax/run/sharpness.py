"""How sharp a real mask is: entropy of its draw, and share of its top K."""

from __future__ import annotations

import numpy as np

from maskconnect_jax.method import connectivity
from maskconnect_jax.method.spec import WiringSpec


def temperatures(
  learner: str, temperature: float, progress: np.ndarray
) -> np.ndarray:
  """Returns the temperature of the draw at some shares of the phase.

  Args:
    learner: 'draws' or 'as_published', which draws at a temperature of 1.
    temperature: the last one, of the config.
    progress: float [T], shares of the connectivity phase.

  Returns:
    float [T].
  """
  if learner == 'as_published':
    return np.ones_like(progress)
  return np.asarray(
    WiringSpec(temperature=temperature).temperature_at(progress)
  )


def entropies(
  masks: np.ndarray, valid: np.ndarray, temperature: np.ndarray
) -> np.ndarray:
  """Returns the entropy of the draw, divided by that of a uniform one.

  The entropy is -sum_i p log p, with p in proportion to r^(1/T), r having the
  floor of the draw.

  Args:
    masks: float32 [T, J, S], r.
    valid: bool [J, S]; each row has two valid sources or more.
    temperature: float [T].

  Returns:
    float64 [T, J].
  """
  r = np.maximum(masks, connectivity.PROBABILITY_FLOOR, dtype=np.float64)
  scores = np.log(r) / temperature[:, None, None]
  scores -= scores.max(-1, where=valid, initial=-np.inf, keepdims=True)
  weights = np.where(valid, np.exp(np.minimum(scores, 0)), 0)
  total = weights.sum(-1)
  entropy = np.log(total) - (weights * scores).sum(-1) / total
  return np.asarray(entropy / np.log(valid.sum(-1)))


def top_shares(masks: np.ndarray, valid: np.ndarray, fan_in: int) -> np.ndarray:
  """Returns the share of the K largest entries in the sum of each row.

  Args:
    masks: float32 [T, J, S], r.
    valid: bool [J, S].
    fan_in: K.

  Returns:
    float64 [T, J]; K / n_j for a row of zeros.
  """
  r = np.where(valid, masks, 0).astype(np.float64)
  top = np.sort(r, -1)[..., ::-1][..., :fan_in].sum(-1)
  total = r.sum(-1)
  even = np.broadcast_to(fan_in / valid.sum(-1), total.shape)
  return np.divide(top, total, out=even.copy(), where=total > 0)
