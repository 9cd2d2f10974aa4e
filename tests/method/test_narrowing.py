"""Narrowing against loops over plain Python lists, which share no code."""

import itertools
import math

import numpy as np
import pytest
from flax import nnx

from maskconnect_jax.method import connectivity, narrowing, wiring
from maskconnect_jax.method.stack import MaskedStack

BLOCKS = np.tri(7, dtype=bool)  # row j may take sources 0..j
BRANCHES = np.ones((2, 5, 5), bool)


def rows_of(valid):
  """Index and number of sources of each row."""
  return [(i, int(valid[i].sum())) for i in np.ndindex(valid.shape[:-1])]


@pytest.mark.parametrize('valid', [BLOCKS, BRANCHES], ids=['block', 'branch'])
@pytest.mark.parametrize('fan_in', [1, 2, 4, 9])
def test_rows_shrink_geometrically_from_all_to_k(valid, fan_in):
  before = None
  for n in range(6):
    left = narrowing.left_after(valid, fan_in, n / 5)
    for row, count in rows_of(valid):
      expected = count
      if count > fan_in:
        expected = round(fan_in * (count / fan_in) ** (1 - n / 5))
      assert left[row] == expected
    assert before is None or (left <= before).all()
    before = left
  for row, count in rows_of(valid):
    assert before[row] == min(fan_in, count)


def test_edges_measured_are_those_of_rows_that_shrink():
  moments, fan_in = 4, 2
  counts = [count for _, count in rows_of(BLOCKS)]
  total = 0
  for n in range(1, moments + 1):
    after = [
      c if c <= fan_in else round(fan_in * (c / fan_in) ** (1 - n / moments))
      for c in (count for _, count in rows_of(BLOCKS))
    ]
    total += sum(b for b, a in zip(counts, after, strict=True) if b > a)
    counts = after
  assert narrowing.edges_measured(BLOCKS, fan_in, moments) == total


def test_a_mask_keeps_what_is_still_1():
  real = np.where(BLOCKS, 1, 0).astype(np.float32)
  real[3, 1], real[6, 0] = 0.5, 0.999
  kept = np.asarray(narrowing.kept(real, BLOCKS))
  assert kept[3, 1] == kept[6, 0] == 0
  assert kept.sum() == BLOCKS.sum() - 2
  assert kept.dtype == real.dtype


@pytest.mark.parametrize('weight', [0.0, 0.25, 1.0])
def test_sources_fade_in_beside_the_previous_one(weight):
  """Blocks that double their input, so that a row's sum is told from y_4."""

  class Double(nnx.Module):
    def __call__(self, x):
      return 2 * x

  stack = MaskedStack(
    [Double() for _ in range(4)], fan_in=2, start='previous', rngs=nnx.Rngs(0)
  )
  mask = stack.draw(None, None, weight)
  outputs = [1.0]
  for block in range(4):
    *others, previous = outputs
    total = previous + weight * sum(others)
    outputs.append(2 * total / (1 + weight * block))
  x = np.ones((1, 1), np.float32)
  assert float(stack(x, mask)[0, 0]) == pytest.approx(outputs[-1], rel=1e-6)
  rule = {0.0: 'fixed_prev', 1.0: 'fixed_all'}.get(weight)
  if rule:
    fixed = MaskedStack(
      [Double() for _ in range(4)], rule=rule, rngs=nnx.Rngs(0)
    )
    np.testing.assert_allclose(fixed(x), stack(x, mask), rtol=1e-6)


def test_without_takes_one_edge_out_of_each_mask():
  mask = BRANCHES.astype(np.float32)
  left = np.full((2, 5), 5)
  left[0, 1], left[1, 4] = 3, 4
  edges = narrowing.losing(mask, left)
  assert [tuple(e) for e in edges] == [
    *((0, 1, k) for k in range(5)),
    *((1, 4, k) for k in range(5)),
  ]
  for edge, one in zip(edges, narrowing.without(mask, edges), strict=True):
    expected = mask.copy()
    expected[tuple(edge)] = 0
    np.testing.assert_array_equal(one, expected)


