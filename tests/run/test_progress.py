"""What a checkpoint keeps beside the state; damage is in test_checkpoint."""

import json
import math

import jax.numpy as jnp

from maskconnect_jax.run import metrics
from maskconnect_jax.run.progress import Progress


def test_it_comes_back_from_json():
  third = jnp.float32(1) / 3
  progress = Progress(
    metrics.Throughput(128, 0.25),
    {7, 3},
    {'test_accuracy_drawn': 0.5, 'test_accuracy_at_freeze': None},
    [{'loss': third, 'accuracy': jnp.float32(0.1)}],
  )
  text = json.dumps(progress.to_json())
  again = Progress.from_json(json.loads(text))
  assert (again.clock.images, again.clock.seconds) == (128, 0.25)
  assert (again.damaged, again.accuracies) == (
    progress.damaged,
    progress.accuracies,
  )
  assert again.pending[0]['loss'] == third
  assert again.pending[0]['loss'].dtype == third.dtype
  assert json.dumps(again.to_json()) == text


def test_one_of_version_0_1_0():
  record = {'images': 64, 'train_seconds': 1.5, 'damaged': []}
  progress = Progress.from_json(record)
  assert progress.to_json() == record
  assert not progress.pending
  # Named by the run, which then stops: it is no damage.
  record['unlogged'] = [{'loss': math.nan, 'accuracy': 0.0}]
  assert math.isnan(Progress.from_json(record).pending[0]['loss'])
