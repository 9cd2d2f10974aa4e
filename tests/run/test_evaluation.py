"""A model scored on data: its own classes and preprocessing decide."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import maskconnect_jax
from maskconnect_jax import config
from maskconnect_jax.method import wiring
from maskconnect_jax.run import evaluation, inference, scores

CONFIGS = Path(__file__).parents[2] / 'configs'
CLASSES = ('ant', 'bee', 'cow')


def saved(folder, *, bias=0.0):
  """Writes an untrained network of three classes: no run is needed."""
  arguments = {'name': 'resnet8', 'num_classes': 3, 'width': 4, 'seed': 1}
  network = maskconnect_jax.create_model(**arguments, rule='fixed_prev')
  network.head.bias.set_value(network.head.bias[...] + bias)
  inference.save(
    folder,
    wiring.prune(wiring.freeze(network)),
    architecture=arguments,
    classes=CLASSES,
    image_shape=(12, 12, 3),
    resize=0,
    mean=(100.0, 110.0, 120.0),
    std=(50.0, 60.0, 70.0),
  )
  return folder


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return maskconnect_jax.load(saved(tmp_path_factory.mktemp('run') / 'model'))


def image(seed, side=12):
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))


@pytest.fixture
def data(tmp_path):
  """Makes a folder of images and returns the config that reads it."""

  def make(classes=CLASSES, side=12, **fields):
    for part in ('train', 'test'):
      for label, name in enumerate(classes):
        (tmp_path / part / name).mkdir(parents=True)
        for i in range(4):
          path = tmp_path / part / name / f'{i}.png'
          image(100 * label + i, side).save(path)
    made = config.default()
    made.eval_batch_size = 5
    made.data.source = 'folder'
    made.data.dir = str(tmp_path)
    made.data.threads = 2
    made.update_from_flattened_dict(fields)
    return made

  return make


def expected(model, images, labels):
  """Accuracy and cross-entropy by hand."""
  rows = model.predict(images).astype(np.float64)
  own = rows[np.arange(len(labels)), labels]
  return np.mean(rows.argmax(1) == labels), -np.log(own).mean()


def test_by_hand(model, data):
  found = evaluation.of_model(model, data())
  images = [image(100 * label + i) for label in range(3) for i in range(4)]
  accuracy, loss = expected(model, images, np.repeat(range(3), 4))
  assert found.count == 12
  assert found.accuracy == pytest.approx(accuracy)
  assert found.loss == pytest.approx(loss, rel=1e-5)
  taken = model.predict(images).argmax(1).reshape(3, 4)
  assert found.confused.tolist() == [
    [label, other, (row == other).sum()]
    for label, row in enumerate(taken)
    for other in range(3)
    if other in row
  ]


def test_scores_of_each_class():
  confused = np.array([[0, 0, 3], [0, 2, 1], [2, 0, 5]])
  found = scores.OneClass(0, 0, 0, 9, confused)
  assert found.by_class(['ant', 'crane', 'crane']) == {
    'class_accuracy': {'ant': 0.75, 'crane (1)': None, 'crane (2)': 0},
    'confusion': {
      'ant': {'ant': 3, 'crane (2)': 1},
      'crane (2)': {'ant': 5},
    },
  }


def test_labels_are_matched_by_name(model, data):
  """The model's classes are in another order than those of the folder."""
  other = inference.Classifier.__new__(inference.Classifier)
  other.__dict__ |= vars(model) | {'classes': ('cow', 'ant', 'bee')}
  found = evaluation.of_model(other, data())
  images = [image(100 * label + i) for label in range(3) for i in range(4)]
  _, loss = expected(model, images, np.repeat([1, 2, 0], 4))
  assert found.loss == pytest.approx(loss, rel=1e-5)