class Noisy:
  """Losses of edges: a true value for each, and noise of every image."""

  def __init__(self, mask, values, noise, images=8, seed=0):
    self.mask, self.values, self.images = mask, values, images
    self.noise = noise
    self.seed = seed
    self.calls = []  # (number of the set, edges)
    self.seen = {}  # edge -> every difference

  def __call__(self, masks, number):
    sums = []
    edges = [tuple(np.argwhere(self.mask - one)[0]) for one in masks]
    self.calls.append((number, edges))
    for edge in edges:
      rng = np.random.default_rng([self.seed, number, *edge])
      found = self.values[edge] + self.noise * rng.normal(size=self.images)
      self.seen.setdefault(edge, []).extend(found)
      sums.append([found.sum(), (found**2).sum()])
    return np.array(sums), self.images


def race(noise, seed=0):
  rng = np.random.default_rng(seed)
  mask = BLOCKS.astype(np.float32)
  values = rng.normal(size=mask.shape)
  left = narrowing.left_after(BLOCKS, 2, 1.0)
  measure = Noisy(mask, values, noise, seed=seed)
  return narrowing.race(measure, mask, left), measure, mask, left, values


def test_a_race_gives_means_and_errors_of_all_that_was_seen():
  found, measure, _, _, _ = race(noise=1.0)
  for edge, mean, error, count in zip(
    found.edges, found.mean, found.standard_error, found.count, strict=True
  ):
    seen = measure.seen[tuple(edge)]
    assert count == len(seen)
    assert mean == pytest.approx(np.mean(seen))
    assert error == pytest.approx(np.std(seen, ddof=1) / math.sqrt(len(seen)))


