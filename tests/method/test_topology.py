"""Topologies given to a run, and their rows shuffled."""

import json

import jax
import numpy as np
import pytest

from maskconnect_jax import config as config_lib
from maskconnect_jax.method import connectivity, wiring
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.method.topology import BranchTopology, Topology, from_mask
from maskconnect_jax.run import experiment


def test_rows_of_one_distance_are_shuffled_into_themselves():
  chain = Topology(tuple((j,) for j in range(9)))
  assert chain.shuffled(np.random.default_rng(0), np.tri(9)) == chain
  pairs = Topology(((0,), *((j - 1, j) for j in range(1, 9))))
  assert pairs.shuffled(np.random.default_rng(0), np.tri(9)) == pairs


def test_distances_move_from_row_to_row():
  rng = np.random.default_rng(1)
  size = 60
  mask = np.zeros((size, size))
  for j in range(size):
    near = np.arange(max(0, j - 9), j + 1)
    mask[j, rng.choice(near, min(3, len(near)), replace=False)] = 1
  before = from_mask(mask)
  after = before.shuffled(rng, np.tri(size))
  assert list(map(len, after.sources)) == list(map(len, before.sources))

  def patterns(topology):
    return [tuple(j - i for i in row) for j, row in enumerate(topology.sources)]

  assert patterns(after) != patterns(before)
  # But for rows that meet the start of the network, they are the same rows.
  missing = set(patterns(after)) - set(patterns(before))
  assert len(missing) <= 12


def test_shuffled_rows_stay_valid():
  # Three stages, of whose sources a block may take those of its own alone.
  valid = np.tri(9) * np.kron(np.eye(3), np.ones((3, 3)))
  rng = np.random.default_rng(0)
  for seed in range(20):
    before = from_mask(
      connectivity.fixed_random(jax.random.key(seed), valid > 0, 2)
    )
    after = before.shuffled(rng, valid)
    after.check(valid)
    assert list(map(len, after.sources)) == list(map(len, before.sources))


def test_every_block_has_as_many_branches():
  for sources in ((), (((0,), (1,)), ((0,),))):
    with pytest.raises(ValueError, match='as many branches'):
      BranchTopology(sources)


def test_branches_are_shuffled_within_their_block():
  before = BranchTopology((((0, 1), (1, 2), (0, 2)), ((0, 1), (0, 1), (1, 2))))
  after = before.shuffled(np.random.default_rng(3), np.ones((2, 3, 3)))
  assert after != before
  assert [sorted(rows) for rows in after.sources] == [
    sorted(rows) for rows in before.sources
  ]


def block_form(**changes):
  return Topology(((0,), (0, 1), (1,))).to_dict() | changes


BRANCHES = BranchTopology((((0,), (0, 1)), ((1,), (0,)))).to_dict()


def branch_form(block, branch, sources):
  record = json.loads(json.dumps(BRANCHES))
  record['blocks'][block]['branches'][branch]['sources'] = sources
  return record


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ([], 'expected object, got array'),
    (None, 'got null'),
    ('text', 'got str'),
    ({}, 'form'),
    (block_form(form='tree'), "form: invalid value 'tree'"),
    (block_form(form=['block']), 'form.*expected str'),
    (block_form(form='\udcff'), r"a name holds '\\udcff'"),
    (block_form(schema='other/9'), "schema: invalid enum value 'other/9'"),
    (block_form(blocks=None), 'blocks: expected array, got null'),
    (block_form(blocks={}), 'blocks: expected array, got object'),
    (block_form(blocks=[]), 'length >= 1'),
    (block_form(blocks=[{'sources': [0]}] * 1001), 'length <= 1000'),
    (block_form(blocks=[[0]]), r'\[0\]: expected object, got array'),
    (block_form(blocks=[{'sources': '0'}]), 'sources: expected array, got str'),
    (block_form(blocks=[{'sources': [0.5]}]), 'expected int, got float'),
    (block_form(blocks=[{'sources': [True]}]), 'expected int, got bool'),
    (block_form(blocks=[{'sources': [None]}]), 'expected int, got null'),
    (block_form(blocks=[{'sources': [10**30]}]), 'expected int <= 999'),
    (block_form(blocks=[{'sources': [-1]}]), 'expected int >= 0'),
    (block_form(blocks=[{'sources': []}]), 'at least one'),
    (block_form(blocks=[{'sources': [1]}]), r'sources 0\.\.0 come before'),
    (
      block_form(blocks=block_form()['blocks'][::-1]),
      'block 3 stands where block 1 belongs',
    ),
    (BRANCHES | {'blocks': BRANCHES['blocks'][:1]}, 'two blocks or more'),
    (BRANCHES | {'form': 'block'}, 'sources'),
    (branch_form(0, 0, [0]), 'block 1 take the stem'),
    (branch_form(1, 0, [2]), 'only 2 branches'),
    (branch_form(1, 0, [1.5]), 'got float'),
    (branch_form(1, 0, 1), 'expected array, got int'),
  ],
  ids=range(28),
)
def test_json_that_is_no_topology_is_one_line(record, message, tmp_path):
  path = tmp_path / 'topology.json'
  path.write_text(json.dumps(record))
  with pytest.raises(config_lib.InputError, match=message) as error:
    topology_lib.read(path, remedy='give another')
  assert str(error.value).startswith(f'{path} is damaged: ')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('record', [block_form(), BRANCHES])
def test_json_of_a_topology(record):
  assert topology_lib.from_dict(record).to_dict() == record
  # What follows from the sources need not stand there, and more may.
  bare = record | {'made by': 'hand'}
  del bare['num_blocks']
  assert topology_lib.from_dict(bare).to_dict() == record


@pytest.mark.parametrize('sources', [(0.0,), (True,), ('0',), (None,)])
def test_sources_are_whole_numbers(sources):
  with pytest.raises(config_lib.InputError, match='whole numbers'):
    Topology((sources,))
  with pytest.raises(config_lib.InputError, match='whole numbers'):
    BranchTopology(((sources, (0,)),))


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
  expected = topology.shuffled(np.random.default_rng(2), np.tri(3))
  assert shuffled.model.topology == expected


@pytest.mark.parametrize(
  ('record', 'fields', 'message'),
  [
    (Topology(((0,), (1,))).to_dict(), {}, r'shape \(2, 2\); .* \(3, 3\)'),
    (
      Topology(((0,), (0, 1), (1,))).to_dict(),
      {'connectivity.stem_source': False},
      'json is not of resnet8: block 2 takes source 0',
    ),
    ('{', {}, 'topology.json is damaged'),
    ('{}', {}, 'topology.json is damaged: .*form.* a finished run'),
    ({}, {'connectivity.topology': 'none.json'}, 'none.json is not there'),
    ({}, {'connectivity.topology': ''}, 'go together'),
    ({}, {'connectivity.rule': 'learned'}, 'go together'),
  ],
)
def test_a_topology_that_cannot_be_given(given, record, fields, message):
  with pytest.raises(config_lib.InputError, match=message):
    experiment.build(given(record, **fields))


def test_the_branches_identity_follows_the_given_fan_in(given, tmp_path):
  own = {'model.name': 'resnext20_8x4d', 'connectivity.level': 'branch'}
  learned = config_lib.default()
  learned.update_from_flattened_dict(
    {**own, 'eval_batch_size': 8, 'connectivity.fan_in': 2}
  )
  model = wiring.freeze(experiment.build(learned).model)
  fields = {**own, 'model.width': 0}
  job = experiment.build(given(model.topology.to_dict(), **fields))
  assert job.model.topology == model.topology
  assert job.model.stack.identity == model.stack.identity == 1 / 2
