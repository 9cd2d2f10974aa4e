"""Topologies given to a run, and their rows shuffled."""

import json

import numpy as np
import pytest

from maskconnect_jax import config as config_lib
from maskconnect_jax import experiment
from maskconnect_jax.topology import BranchTopology, Topology, from_mask


def test_rows_of_one_distance_are_shuffled_into_themselves():
  chain = Topology(tuple((j,) for j in range(9)))
  assert chain.shuffled(np.random.default_rng(0)) == chain
  pairs = Topology(((0,), *((j - 1, j) for j in range(1, 9))))
  assert pairs.shuffled(np.random.default_rng(0)) == pairs


def test_distances_move_from_row_to_row():
  rng = np.random.default_rng(1)
  size = 60
  mask = np.zeros((size, size))
  for j in range(size):
    near = np.arange(max(0, j - 9), j + 1)
    mask[j, rng.choice(near, min(3, len(near)), replace=False)] = 1
  before = from_mask(mask)
  after = before.shuffled(rng)
  assert list(map(len, after.sources)) == list(map(len, before.sources))

  def patterns(topology):
    return [tuple(j - i for i in row) for j, row in enumerate(topology.sources)]

  assert patterns(after) != patterns(before)
  # But for rows that meet the start of the network, they are the same rows.
  missing = set(patterns(after)) - set(patterns(before))
  assert len(missing) <= 12


def test_branches_are_shuffled_within_their_block():
  before = BranchTopology((((0, 1), (1, 2), (0, 2)), ((0, 1), (0, 1), (1, 2))))
  after = before.shuffled(np.random.default_rng(3))
  assert after != before
  assert [sorted(rows) for rows in after.sources] == [
    sorted(rows) for rows in before.sources
  ]


@pytest.fixture
def given(tmp_path):
  """A config of four blocks, wired as a file says."""

  def make(record, **fields):
    path = tmp_path / 'topology.json'
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    config = config_lib.default()
    config.model.name = 'resnet8'
    config.model.width = 4
    config.eval_batch_size = 8
    config.connectivity.rule = 'fixed_given'
    config.connectivity.topology = str(path)
    config.update_from_flattened_dict(fields)
    return config

  return make


def test_a_run_with_the_topology_of_another(given):
  topology = Topology(((0,), (0, 1), (1,)))
  job = experiment.build(given(topology.to_dict()))
  assert job.model.topology == topology
  assert job.plan.freeze == 0
  shuffled = experiment.build(
    given(topology.to_dict(), **{'connectivity.shuffled': True, 'seed': 2})
  )
  expected = topology.shuffled(np.random.default_rng(2))
  assert shuffled.model.topology == expected


@pytest.mark.parametrize(
  ('record', 'fields', 'message'),
  [
    (Topology(((0,), (1,))).to_dict(), {}, r'shape \(2, 2\); .* \(3, 3\)'),
    ('{', {}, 'is no topology.json'),
    ('{}', {}, 'is no topology.json: schema None'),
    ({}, {'connectivity.topology': 'none.json'}, 'none.json is not there'),
    ({}, {'connectivity.topology': ''}, 'go together'),
    ({}, {'connectivity.rule': 'learned'}, 'go together'),
  ],
)
def test_a_topology_that_cannot_be_given(given, record, fields, message):
  with pytest.raises(config_lib.InputError, match=message):
    experiment.build(given(record, **fields))
