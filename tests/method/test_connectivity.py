"""The draw, the freeze and the topology, against NumPy and enumeration."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskconnect_jax.errors import InputError
from maskconnect_jax.method import connectivity, wiring
from maskconnect_jax.method.spec import GRADIENTS, WiringSpec
from maskconnect_jax.method.topology import Topology, from_dict, from_mask

L = 7
FLOOR = 1e-6  # row 8 of "Decided here"

# The channels of sources 0..6; block j may take those of source j - 1's.
STAGES = (4, 4, 4, 8, 8, 16, 16)
TABLES = {
  'all': connectivity.valid_sources(L),
  'no_stem': connectivity.valid_sources(L, stem_source=False),
  'same_stage': connectivity.valid_sources(L, stages=STAGES),
}


def masks_to_draw_from():
  """Real masks [6, L, L] with all that is hard about them."""
  rng = np.random.default_rng(0)
  one = np.zeros((L, L))
  one[np.arange(L), rng.integers(0, np.arange(1, L + 1))] = 1
  kinds = [
    np.zeros((L, L)),
    one,
    one * 1e-30,
    np.full((L, L), 0.5),
    np.ones((L, L)),
    rng.uniform(size=(L, L)),
  ]
  return np.asarray(kinds, np.float32)


def random_topology(rng, num_blocks):
  return Topology(
    tuple(
      tuple(
        np.sort(
          rng.choice(
            target + 1, min(target + 1, rng.integers(1, 3)), replace=False
          )
        ).tolist()
      )
      for target in range(num_blocks)
    )
  )


# Which sources there are.


def test_every_earlier_source_is_valid():
  np.testing.assert_array_equal(TABLES['all'], np.tri(L, dtype=bool))


def test_without_the_stem_only_the_first_block_takes_it():
  expected = np.tri(L, dtype=bool)
  expected[1:, 0] = False
  np.testing.assert_array_equal(TABLES['no_stem'], expected)


def test_same_stage_tables_hold_sources_of_the_inputs_shape():
  expected = [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0],
    [0, 0, 0, 1, 0, 0, 0],
    [0, 0, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 0, 1, 1],
  ]
  np.testing.assert_array_equal(TABLES['same_stage'], np.array(expected, bool))


def test_same_stage_without_the_stem_leaves_no_row_empty():
  table = np.array(
    connectivity.valid_sources(L, stem_source=False, stages=STAGES)
  )
  assert table[0, 0]
  assert not table[1:, 0].any()
  assert table.any(-1).all()


@pytest.mark.parametrize('fan_in', [1, 3, 20])
@pytest.mark.parametrize('table', TABLES)
def test_fan_in_is_cut_to_the_valid_sources(table, fan_in):
  expected = [min(fan_in, sum(row)) for row in TABLES[table]]
  actual = connectivity.fan_in_of(TABLES[table], fan_in)
  np.testing.assert_array_equal(actual, expected)


# Drawing.


@pytest.mark.parametrize('fan_in', [1, 3, 20])
def test_every_draw_has_k_ones_on_valid_sources_only(fan_in):
  valid = np.array(list(TABLES.values()))[:, None]
  real = np.broadcast_to(masks_to_draw_from(), (3, 6, L, L))
  draw = jax.jit(
    jax.vmap(lambda key: connectivity.draw(key, real, valid, fan_in))
  )
  drawn = np.asarray(draw(jax.random.split(jax.random.key(1), 1000)))
  assert drawn.shape == (1000, 3, 6, L, L)
  assert drawn.dtype == np.float32
  assert np.isin(drawn, (0, 1)).all()
  assert not (drawn * ~valid).any()
  expected = np.minimum(fan_in, valid.sum(-1))
  np.testing.assert_array_equal(
    drawn.sum(-1), np.broadcast_to(expected, drawn.shape[:-1])
  )


def test_the_one_positive_entry_is_nearly_always_drawn():
  real = masks_to_draw_from()[1]
  keys = jax.random.split(jax.random.key(2), 2000)
  drawn = jax.vmap(lambda key: connectivity.draw(key, real, TABLES['all'], 2))(
    keys
  )
  assert np.asarray(drawn)[:, real == 1].mean() > 0.999


def probabilities_of_sets(row, fan_in):
  """{set: probability}, by going through every order of drawing."""
  row = np.maximum(np.asarray(row, np.float64), FLOOR)
  sets = {}
  for order in itertools.permutations(range(len(row)), fan_in):
    probability, left = 1.0, row.sum()
    for source in order:
      probability *= row[source] / left
      left -= row[source]
    sets[frozenset(order)] = sets.get(frozenset(order), 0) + probability
  return sets


def block_masks():
  real = np.array(
    [
      [0.7, 0.0, 0.0, 0.0, 0.0],
      [0.9, 0.1, 0.0, 0.0, 0.0],
      [1.0, 0.05, 0.3, 0.0, 0.0],
      [0.0, 0.0, 0.0, 0.0, 0.0],
      [0.2, 1.0, 0.5, 0.03, 0.9],
      [1.0, 0.6, 0.0, 0.25, 0.25],
    ],
    np.float32,
  )
  valid = np.tri(6, 5, dtype=bool)
  valid[5, 1] = False
  return real, valid


def branch_masks():
  """[L-1, C, C]: unequal entries, some of them 0, some at the box's 1."""
  rng = np.random.default_rng(11)
  real = np.clip(rng.uniform(-0.2, 1.2, (2, 5, 5)), 0, 1).astype(np.float32)
  assert {0.0, 1.0} < set(real.ravel().tolist())
  return real, np.ones(real.shape, bool)


