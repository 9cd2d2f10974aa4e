"""What is kept, what comes back, and what a damaged file does."""

import contextlib
import dataclasses
import gc
import json
import logging
import os
import resource
import shutil
import signal
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax import config, files
from maskconnect_jax.run import checkpoint, distributed, model_arrays
from maskconnect_jax.run.progress import Progress


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


def load(folder, like=None, parse=lambda found: found):
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  try:
    return checkpoints.load_newest(like or state(0), parse)
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


def test_an_accuracy_may_come_after_the_save(tmp_path):
  def measured(steps, accuracies):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    for step in steps:
      checkpoints.save(step, state(step), {'at': step})
      if step in accuracies:
        checkpoints.measured(step, accuracies[step])
    checkpoints.close()
    return sorted(int(p.name) for p in tmp_path.iterdir() if p.is_dir())

  assert measured(range(1, 6), {1: 0.5, 2: 0.9, 4: 0.7}) == [2, 5]
  assert json.loads((tmp_path / 'accuracies.json').read_text()) == {
    '2': 0.9, '4': 0.7,
  }  # fmt: skip
  # Opened again, it still knows which was the best; and without the file not.
  assert measured([6, 7], {6: 0.8}) == [2, 7]
  (tmp_path / 'accuracies.json').write_text('{"2": []}')
  assert measured([8], {}) == [8]


@pytest.mark.parametrize('shards', [True, False])
def test_a_sharded_state_and_a_whole_one_are_the_same_checkpoint(
  shards, tmp_path
):
  """Either is saved and loaded as the other, to the same bits."""
  mesh = distributed.make_mesh()
  places = [distributed.sharded(mesh), distributed.replicated(mesh)]
  ours, theirs = places if shards else places[::-1]

  def placed(step, place):
    whole, arrays = state(step), expected(step)
    split = distributed.to_global(arrays['a'], place)
    return State(whole.step, whole.weights | {'a': split})

  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  checkpoints.save(4, placed(4, ours), {})
  checkpoints.close()
  loaded, _ = load(tmp_path, placed(0, theirs))
  assert loaded.weights['a'].sharding == theirs
  np.testing.assert_array_equal(loaded.weights['a'], expected(4)['a'])


def test_a_checkpoint_of_another_version_names_it(two_saved, tmp_path):
  folder = tmp_path / 'checkpoints'
  shutil.copytree(two_saved, folder)
  path = folder / '7/_CHECKPOINT_METADATA'
  record = json.loads(path.read_bytes())
  assert record['custom_metadata']['schema'] == checkpoint.SCHEMA
  record['custom_metadata']['schema'] = 'maskconnect_jax.checkpoint/9'
  path.write_text(json.dumps(record))
  with pytest.raises(config.InputError, match="/7 has the schema '.*/9'") as e:
    load(folder)  # nor does it go on from the older one
  assert 'damaged' not in str(e.value)
  del record['custom_metadata']['schema']  # as version 0.1.0 wrote it
  path.write_text(json.dumps(record))
  assert_is(load(folder)[0], 7)


def test_arrays_named_as_before_version_0_1_0(tmp_path):
  place = distributed.replicated(distributed.make_mesh())
  own = {'a': {'value': np.zeros(3)}, 'b': [np.zeros(())]}
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  checkpoints.save(1, distributed.to_global(State(np.int32(1), own), place), {})
  checkpoints.close()
  with pytest.raises(config.InputError, match='before version 0.1.0') as e:
    load(tmp_path)
  assert 'damaged' not in str(e.value)


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
  assert model_arrays.digest(tree) == zlib.crc32(content)
  assert model_arrays.digest(tree | {'a': jnp.float32(2)}) != zlib.crc32(
    content
  )


