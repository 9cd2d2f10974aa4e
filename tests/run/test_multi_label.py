"""Several labels an image: loss, mAP, predictions, and a run to its end."""

import contextlib
import csv
import http.client
import io
import json
import socket
import threading

import jax
import numpy as np
import pytest
from PIL import Image

import maskconnect_jax
from maskconnect_jax import config
from maskconnect_jax.data import sources
from maskconnect_jax.method import wiring
from maskconnect_jax.networks import architectures
from maskconnect_jax.run import (
  evaluation,
  export,
  inference,
  loop,
  objective,
  scores,
  train,
)
from maskconnect_jax.serve import server
from maskconnect_jax.serve.app import Limits

CLASSES = ('left', 'red')


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


# The loss.


def test_losses_are_numpys():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (6, 4)).astype(np.float32)
  labels = rng.uniform(size=(6, 4)) < 0.4
  p = sigmoid(logits)
  for wanted in (labels, rng.uniform(size=(6, 4)).astype(np.float32)):
    found = objective.losses(logits, wanted, multi_label=True)
    expected = -(wanted * np.log(p) + (1.0 - wanted) * np.log(1 - p))
    np.testing.assert_allclose(found, expected.mean(1), rtol=1e-5)
  smoothed = objective.targets(labels, 4, 0.1, multi_label=True)
  np.testing.assert_allclose(smoothed, np.where(labels, 0.95, 0.05), rtol=1e-6)
  # No logit is too large for it.
  far = objective.losses(
    np.float32([[1e4, -1e4]]), labels[:1, :2], multi_label=True
  )
  assert np.isfinite(far).all()


# What is measured.


def average_precision(labels, logits):
  """By the definition: every threshold, one after the other."""
  total, before = 0.0, 0.0
  for threshold in sorted(set(logits.tolist()), reverse=True):
    taken = logits >= threshold
    recall = (taken & labels).sum() / labels.sum()
    total += (recall - before) * (taken & labels).sum() / taken.sum()
    before = recall
  return total


def batch_of(logits, labels, counted):
  """What the device gives for a batch, as host arrays."""
  arguments = logits, labels, counted
  found = objective.scores(*arguments, multi_label=True)
  found['outcomes'] = objective.outcomes(*arguments, multi_label=True)
  return jax.device_get(found)


def test_scores_are_those_of_the_definition():
  rng = np.random.default_rng(1)
  logits = np.round(rng.normal(size=(24, 5)), 1).astype(np.float32)  # ties
  labels = rng.uniform(size=(24, 5)) < 0.3
  labels[:, 3] = False  # a class that no image has
  counted = np.arange(24) < 21
  found = scores.of_batches(
    [
      batch_of(logits[part], labels[part], counted[part])
      for part in (slice(0, 8), slice(8, 16), slice(16, 24))
    ],
    multi_label=True,
  )
  logits, labels = logits[counted], labels[counted]
  known = [0, 1, 2, 4]
  by_class = [average_precision(labels[:, c], logits[:, c]) for c in known]
  np.testing.assert_allclose(found.average_precisions[known], by_class)
  assert np.isnan(found.average_precisions[3])
  assert found.headline == pytest.approx(np.mean(by_class))
  taken = sigmoid(logits) > 0.5
  assert found.count == 21
  assert found.label_accuracy == pytest.approx((taken == labels).mean())
  precision = (taken & labels).sum() / taken.sum()
  recall = (taken & labels).sum() / labels.sum()
  assert found.f1 == pytest.approx(2 / (1 / precision + 1 / recall))
  p = sigmoid(logits)
  losses = -np.where(labels, np.log(p), np.log(1 - p))
  assert found.loss == pytest.approx(losses.mean(), rel=1e-5)
  assert found.by_class(['a', 'b', 'b', 'd', 'é']) == {
    'class_average_precision': {
      'a': pytest.approx(by_class[0]),
      'b (1)': pytest.approx(by_class[1]),
      'b (2)': pytest.approx(by_class[2]),
      'd': None,
      'é': pytest.approx(by_class[3]),
    }
  }


def test_what_is_not_finite_is_the_lowest_of_all():
  logits = np.float32([[np.nan], [np.inf], [1.0], [-np.inf]])
  labels = np.array([[True], [True], [False], [False]])
  found = scores.of_batches(
    [batch_of(logits, labels, np.ones(4, bool))], multi_label=True
  )
  assert found.headline == pytest.approx((1 + 2 / 4) / 2)
  assert found.named('test')['test_loss'] is None