@pytest.mark.parametrize('fan_in', [1, 2, 3])
@pytest.mark.parametrize('masks', [block_masks, branch_masks])
def test_frequencies_are_those_of_draws_without_replacement(masks, fan_in):
  count = 200_000
  real, valid = masks()

  @jax.jit
  def draw(keys):
    drawn = jax.vmap(lambda key: connectivity.draw(key, real, valid, fan_in))(
      keys
    )
    return drawn.astype(jnp.int32) @ (2 ** jnp.arange(5))

  codes = np.asarray(draw(jax.random.split(jax.random.key(3), count)))
  codes = codes.reshape(count, -1)
  real, valid = real.reshape(-1, 5), valid.reshape(-1, 5)
  bits = (np.arange(32)[:, None] >> np.arange(5)) & 1

  def check(actual, expected):
    sigma = np.sqrt(np.clip(expected * (1 - expected), 0, None) / count)
    assert (np.abs(actual - expected) <= 5 * sigma + 1e-9).all()

  inclusion = []
  for target in range(len(real)):
    sources = np.flatnonzero(valid[target])
    expected = np.zeros(32)
    for chosen, probability in probabilities_of_sets(
      real[target, sources], min(fan_in, len(sources))
    ).items():
      expected[sum(2 ** sources[i] for i in chosen)] = probability
    actual = np.bincount(codes[:, target], minlength=32) / count
    assert expected.sum() == pytest.approx(1, abs=1e-12)
    check(actual, expected)  # of each set of sources
    inclusion.append(np.minimum(expected @ bits, 1))
    check(actual @ bits, inclusion[-1])  # of each source
  # Of each pair of sources of two rows: rows are drawn independently.
  drawn = bits[codes].astype(np.float32)
  for first, second in itertools.combinations(range(len(real)), 2):
    together = drawn[:, first].T @ drawn[:, second] / count
    check(together, np.outer(inclusion[first], inclusion[second]))


# Straight through, start, projection.


def test_straight_through_is_the_mask_and_passes_its_gradient_to_r():
  rng = np.random.default_rng(4)
  real, gradient = rng.normal(size=(2, L, L)).astype(np.float32)
  mask = (rng.uniform(size=(L, L)) < 0.5).astype(np.float32)
  value, backward = jax.vjp(connectivity.straight_through, real, mask)
  for_real, for_mask = backward(jnp.asarray(gradient))
  np.testing.assert_array_equal(value, mask)
  np.testing.assert_array_equal(for_real, gradient)
  assert not np.any(for_mask)


def analytic(kind, real, gradient, mask, valid):
  """dloss/dr of one row from g = dloss/db, by hand."""
  g, r = gradient[valid], real[valid]
  return {
    'all': g,
    'drawn': g * mask[valid],
    'centered': g - g.mean(),
    'normalized': (g - (r / r.sum()) @ g) / r.sum(),
  }[kind]


def drawn_through(key, real, valid, fan_in, kind):
  """The first three lines of the module's header."""
  mask = connectivity.draw(key, real, valid, fan_in)
  proxy = connectivity.proxy(real, mask, valid, kind)
  return connectivity.straight_through(proxy, mask)


