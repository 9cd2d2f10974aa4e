"""Durations, the check of every field, and the configs that are shipped."""

import runpy
from pathlib import Path

import ml_collections
import pytest
from flax import nnx

from maskconnect_jax import config as config_lib
from maskconnect_jax import models

CONFIGS = sorted((Path(__file__).parents[1] / 'configs').glob('*.py'))


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
    config_lib.to_steps(text, batch_size=128, num_examples=1437, total=200)
    == steps
  )


@pytest.mark.parametrize(
  'text',
  ['', '60', 'epochs', '60 epoch s', '-1 steps', '1.2.3 steps', '. steps',
   'nan steps', '1e999 steps', '5 minutes', '60 epochs!', 3],
)  # fmt: skip
def test_bad_durations(text):
  with pytest.raises(config_lib.InputError) as error:
    config_lib.to_steps(text, batch_size=1, num_examples=1, name='config.x')
  assert str(error.value).startswith(f'config.x={text!r} is not a duration')
  assert '60 epochs' in str(error.value)


def test_a_per_cent_of_nothing():
  with pytest.raises(config_lib.InputError, match='cannot be a per cent'):
    config_lib.to_steps('50%', batch_size=1, num_examples=1)


def test_flat():
  config = ml_collections.ConfigDict(
    {'a': 1, 'b': {'c': (1, 2), 'd': {'e': 'x'}}, 'empty': {}}
  )
  assert config_lib.flat(config) == {'a': 1, 'b.c': (1, 2), 'b.d.e': 'x'}


def test_default_passes():
  config_lib.check(config_lib.default())


def changed(path, value):
  config = config_lib.default()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict({path: value})
  return config


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('seeed', 1, 'not a config field; did you mean config.seed?'),
    ('fan_in', 1, 'did you mean config.connectivity.fan_in?'),
    ('zzzzzz', 1, 'maskconnect_jax/config.py lists the fields'),
    ('connectivity.rule', 'lerned', 'not one of learned, fixed_prev'),
    ('connectivity.gradient', 'some', 'not one of all, drawn'),
    ('model.dtype', 'float16', 'not one of float32, bfloat16'),
    ('connectivity.fan_in', 0, r'fan_in=0 must be a whole number in \[1, 2'),
    ('batch_size', -8, r'batch_size=-8 must be a whole number in \[1, 2'),
    ('connectivity.gradient_every', 3, 'must divide config.batch_size=128'),
    ('keep_checkpoints', 0, r'must be a whole number in \[1, 2'),
    ('optimizer.learning_rate', -0.1, r'learning_rate=-0.1 must be a number in \[0, 3'),
    ('optimizer.learning_rate', float('nan'), 'learning_rate=nan must be a number in'),
    ('masks.learning_rate', float('inf'), 'learning_rate=inf must be a number in'),
    ('connectivity.initial', 1.5, r'initial=1.5 must be a number in \[0, 1\]'),
    ('connectivity.temperature', 0.0, r'=0.0 must be a number in \[1e-06, 1\]'),
    ('optimizer.momentum', float('nan'), r'=nan must be a number in \[0, 1\]'),
    ('log_every', 'often', "log_every='often' is not a duration"),
    ('optimizer.steps_at', ('50%', 'x'), r"'x'\) must be \(\) or several values, each a dur"),
    ('duration', '50%', "duration='50%' needs a unit"),
    ('connectivity.branch_identity', '1/C', "is for .*level='branch' alone"),
    ('connectivity.shuffled', True, "is for .*rule='fixed_given' alone"),
    ('data.randaugment', 2, "for .*crop='resized' alone, not for 'pad'"),
  ],
)
def test_bad_values(path, value, message):
  with pytest.raises(config_lib.InputError, match=message) as error:
    config_lib.check(changed(path, value))
  assert str(error.value).startswith(f'config.{path}')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('path', 'value'),
  [('connectivity.gradient_every', 4), ('model.remat', 'block')],
)
def test_what_the_branch_level_form_has_not(path, value):
  config = changed(path, value)
  config_lib.check(config)
  config.connectivity.level = 'branch'
  with pytest.raises(config_lib.InputError, match='not for .branch.; leave it'):
    config_lib.check(config)


def test_a_missing_field():
  config = config_lib.default()
  with config.unlocked():
    del config.masks.momentum
  with pytest.raises(
    config_lib.InputError, match='masks.momentum is missing; its default is 0.0'
  ):
    config_lib.check(config)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path):
  config = runpy.run_path(str(path))['get_config']()
  config_lib.check(config)
  nnx.eval_shape(
    lambda: models.create_model(
      config.model.name, num_classes=2, level=config.connectivity.level
    )
  )
  # Each opens with its own command.
  assert f'--config=configs/{path.name}' in path.read_text().split('"""')[1]
