"""WiringSpec: its checks, its schedule, its form in JSON."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskconnect_jax import config as config_lib
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import connectivity
from maskconnect_jax.method.spec import WiringSpec
from maskconnect_jax.method.stack import MaskedStack
from maskconnect_jax.method.topology import Topology
from maskconnect_jax.networks import models


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'level': 'layer'}, "level='layer' is not one of block, branch"),
    ({'fan_in': 0}, 'fan_in=0 must be at least 1'),
    ({'fan_in': True}, 'fan_in=True must be a whole number'),
    ({'rule': None}, 'rule=None is not one of learned, fixed_prev'),
    ({'gradient': 'x'}, "gradient='x' is not one of all, drawn"),
    ({'temperature': 0}, r'temperature=0 must be a number in \[1e-06, 1\]'),
    ({'temperature': 2}, r'temperature=2 must be a number in \[1e-06, 1\]'),
    ({'initial': 1.5}, r'initial=1.5 must be a number in \[0, 1\]'),
    ({'initial_spread': -1}, 'initial_spread=-1 must be a number >= 0'),
    ({'scale': 'max'}, "scale='max' is not one of mean, sum"),
    ({'identity': '1/L'}, "identity='1/L' is not one of 1/K, 1/C"),
    ({'identity': '1/C'}, "identity='1/C' is for level='branch' alone"),
    ({'start': 'none'}, "start='none' is not one of all, previous"),
    (
      {'start': 'previous', 'learner': 'draws'},
      "start='previous' is for the learners that narrow: measured, fisher",
    ),
    (
      {'start': 'previous', 'level': 'branch'},
      "start='previous' is for level='block' alone",
    ),
    ({'level': 'branch', 'scale': 'sum'}, "scale='sum' is for level='block'"),
  ],
)
def test_a_spec_that_cannot_be_is_one_line(fields, message):
  with pytest.raises(InputError, match=message) as error:
    WiringSpec(**fields)
  assert '\n' not in str(error.value)


def test_numbers_of_numpy_are_pythons():
  spec = WiringSpec(fan_in=np.int64(3), temperature=np.float32(0.5))
  assert (type(spec.fan_in), type(spec.temperature)) == (int, float)
  assert hash(spec) == hash(WiringSpec(fan_in=3, temperature=0.5))


@pytest.mark.parametrize(
  'spec',
  [
    WiringSpec(fan_in=3, scale='sum'),
    WiringSpec(level='branch', identity='1/C', temperature=0.5),
  ],
)
def test_a_spec_comes_back_from_json(spec):
  record = json.loads(json.dumps(spec.to_dict()))
  assert WiringSpec(**record) == spec
  assert (
    ('identity' in record) == (spec.level == 'branch') != ('scale' in record)
  )


def test_a_config_becomes_a_spec_field_by_field():
  config = config_lib.default()
  changed = {
    'fan_in': 3,
    'rule': 'fixed_all',
    'gradient': 'drawn',
    'temperature': 0.5,
    'initial': 0.25,
    'initial_spread': 0.125,
    'scale': 'sum',
    'start': 'previous',
  }
  for name, value in changed.items():
    config.connectivity[name] = value
  assert config_lib.wiring_spec(config) == WiringSpec(**changed)
  config = config_lib.default()
  config.connectivity.level = 'branch'
  config.connectivity.branch_identity = '1/C'
  expected = WiringSpec(level='branch', identity='1/C')
  assert config_lib.wiring_spec(config) == expected


@pytest.mark.parametrize('last', [1.0, 0.1, 1e-6])
def test_the_temperature_falls_geometrically_to_the_last(last):
  spec, steps = WiringSpec(temperature=last), np.arange(8)
  found = jax.jit(lambda step: spec.temperature_at(step / 7))(steps)
  np.testing.assert_array_equal(
    found, jax.jit(optax.exponential_decay(1.0, 7, last))(steps)
  )
  assert (found[0], found[7]) == (1, np.float32(last))


class Double(nnx.Module):
  def __call__(self, x):
    return 2 * x


def test_a_stack_draws_at_the_last_temperature_if_none_is_given():
  spec = WiringSpec(fan_in=1, learner='draws', temperature=0.05)
  stack = MaskedStack([Double()] * 6, spec, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  real = jnp.asarray(rng.uniform(size=(6, 6)) * np.tri(6), jnp.float32)
  stack.real_mask[...] = real
  warm = 0
  for key in jax.random.split(jax.random.key(1), 20):
    drawn, last = stack.draw(key), stack.draw(key, spec.temperature)
    np.testing.assert_array_equal(drawn, last)
    expected = connectivity.draw(key, real, stack.valid, 1, 0.05)
    np.testing.assert_array_equal(drawn, expected)
    warm += int(np.any(drawn != stack.draw(key, 1.0)))
  assert warm > 10


def test_keywords_stand_in_place_of_the_specs_fields():
  spec = WiringSpec(fan_in=3, scale='sum')
  stack = MaskedStack([Double()] * 2, spec, fan_in=1, rngs=nnx.Rngs(0))
  assert stack.spec == dataclasses.replace(spec, fan_in=1)
  model = models.create_model(
    'resnet8', num_classes=2, width=4, spec=spec, scale='mean'
  )
  assert model.stack.spec == dataclasses.replace(spec, scale='mean')


@pytest.mark.parametrize('rule', ['learned', 'fixed_random', 'fixed_given'])
def test_a_network_of_a_given_topology_has_no_real_mask(rule):
  topology = Topology(((0,), (0, 1), (1,)))
  model = models.create_model(
    'resnet8', num_classes=2, width=4, rule=rule, topology=topology
  )
  assert model.topology == topology
  assert not hasattr(model.stack, 'real_mask')
  # Its weights are those of the ordinary network of the seed.
  plain = models.create_model(
    'resnet8', num_classes=2, width=4, rule='fixed_prev'
  )
  jax.tree.map(
    np.testing.assert_array_equal, nnx.state(model), nnx.state(plain)
  )


def test_a_rule_of_a_given_topology_needs_one_that_fits():
  make = {'num_classes': 2, 'width': 4, 'rule': 'fixed_given'}
  with pytest.raises(InputError, match='needs a topology'):
    models.create_model('resnet8', **make)
  with pytest.raises(InputError, match=r'shape \(2, 2\)'):
    models.create_model('resnet8', **make, topology=Topology(((0,), (1,))))
  with pytest.raises(InputError, match='block 2 takes source 0'):
    models.create_model(
      'resnet8',
      **make,
      stem_source=False,
      topology=Topology(((0,), (0,), (1,))),
    )


def test_options_of_blocks_are_refused_for_branches():
  with pytest.raises(InputError, match="adapter='projection' and"):
    models.create_model(
      'resnext20_8x4d', num_classes=2, level='branch', adapter='projection'
    )
  with pytest.raises(InputError, match="level='branch' is not one of block"):
    MaskedStack([Double()], level='branch', rngs=nnx.Rngs(0))