@pytest.mark.parametrize('kind', GRADIENTS)
@pytest.mark.parametrize('table', list(TABLES))
def test_what_reaches_r_of_a_gradient(kind, table):
  rng, valid = np.random.default_rng(11), np.asarray(TABLES[table])
  real = (rng.uniform(0.1, 1, size=(L, L)) * valid).astype(np.float32)
  gradient = rng.normal(size=(L, L)).astype(np.float32)
  mask, backward = jax.vjp(
    lambda r: drawn_through(jax.random.key(0), r, valid, 2, kind),
    real,
  )
  drawn = connectivity.draw(jax.random.key(0), real, valid, 2)
  np.testing.assert_array_equal(mask, drawn)
  (actual,) = backward(jnp.asarray(gradient))
  for row in range(L):
    expected = analytic(kind, real[row], gradient[row], mask[row], valid[row])
    np.testing.assert_allclose(
      actual[row][valid[row]], expected, rtol=1e-4, atol=1e-5
    )


def test_a_row_of_zeros_has_a_finite_normalized_gradient():
  valid = np.tri(L, dtype=bool)
  _, backward = jax.vjp(
    lambda r: drawn_through(jax.random.key(0), r, valid, 2, 'normalized'),
    jnp.zeros((L, L)),
  )
  assert np.isfinite(backward(jnp.ones((L, L)))[0]).all()


@pytest.mark.parametrize('temperature', [0.25, 1.0, 2.0])
def test_the_temperature_of_a_draw(temperature):
  row, count = np.array([0.1, 0.2, 0.4, 0.3]), 40_000
  real = np.broadcast_to(row, (count, 4)).astype(np.float32)
  drawn = connectivity.draw(
    jax.random.key(1), real, np.ones(4, bool), 1, temperature
  )
  expected = row ** (1 / temperature) / np.sum(row ** (1 / temperature))
  error = np.sqrt(expected * (1 - expected) / count)
  assert (np.abs(np.mean(drawn, 0) - expected) < 5 * error).all()


def test_r_starts_at_its_constant_on_valid_entries_and_0_elsewhere():
  real = connectivity.initial(
    jax.random.key(5), TABLES['no_stem'], center=0.5, spread=0.0
  )
  assert real.dtype == jnp.float32
  np.testing.assert_array_equal(real, np.where(TABLES['no_stem'], 0.5, 0))


def test_r_starts_spread_uniformly_within_its_bounds():
  valid = np.tri(100, dtype=bool)
  key = jax.random.key(6)
  real = np.asarray(connectivity.initial(key, valid, center=0.4, spread=0.2))[
    valid
  ]
  assert real.min() >= 0.2 - 1e-6
  assert real.max() <= 0.6 + 1e-6
  deciles = np.histogram(real, 10, (0.2, 0.6))[0] / real.size
  assert np.abs(deciles - 0.1).max() < 5 * np.sqrt(0.09 / real.size)
  clipped = connectivity.initial(key, valid, center=0.9, spread=0.5)
  assert np.max(clipped) == 1


def test_projection_clips_valid_entries_and_clears_the_others():
  rng = np.random.default_rng(7)
  real = rng.normal(scale=2, size=(50, L, L)).astype(np.float32)
  expected = np.clip(real, 0, 1) * np.tri(L, dtype=np.float32)
  actual = connectivity.project(real, TABLES['all'])
  np.testing.assert_array_equal(actual, expected)


# Freezing.


def sorted_choice(row, valid, fan_in):
  """The largest valid entries; of equal ones the latest."""
  sources = [i for i, ok in enumerate(valid) if ok]
  return tuple(sorted(sorted(sources, key=lambda i: (-row[i], -i))[:fan_in]))


@pytest.mark.parametrize('fan_in', [1, 3, 20])
@pytest.mark.parametrize('table', TABLES)
def test_freeze_keeps_the_largest_and_of_equals_the_latest(table, fan_in):
  rng = np.random.default_rng(8)
  valid = TABLES[table]
  real = rng.choice([0, 0.25, 0.5, 1], size=(8, L, L)).astype(np.float32)
  real[0], real[1] = 0, 1
  real[2] = rng.uniform(size=(L, L))
  for matrix in real:
    expected = tuple(
      sorted_choice(matrix[target], valid[target], fan_in)
      for target in range(L)
    )
    mask = np.asarray(connectivity.top_k(matrix, valid, fan_in))
    assert from_mask(mask).sources == expected
    assert tuple(tuple(np.flatnonzero(row)) for row in mask) == expected
    assert np.isin(mask, (0, 1)).all()