def test_each_round_halves_the_edges_and_doubles_the_images():
  found, measure, _, _, _ = race(noise=1.0)
  count = len(found.edges)
  assert [number for number, _ in measure.calls] == list(range(7))
  sizes = [len(edges) for _, edges in measure.calls]
  assert sizes == [count] + [count // 2] * 2 + [count // 4] * 4


def test_a_race_goes_on_with_the_edges_nearest_to_their_cut():
  found, measure, mask, left, values = race(noise=1e-3)
  second = set(measure.calls[1][1])
  distances = {}
  for row in range(7):
    edges = [(row, i) for i in range(7) if mask[row, i]]
    if len(edges) <= left[row]:
      continue
    ranked = sorted(edges, key=lambda e: -values[e])
    cut = (values[ranked[left[row] - 1]] + values[ranked[left[row]]]) / 2
    distances |= {e: abs(values[e] - cut) for e in edges}
  # With noise of one size the errors are nearly alike: by distance, but for
  # the order of neighbours.
  ranked = sorted(distances, key=distances.get)
  assert {tuple(e) for e in found.edges} == set(distances)
  assert set(ranked[: len(second) // 2]) <= second
  assert not set(ranked[-len(second) // 2 :]) & second


def test_more_images_for_near_edges_choose_better_than_the_same_for_all():
  """At equal cost, over many true values: that is what the race is for."""
  wrong = {'race': 0, 'even': 0}
  for seed in range(200):
    found, measure, mask, _, values = race(noise=1.5, seed=seed)
    scores = found.on(mask, found.mean)
    even = Noisy(mask, values, 1.5, images=24, seed=seed + 1000)
    sums, count = even(narrowing.without(mask, found.edges), 0)
    plain = narrowing.Differences.none(found.edges)
    plain.add(np.arange(len(found.edges)), sums, count)
    assert sum(len(e) for _, e in measure.calls) * 8 <= len(found.edges) * 24
    for name, one in (
      ('race', scores),
      ('even', plain.on(mask, plain.mean)),
    ):
      for row in range(3, 7):
        best = sorted(range(row + 1), key=lambda i: -values[row, i])[:2]
        picked = sorted(range(row + 1), key=lambda i: -one[row, i])[:2]
        wrong[name] += len(set(best) - set(picked))
  assert wrong['race'] < 0.95 * wrong['even'], wrong


@pytest.mark.parametrize('valid', [BLOCKS, BRANCHES], ids=['block', 'branch'])
def test_a_moment_drops_the_smallest_scores(valid):
  rng = np.random.default_rng(1)
  for fan_in, share in itertools.product((1, 2), (0.4, 1.0)):
    # Few values: many ties.
    scores = rng.integers(0, 3, valid.shape).astype(float)
    left = narrowing.left_after(valid, fan_in, share)
    after = narrowing.narrowed(
      valid.astype(np.float32),
      valid,
      scores,
      left,
      0.25,
      keep_readers=False,
    )
    for row, count in rows_of(valid):
      sources = [i for i in range(valid.shape[-1]) if valid[row][i]]
      best = sorted(sources, key=lambda i: (-scores[row][i], -i))
      kept = set(best[: left[row]])
      for i in range(valid.shape[-1]):
        gone = np.float32(0.25) if i in sources else 0
        assert after[row][i] == (1 if i in kept else gone)
      assert len(sources) == count


def most_with_readers(mask, left):
  """The largest number of sources 1.. that some wiring gives readers."""
  best = 0
  rows = [
    list(itertools.combinations(np.flatnonzero(row), n))
    for row, n in zip(mask, left, strict=True)
  ]
  for chosen in itertools.product(*rows):
    best = max(best, len({i for row in chosen for i in row} - {0}))
  return best


@pytest.mark.parametrize('fan_in', [1, 2, 3])
def test_as_many_blocks_as_possible_keep_a_reader(fan_in):
  """The number is that of all wirings, by enumeration."""
  rng = np.random.default_rng(4)
  for _ in range(10):
    valid = np.tri(5, dtype=bool)
    scores = rng.normal(size=valid.shape)
    scores[:, 0] += 9  # all rows ask for the stem
    scores[:fan_in] = np.inf  # rows that lose none are not measured
    left = narrowing.left_after(valid, fan_in, 1.0)
    after = narrowing.narrowed(
      valid.astype(np.float32), valid, scores, left, 0.5, keep_readers=True
    )
    assert ((after == 1).sum(-1) == left).all()
    found = int((after == 1)[:, 1:].any(0).sum())
    assert found == most_with_readers(valid, left)


def test_every_branch_keeps_a_reader():
  scores = np.zeros(BRANCHES.shape)
  scores[..., 0] = 9  # all branches ask for the first
  for fan_in in (1, 2):
    left = narrowing.left_after(BRANCHES, fan_in, 1.0)
    after = narrowing.narrowed(
      BRANCHES.astype(np.float32), BRANCHES, scores, left, 0.5,
      keep_readers=True,
    )  # fmt: skip
    assert (after == 1).any(-2).all()
    assert ((after == 1).sum(-1) == fan_in).all()


def test_of_all_ways_to_keep_readers_the_best_is_taken():
  """K = 1 of three sources without a stem: an assignment, by enumeration."""
  rng = np.random.default_rng(5)
  valid = np.ones((1, 3, 3), bool)
  for _ in range(20):
    scores = rng.normal(size=valid.shape)
    after = narrowing.narrowed(
      valid.astype(np.float32), valid, scores, np.full((1, 3), 1), 0.5,
      keep_readers=True,
    )  # fmt: skip
    best = max(
      itertools.permutations(range(3)),
      key=lambda order: sum(scores[0, r, s] for r, s in enumerate(order)),
    )
    assert [int(row.argmax()) for row in after[0] == 1] == list(best)


def test_of_equal_scores_the_latest_source_stays():
  real = BLOCKS.astype(np.float32)
  left = narrowing.left_after(BLOCKS, 2, 1.0)
  after = narrowing.narrowed(
    real, BLOCKS, np.zeros((7, 7)), left, 0.5, keep_readers=False
  )
  for row in range(7):
    kept = np.flatnonzero(after[row] == 1)
    np.testing.assert_array_equal(kept, range(max(0, row - 1), row + 1))


def test_what_is_left_is_the_top_k_of_the_real_mask():
  """So any code that reads r finds the mask, whenever it was narrowed."""
  rng = np.random.default_rng(2)
  real = BLOCKS.astype(np.float32)
  for n in range(1, 5):
    left = narrowing.left_after(BLOCKS, 2, n / 4)
    real = narrowing.narrowed(
      real,
      BLOCKS,
      rng.normal(size=real.shape),
      left,
      n / 5,
      keep_readers=n % 2 == 0,
    )
    assert ((real == 1).sum(-1) == left).all()
  top = np.asarray(connectivity.top_k(real, BLOCKS, 2))
  np.testing.assert_array_equal(top, np.asarray(narrowing.kept(real, BLOCKS)))
  # An entry that went earlier is smaller.
  assert set(np.unique(real)) <= {
    np.float32(x) for x in (0, 0.2, 0.4, 0.6, 0.8, 1)
  }


def test_the_estimate_is_the_change_of_a_quadratic_loss():
  """For per-batch losses g·x + noise, with x the mean of k sources in 1-D."""
  rng = np.random.default_rng(3)
  sources, images = rng.normal(size=5), 4
  slopes = rng.normal(size=(9, images))  # dloss/dx of each image of 9 batches
  mask = np.array([[1, 1, 0, 1, 1]], float)
  k = mask.sum()
  gradients = np.stack(
    [[[np.mean(g) * y / k for y in sources]] for g in slopes]
  )
  found = narrowing.estimate(gradients, mask, images)
  x = sum(sources[i] for i in (0, 1, 3, 4)) / k
  for i in (0, 1, 3, 4):
    without = (k * x - sources[i]) / (k - 1)
    changes = [np.mean(g) * (without - x) for g in slopes]
    expected = np.mean(changes) + 0.5 * images * np.var(changes)
    assert found[0, i] == pytest.approx(expected)
  assert found[0, 2] == np.inf


def test_margins_by_hand():
  mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], float)
  after = np.array([[1, 0, 1, 0], [1, 0, 0, 1]], float)
  edges = np.argwhere(mask)
  found = narrowing.Differences.none(edges)
  values = {
    (0, 0): 5, (0, 1): 1, (0, 2): 3, (1, 0): 9, (1, 1): 2, (1, 2): 4,
    (1, 3): 4.5,
  }  # fmt: skip
  spread = {(0, 1): 0.1, (0, 2): 0.1, (1, 2): 3.0, (1, 3): 4.0}
  for index, edge in enumerate(map(tuple, edges)):
    s = spread.get(edge, 0)
    seen = values[edge] + s * np.array([1, -1])
    found.add(np.array([index]), np.array([[seen.sum(), (seen**2).sum()]]), 2)
  got = narrowing.margins(found, mask, after)
  # The sample deviation of ±s is s √2, its standard error s.
  assert (got.choices, got.choices_clear) == (2, 1)
  assert got.margin == pytest.approx(((3 - 1) + (4.5 - 4)) / 2)
  assert got.margin_standard_error == pytest.approx(
    (math.hypot(0.1, 0.1) + 5) / 2
  )


def test_a_stack_is_narrowed_in_a_loop_of_ones_own():
  """Losses without noise: each block loses what costs least, by plain loops."""
  rng = np.random.default_rng(6)
  cost = rng.uniform(size=(5, 5))  # of leaving an edge out
  stack = MaskedStack(
    [nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(5)],
    fan_in=2,
    learner='measured',
    rngs=nnx.Rngs(0),
  )
  asked = []

  def losses(mask, batch):
    asked.append(batch)
    missing = np.tri(5) - np.asarray(mask)
    return np.full(3, (missing * cost).sum())

  kept = [set(range(j + 1)) for j in range(5)]
  for moment in (1, 2):
    told = narrowing.narrow(
      stack, losses, moment=moment, moments=2, keep_readers=False
    )
    lost = 0
    for j, row in enumerate(kept):
      left = round(2 * ((j + 1) / 2) ** (1 - moment / 2)) if j > 1 else j + 1
      lost += len(row) > left
      while len(row) > left:
        row.remove(min(row, key=lambda i: cost[j, i]))
    mask = np.asarray(stack.mask())
    assert [set(np.flatnonzero(row)) for row in mask] == kept
    assert told.choices == told.choices_clear == lost
  assert set(asked) == set(range(7))
  assert wiring.freeze(stack).topology.sources == tuple(
    tuple(sorted(row)) for row in kept
  )
