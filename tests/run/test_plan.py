"""The plan of a run: its durations, and plan.json."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.run import plan

PLAN = plan.Plan(
  total=24, freeze=12, log_every=5, evaluate_every=8, checkpoint_every=7,
  per_epoch=6,
)  # fmt: skip


def test_what_is_due_and_when():
  due = {
    name: [step for step in range(25) if getattr(PLAN, name)(step)]
    for name in ('freezes', 'saves', 'evaluates', 'records')
  }
  assert due['freezes'] == [12]
  assert due['saves'][1:] == [7, 14, 21, 24]
  assert due['evaluates'][1:] == [8, 16, 24]
  assert due['records'][1:] == [5, 7, 8, 10, 12, 14, 15, 16, 20, 21, 24]
  assert [PLAN.phase(11), PLAN.phase(12)] == ['connectivity', 'fine-tune']
  fixed = dataclasses.replace(PLAN, freeze=0)
  assert not any(map(fixed.freezes, range(25)))
  assert fixed.phase(0) == 'train'


@pytest.mark.parametrize('last', [0.1, 1.0])
def test_the_temperature_is_that_of_the_runs_before(last):
  """To the bit: optax's decay was it in version 0.1.0."""
  before = jax.jit(optax.exponential_decay(1.0, 12, last))
  spec = WiringSpec(temperature=last)
  now = jax.jit(lambda step: spec.temperature_at(PLAN.share(step)))
  for step in jnp.arange(25):
    assert now(step) == before(step)
  steps = np.array([0, 6, 12])
  np.testing.assert_allclose(
    spec.temperature_at(PLAN.share(steps)),
    [1, last**0.5, last],
  )


def test_in_words():
  assert PLAN.in_words(64) == (
    '4 epochs, 24 steps of 64 images, 6 per epoch; masks move for the first 12,'
    ' which is little to learn a wiring from: a smaller config.batch_size or a'
    ' longer config.duration gives them more'
  )
  assert dataclasses.replace(PLAN, freeze=0).in_words(64) == (
    '4 epochs, 24 steps of 64 images, 6 per epoch'
  )


def test_what_is_written_is_read(tmp_path, caplog):
  assert plan.read(tmp_path) is None  # as in workdirs of version 0.1.0
  assert not caplog.records
  plan.write(PLAN, tmp_path)
  assert plan.read(tmp_path) == PLAN


@pytest.mark.parametrize(
  'change',
  [
    {'total': 0}, {'total': 24.0}, {'total': True}, {'freeze': -1},
    {'freeze': 25}, {'log_every': '5'}, {'per_epoch': None}, {'more': 1},
    {'schema': 'another/1'},
  ],
)  # fmt: skip
def test_a_damaged_plan_counts_as_none(change, tmp_path, caplog):
  plan.write(PLAN, tmp_path)
  path = tmp_path / 'plan.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  assert plan.read(tmp_path) is None
  assert f'{path} is damaged' in caplog.text


@pytest.mark.parametrize('text', ['', '[]', '{"schema": 5}', '[' * 100_000])
def test_what_is_no_plan_counts_as_none(text, tmp_path, caplog):
  (tmp_path / 'plan.json').write_text(text)
  assert plan.read(tmp_path) is None
  assert 'is damaged' in caplog.text
