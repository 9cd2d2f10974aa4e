"""One whole tiny run: what it leaves in its workdir, recomputed apart."""

import collections
import contextlib
import dataclasses
import importlib
import io
import json
import math
import struct
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import sklearn.model_selection
from PIL import Image
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

import maskconnect_jax
from maskconnect_jax import config
from maskconnect_jax.run import (
  evaluation,
  experiment,
  loop,
  metrics,
  train,
  train_state,
)

BATCH, TOTAL, FREEZE, PER_EPOCH = 64, 24, 12, 1437 // 64


def digits():
  """Train and test images and labels, from scikit-learn itself."""
  bunch = sklearn.datasets.load_digits()
  rest, held = sklearn.model_selection.train_test_split(
    np.arange(1797), test_size=360, random_state=0, stratify=bunch.target
  )
  images = np.rint(bunch.images * 255 / 16).astype(np.uint8)
  return (images[rest], bunch.target[rest]), (images[held], bunch.target[held])


def lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  assert text.endswith('\n')
  return [json.loads(line) for line in text.splitlines()]


def read_json(workdir, name):
  return json.loads((workdir / name).read_text())


def events(workdir, kind='simple_value'):
  """{(tag, step): value} of all event files, as TensorBoard reads them."""
  found = {}
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from('<Q', data, at)
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
      at += 12 + length + 4
      if event.session_log.status == event_pb2.SessionLog.START:
        found = {k: v for k, v in found.items() if k[1] < event.step}
      for value in event.summary.value:
        if value.HasField(kind):
          found[value.tag, event.step] = getattr(value, kind)
  return found


def top_k(real_mask, fan_in):
  """Sources of each block: the largest, of equals the latest, 0-based."""
  return [
    sorted(sorted(range(row + 1), key=lambda i: (-real_mask[row, i], -i))[:k])
    for row in range(len(real_mask))
    for k in [min(fan_in, row + 1)]
  ]


def reached(sources):
  """Blocks (from 1) from which the last one can be reached."""
  seen, todo = set(), [len(sources)]
  while todo:
    block = todo.pop()
    if block and block not in seen:
      seen.add(block)
      todo += sources[block - 1]
  return seen


# The workdir, file by file.


def test_everything_is_there(finished):
  names = {path.name for path in finished.workdir.iterdir()}
  assert names == {
    'checkpoints', 'config.json', 'examples.npz', 'figures', 'inputs.json',
    'metrics.jsonl', 'model', 'plan.json', 'real_masks.npz', 'report.html',
    'summary.json', 'tensorboard', 'topology.json',
  }  # fmt: skip
  assert not [p for p in finished.workdir.rglob('*') if '.tmp' in p.name]


def test_config_is_stored(finished, tiny_config):
  stored = read_json(finished.workdir, 'config.json')
  assert stored == json.loads(tiny_config.to_json())
  assert stored['connectivity']['fan_in'] == 2


def test_metrics_lines(finished):
  records = lines(finished.workdir)
  assert [record['step'] for record in records] == list(range(2, 25, 2))
  for record in records:
    step, last = record['step'], record['step'] - 1
    connectivity = step <= FREEZE
    assert record['phase'] == ('connectivity' if connectivity else 'fine-tune')
    assert record['epoch'] == pytest.approx(step / PER_EPOCH)
    cosine = 0.1 * (1 + math.cos(math.pi * last / TOTAL)) / 2
    assert record['learning_rate'] == pytest.approx(cosine, rel=1e-5)
    assert record['mask_learning_rate'] == pytest.approx(0.1 * connectivity)
    assert 0 < record['loss'] < 4
    # A mean over the 2 x 64 images since the line before.
    assert (record['accuracy'] * 2 * BATCH) % 1 == pytest.approx(0, abs=1e-4)
    assert record['images_per_second'] > 0
    for name in ('test_accuracy', 'test_top5_accuracy', 'test_loss'):
      assert (name in record) == (step % 8 == 0)
  assert records[0]['loss'] > records[-1]['loss'] + 0.3  # it learns
  for name in ('test_accuracy', 'test_top5_accuracy', 'test_loss'):
    assert records[-1][name] == finished.summary[name]


def test_tensorboard_says_the_same(finished):
  expected = {
    (name, record['step']): value
    for record in lines(finished.workdir)
    for name, value in record.items()
    if name not in ('step', 'phase')
  }
  found = events(finished.workdir)
  assert set(found) == set(expected)
  for key, value in expected.items():
    assert found[key] == pytest.approx(value, rel=1e-6), key