def test_arrays_of_a_model(tmp_path):
  arrays = {'x/kernel': jnp.arange(6.0).reshape(2, 3), 'x/bias': jnp.ones(3)}
  model_arrays.save(tmp_path / 'arrays', arrays)
  abstract = jax.eval_shape(lambda: arrays)
  loaded = model_arrays.load(tmp_path / 'arrays', abstract)
  assert set(loaded) == set(arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(loaded[name], array)
    assert loaded[name].devices() == {jax.devices()[0]}
  with pytest.raises(config.InputError, match='no whole set of arrays'):
    model_arrays.load(tmp_path / 'nothing', abstract)
  other = abstract | {'x/bias': jax.ShapeDtypeStruct((4,), jnp.float32)}
  with pytest.raises(config.InputError, match='another network .*x/bias'):
    model_arrays.load(tmp_path / 'arrays', other)


def test_sixty_saves_leave_no_thread_and_no_descriptor(tmp_path):
  def count():
    return threading.active_count(), len(os.listdir('/proc/self/fd'))

  before, live = count(), state(1)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  counts = []
  for step in range(1, 61):
    checkpoints.save(step, live, {}, None)
    counts.append(count())
  checkpoints.close()
  early, late = np.max(counts[5:20], 0), np.max(counts[45:], 0)
  # What one save under way takes comes and goes.
  assert late[0] <= early[0] + 3
  assert late[1] <= early[1] + 8
  assert count()[0] <= before[0]
  assert count()[1] <= before[1] + 3


ODD = [
  'exp[1]',
  'a\\b',
  'a*b',
  'a?b',
  'gs:',
  '{x}%20#\n é',
  os.fsdecode(b'\xff'),
]


@pytest.mark.parametrize('name', ODD, ids=ascii)
def test_a_path_that_a_storage_library_misreads(
  name, tmp_path, monkeypatch, arrays_in
):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
  (tmp_path / 'temporary').mkdir()
  folder = tmp_path / name / 'checkpoints'
  assert save(folder, [(3, None), (7, 0.5)]) == [3, 7]
  loaded, _ = load(folder)
  assert_is(loaded, 7)
  model = tmp_path / name / 'arrays'
  model_arrays.save(model, {'x': jnp.arange(3.0)})
  one = {'x': jax.ShapeDtypeStruct((3,), jnp.float32)}
  assert model_arrays.load(model, one)['x'].tolist() == [0, 1, 2]
  # No link is left, and the files stand where a plain path would have them.
  assert list((tmp_path / 'temporary').iterdir()) == []
  shutil.copytree(folder / '7', tmp_path / 'copy')
  stored = arrays_in(tmp_path / 'copy/state')
  np.testing.assert_array_equal(stored['weights.a'], expected(7)['a'])


def test_a_pattern_does_not_reach_into_a_neighbour(tmp_path):
  for name in ('axb', 'a?b'):  # the second matches both
    save(tmp_path / name, [(3 if name == 'axb' else 7, None)])
  model_arrays.save(tmp_path / 'axb/m', {'x': jnp.zeros(3)})
  model_arrays.save(tmp_path / 'a?b/m', {'y': jnp.ones(3)})
  one = {'y': jax.ShapeDtypeStruct((3,), jnp.float32)}
  assert model_arrays.load(tmp_path / 'a?b/m', one)['y'].tolist() == [1] * 3
  assert_is(load(tmp_path / 'a?b')[0], 7)


def test_a_path_that_cannot_be_linked_to_is_refused(tmp_path, monkeypatch):
  (tmp_path / 't[1]').mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 't[1]'))
  with pytest.raises(config.InputError, match='cannot take the path') as error:
    checkpoint.Checkpoints(tmp_path / 'a[1]', keep=2)
  assert '\n' not in str(error.value)
  assert not any((tmp_path / 'a[1]').iterdir())


def test_checkpoints_is_a_file(tmp_path):
  (tmp_path / 'checkpoints').write_text('mine')
  with pytest.raises(config.InputError, match='checkpoints is a file, not a'):
    checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=2)
  assert (tmp_path / 'checkpoints').read_text() == 'mine'


PROGRESS = {'images': 4, 'train_seconds': 0.5, 'damaged': [3]}
EDITS = {
  'list': lambda record: [],
  'number': lambda record: 5,
  'null': lambda record: None,
  'own is a list': lambda record: record | {'custom_metadata': []},
  'own is text': lambda record: record | {'custom_metadata': 'x'},
  'own is null': lambda record: record | {'custom_metadata': None},
  'time is text': lambda record: record | {'init_timestamp_nsecs': 'x'},
  'handlers are a list': lambda record: record | {'item_handlers': []},
}
OWN_EDITS = {
  'no digest': lambda own: {'progress': own['progress']},
  'digest is text': lambda own: own | {'digest': 'x'},
  'no progress': lambda own: {'digest': own['digest']},
  'progress is a list': lambda own: own | {'progress': []},
  'progress is a number': lambda own: own | {'progress': 5},
}
PROGRESS_EDITS = {
  'no images': lambda p: {k: v for k, v in p.items() if k != 'images'},
  'images are text': lambda p: p | {'images': '4'},
  'images below 0': lambda p: p | {'images': -4},
  'seconds are NaN': lambda p: p | {'train_seconds': float('nan')},
  'seconds are true': lambda p: p | {'train_seconds': True},
  'damaged is a number': lambda p: p | {'damaged': 3},
  'damaged is a list of lists': lambda p: p | {'damaged': [[3]]},
  'accuracy is text': lambda p: p | {'test_accuracy_drawn': '1'},
  'a step has no loss': lambda p: p | {'unlogged': [{'accuracy': 1.0}]},
}


