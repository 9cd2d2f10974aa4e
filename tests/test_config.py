"""Durations, the check of every field, and the configs that are shipped."""

import json
import runpy
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from flax import nnx
from ml_collections import config_dict

from maskconnect_jax import config as config_lib
from maskconnect_jax.data import datasets
from maskconnect_jax.networks import models
from maskconnect_jax.run import experiment, plan, train

NAN, INF = float('nan'), float('inf')

CONFIGS = sorted((Path(__file__).parents[1] / 'configs').glob('*.py'))


@pytest.mark.parametrize('duration', ['1e99 epochs', '3e9 steps'])
def test_a_run_that_is_too_long(duration):
  config = changed('duration', duration)
  with pytest.raises(config_lib.InputError, match='is too long; a run has'):
    plan.make(config, num_examples=1000)


def test_flat():
  config = ml_collections.ConfigDict(
    {'a': 1, 'b': {'c': (1, 2), 'd': {'e': 'x'}}, 'empty': {}}
  )
  assert config_lib.flat(config) == {'a': 1, 'b.c': (1, 2), 'b.d.e': 'x'}


def test_nesterovs_form_is_for_sgd_alone():
  config = changed('optimizer.nesterov', False)
  config_lib.check(config)
  config.optimizer.name = 'adamw'
  with pytest.raises(config_lib.InputError, match="optimizer.name='sgd' alone"):
    config_lib.check(config)


def test_two_ways_to_augment_exclude_each_other():
  config = changed('data.randaugment', 1)
  config.data.crop, config.data.trivialaugment = 'resized', True
  with pytest.raises(config_lib.InputError, match='leave one of them out'):
    config_lib.check(config)


def test_the_smaller_share_of_a_crop_comes_first():
  config = changed('data.crop_scale', (0.5, 0.1))
  config.data.crop = 'resized'
  with pytest.raises(config_lib.InputError, match='the smaller first'):
    config_lib.check(config)


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
    (
      'model.width',
      10**7,
      r'width=10000000 must be a whole number in \[0, 8192\]',
    ),
    (
      'data.image_size',
      10**6,
      r'=1000000 must be a whole number in \[0, 81',
    ),
    ('data.pad', 10**6, r'pad=1000000 must be a whole number in \[0, 8192\]'),
    (
      'connectivity.fan_in',
      2**40,
      r'must be a whole number in \[1, 2147',
    ),
    ('connectivity.fan_in', 0, r'fan_in=0 must be a whole number in \[1, 2'),
    ('batch_size', -8, r'batch_size=-8 must be a whole number in \[1, 2'),
    ('masks.start', '10%', 'is not a config field any more'),
    ('keep_checkpoints', 0, r'must be a whole number in \[1, 2'),
    (
      'optimizer.learning_rate',
      -0.1,
      r'=-0.1 must be a number in \[0, 3',
    ),
    (
      'optimizer.learning_rate',
      float('nan'),
      '=nan must be a number in',
    ),
    (
      'masks.learning_rate',
      float('inf'),
      '=inf must be a number in',
    ),
    ('connectivity.initial', 1.5, r'initial=1.5 must be a number in \[0, 1\]'),
    ('connectivity.temperature', 0.0, r'=0.0 must be a number in \[1e-06, 1\]'),
    ('optimizer.momentum', float('nan'), r'=nan must be a number in \[0, 1\]'),
    ('log_every', 'often', "log_every='often' is not a duration"),
    (
      'optimizer.steps_at',
      ('50%', 'x'),
      r"'x'\) must be \(\) or several v",
    ),
    ('duration', '50%', "duration='50%' needs a unit"),
    ('connectivity.branch_identity', '1/C', "is for .*level='branch' alone"),
    ('connectivity.shuffled', True, "is for .*rule='fixed_given' alone"),
    ('data.randaugment', 2, "for .*crop='resized' alone, not for 'pad'"),
    ('data.max_pixels', 2 * 10**9, r'whole number in \[1, 1000000000\]'),
    (
      'data.crop_scale',
      (0.5, 1.0),
      "for .*crop='resized' alone, not for 'pad'",
    ),
    (
      'connectivity.initial',
      0.4,
      "for .*learner='draws' or .*learner='as_published' alone, not for 'meas",
    ),
    ('data.val_labels', 'x', "for .*source='folder' alone, not for 'digits'"),
    ('optimizer.name', 'adam', 'not one of sgd, adamw, lamb, lion'),
    ('model.drop_path', 1.0, r'must be a number in \[0, 1\)'),
  ],
)
def test_bad_values(path, value, message):
  with pytest.raises(config_lib.InputError, match=message) as error:
    config_lib.check(changed(path, value))
  assert str(error.value).startswith(f'config.{path}')
  assert '\n' not in str(error.value)