def test_tensorboard_shows_the_real_mask_and_the_config(finished):
  with np.load(finished.workdir / 'real_masks.npz') as file:
    masks = dict(zip(file['steps'].tolist(), file['masks'], strict=True))
  images = events(finished.workdir, 'image')
  histograms = events(finished.workdir, 'histo')
  assert set(images) == {('real_mask', step) for step in masks}
  for step, mask in masks.items():
    with Image.open(
      io.BytesIO(images['real_mask', step].encoded_image_string)
    ) as picture:
      pixels = np.asarray(picture.convert('RGB'), int)[4::8, 4::8]
    assert (pixels[~np.tri(3, dtype=bool)] == 255).all()
    red = pixels[..., 0][np.tri(3, dtype=bool)]
    found = (232 - red) / (232 - 8)
    np.testing.assert_allclose(found, mask[np.tri(3, dtype=bool)], atol=0.003)
    histogram = histograms['real_mask_entries', step]
    assert histogram.num == 6
    assert histogram.sum == pytest.approx(mask.sum(), rel=1e-5)
  parts = events(finished.workdir, 'metadata')
  plugin = plugin_hparams_pb2.HParamsPluginData.FromString(
    parts['_hparams_/session_start_info', 0].plugin_data.content
  )
  fields = plugin.session_start_info.hparams
  assert fields['model.name'].string_value == 'resnet8'
  assert fields['batch_size'].number_value == 64
  assert fields['optimizer.steps_at'].string_value == "('50%', '75%')"


def test_real_masks_are_those_of_the_checkpoints(finished, arrays_in):
  with np.load(finished.workdir / 'real_masks.npz') as file:
    steps, masks = file['steps'].tolist(), file['masks']
  assert steps == list(range(2, FREEZE + 1, 2))
  assert masks.shape == (6, 3, 3)
  assert masks.dtype == np.float32
  assert ((masks >= 0) & (masks <= 1)).all()
  assert (masks[:, ~np.tri(3, dtype=bool)] == 0).all()
  assert (masks[0] != masks[-1])[np.tri(3, dtype=bool)].any()
  for step in (4, 8, 12, 16, 24):  # after the freeze it stays as it was
    state = arrays_in(finished.workdir / f'checkpoints/{step}/state')
    (stored,) = [v for k, v in state.items() if k.startswith('masks.')]
    want = masks[steps.index(min(step, FREEZE))]
    np.testing.assert_array_equal(stored, want)


def test_topology_is_the_top_k_of_the_last_real_mask(finished):
  with np.load(finished.workdir / 'real_masks.npz') as file:
    sources = top_k(file['masks'][-1], 2)
  live = reached(sources)
  assert len(live) < len(sources), 'nothing to prune: choose another seed'
  assert read_json(finished.workdir, 'topology.json') == {
    'schema': 'maskconnect_jax.topology/1',
    'form': 'block',
    'num_blocks': 3,
    'blocks': [
      {'block': block, 'sources': taken, 'pruned': block not in live}
      for block, taken in enumerate(sources, start=1)
    ],
  }


def test_ties_go_to_the_latest_source():
  # The oracle above against a case counted by hand.
  tied = np.array([[0.5, 0, 0], [1, 1, 0], [1, 0.2, 1]])
  assert top_k(tied, 1) == [[0], [1], [2]]
  assert reached([[0], [0], [1]]) == {1, 3}


