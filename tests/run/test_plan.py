"""The plan of a run: its durations, and plan.json."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskconnect_jax import config as config_lib
from maskconnect_jax.errors import InputError
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


def test_sources_fade_in_until_the_first_moment():
  own = dataclasses.replace(PLAN, moments=3)
  assert own.moment(4) == 1
  found = [float(own.newcomers(step)) for step in range(7)]
  np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)


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


@pytest.mark.parametrize(
  ('text', 'steps'),
  [
    ('400 steps', 400),
    ('1 step', 1),
    ('0 steps', 0),
    ('1 epoch', 11),  # 1437 // 128: what is over is not an own step
    ('60 epochs', 660),
    ('0.5 epochs', 6),  # 5.5, and Python rounds to even
    ('1e3 examples', 8),  # 7.8: as many as are asked for, or more
    ('1024 examples', 8),
    ('1025 examples', 9),
    ('50%', 100),
    (' 12.5 % ', 25),
    ('.5%', 1),
    ('2e2steps', 200),
  ],
)
def test_to_steps(text, steps):
  assert (
    plan.to_steps(text, batch_size=128, num_examples=1437, total=200) == steps
  )


@pytest.mark.parametrize(
  'text',
  ['', '60', 'epochs', '60 epoch s', '-1 steps', '1.2.3 steps', '. steps',
   'nan steps', 'inf steps', '1e999 steps', '5 minutes', '60 epochs!', 3, None,
   '1 steps\0', '\u0663 steps', '60 epochs\n400 steps'],
)  # fmt: skip
def test_bad_durations(text):
  with pytest.raises(InputError) as error:
    plan.to_steps(text, batch_size=1, num_examples=1, name='config.x')
  assert str(error.value).startswith(f'config.x={text!r} is not a duration')
  assert '60 epochs' in str(error.value)


@pytest.mark.parametrize('unit', ['%', ' steps', ' epochs', ' examples'])
@pytest.mark.parametrize('amount', ['1e99', '9' * 300])
def test_a_duration_without_end_is_a_number_of_steps(amount, unit):
  assert (
    plan.to_steps(f'{amount}{unit}', batch_size=1, num_examples=9, total=9)
    == 2**31 - 1
  )


def test_a_duration_of_more_digits_than_a_float_has():
  with pytest.raises(InputError, match='is not a duration') as error:
    plan.to_steps('9' * 400 + ' steps', batch_size=1, num_examples=1)
  assert len(str(error.value)) < 400


def test_a_per_cent_of_nothing():
  with pytest.raises(InputError, match='cannot be a per cent'):
    plan.to_steps('50%', batch_size=1, num_examples=1)


def test_a_fixed_rule_needs_no_phase():
  config = config_lib.default()
  config.duration, config.connectivity.rule = '1 steps', 'fixed_prev'
  assert plan.make(config, num_examples=1000).freeze == 0
  config.connectivity.rule = 'learned'
  with pytest.raises(InputError, match="phase='25%' is 0 steps"):
    plan.make(config, num_examples=1000)