def test_nothing_to_measure():
  logits, labels = np.zeros((2, 3), np.float32), np.zeros((2, 3), bool)
  for counted, says in (
    (True, 'none has a label'),
    (False, 'none can be read'),
  ):
    with pytest.raises(config.InputError, match=says):
      scores.of_batches(
        [batch_of(logits, labels, np.full(2, counted))], multi_label=True
      )


# A model.


def saved(folder, *, multi_label):
  """Writes an untrained network of two classes: no run is needed."""
  arguments = {'name': 'resnet8', 'num_classes': 2, 'width': 4, 'seed': 1}
  network = maskconnect_jax.create_model(**arguments, rule='fixed_prev')
  inference.save(
    folder,
    wiring.prune(wiring.freeze(network)),
    architecture=arguments,
    classes=CLASSES,
    image_shape=(12, 12, 3),
    resize=0,
    mean=(100.0, 110.0, 120.0),
    std=(50.0, 60.0, 70.0),
    multi_label=multi_label,
  )
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return saved(tmp_path_factory.mktemp('run') / 'model', multi_label=True)


@pytest.fixture(scope='module')
def model(folder):
  return maskconnect_jax.load(folder)


def picture(red, left, seed=0):
  """A square on noise, red or green, on the left or on the right."""
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 60, (12, 12, 3), np.uint8)
  corner = 1 if left else 7
  pixels[4:8, corner : corner + 4, 0 if red else 1] += 180
  return pixels


def test_predictions_are_the_sigmoid_of_the_logits(model):
  assert model.multi_label
  image = picture(True, True)
  logits = model.logits(image[None])
  expected = sigmoid(logits)
  np.testing.assert_allclose(model.predict(image), expected, rtol=1e-5)
  assert abs(expected.sum() - 1) > 0.01  # no softmax
  exported = jax.export.deserialize(bytearray(export.stablehlo(model)))
  np.testing.assert_allclose(
    sigmoid(exported.call(image[None])), expected, rtol=1e-4
  )


@pytest.mark.parametrize(
  ('row', 'best'),
  [
    ((0.5, 0.25), []),
    ((0.6, 0.25), ['left']),
    ((0.6, 0.75), ['red', 'left']),
    ((0.75, 0.75), ['left', 'red']),
    ((np.nan, 0.75), ['red']),
  ],
)
def test_every_label_above_a_half(row, best, model):
  row = np.float32(row)
  assert [name for name, _ in model.best(row)] == best
  answer = model.answer(row)
  assert answer['labels'] == best
  assert list(answer) == ['labels', 'probabilities']
  np.testing.assert_equal(list(answer['probabilities'].values()), row.tolist())


def test_the_command_line(folder, model, cli, tmp_path):
  Image.fromarray(picture(True, False)).save(tmp_path / 'a.png')
  ask = (
    '--mode=predict',
    f'--workdir={folder}',
    f'--images={tmp_path / "a.png"}',
  )
  row = model.predict(picture(True, False))[0]
  expected = [tmp_path / 'a.png']
  for n in sorted(range(2), key=lambda n: -row[n]):
    if row[n] > 0.5:
      expected += [CLASSES[n], f'{row[n]:.4f}']
  assert cli(*ask).out == '\t'.join(map(str, expected)) + '\n'
  record = json.loads(cli(*ask, '--json').out)
  assert record.pop('image') == str(tmp_path / 'a.png')
  assert record == model.answer(row)


def test_the_service(model):
  begun = threading.Event()
  file = io.BytesIO()
  Image.fromarray(picture(False, True)).save(file, 'png')
  with socket.create_server(('127.0.0.1', 0)) as listening:
    running = server.of(model, Limits(batch=1), begun.set)
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    try:
      assert begun.wait(30)
      link = http.client.HTTPConnection(*listening.getsockname())
      with contextlib.closing(link):
        link.request('POST', '/predict', file.getvalue())
        (found,) = json.loads(link.getresponse().read())['predictions']
        link.request('GET', '/')
        page = link.getresponse().read().decode()
    finally:
      running.should_exit = True
      thread.join(30)
  row = model.predict(picture(False, True))[0]
  assert found == {'image': 'the image'} | model.answer(row)
  assert 'each gets any of 2 classes' in page