def test_summary(finished, arrays_in):
  workdir = finished.workdir
  summary = read_json(workdir, 'summary.json')
  assert summary == finished.summary
  sources = [
    b['sources'] for b in read_json(workdir, 'topology.json')['blocks']
  ]
  live = reached(sources)
  weights = {
    name.removeprefix('weights.'): array.size
    for name, array in arrays_in(workdir / 'checkpoints/24/state').items()
    if name.startswith('weights.')
  }
  dead = tuple(f'stack.blocks.{block - 1}.' for block in {1, 2, 3} - live)
  pruned = sum(n for k, n in weights.items() if not k.startswith(dead))
  expected = {
    'model': 'resnet8',
    'rule': 'learned',
    'fan_in': 2,
    'seed': 6,
    'steps': TOTAL,
    'num_train_examples': 1437,
    'num_test_examples': 360,
    'skipped_files': 0,
    'parameters': sum(weights.values()),
    'parameters_pruned': pruned,
    'blocks': 3,
    'blocks_pruned': len(live),
    'num_devices': jax.device_count(),
    'jax': jax.__version__,
  }
  assert {name: summary[name] for name in expected} == expected
  assert pruned < sum(weights.values())
  # Stem, blocks of two 3x3 convolutions on 8x8, 4x4 and 2x2 pixels, head.
  products = {
    0: 9 * 8 * 64,
    1: 9 * (8 * 8 + 8 * 8) * 64,
    2: 9 * (8 * 16 + 16 * 16) * 16,
    3: 9 * (16 * 32 + 32 * 32) * 4,
    4: 32 * 10,
  }
  assert summary['multiply_adds'] == sum(products.values())
  assert summary['multiply_adds_pruned'] == sum(
    products[part] for part in {0, 4} | live
  )
  for name in ('_drawn', '_at_freeze', '', '_pruned'):
    correct = summary[f'test_accuracy{name}'] * 360
    assert correct == pytest.approx(round(correct))
  assert summary['test_accuracy'] > 0.3  # chance is 0.1
  assert summary['test_accuracy_pruned'] == summary['test_accuracy']
  assert summary['images_per_second'] * summary[
    'train_seconds'
  ] == pytest.approx(TOTAL * BATCH)
  for name in ('flax', 'jaxlib', 'numpy'):
    module = importlib.import_module(name)
    assert summary[name] == module.__version__
  assert summary['python'] == sys.version.split()[0]
  # The config's 200, rounded up to a multiple of the devices.
  assert 0 <= summary['batch_images'] - 200 < jax.device_count()
  assert 0 < summary['batch_seconds'] < 60
  assert 0 < summary['batch_seconds_pruned'] < 60


def test_parameters_are_those_of_the_architecture(finished):
  # Stem, three blocks of two 3x3 convolutions, BatchNorm, head; width 8.
  conv, norm = 9, 2
  stem = conv * 1 * 8 + norm * 8
  blocks = [
    conv * (into * out + out * out) + norm * 2 * out
    for into, out in ((8, 8), (8, 16), (16, 32))
  ]
  head = 32 * 10 + 10
  assert finished.summary['parameters'] == stem + sum(blocks) + head


def test_model_predicts_the_pruned_accuracy(finished):
  _, (images, labels) = digits()
  model = maskconnect_jax.load(finished.workdir / 'model')
  probabilities = model.predict(images)
  assert probabilities.dtype == np.float32
  np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
  accuracy = (probabilities.argmax(-1) == labels).mean()
  assert accuracy == pytest.approx(finished.summary['test_accuracy_pruned'])
  loss = -np.log(probabilities[np.arange(360), labels]).mean()
  assert loss == pytest.approx(finished.summary['test_loss'], rel=1e-4)
  five = np.argsort(-probabilities, -1)[:, :5] == labels[:, None]
  assert five.any(-1).mean() == pytest.approx(
    finished.summary['test_top5_accuracy']
  )


def test_model_json(finished):
  (images, _), _ = digits()
  record = read_json(finished.workdir, 'model/model.json')
  assert record['schema'] == 'maskconnect_jax.model/1'
  assert record['classes'] == list('0123456789')
  assert record['topology'] == read_json(finished.workdir, 'topology.json')
  assert record['architecture'] == {
    'name': 'resnet8', 'num_classes': 10, 'in_channels': 1, 'width': 8,
    'dtype': 'float32', 'fan_in': 2, 'rule': 'learned', 'stem_source': True,
    'adapter': 'pool', 'scale': 'mean', 'gradient': 'all', 'initial': 0.5,
    'initial_spread': 0.5, 'seed': 6, 'level': 'block',
    'remat': 'none', 'version': '2',
    'matmul_precision': 'default', 'temperature': 1.0, 'learner': 'draws',
    'live': 0, 'head_norm': False, 'start': 'all',
  }  # fmt: skip
  shape = record['preprocessing']
  assert (shape['height'], shape['width'], shape['channels']) == (8, 8, 1)
  assert shape['mean'] == pytest.approx([images.mean()])
  assert shape['std'] == pytest.approx([images.std()])