# The fixed rules.


def test_fixed_prev_takes_the_block_before():
  valid = connectivity.valid_sources(4)
  assert from_mask(connectivity.fixed_prev(valid)).sources == (
    (0,),
    (1,),
    (2,),
    (3,),
  )


def test_fixed_all_takes_every_valid_source():
  topology = from_mask(connectivity.fixed_all(TABLES['no_stem']))
  assert topology.sources == (
    (0,),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4),
    (1, 2, 3, 4, 5),
    (1, 2, 3, 4, 5, 6),
  )


def test_fixed_random_takes_k_valid_sources_that_the_seed_decides():
  draws = [
    from_mask(
      connectivity.fixed_random(jax.random.key(seed), TABLES['no_stem'], 2)
    )
    for seed in range(8)
  ]
  again = from_mask(
    connectivity.fixed_random(jax.random.key(0), TABLES['no_stem'], 2)
  )
  assert draws[0] == again
  assert len(set(draws)) > 1
  for topology in draws:
    for sources, valid in zip(topology.sources, TABLES['no_stem'], strict=True):
      assert len(sources) == min(2, sum(valid))
      assert all(valid[i] for i in sources)


@pytest.mark.parametrize('fan_in', [1, 2, 9])
def test_fixed_near_takes_the_latest_sources(fan_in):
  topology = from_mask(connectivity.fixed_near(TABLES['no_stem'], fan_in))
  for target, sources in enumerate(topology.sources):
    ok = [i for i in range(L) if TABLES['no_stem'][target][i]]
    assert sources == tuple(ok[-fan_in:])


def test_a_near_branch_takes_its_own_number_and_those_before_it():
  valid = connectivity.valid_branches(2, 4)
  topology = from_mask(connectivity.fixed_near(valid, 2))
  assert topology.sources == (((0, 3), (0, 1), (1, 2), (2, 3)),)


@pytest.mark.parametrize('level', ['block', 'branch'])
def test_a_random_wiring_has_as_many_live_blocks_as_asked_for(level):
  valid = (
    TABLES['all'] if level == 'block' else connectivity.valid_branches(3, 4)
  )
  found = set()
  for live in (7, 9) if level == 'branch' else (2, 4):
    for seed in range(3):
      spec = WiringSpec(level=level, fan_in=1, rule='fixed_random', live=live)
      topology = wiring.Wiring(
        spec, valid=valid, rngs=nnx.Rngs(connectivity=seed), topology=None
      ).topology
      # Walk back from the output, by hand.
      if level == 'block':
        reached, todo = set(), [L]
        while todo:
          block = todo.pop()
          if block not in reached and block > 0:
            reached.add(block)
            todo += topology.sources[block - 1]
        assert len(reached) == live
      else:
        layer, count = set(range(4)), 4
        for rows in reversed(topology.sources):
          layer = {k for c in layer for k in rows[c]}
          count += len(layer)
        assert count == live
      found.add(topology)
  assert len(found) > 2


def test_a_rare_number_of_live_blocks_is_found():
  # One in 99,000 wirings (docs/results.md): 2^18 draws miss it for 7 % of keys.
  spec = WiringSpec(fan_in=2, rule='fixed_random', live=18)
  topology = wiring.Wiring(
    spec,
    valid=connectivity.valid_sources(18),
    rngs=nnx.Rngs(connectivity=10),
    topology=None,
  ).topology
  read = {source for row in topology.sources for source in row}
  assert read == set(range(18))  # so all are live, from the last one back


def test_a_number_of_live_blocks_that_no_wiring_has_is_refused(monkeypatch):
  monkeypatch.setattr(wiring, '_DRAWS', 512)
  spec = WiringSpec(fan_in=1, rule='fixed_random', live=L + 1)
  with pytest.raises(
    InputError, match=rf'random wirings.* {L + 1} live blocks'
  ):
    wiring.Wiring(
      spec, valid=TABLES['all'], rngs=nnx.Rngs(connectivity=0), topology=None
    )