def test_names_are_matched_in_either_unicode_form(model, data):
  other = inference.Classifier.__new__(inference.Classifier)
  other.__dict__ |= vars(model) | {'classes': ('a\u0301', 'b', 'c')}
  assert evaluation.of_model(other, data(('\u00e1', 'b', 'c'))).count == 12


@pytest.mark.parametrize(
  ('classes', 'message'),
  [
    (('bee', 'cow'), "'ant' the data do not have"),
    (('ant', 'bee', 'cow', 'dog'), "'dog' the model does not have"),
    (('aardvark', *CLASSES), "'aardvark' the model does not have"),
    (
      ('bee', 'cow', 'dog'),
      "'dog' the model does not have; 'ant' the data do not have",
    ),
    (('Ant', 'bee', 'cow'), "'Ant' the model does not have"),
    (tuple(map(str, range(9))), "'0', '1', '2', '3', '4' and 4 more the model"),
    (('ant', 'bee', 'c\now'), r"'c\\now' the model does not have"),
  ],
)
def test_other_classes_are_named(classes, message, model, data):
  with pytest.raises(config.InputError, match=message) as error:
    evaluation.of_model(model, data(classes))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('fields', 'told'),
  [
    ({}, None),
    ({'data.image_size': 12}, None),
    ({'data.image_size': 16}, r'image_size=16 is not .* \(12, 12\)'),
    ({'data.image_size': 16, 'data.eval_resize': 20}, 'eval_resize=20 is not'),
    ({'data.mean': (1.0, 2.0, 3.0)}, r'mean=\(1.0, 2.0, 3.0\) is not'),
    ({'data.std': (1.0, 2.0, 3.0)}, r'std=\(1.0, 2.0, 3.0\) is not'),
    ({'data.crop': 'resized', 'data.image_size': 12}, None),
  ],
)
def test_the_models_own_preprocessing_decides(
  fields, told, model, data, caplog
):
  found = evaluation.of_model(model, data(side=24, **fields))
  images = [image(100 * label + i, 24) for label in range(3) for i in range(4)]
  _, loss = expected(model, images, np.repeat(range(3), 4))
  assert found.loss == pytest.approx(loss, rel=1e-5)
  assert bool(caplog.text) == bool(told)
  assert re.search(told or '', caplog.text)


def test_test_images_that_cannot_be_read(model, data, tmp_path):
  made = data()
  paths = sorted(tmp_path.glob('test/*/*.png'))
  paths[0].write_text('no image')
  with pytest.raises(config.InputError, match=str(paths[0])):
    evaluation.of_model(model, made)
  made.data.skip_errors = True
  assert evaluation.of_model(model, made).count == 11
  for path in paths:
    path.write_text('no image')
  with pytest.raises(config.InputError, match='none can be read'):
    evaluation.of_model(model, made)


def test_what_is_not_finite_is_null_in_the_output(cli, data, tmp_path):
  saved(tmp_path / 'run/model', bias=np.nan)
  data()
  ran = cli(
    '--mode=evaluate',
    f'--workdir={tmp_path / "run"}',
    f'--config={CONFIGS / "image_folder.py"}',
    f'--config.data.dir={tmp_path}',
    '--config.eval_batch_size=5',
  )
  assert ran.code == 0
  assert json.loads(ran.out, parse_constant=pytest.fail) == {
    'test_accuracy': pytest.approx(1 / 3),
    'test_top5_accuracy': 1.0,
    'test_loss': None,
    'num_test_examples': 12,
  }


def test_other_classes_are_one_line(cli, data, tmp_path):
  saved(tmp_path / 'run/model')
  data(('bee', 'cow', 'dog'))
  ran = cli(
    '--mode=evaluate',
    f'--workdir={tmp_path / "run"}',
    f'--config={CONFIGS / "image_folder.py"}',
    f'--config.data.dir={tmp_path}',
  )
  assert (ran.code, ran.out, ran.err.count('\n')) == (2, '', 1)
  assert ran.err.startswith('error: config.data.dir=')
