"""A model folder: what it predicts, and what a damaged one does."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

import maskconnect_jax
from maskconnect_jax import config, inference

DIGITS = np.rint(sklearn.datasets.load_digits().images * 255 / 16).astype(
  np.uint8
)


@pytest.fixture(scope='module')
def model(finished):
  return maskconnect_jax.load(str(finished.workdir / 'model'))


@pytest.fixture
def folder(finished, tmp_path):
  """A copy to damage."""
  return shutil.copytree(finished.workdir / 'model', tmp_path / 'model')


def test_what_it_says_of_itself(model, finished):
  assert model.classes == tuple('0123456789')
  assert model.image_shape == (8, 8, 1)
  stored = json.loads((finished.workdir / 'topology.json').read_text())
  assert [list(s) for s in model.topology.sources] == [
    block['sources'] for block in stored['blocks']
  ]


def test_the_batch_does_not_matter(model):
  together = model.predict(DIGITS[:300])  # more than one batch, padded
  assert together.shape == (300, 10)
  alone = np.concatenate([model.predict(DIGITS[i : i + 1]) for i in (0, 299)])
  np.testing.assert_allclose(alone, together[[0, 299]], atol=1e-6)
  np.testing.assert_array_equal(
    model.predict(DIGITS[:5, :, :, None]), model.predict(DIGITS[:5])
  )


def test_nothing_to_predict(model):
  assert model.predict([]).shape == (0, 10)


def test_one_image_need_not_be_in_a_list(model, tmp_path):
  path = tmp_path / 'digit.png'
  image = Image.fromarray(DIGITS[3])
  image.save(path)
  expected = model.predict([DIGITS[3]])
  for one in (DIGITS[3], DIGITS[3, :, :, None], image, path, str(path)):
    np.testing.assert_array_equal(model.predict(one), expected)
  colours = np.asarray(image.convert('RGB'))  # not as many rows of grey
  assert model.predict(colours).shape == (1, 10)


def test_a_workdir_stands_for_its_model(model, finished):
  found = maskconnect_jax.load(finished.workdir).predict(DIGITS[:5])
  np.testing.assert_array_equal(found, model.predict(DIGITS[:5]))


def test_arrays_images_and_paths_are_one(model, tmp_path):
  path = tmp_path / 'digit.png'
  image = Image.fromarray(DIGITS[3])
  image.save(path)
  rows = model.predict([DIGITS[3], image, path, str(path)])
  for row in rows[1:]:
    np.testing.assert_array_equal(row, rows[0])


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA', 'I;16', 'size'])
def test_other_images_are_converted(mode, model, tmp_path):
  path = tmp_path / 'digit.png'
  if mode == 'I;16':
    image = Image.fromarray(DIGITS[7].astype(np.uint16) << 8)
  elif mode == 'size':  # each pixel four times: shrinks back to nearly itself
    image = Image.fromarray(DIGITS[7].repeat(32, 0).repeat(32, 1))
  else:
    image = Image.fromarray(DIGITS[7]).convert(mode)
  image.save(path)
  expected = model.predict(DIGITS[7:8])
  atol = 0.2 if mode == 'size' else 1e-6
  np.testing.assert_allclose(model.predict([path]), expected, atol=atol)
  assert model.predict([path]).argmax() == expected.argmax()


def test_what_cannot_be_read(model, tmp_path):
  text = tmp_path / 'note.png'
  text.write_text('hello')
  with pytest.raises(config.InputError, match='note.png'):
    model.predict([text])
  with pytest.raises(config.InputError, match='missing.png'):
    model.predict([tmp_path / 'missing.png'])
  with pytest.raises(config.InputError, match='float64'):
    model.predict(DIGITS[:1] / 255)


def test_no_model(tmp_path):
  with pytest.raises(config.InputError, match='holds no model.json'):
    inference.load(tmp_path)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda record: record.pop('classes'), 'model.json is damaged'),
    (lambda record: record.pop('topology'), 'model.json is damaged'),
    (lambda record: record.update(schema='other/9'), "schema 'other/9' is not"),
    (lambda record: record['architecture'].update(x=1), 'json is damaged'),
    (lambda record: record['architecture'].update(width=4), 'another network'),
    (
      lambda record: record['topology']['blocks'][0].update(sources=[5]),
      'only sources 0..0 come before',
    ),
  ],
)
def test_damaged_record(change, message, folder):
  path = folder / 'model.json'
  record = json.loads(path.read_text())
  change(record)
  path.write_text(json.dumps(record))
  with pytest.raises(config.InputError, match=message) as error:
    inference.load(folder)
  assert str(folder) in str(error.value)


def test_cut_record(folder):
  (folder / 'model.json').write_text('{"schema"')
  with pytest.raises(config.InputError, match='model.json is damaged'):
    inference.load(folder)


@pytest.mark.parametrize('how', ['flipped', 'truncated', 'deleted'])
def test_damaged_arrays(how, folder):
  files = [path for path in folder.rglob('*') if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  middle = len(content) // 2
  if how == 'flipped':
    content[middle] ^= 255
    largest.write_bytes(content)
  elif how == 'truncated':
    largest.write_bytes(content[:middle])
  else:
    shutil.rmtree(folder / 'arrays')
  with pytest.raises(config.InputError, match='arrays') as error:
    inference.load(folder)
  assert str(folder / 'arrays') in str(error.value)
  assert '\n' not in str(error.value)


def test_another_process_on_one_device(model, finished):
  """What eight devices wrote, a machine with one reads; nothing else needed."""
  program = (
    'import sys, numpy as np, maskconnect_jax as m;'
    'model = m.load(sys.argv[1]);'
    'assert "maskconnect_jax.train" not in sys.modules;'
    'print(model.predict(np.full((1, 8, 8), 200, np.uint8)).tolist())'
  )
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=1'
  }
  ran = subprocess.run(
    [sys.executable, '-c', program, str(finished.workdir / 'model')],
    env=environment,
    cwd=os.path.dirname(os.path.dirname(__file__)),
    capture_output=True,
    text=True,
    check=True,
    timeout=200,
  )
  expected = model.predict(np.full((1, 8, 8), 200, np.uint8))
  np.testing.assert_allclose(json.loads(ran.stdout), expected, atol=1e-5)
  assert 'Traceback' not in ran.stderr
