"""What a checkpoint keeps beside the state; damage is in test_checkpoint."""

import json
import math

import jax.numpy as jnp
import pytest

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


@pytest.mark.parametrize('margin', [0.25, -0.004, 0])
def test_margins_come_back_also_below_0(margin):
  """A source that stays for its reader may be worth less than one that goes."""
  margins = {
    'choices': 5, 'choices_clear': 1, 'margin': margin,
    'margin_standard_error': 0.01,
  }  # fmt: skip
  record = json.loads(json.dumps(Progress(margins=margins).to_json()))
  assert Progress.from_json(record).margins == margins
  for name, wrong in (('margin', 'x'), ('margin', math.nan), ('other', 1)):
    damaged = record | {'margins': margins | {name: wrong}}
    with pytest.raises(ValueError, match='margins'):
      Progress.from_json(damaged)


def test_one_of_version_0_1_0():
  record = {'images': 64, 'train_seconds': 1.5, 'damaged': []}
  progress = Progress.from_json(record)
  assert progress.to_json() == record
  assert not progress.pending
  # Named by the run, which then stops: it is no damage.
  record['unlogged'] = [{'loss': math.nan, 'accuracy': 0.0}]
  assert math.isnan(Progress.from_json(record).pending[0]['loss'])