def test_a_folder_says_which_kind_it_is(folder, tmp_path):
  record = json.loads((folder / 'model.json').read_text())
  assert record['schema'] == 'maskconnect_jax.model/2'
  assert record['multi_label'] is True
  one = saved(tmp_path / 'one', multi_label=False)
  record = json.loads((one / 'model.json').read_text())
  assert record['schema'] == 'maskconnect_jax.model/1'
  assert 'multi_label' not in record
  assert not maskconnect_jax.load(one).multi_label
  # An old reader takes schema 1 for a softmax.
  (one / 'model.json').write_text(json.dumps(record | {'multi_label': True}))
  with pytest.raises(config.InputError, match='does not go with multi_label'):
    maskconnect_jax.load(one)


# A set of images.


def write_set(folder, count=64, tests=32):
  """Writes images, and a table of them whose last rows are for testing."""
  rng = np.random.default_rng(0)
  rows = []
  for i in range(count + tests):
    left, red = map(bool, rng.uniform(size=2) < 0.5)
    Image.fromarray(picture(red, left, i)).save(folder / f'{i}.png')
    labels = ['left'] * left + ['red'] * red
    rows.append(
      (f'{i}.png', ';'.join(labels), 'train' if i < count else 'test')
    )
  with (folder / 'all.csv').open('w', newline='') as file:
    csv.writer(file).writerows([('path', 'label', 'split'), *rows])
  return folder / 'all.csv'


def recipe(table, **fields):
  made = config.default()
  made.data.source, made.data.dir = 'table', str(table)
  made.data.multi_label, made.data.flip, made.data.pad = True, False, 0
  made.data.threads = 2
  made.model.name, made.model.width = 'resnet8', 8
  made.duration, made.batch_size, made.eval_batch_size = '40 steps', 16, 32
  made.evaluate_every, made.checkpoint_every = '20 steps', '10 steps'
  made.log_every = '10 steps'
  made.optimizer.learning_rate, made.optimizer.schedule = 0.05, 'cosine'
  made.connectivity.rule, made.connectivity.batchnorm_batches = 'fixed_prev', 0
  made.update_from_flattened_dict(fields)
  return made


def test_a_model_is_measured_on_data_of_its_own_kind(model, tmp_path):
  table = write_set(tmp_path, 4, 8)
  made = recipe(table, eval_batch_size=5)
  found = evaluation.of_model(model, made)
  assert found.count == 8
  labels = np.array(
    [
      [name in row['label'].split(';') for name in CLASSES]
      for row in csv.DictReader(table.read_text().splitlines())
    ]
  )[4:]
  logits = model.logits(
    np.stack(
      [np.asarray(Image.open(tmp_path / f'{i}.png')) for i in range(4, 12)]
    )
  )
  expected = [average_precision(labels[:, c], logits[:, c]) for c in (0, 1)]
  np.testing.assert_allclose(found.average_precisions, expected, rtol=1e-6)
  # The model's classes are in another order than those of the table.
  other = inference.Classifier.__new__(inference.Classifier)
  other.__dict__ |= vars(model) | {'classes': CLASSES[::-1]}
  turned = evaluation.of_model(other, made).average_precisions
  expected = [average_precision(labels[:, 1 - c], logits[:, c]) for c in (0, 1)]
  np.testing.assert_allclose(turned, expected, rtol=1e-6)
  with pytest.raises(config.InputError, match='gives an image several labels'):
    evaluation.of_model(model, recipe(table, **{'data.multi_label': False}))


def test_labels_are_matched_by_name():
  theirs = sources.Source(
    lambda i: ('a.png', np.eye(3, dtype=bool)[i]), num_train=2, num_test=1,
    classes=('b', 'c', 'a'), channels=3, name='', multi_label=True,
  )  # fmt: skip
  ours = evaluation._in_order(theirs, ('a', 'b', 'c'))
  found = [ours.classes[ours.read(i)[1].argmax()] for i in range(3)]
  assert found == ['b', 'c', 'a']


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'data.source': 'folder'}, "and 'folder' cannot"),
    ({'data.class_weights': 'balanced'}, 'for config.data.multi_label=False'),
  ],
)
def test_what_has_no_meaning_with_several_labels(fields, says, tmp_path):
  with pytest.raises(config.InputError, match=says) as error:
    config.check(recipe(tmp_path, **fields))
  assert '\n' not in str(error.value)