def test_the_table_has_every_field():
  assert set(config_lib.FIELDS) == set(config_lib.flat(config_lib.default()))


# Of each kind of a field, what is none of it. `stored` below tries the same.
HUGE = 10**5000  # Python does not write it, by default
WRONG = {
  'number': [None, 'x', (), [1.0], NAN, INF, -INF, -1, 1e39, np.float32(1)],
  'whole': [None, False, 'x', '1', 1.5, 1.0, NAN, INF, -1, 2**63, 2**70, HUGE,
            (1,), [1]],
  'text': [None, 3, True, ('a',), b'a', 'a\0b'],
  'several': [None, 5, 'x', '30%,60%', (None,), ((1,),), (True,)],
  'numbers': [('a', 'b', 'c'), (1, 2, '3'), (NAN, 1, 1), (INF, 1, 1), (1, 2),
              (1, 2, 3, 4), (1, 2, -3), (1e400, 2, 3), (2**70, 2, 3)],
  'switch': [None, 0, 1, 'true', ()],
}  # fmt: skip


@pytest.mark.parametrize(
  ('path', 'values'),
  [
    ('seed', WRONG['whole'] + [2**32]),
    ('seeds', [*WRONG['several'], (0, -1), (0, 'a'), (1.0,), (2**32,)]),
    ('variants', [None, 5, 'model.width=8', (5,), ('a\0',)]),
    ('batch_size', [*WRONG['whole'], 0]),
    ('duration', [*WRONG['text'], '50%', '-1 steps', 'inf steps']),
    ('log_every', [*WRONG['text'], 30, 'nan steps']),
    ('model.name', WRONG['text']),
    ('model.width', [*WRONG['whole'], 10**6]),
    ('model.dtype', [*WRONG['text'], 'float64', ('float32',)]),
    ('connectivity.rule', [*WRONG['text'], []]),
    ('connectivity.topology',
     [*WRONG['text'], 'x' * 256, 'é' * 128, 'x/' * 2000]),
    ('connectivity.fan_in', [*WRONG['whole'], 0]),
    ('connectivity.temperature', [*WRONG['number'], 0, 1e-300, 2]),
    ('connectivity.shuffled', WRONG['switch']),
    ('masks.momentum', [*WRONG['number'], 1.5]),
    ('optimizer.average', [*WRONG['number'], 1]),
    ('optimizer.learning_rate', WRONG['number']),
    ('optimizer.steps_at', [*WRONG['several'], ('50%', 30), ('1e99 years',)]),
    ('data.dir', [*WRONG['text'], '~no such user/x', 'x' * 256]),
    ('data.memory_gb', WRONG['number']),
    ('data.workers', [*WRONG['whole'], 10**6]),
    ('data.crop_scale',
     [*WRONG['several'], *WRONG['numbers'], (0.5,), (0, 1)]),
    ('data.mean', [*WRONG['several'], *WRONG['numbers'], (256.0,)]),
    ('data.std', [*WRONG['several'], *WRONG['numbers'], (0, 0, 0),
                  (58, -57, 57), (0.229, 0.224, 0.225)]),
    ('data.image_size', [*WRONG['whole'], 2**15]),
    ('data.mixup', WRONG['number']),
  ],
)  # fmt: skip
def test_values_of_another_type_or_out_of_range(path, values, tmp_path):
  for value in values:
    config = changed(path, value)
    with pytest.raises(config_lib.InputError) as error:
      config_lib.check(config)
    message = str(error.value)
    assert message.startswith(f'config.{path}='), value
    assert '\n' not in message
    assert '\0' not in message
    assert len(message) < 500
    # What a workdir holds goes through the same.
    try:
      text = config.to_json()
    except (TypeError, ValueError):
      continue  # no JSON says so
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(config_lib.InputError, match='is damaged') as error:
      config_lib.stored(tmp_path)
    said = str(error.value)
    assert f'config.{path}' in said or 'is no finite number' in said, value
    assert '\n' not in said


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('seed', 2**32 - 1),
    ('seeds', [0, 1]),  # JSON has lists
    ('optimizer.learning_rate', 1),  # an int where a float may be
    ('optimizer.learning_rate', np.float64(0.1)),  # which is a float
    ('optimizer.steps_at', []),
    ('optimizer.steps_at', ['30%', '200 steps']),
    ('data.mean', (1, 2.5, 3)),
    ('data.std', [127.5]),
    ('data.memory_gb', 0),
    ('data.dir', '~/data'),
    ('data.dir', 'x' * 255),
  ],
)
def test_values_that_may_be(path, value):
  config_lib.check(changed(path, value))