def test_model_holds_the_live_weights_of_the_last_checkpoint(
  finished, arrays_in
):
  state = arrays_in(finished.workdir / 'checkpoints/24/state')
  model = arrays_in(finished.workdir / 'model/arrays/state')
  blocks = read_json(finished.workdir, 'topology.json')['blocks']
  dead = [str(b['block'] - 1) for b in blocks if b['pruned']]
  expected = {}
  for name, array in state.items():
    group, _, path = name.partition('.')
    parts = path.split('.')
    if group in ('weights', 'statistics') and not (
      parts[:2] == ['stack', 'blocks'] and parts[2] in dead
    ):
      expected['/'.join(parts)] = array
  assert set(model) == set(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(model[name], array, err_msg=name)


def test_figures_can_be_opened(finished):
  names = ('topology', 'topology_dark', 'real_mask', 'real_mask_history')
  names += ('confusion',)
  for name in names:
    path = finished.workdir / 'figures' / name
    with Image.open(path.with_suffix('.png')) as image:
      image.load()
      assert min(image.size) > 100
    root = ElementTree.parse(path.with_suffix('.svg')).getroot()
    assert root.tag.endswith('svg')
  assert len(list((finished.workdir / 'figures').iterdir())) == 10


def test_what_is_said_on_the_way(finished):
  assert 'compiling the training step' in finished.stderr
  assert 'froze the topology after step 12' in finished.stderr
  assert 'step 24/24' in finished.stderr  # the last line is always printed


# Other configs.


def test_a_fixed_rule_has_no_masks(tiny_config, tmp_path, capsys):
  tiny_config.connectivity.rule = 'fixed_all'
  tiny_config.connectivity.fan_in = 9
  tiny_config.duration = '4 steps'
  tiny_config.data.validation = 64
  summary = train.train(tiny_config, tmp_path).summary
  records = lines(tmp_path)
  assert {record['phase'] for record in records} == {'train'}
  assert {record['mask_learning_rate'] for record in records} == {0}
  assert 'validation_accuracy' in records[-1]
  assert 'test_accuracy' not in records[-1]
  assert 'test_accuracy_drawn' not in summary
  assert summary['validation_accuracy_drawn'] is None
  (last,) = {summary['validation_accuracy'], records[-1]['validation_accuracy']}
  assert f'{last:.2%}' in train.finish.table(summary, tmp_path)
  assert summary['num_train_examples'] == 1437 - 64
  topology = read_json(tmp_path, 'topology.json')
  assert [b['sources'] for b in topology['blocks']] == [[0], [0, 1], [0, 1, 2]]
  assert not (tmp_path / 'real_masks.npz').exists()
  figures = {path.stem for path in (tmp_path / 'figures').iterdir()}
  assert figures == {'topology', 'topology_dark', 'confusion'}
  assert 'sources' not in capsys.readouterr().err  # K means nothing here


def test_masks_may_move_to_the_end(tiny_config, tmp_path, capsys):
  tiny_config.connectivity.phase = '100%'
  tiny_config.connectivity.fan_in = 9  # more than there are: all, with a note
  tiny_config.duration = '4 steps'
  tiny_config.evaluate_every = '4 steps'
  summary = train.train(tiny_config, tmp_path).summary
  assert {record['phase'] for record in lines(tmp_path)} == {'connectivity'}
  assert summary['test_accuracy'] == summary['test_accuracy_at_freeze']
  assert summary['test_accuracy_drawn'] is not None
  topology = read_json(tmp_path, 'topology.json')
  assert [b['sources'] for b in topology['blocks']] == [[0], [0, 1], [0, 1, 2]]
  notes = [n for n in capsys.readouterr().err.splitlines() if 'fan_in=9' in n]
  assert len(notes) == 1
  assert 'no block has more than 3 sources' in notes[0]


# Evaluation.


def test_every_example_is_counted_once(tiny_config):
  job = experiment.build(tiny_config)
  # It says "0" to everything, as the padding's label is.
  job.model.head.bias[...] = jnp.array([1e6] + [0] * 9)
  network, *variables = train_state.split(job.model)
  _, (_, labels) = digits()
  for size in (200, 45):  # neither divides 360, nor 45 over the devices
    evaluate = evaluation.Evaluator(job.recipe, size, job.mesh, threads=1)
    scores = evaluate(network, tuple(variables), job.dataset.test)
    assert scores.count == 360
    assert scores.accuracy == pytest.approx((labels == 0).mean())
    assert scores.loss == pytest.approx(1e6 * (labels != 0).mean(), rel=1e-5)


def test_no_compiling_counts_in_the_time_left(
  tiny_config, tmp_path, monkeypatch
):
  """Evaluations, moments and the freeze compile between steps, once each."""
  compiled, paused_at, inside = [], [], []

  def note(event, _, *, fun_name='', **__):
    if event.endswith('backend_compile_duration'):
      name = fun_name.removeprefix('jit(').rstrip(')')
      (paused_at if inside else compiled).append(name)

  pause = metrics.ProgressBar.pause

  @contextlib.contextmanager
  def paused(bar):
    inside.append(bar)
    with pause(bar):
      yield
    inside.pop()

  monkeypatch.setattr(metrics.ProgressBar, 'pause', paused)
  tiny_config.evaluate_every = '6 steps'
  own, default = tiny_config.connectivity, config.default().connectivity
  for name in ('learner', 'gradient', 'temperature', 'initial_spread'):
    own[name] = default[name]
  tiny_config.masks = config.default().masks
  real = loop.loop

  def loop_alone(*arguments):
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
      return real(*arguments)
    finally:
      jax.monitoring.unregister_event_duration_listener(note)

  monkeypatch.setattr(train.loop, 'loop', loop_alone)
  train.train(tiny_config, tmp_path)
  assert compiled, 'small programs, such as those of the rates'
  times = {'train_step': 2, 'eval_step': 2, '_differences': 1}
  times['batch_statistics'] = 1
  assert not times.keys() & set(compiled)
  assert collections.Counter(paused_at) == times


# A loss that is not finite.


@pytest.fixture
def breaking(monkeypatch):
  """Makes the next run's step put a NaN into its loss or into the weights."""

  def break_(what, at):
    real = loop.compile_step

    def compile_step(*arguments):
      compiled = real(*arguments)

      def step(state, images, labels):
        bad = int(state.step) + 1 == at
        state, values = compiled(state, images, labels)
        if bad and what == 'loss':
          values = values | {'loss': jnp.float32(math.nan)}
        elif bad:
          weights = jax.tree.map(lambda w: w * math.nan, state.weights)
          state = dataclasses.replace(state, weights=weights)
        return state, values

      return step

    monkeypatch.setattr(loop, 'compile_step', compile_step)

  return break_


def test_a_loss_that_is_not_finite(tiny_config, tmp_path, arrays_in, breaking):
  breaking('loss', 5)
  with pytest.raises(config.InputError, match='loss is not finite') as error:
    train.train(tiny_config, tmp_path)
  message = str(error.value)
  assert 'at step 5;' in message  # that step, not the end of its window
  assert str(tmp_path / 'checkpoints/4') in message
  assert 'learning_rate' in message
  assert '\n' not in message
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['4']
  state = arrays_in(tmp_path / 'checkpoints/4/state')
  assert int(state['step']) == 4
  assert all(np.isfinite(array).all() for array in state.values())
  assert not (tmp_path / 'summary.json').exists()


def test_an_update_that_is_not_finite_is_not_saved(
  tiny_config, tmp_path, breaking, finished, monkeypatch
):
  breaking('weights', 8)
  with pytest.raises(config.InputError, match='update is not finite at step 8'):
    train.train(tiny_config, tmp_path)
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['4']
  monkeypatch.undo()  # and what is kept is good to go on from
  breaking('nothing', 0)
  summary = train.train(tiny_config, tmp_path).summary
  assert summary['test_accuracy'] == finished.summary['test_accuracy']


def test_a_test_loss_that_is_not_finite(tiny_config, tmp_path, capsys):
  """The weights are, so the run counts as finished; JSON has no NaN."""
  tiny_config.optimizer.learning_rate = 1e4
  tiny_config.optimizer.schedule = 'constant'
  tiny_config.optimizer.weight_decay = 0.0
  tiny_config.connectivity.rule = 'fixed_prev'
  tiny_config.duration = '2 steps'
  tiny_config.evaluate_every = '1 steps'
  result = train.train(tiny_config, tmp_path)
  assert result.summary['test_loss'] is None
  assert read_json(tmp_path, 'summary.json') == result.summary
  assert 0 <= result.summary['test_accuracy'] <= 1
  assert lines(tmp_path)[-1]['test_loss'] is None
  for path in tmp_path.rglob('*.json*'):
    assert 'NaN' not in path.read_text(), path
    assert 'Infinity' not in path.read_text(), path
  assert maskconnect_jax.load(tmp_path).image_shape == (8, 8, 1)
  err = capsys.readouterr().err
  assert 'test_loss is not finite, and null in summary.json' in err


def test_mean_of_the_steps_since_the_last_line():
  values = [
    {'loss': jnp.float32(loss), 'accuracy': jnp.float32(accuracy)}
    for loss, accuracy in ((1, 0.5), (2, 0.25), (6, 0))
  ]
  assert loop.mean_of_steps(values, 10) == {'loss': 3, 'accuracy': 0.25}
  values[1]['loss'] = jnp.float32(math.inf)
  with pytest.raises(loop.NotFinite, match='loss is not finite at step 9'):
    loop.mean_of_steps(values, 10)