def edited(record, name):
  if name in EDITS:
    return EDITS[name](record)
  own = record['custom_metadata']
  if name in OWN_EDITS:
    own = OWN_EDITS[name](own)
  else:
    own |= {'progress': PROGRESS_EDITS[name](own['progress'])}
  return record | {'custom_metadata': own}


@pytest.fixture(scope='module')
def two_saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('two')
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  for step in (3, 7):
    progress = PROGRESS | {'images': step, 'test_accuracy_drawn': None}
    checkpoints.save(step, state(step), progress, 0.1)
  checkpoints.close()
  return folder


@pytest.mark.parametrize('name', [*EDITS, *OWN_EDITS, *PROGRESS_EDITS, 'deep'])
def test_metadata_edited_by_hand(name, two_saved, tmp_path, caplog):
  folder = tmp_path / 'checkpoints'
  shutil.copytree(two_saved, folder)
  path = folder / '7/_CHECKPOINT_METADATA'
  text = '[' * 100_000
  if name != 'deep':
    text = json.dumps(edited(json.loads(path.read_text()), name))
  path.write_text(text)
  loaded, progress = load(folder, parse=Progress.from_json)
  assert_is(loaded, 3)
  assert progress.clock.images == 3
  (said,) = [r.getMessage() for r in caplog.records]
  assert said.startswith(f'checkpoint {folder / "7"} is damaged (')
  assert '\n' not in said


def test_metadata_mended_by_hand(two_saved, tmp_path, caplog):
  folder = tmp_path / 'checkpoints'
  shutil.copytree(two_saved, folder)
  path = folder / '7/_CHECKPOINT_METADATA'
  text = path.read_text()
  path.write_text('[]')
  for count in (1, 2):  # the second start says the same
    assert_is(load(folder)[0], 3)
    assert len(caplog.records) == count
  path.write_text(text)
  assert_is(load(folder)[0], 7)


def test_what_lies_among_the_checkpoints(two_saved, tmp_path):
  folder = tmp_path / 'checkpoints'
  shutil.copytree(two_saved, folder)
  (folder / '9').write_text('a file')
  (folder / '10').symlink_to('nowhere')
  names = ['abc', '-1', '1.5', '8 copy', '007', '.snapshot']
  for name in names:
    (folder / name).mkdir()
  loaded, _ = load(folder)
  assert_is(loaded, 7)
  assert {*names, '9'} <= {path.name for path in folder.iterdir()}
  (folder / '8').mkdir()  # an empty one is damaged
  assert_is(load(folder)[0], 7)


def other_state(step=0, dtype=np.float32, shape=(64, 64), name='a'):
  place = distributed.replicated(distributed.make_mesh())
  weights = {name: np.zeros(shape, dtype), 'b': [np.zeros((), dtype)]}
  return distributed.to_global(State(np.int32(step), weights), place)


@pytest.mark.parametrize(
  ('difference', 'said'),
  [
    ({'shape': (64, 65)}, r'weights/a is float32 \[64, 64\] .* \[64, 65\] now'),
    ({'dtype': np.float16}, r'weights/a is float32 .* float16 '),
    ({'name': 'z'}, r'weights/z is missing there'),
  ],
  ids=['shape', 'dtype', 'name'],
)
def test_checkpoints_of_another_network(difference, said, two_saved):
  with pytest.raises(config.InputError, match=said) as error:
    load(two_saved, other_state(**difference))
  assert 'another network' in str(error.value)
  assert 'damaged' not in str(error.value)
  assert '\n' not in str(error.value)


@pytest.fixture
def x64():
  yield lambda is_wide: jax.config.update('jax_enable_x64', is_wide)
  jax.config.update('jax_enable_x64', False)


