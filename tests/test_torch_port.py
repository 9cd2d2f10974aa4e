"""The PyTorch port and ours are one method: equal weights, equal numbers."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskconnect_jax.method import connectivity, wiring
from maskconnect_jax.networks import models
from maskconnect_jax.run import train_state

torch = pytest.importorskip('torch')

FOLDER = Path(__file__).parents[1] / 'benchmarks'
TINY = ('--quick', '--models=resnet8', '--batches=8', '--fan_in=2')


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def run(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
  """Runs the program; returns its exit status and rows."""

  def program(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    path = tmp_path / 'result.json'
    argv = ['torch_port.py', *TINY, '--modes=eager', *arguments]
    monkeypatch.setattr(sys, 'argv', [*argv, f'--json={path}'])
    with pytest.raises(SystemExit) as exited:
      runpy.run_path(str(FOLDER / argv[0]), run_name='__main__')
    return int(exited.value.code), json.loads(path.read_text())['rows']

  return program


def with_residuals(model: Any) -> None:
  """Lets the branches' residuals through; they start at scale 0."""
  for block in model.stack.blocks:
    block.scale.set_value(jnp.full(block.scale.shape, 0.75))


@pytest.mark.parametrize('level', ['block', 'branch'])
def test_a_pruned_resnext_predicts_the_same(level: str) -> None:
  port = runpy.run_path(str(FOLDER / 'torch_port.py'))
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
  model = models.create_model(
    'resnext20_8x4d',
    num_classes=10,
    level=level,
    fan_in=1,
    learner='draws',
    initial_spread=0.5,
  )
  if level == 'branch':
    with_residuals(model)
  pruned = wiring.prune(wiring.freeze(model))
  if level == 'branch':
    assert any(len(live) < 8 for live in pruned.topology.live_branches)
  else:
    assert not all(pruned.topology.live)
  theirs = port['ported'](pruned, 'resnext20_8x4d').eval()
  with torch.no_grad():
    found = theirs(torch.from_numpy(images).permute(0, 3, 1, 2).float())
  ours = nnx.jit(lambda model, x: model(x))(
    pruned, jnp.asarray(images, jnp.float32)
  )
  np.testing.assert_allclose(found, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ('name', 'level', 'rule'),
  [
    ('resnet14', 'block', 'learned'),
    ('resnet14', 'block', 'fixed_all'),
    ('resnext20_8x4d', 'branch', 'learned'),
  ],
)
def test_loss_and_gradients_are_equal_in_float64(
  name: str, level: str, rule: str
) -> None:
  port = runpy.run_path(str(FOLDER / 'torch_port.py'))
  rng = np.random.default_rng(0)
  side = 32 if level == 'block' else 8
  images, labels = rng.normal(size=(8, side, side, 3)), rng.integers(0, 10, 8)
  with jax.enable_x64(True):
    model = models.create_model(
      name,
      num_classes=10,
      dtype='float64',
      level=level,
      rule=rule,
      fan_in=2,
      learner='draws',
      gradient='all',  # as the port
      initial_spread=0.5,
    )
    if level == 'branch':
      with_residuals(model)
    network, weights, masks, statistics = jax.tree.map(
      lambda leaf: leaf.astype(jnp.float64), train_state.split(model)
    )
    given = []
    if rule == 'learned':
      real_mask = masks['stack']['real_mask'][...]
      key, stack = jax.random.key(1), model.stack
      drawn = connectivity.draw(key, real_mask, stack.valid, stack.fan_in)
      given = [torch.from_numpy(np.array(drawn))]

    @jax.jit
    @jax.value_and_grad
    def loss_of(variables: tuple[Any, Any]) -> jax.Array:
      own = nnx.merge(network, *variables, statistics, copy=True)
      mask = own.draw(key, 1.0) if given else None
      logits = own(images, mask, train=True)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels
      ).mean()

    loss, gradients = loss_of((weights, masks))
    expected = port['torch_weights'](
      nnx.merge(network, *gradients, statistics, copy=True)
    )
  theirs = port['ported'](model, name).double().train()
  inputs = torch.from_numpy(images).permute(0, 3, 1, 2)
  found = torch.nn.functional.cross_entropy(
    theirs(inputs, *given), torch.from_numpy(labels)
  )
  found.backward()
  assert found.item() == pytest.approx(float(loss), rel=1e-12)
  named = dict(theirs.named_parameters())
  assert ('stack.real_mask' in named) == (rule == 'learned')
  for name, parameter in named.items():
    np.testing.assert_allclose(
      parameter.grad, expected[name], rtol=1e-9, atol=1e-10, err_msg=name
    )


def test_ten_steps_stay_together(run: Callable[..., Any]) -> None:
  status, (learned, fixed) = run('--check')
  assert status == 0
  assert (learned['rule'], fixed['rule']) == ('learned', 'fixed_prev')
  for row in (learned, fixed):
    assert row['step 10'] < row['loss, step 1']  # they are learning
    assert float(row['any loss apart']) < 1e-3
  assert fixed['real masks apart'] is None
  assert float(learned['real masks apart']) < 3e-2


def test_check_notices_another_method(
  run: Callable[..., Any],
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  import torch_network

  def without_momentum(*arguments: Any, **options: Any) -> Any:
    options['momentum'], options['nesterov'] = 0.0, False
    return sgd(*arguments, **options)

  sgd = torch.optim.SGD
  monkeypatch.setattr(torch_network.torch.optim, 'SGD', without_momentum)
  status, _ = run('--check', '--rules=fixed_prev')
  assert status == 1
  assert 'any loss' in capsys.readouterr().err.splitlines()[-1]


def test_both_are_timed(run: Callable[..., Any]) -> None:
  status, (ours, theirs) = run('--rules=learned', '--rounds=2')
  assert status == 0
  assert (ours['step of'], theirs['step of']) == ('ours', 'torch, eager')
  assert ours['ours x'] == 1
  for row in (ours, theirs):
    assert row['ms'] * row['images/s'] == pytest.approx(8e3)


def test_draws_are_without_replacement_in_proportion() -> None:
  import torch_network

  shares, count = (0.5, 0.3, 0.2), 20_000
  expected = np.zeros(3)
  for first, second in itertools.permutations(range(3), 2):
    chance = shares[first] * shares[second] / (1 - shares[first])
    expected[[first, second]] += chance
  torch.manual_seed(0)
  valid = torch.ones(3, 3, dtype=torch.bool).tril()
  drawn = torch_network.draw(
    torch.tensor(shares).expand(count, 3, 3), valid, 2
  ).numpy()
  np.testing.assert_array_equal(
    drawn.sum(-1), np.broadcast_to([1, 2, 2], (count, 3))
  )
  np.testing.assert_array_equal(drawn[:, 0], [[1, 0, 0]] * count)
  np.testing.assert_allclose(drawn[:, 2].mean(0), expected, atol=0.015)


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--set=connectivity.scale=sum', 'the port has the defaults only'),
  ],
)
def test_bad_input_is_one_line(
  argument: str,
  message: str,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  argv = ['torch_port.py', *TINY, '--check', '--rules=fixed_prev', argument]
  monkeypatch.setattr(sys, 'argv', argv)
  with pytest.raises(SystemExit) as exited:
    runpy.run_path(str(FOLDER / argv[0]), run_name='__main__')
  assert exited.value.code == 2
  assert message in capsys.readouterr().err.splitlines()[-1]
