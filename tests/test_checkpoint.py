"""What is kept, what comes back, and what a damaged file does."""

import dataclasses
import logging
import shutil
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax import checkpoint, config, distributed


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  step: Any
  weights: Any
  empty: Any = dataclasses.field(default_factory=dict)


def expected(step):
  """NumPy's own state, so that nothing JAX does to a buffer can change it."""
  rng = np.random.default_rng(step)
  return {
    'step': np.int32(step),
    'a': rng.normal(size=(64, 64)).astype(np.float32),
    'b': np.float32(rng.normal()),
  }


def state(step):
  arrays = expected(step)
  place = distributed.replicated(distributed.make_mesh())
  return distributed.to_global(
    State(arrays['step'], {'a': arrays['a'], 'b': [arrays['b']]}), place
  )


def assert_is(loaded, step):
  arrays = expected(step)
  assert isinstance(loaded, State)
  assert int(loaded.step) == step
  assert loaded.empty == {}
  for ours, theirs in (
    (loaded.weights['a'], arrays['a']),
    (loaded.weights['b'][0], arrays['b']),
  ):
    assert ours.dtype == theirs.dtype
    assert ours.sharding == state(0).step.sharding
    np.testing.assert_array_equal(np.asarray(ours), theirs)


def save(folder, steps, *, keep=2):
  """Saves [(step, accuracy)] and returns the folders that are left."""
  checkpoints = checkpoint.Checkpoints(folder, keep=keep)
  for step, accuracy in steps:
    checkpoints.save(step, state(step), {'at': step}, accuracy)
  checkpoints.close()
  return sorted(int(path.name) for path in folder.iterdir())


def load(folder):
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  try:
    return checkpoints.load_newest(state(0))
  finally:
    checkpoints.close()


def test_what_was_saved_comes_back(tmp_path):
  save(tmp_path, [(3, None), (7, 0.5)])
  loaded, progress = load(tmp_path)
  assert_is(loaded, 7)
  assert progress == {'at': 7}


def test_nothing_to_load(tmp_path):
  assert load(tmp_path / 'none') is None


def test_newest_and_best_are_kept(tmp_path):
  steps = [(1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, None), (6, None)]
  assert save(tmp_path, steps) == [2, 5, 6]
  # Opened again, it still knows which was the best ...
  assert save(tmp_path, [(7, None), (8, 0.2), (9, None)]) == [2, 8, 9]
  # ... and gives it up for a better one.
  assert save(tmp_path, [(10, 0.95), (11, None), (12, None)]) == [10, 11, 12]


def test_without_any_accuracy_the_newest_are_kept(tmp_path):
  assert save(tmp_path, [(s, None) for s in range(1, 6)], keep=3) == [3, 4, 5]


def test_buffers_may_be_donated_while_a_save_is_under_way(tmp_path):
  @jax.jit
  def other(tree):
    return jax.tree.map(lambda x: x * 0 - 1, tree)

  overwrite = jax.jit(other, donate_argnums=0)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=20)
  progress = {'at': 0}
  for step in range(1, 9):
    live = state(step)
    progress['at'] = step
    checkpoints.save(step, live, progress, None)
    for _ in range(3):
      live = overwrite(live)
    jax.block_until_ready(live)
    progress['at'] = -1  # nor does it matter what becomes of the dict
  checkpoints.close()
  for step in range(8, 0, -1):
    loaded, progress = load(tmp_path)
    assert_is(loaded, step)
    assert progress == {'at': step}
    shutil.rmtree(tmp_path / str(step))


def test_a_save_that_was_cut_is_never_seen(tmp_path):
  save(tmp_path / 'whole', [(5, None), (6, None)])
  (tmp_path / 'checkpoints').mkdir()
  shutil.copytree(tmp_path / 'whole/5', tmp_path / 'checkpoints/5')
  # The name that Orbax writes under before it renames.
  cut = tmp_path / 'checkpoints/6.orbax-checkpoint-tmp'
  shutil.copytree(tmp_path / 'whole/6', cut)
  loaded, _ = load(tmp_path / 'checkpoints')
  assert_is(loaded, 5)
  assert not cut.exists()