def test_gaps_are_between_the_last_that_stays_and_the_first_that_goes():
  rng = np.random.default_rng(14)
  real = rng.uniform(size=(L, L)) * np.tri(L)
  found = connectivity.gaps(real, TABLES['no_stem'], 2)
  expected = []
  for row, valid in zip(real, TABLES['no_stem'], strict=True):
    entries = sorted((r for r, ok in zip(row, valid, strict=True) if ok))[::-1]
    if len(entries) > 2:
      expected.append(entries[1] - entries[2])
  np.testing.assert_allclose(found, expected)
  assert connectivity.gaps(real, TABLES['all'], L).shape == (0,)


# The authors' step.


def test_as_published_draws_p_proportional_to_r_and_passes_every_gradient():
  spec = WiringSpec(fan_in=2, learner='as_published')
  own = wiring.Wiring(
    spec, valid=TABLES['all'], rngs=nnx.Rngs(connectivity=0), topology=None
  )
  rng = np.random.default_rng(13)
  real = jnp.asarray(rng.uniform(size=(L, L)) * np.tri(L), jnp.float32)
  gradient = jnp.asarray(rng.normal(size=(L, L)), jnp.float32)
  graph, state = nnx.split(own)

  def loss(real, key):
    own = nnx.merge(graph, jax.tree.map(lambda _: real, state))
    mask = own.draw(key, 0.01)  # it has no temperature
    return (mask * gradient).sum(), mask

  key = jax.random.key(3)
  found, mask = jax.grad(loss, has_aux=True)(real, key)
  np.testing.assert_array_equal(found, gradient)
  expected = connectivity.draw(key, real, TABLES['all'], 2, 1.0)
  np.testing.assert_array_equal(mask, expected)


# The topology.


@pytest.mark.parametrize(
  ('sources', 'message'),
  [
    (((0,), ()), r'block 2 takes \(\).*at least one'),
    (((0,), (0, 0)), r'block 2 takes \(0, 0\).*distinct'),
    (((0,), (1, 0)), r'block 2 takes \(1, 0\).*rising order'),
    (((0,), (2,)), r'block 2 takes \(2,\): only sources 0\.\.1'),
    (((1,),), r'block 1 takes \(1,\): only sources 0\.\.0'),
    (((-1, 0),), r'block 1 takes \(-1, 0\): only sources 0\.\.0'),
  ],
)
def test_a_topology_that_cannot_be_is_refused(sources, message):
  with pytest.raises(ValueError, match=message):
    Topology(sources)


def test_a_block_is_live_if_a_path_leads_from_it_to_the_last():
  rng = np.random.default_rng(9)
  num_dead = 0
  for _ in range(100):
    size = int(rng.integers(1, 12))
    topology = random_topology(rng, size)
    edges = np.zeros((size + 1, size + 1), bool)
    for target, sources in enumerate(topology.sources, start=1):
      edges[list(sources), target] = True
    # Paths of length 0..size: powers of I + edges.
    paths = np.linalg.matrix_power(
      (edges | np.eye(size + 1, dtype=bool)).astype(object), size
    )
    expected = tuple(bool(paths[block, size]) for block in range(1, size + 1))
    assert topology.live == expected
    num_dead += expected.count(False)
  assert num_dead > 50


def test_a_topology_comes_back_from_json():
  rng = np.random.default_rng(10)
  for _ in range(10):
    topology = random_topology(rng, 9)
    record = json.loads(json.dumps(topology.to_dict()))
    back = from_dict(record)
    assert back == topology
    assert hash(back) == hash(topology)


def test_the_json_form_is_the_documented_one():
  assert Topology(((0,), (0,), (0, 2))).to_dict() == {
    'schema': 'maskconnect_jax.topology/1',
    'form': 'block',
    'num_blocks': 3,
    'blocks': [
      {'block': 1, 'sources': [0], 'pruned': True},
      {'block': 2, 'sources': [0], 'pruned': False},
      {'block': 3, 'sources': [0, 2], 'pruned': False},
    ],
  }


@pytest.mark.parametrize('schema', ['maskconnect_jax.topology/2', None])
def test_another_schema_is_refused(schema):
  record = Topology(((0,), (1,))).to_dict() | {'schema': schema}
  with pytest.raises(ValueError, match='schema'):
    from_dict(record)