# A run.


def files_of(workdir):
  """What must have the same bits however often a run was cut."""
  model = json.loads((workdir / 'model/model.json').read_text())
  summary = json.loads((workdir / 'summary.json').read_text())
  for name in (
    'images_per_second',
    'train_seconds',
    'batch_seconds',
    'batch_seconds_pruned',
  ):
    summary.pop(name)
  lines = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  for line in lines:
    line.pop('images_per_second')
  return model, summary, lines


@pytest.mark.slow
def test_a_run_learns_both_labels(tmp_path, cli, monkeypatch):
  table = write_set(tmp_path, 192, 60)
  monkeypatch.setitem(
    architectures.REGISTRY,
    'tiny',
    architectures.Architecture((1, 2, 1), width=8),
  )
  made = recipe(
    table,
    **{
      'model.name': 'tiny',
      'duration': '120 steps',
      'connectivity.rule': 'learned',
      'connectivity.fan_in': 1,
      'connectivity.phase': '25%',
      'connectivity.moments': 2,
      'connectivity.batchnorm_batches': 2,
      'data.validation': 32,
      'data.mixup': 0.1,
      'optimizer.label_smoothing': 0.05,
    },
  )
  workdir = tmp_path / 'run'
  result = train.train(made, workdir)
  summary = result.summary
  assert summary == json.loads((workdir / 'summary.json').read_text())
  assert summary['test_map'] > 0.95
  assert summary['test_map_pruned'] == pytest.approx(summary['test_map'])
  assert summary['test_label_accuracy'] > 0.9
  assert summary['test_f1'] > 0.9
  assert min(summary['class_average_precision'].values()) > 0.95
  assert list(summary['class_average_precision']) == list(CLASSES)
  assert {'validation_map_drawn', 'validation_map_at_freeze'} <= {*summary}
  assert not {'test_accuracy', 'class_accuracy', 'confusion'} & {*summary}
  assert not list((workdir / 'figures').glob('confusion*'))
  assert (summary['choices'], summary['choices_clear']) != (0, 0)

  # The best checkpoint is the best by the mAP in the log.
  logged = {
    line['step']: line['validation_map']
    for line in files_of(workdir)[2]
    if 'validation_map' in line
  }
  known = json.loads((workdir / 'checkpoints/accuracies.json').read_text())
  assert known.items() <= {str(n): v for n, v in logged.items()}.items()
  assert max(known.values()) == max(logged.values())

  # New pictures, on the command line.
  for red in (False, True):
    for left in (False, True):
      path = tmp_path / 'new.png'
      Image.fromarray(picture(red, left, 999)).save(path)
      line = cli('--mode=predict', f'--workdir={workdir}', f'--images={path}')
      found = line.out.rstrip('\n').split('\t')[1::2]
      assert sorted(found) == ['left'] * left + ['red'] * red
  ran = cli('--mode=evaluate', f'--workdir={workdir}', '--json')
  again = json.loads(ran.out)
  for name, value in again.items():
    assert summary[name] == pytest.approx(value, rel=1e-4), name

  # The page and the table of runs.
  page = (workdir / 'report.html').read_text()
  assert 'mAP along the run' in page
  assert 'Average precision of each class' in page
  assert 'Confusion' not in page
  table_of_runs = cli('--mode=summarize', f'--workdirs={workdir}').out
  assert '| validation | test mAP | best |' in table_of_runs
  assert f'{summary["test_map_pruned"]:.2%}'.replace('%', ' %') in table_of_runs
  card = (workdir / 'model/README.md').read_text()
  assert f'| test mAP | {summary["test_map_pruned"]:.2%} on 60 images |' in card

  # Cut after the 20th and the 70th step: in either phase.
  cut = tmp_path / 'cut'
  for at in (20, 70, None):
    with monkeypatch.context() as patch:
      if at:
        taken = loop.take_step
        patch.setattr(
          loop,
          'take_step',
          lambda run, *rest, at=at, taken=taken: (
            _stop() if int(run.state.step) == at else taken(run, *rest)
          ),
        )
      with contextlib.suppress(Cut):
        train.train(made, cut)
  assert files_of(cut) == files_of(workdir)


class Cut(Exception):
  """Ends a run as a kill would."""


def _stop():
  raise Cut