def test_mean_and_std_have_as_many_values():
  config = changed('data.mean', (1.0,))
  config_lib.check(config)  # the other is measured
  config.data.std = (1.0, 2.0, 3.0)
  with pytest.raises(config_lib.InputError, match='as many values'):
    config_lib.check(config)


@pytest.mark.parametrize('config', [None, {}, {'seed': 1}, 'digits.py', []])
def test_a_config_that_is_none(config, tmp_path):
  with pytest.raises(config_lib.InputError, match='not a ConfigDict'):
    train.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_placeholder_that_nobody_filled_in():
  config = config_lib.default()
  config.batch_size = config_dict.required_placeholder(int)
  with pytest.raises(config_lib.InputError, match='batch_size=None must'):
    config_lib.check(config)


@pytest.mark.parametrize(
  'text',
  ['', '{', 'null', '[]', '3', '{"seed": -1}', '{"data": 3}', '{"data": null}',
   '{"optimizer": {"steps_at": 5}}', '{"batch_size": 1e400}', '\ud800',
   '{"data": {"mixup": ' + '9' * 400 + '}}',
   '[' * 100_000],
)  # fmt: skip
def test_a_stored_config_that_is_none(text, tmp_path):
  path = tmp_path / 'config.json'
  path.write_bytes(text.encode('utf-8', 'surrogatepass'))
  with pytest.raises(config_lib.InputError) as error:
    config_lib.stored(tmp_path)
  assert str(error.value).startswith(f'{path} is damaged: ')
  assert '\n' not in str(error.value)


def test_a_stored_config_of_an_older_version(tmp_path):
  text = '{"seed": 3, "data": {"source": "idx"}, "what_was_once": 1}'
  (tmp_path / 'config.json').write_text(text)
  config = config_lib.stored(tmp_path)
  assert config.seed == 3
  assert config.data.source == 'idx'
  assert config.batch_size == 128


def test_a_stored_config_with_fields_that_are_gone(tmp_path):
  was = {'connectivity': {'gradient_every': 1, 'fan_in': 3},
         'masks': {'start': '0%', 'relative': 0.0}}  # fmt: skip
  (tmp_path / 'config.json').write_text(json.dumps(was))
  config = config_lib.stored(tmp_path)
  config_lib.check(config)
  assert config.connectivity.fan_in == 3
  was['connectivity']['gradient_every'], was['masks']['start'] = 4, '10%'
  (tmp_path / 'config.json').write_text(json.dumps(was))
  with pytest.raises(config_lib.InputError) as error:
    config_lib.stored(tmp_path)
  message = str(error.value)
  assert 'config.connectivity.gradient_every=4, config.masks.start=' in message
  assert 'relative' not in message
  assert '\n' not in message


def test_what_the_branch_level_form_has_not():
  config = changed('model.remat', 'block')
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


@pytest.mark.parametrize('name', ['resnet99998', 'resnet' + '9' * 5000, 'x'])
def test_a_network_that_is_none_is_named_before_any_image_is_read(
  name, monkeypatch
):
  given = config_lib.default()
  given.model.name = name
  monkeypatch.setattr(datasets, 'load', lambda _: pytest.fail('read'))
  with pytest.raises(config_lib.InputError, match='1,000 blocks|not known'):
    experiment.build(given)