def test_saved_again_at_the_same_step(tmp_path):
  save(tmp_path, [(4, 0.5), (8, 0.6)])
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  checkpoints.save(8, state(80), {'at': 80}, 0.1)
  checkpoints.close()
  loaded, progress = load(tmp_path)
  assert_is(loaded, 80)
  assert progress == {'at': 80}


FILES = (
  'state/manifest.ocdbt',
  'state/_METADATA',
  'state/ocdbt.process_0/d/*',  # the arrays
  '_CHECKPOINT_METADATA',
)


@pytest.mark.parametrize('how', ['truncated', 'flipped', 'deleted'])
@pytest.mark.parametrize('name', FILES)
def test_falls_back_to_the_one_before(name, how, tmp_path, caplog, capfd):
  save(tmp_path, [(3, 0.1), (7, 0.5)])
  (path,) = (tmp_path / '7').glob(name)
  content = path.read_bytes()
  middle = len(content) // 2
  if how == 'deleted':
    path.unlink()
  elif how == 'flipped':
    flipped = bytes(byte ^ 255 for byte in content[middle : middle + 4])
    path.write_bytes(content[:middle] + flipped + content[middle + 4 :])
  else:
    path.write_bytes(content[:middle])
  with caplog.at_level(logging.WARNING):
    loaded, progress = load(tmp_path)
  assert_is(loaded, 3)
  assert progress == {'at': 3}
  (said,) = [r.getMessage() for r in caplog.records]
  assert said.startswith(f'checkpoint {tmp_path / "7"} is damaged (')
  assert said.endswith('trying the one before')
  assert '\n' not in said
  assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.parametrize('content', ['', '{"accu', '{"accuracy": "x"}', '[]'])
def test_a_damaged_metric_costs_only_the_metric(content, tmp_path, caplog):
  save(tmp_path, [(3, 0.1), (7, 0.5)])
  path = tmp_path / '7/metrics/metrics'
  assert path.is_file()
  path.write_text(content)
  loaded, progress = load(tmp_path)
  assert_is(loaded, 7)
  assert progress == {'at': 7}
  assert f'{path} is damaged' in caplog.text
  # 7 is no longer the best: 3 is.
  assert save(tmp_path, [(8, None), (9, None)]) == [3, 8, 9]


def test_no_whole_checkpoint(tmp_path):
  save(tmp_path, [(3, None), (7, None)])
  for step in (3, 7):
    shutil.rmtree(tmp_path / f'{step}/state')
  with pytest.raises(config.InputError, match='all are damaged') as error:
    load(tmp_path)
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)


def test_digest_is_that_of_the_bytes():
  tree = {'b': jnp.arange(3, dtype=jnp.bfloat16), 'a': jnp.float32(1.5)}
  content = (
    np.float32(1.5).tobytes()
    + np.array([0, 0x3F80, 0x4000], np.uint16).tobytes()
  )
  assert checkpoint.digest(tree) == zlib.crc32(content)
  assert checkpoint.digest(tree | {'a': jnp.float32(2)}) != zlib.crc32(content)


def test_arrays_of_a_model(tmp_path):
  arrays = {'x/kernel': jnp.arange(6.0).reshape(2, 3), 'x/bias': jnp.ones(3)}
  checkpoint.save_arrays(tmp_path / 'arrays', arrays)
  abstract = jax.eval_shape(lambda: arrays)
  loaded = checkpoint.load_arrays(tmp_path / 'arrays', abstract)
  assert set(loaded) == set(arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(loaded[name], array)
    assert loaded[name].devices() == {jax.devices()[0]}
  with pytest.raises(config.InputError, match='no whole set of arrays'):
    checkpoint.load_arrays(tmp_path / 'nothing', abstract)
  other = abstract | {'x/bias': jax.ShapeDtypeStruct((4,), jnp.float32)}
  with pytest.raises(config.InputError, match='another network .*x/bias'):
    checkpoint.load_arrays(tmp_path / 'arrays', other)