@pytest.mark.parametrize('wide', [True, False])
def test_checkpoints_of_another_precision(wide, tmp_path, caplog, x64):
  def at(is_wide):
    # Not the context manager, which is of one thread.
    x64(is_wide)
    return other_state(1, np.float64 if is_wide else np.float32)

  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=2)
  for step in (1, 2):
    checkpoints.save(step, at(wide), {}, None)
  checkpoints.close()
  remedy = r'with JAX_ENABLE_X64=1 .* set it' if wide else 'without .* unset it'
  with pytest.raises(config.InputError, match=remedy) as error:
    load(tmp_path / 'checkpoints', at(not wide))
  assert 'damaged' not in str(error.value)
  assert not caplog.records


def test_no_permission_is_no_damage(two_saved):
  if os.geteuid():
    pytest.skip('only root can become another user here')
  with tempfile.TemporaryDirectory(prefix='checkpoints') as temporary:
    folder = Path(temporary, 'checkpoints')
    shutil.copytree(two_saved, folder)
    os.chmod(temporary, 0o755)
    for path in (folder, *folder.rglob('*')):
      os.chown(path, 65534, 65534)
    (folder / '7/state').chmod(0)
    os.seteuid(65534)
    try:
      with pytest.raises(config.InputError, match='cannot be read: Permission'):
        load(folder)
    finally:
      os.seteuid(0)


def test_a_full_disk(small_disk, capfd):
  folder = small_disk('100k') / 'checkpoints'
  checkpoints = checkpoint.Checkpoints(folder, keep=9)
  done = 0

  def fill():
    nonlocal done
    for step in range(1, 20):
      checkpoints.save(step, state(step), {'at': step}, None)
      done = step

  with pytest.raises(config.InputError, match='No space left') as error:
    fill()
  checkpoints.close()
  failed = str(done)  # in the background, and told by the next call
  assert str(error.value).startswith(f'{folder / failed} cannot be written')
  assert '16,392 bytes are needed' in str(error.value)  # 4 * (64 * 64 + 2)
  assert '\n' not in str(error.value)
  assert done > 1
  assert {p.name for p in folder.iterdir()} == {*map(str, range(1, done))}
  # The ones before are whole, and it goes on where there is room.
  assert_is(load(folder)[0], done - 1)
  shutil.rmtree(folder / '1')
  save(folder, [(50, None)], keep=1)
  assert_is(load(folder)[0], 50)
  gc.collect()
  assert capfd.readouterr().err == ''


def test_a_model_on_a_full_disk(small_disk, capfd):
  folder = small_disk('100k')
  arrays = {'x': jnp.asarray(np.random.default_rng(0).normal(size=(99, 999)))}
  with pytest.raises(OSError, match='No space left'):
    model_arrays.save(folder / 'arrays', arrays)
  gc.collect()
  assert capfd.readouterr().err == ''


def test_a_file_that_may_not_grow(tmp_path, capfd):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=9)
  checkpoints.save(1, state(1), {}, None)
  checkpoints.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
  try:
    checkpoints.save(2, state(2), {}, None)
    with pytest.raises(config.InputError, match='File too large'):
      checkpoints.close()  # told also if nothing is saved after it
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert_is(load(tmp_path)[0], 1)
  assert capfd.readouterr().err == ''


@contextlib.contextmanager
def interrupted_after(seconds):
  def interrupt(*_):
    raise KeyboardInterrupt

  previous = signal.signal(signal.SIGALRM, interrupt)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize('milliseconds', [1, 5, 15, 40])
def test_ctrl_c_amid_a_write(milliseconds, tmp_path, capfd):
  path = tmp_path / 'model'
  path.mkdir()
  (path / 'old').write_text('')
  arrays = {f'x{i}': jnp.full((50, 50), i) for i in range(30)}

  def write():
    with files.replacing(path) as temporary:
      temporary.mkdir()
      model_arrays.save(temporary / 'arrays', arrays)
      signal.pause()  # were it faster than the signal

  with pytest.raises(KeyboardInterrupt), interrupted_after(milliseconds / 1e3):
    write()
  assert [p.name for p in path.iterdir()] == ['old']
  assert list(tmp_path.iterdir()) == [path]
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=2)
  live = state(1)

  def save():
    for step in range(1, 1000):
      checkpoints.save(step, live, {}, None)

  with pytest.raises(KeyboardInterrupt), interrupted_after(milliseconds / 1e3):
    save()
  checkpoints.close()
  gc.collect()
  assert capfd.readouterr().err == ''
