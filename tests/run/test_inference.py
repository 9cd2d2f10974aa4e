"""A model folder: what it predicts, and what a damaged one does."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

import maskconnect_jax
from maskconnect_jax import config, files
from maskconnect_jax.data import datasets
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import topology
from maskconnect_jax.networks import models
from maskconnect_jax.run import (
  inference,
  model_arrays,
  model_record,
)

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


def test_it_shows_itself_in_a_notebook(model, finished):
  shown = model._repr_html_()
  assert '<b>resnet8, 10 classes</b>, images of 8 × 8 × 1' in shown
  edges = re.findall(r'data-from="(\w+)" data-to="(\w+)"', shown)
  stored = json.loads((finished.workdir / 'topology.json').read_text())
  assert sorted(edges) == sorted(
    [('3', 'head')]
    + [
      (str(i) if i else 'stem', str(block['block']))
      for block in stored['blocks']
      for i in block['sources']
    ]
  )
  names = re.findall(r'>(?:stage )?(\d)<', shown.partition('class="edge')[0])
  assert names == ['1', '2', '3']


def test_a_result_shows_itself_in_a_notebook(model, finished):
  from maskconnect_jax.run import train

  result = train.Result(finished.summary, None, model.model)
  shown = result._repr_html_()
  accuracy = f'{finished.summary["test_accuracy_pruned"]:.2%}'
  assert f'test accuracy {accuracy}' in shown
  assert shown.count('class="node') == 5


def test_the_batch_does_not_matter(model):
  together = model.predict(DIGITS[:300])  # more than one batch, padded
  assert together.shape == (300, 10)
  alone = np.concatenate([model.predict(DIGITS[i : i + 1]) for i in (0, 299)])
  np.testing.assert_allclose(alone, together[[0, 299]], atol=1e-6)
  np.testing.assert_array_equal(
    model.predict(DIGITS[:5, :, :, None]), model.predict(DIGITS[:5])
  )


def test_features_are_what_head_and_blocks_give(model):
  """The head reads the features of None; a block's are the means of y_i.

  The oracle runs the blocks one by one, by the topology.
  """
  network, mean, std = (
    model.model,
    *(
      np.float32(model.record['preprocessing'][name])
      for name in ('mean', 'std')
    ),
  )
  x = jnp.asarray((DIGITS[:5, :, :, None] - mean) / std, jnp.float32)
  head = network.head
  features = model.features(DIGITS[:5])
  np.testing.assert_allclose(
    features @ head.kernel[...] + head.bias[...],
    model.logits(DIGITS[:5, :, :, None]),
    atol=1e-4,
  )
  outputs = [network.stem(x)]
  for block, sources, live in zip(
    network.stack.blocks, model.topology.sources, model.topology.live,
    strict=True,
  ):  # fmt: skip
    number, shape = len(outputs), outputs[-1].shape
    if not live:
      with pytest.raises(InputError, match=f'block {number} is pruned'):
        model.features(DIGITS[:5], block=number)
      outputs.append(jnp.zeros(jax.eval_shape(block, outputs[-1]).shape))
      continue
    total = 0
    for i in sources:
      y, factor = outputs[i], outputs[i].shape[1] // shape[1]
      n, h, w, c = y.shape
      y = y.reshape(n, h // factor, factor, w // factor, factor, c)
      y = y.mean((2, 4))
      total += jnp.pad(y, [(0, 0)] * 3 + [(0, shape[-1] - c)])
    outputs.append(block(total / len(sources)))
    np.testing.assert_allclose(
      model.features(DIGITS[:5], block=number),
      outputs[-1].mean((1, 2)),
      atol=1e-4,
    )
  for wrong in (0, 4, 1.5):
    with pytest.raises(InputError, match='block='):
      model.features(DIGITS[:5], block=wrong)
  with pytest.raises(InputError, match='no images'):
    model.features([])


def test_a_model_to_fine_tune_has_the_wiring_and_a_new_head(model):
  tuned = model.finetune(3, seed=1)
  assert tuned.topology == model.topology
  assert tuned.head.kernel.shape == (32, 3)
  x = jnp.zeros((2, 8, 8, 1))
  np.testing.assert_array_equal(tuned.features(x), model.model.features(x))
  tuned.stem.conv.kernel[...] *= 0  # a copy: the classifier stays
  assert np.any(model.model.stem.conv.kernel[...])
  with pytest.raises(InputError, match='num_classes=0'):
    model.finetune(0)


def test_a_model_is_used_without_the_training_stack(finished):
  """grain, TFDS and TensorBoard are not needed to load and predict."""
  program = f"""
import sys
for name in ('clu', 'grain', 'tensorflow_datasets', 'tensorboardX', 'sklearn'):
  sys.modules[name] = None
import numpy as np, maskconnect_jax
model = maskconnect_jax.load({str(finished.workdir)!r})
images = np.zeros((2, 8, 8, 1), np.uint8)
print(model.predict(images).shape, model.features(images).shape)
maskconnect_jax.load({str(finished.workdir)!r}, 24)
"""
  ran = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=False
  )
  assert ran.stdout == '(2, 10) (2, 32)\n', ran.stderr


@pytest.fixture
def unfinished(finished, tmp_path):
  """The workdir as it was right before the model was written."""
  shutil.copytree(
    finished.workdir,
    tmp_path / 'run',
    ignore=shutil.ignore_patterns('model', 'summary.json', 'figures'),
  )
  return tmp_path / 'run'


def assert_same_arrays(one, other):
  assert one.keys() == other.keys()
  for name, array in one.items():
    np.testing.assert_array_equal(array, other[name], err_msg=name)


def logged(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  found = (json.loads(line) for line in lines)
  return {r['step']: r['test_accuracy'] for r in found if 'test_accuracy' in r}


def test_a_run_that_is_not_finished_gives_its_newest_checkpoint(
  unfinished, model, caplog
):
  newest = inference.load(unfinished)
  assert newest.topology == model.topology
  assert newest.classes == model.classes
  own = ('classes', 'preprocessing', 'architecture', 'topology')
  assert all(newest.record[name] == model.record[name] for name in own)
  assert_same_arrays(newest.arrays, model.arrays)
  accuracies = logged(unfinished)
  best = max(accuracies, key=lambda step: (accuracies[step], step))
  assert_same_arrays(
    inference.load(unfinished, 'best').arrays,
    inference.load(unfinished, best).arrays,
  )
  # A damaged checkpoint is passed over, unless it is asked for.
  data = max(
    (unfinished / 'checkpoints/24/state').rglob('d/*'),
    key=lambda path: path.stat().st_size,
  )
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 255
  data.write_bytes(content)
  before = inference.load(unfinished)
  assert 'checkpoints/24 is damaged' in caplog.text
  assert_same_arrays(before.arrays, inference.load(unfinished, 20).arrays)
  with pytest.raises(InputError, match='checkpoints/24 is damaged'):
    inference.load(unfinished, 24)


def test_a_checkpoint_predicts_as_it_was_evaluated(finished):
  """In the connectivity phase, in which r still has sources to choose from."""
  dataset = datasets.load(config.default().data)
  early = inference.load(finished.workdir, 8)
  found = early.predict(dataset.test.images).argmax(1) == dataset.test.labels
  assert found.mean() == pytest.approx(logged(finished.workdir)[8])


@pytest.mark.parametrize(
  ('step', 'says'),
  [
    (7, 'no checkpoint of step 7; those there: 4, 8, 12, 16, 20, 24'),
    ('bets', "step='bets' is neither 'best' nor a whole number"),
  ],
)
def test_checkpoints_that_are_not_there(step, says, finished):
  with pytest.raises(InputError, match=says):
    inference.load(finished.workdir, step)


def test_runs_of_earlier_versions_do_not_describe_their_network(unfinished):
  inputs = json.loads((unfinished / 'inputs.json').read_text())
  del inputs['model']
  (unfinished / 'inputs.json').write_text(json.dumps(inputs))
  with pytest.raises(InputError, match='does not describe the network'):
    inference.load(unfinished)


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
  # Each by itself: a batch's last image may be rounded otherwise (AVX2).
  rows = [model.predict([item]) for item in (DIGITS[3], image, path, str(path))]
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


class Interface:
  """An array of a library that knows __array_interface__ alone."""

  def __init__(self, array):
    self.held = array
    self.__array_interface__ = array.__array_interface__


class Dlpack:
  """An array of a library that knows DLPack alone."""

  def __init__(self, array):
    self.held = array

  def __dlpack__(self, **options):
    return self.held.__dlpack__(**options)

  def __dlpack_device__(self):
    return self.held.__dlpack_device__()


class OnDevice:
  """An array that NumPy cannot read, as of another device."""

  def __array__(self, dtype=None, copy=None):
    raise TypeError('copy it\nto the host first')


def objects(items):
  array = np.empty(len(items), object)
  array[:] = items
  return array


@pytest.mark.parametrize(
  'given',
  [
    jnp.asarray,
    lambda images: list(map(jnp.asarray, images)),
    lambda images: memoryview(np.ascontiguousarray(images)),
    Interface,
    Dlpack,
    lambda images: [Interface(images[0]), Dlpack(images[1]), *images[2:]],
    lambda images: (image for image in images),
    lambda images: dict(enumerate(images)).values(),
    lambda images: iter(tuple(images)),
    lambda images: map(Image.fromarray, images),
    lambda images: objects(list(images)),
    lambda images: images.astype('>u2') * 257,
    lambda images: images[..., None].repeat(3, -1),
    lambda images: np.asfortranarray(images),
    lambda images: images.view(np.recarray),
  ],
  ids=range(15),
)
def test_arrays_of_any_library_and_any_iterable(given, model):
  images = DIGITS[:5]
  found = model.predict(given(images))
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, model.predict(images), atol=1e-6)


def test_paths_in_any_iterable(model, tmp_path):
  paths = [tmp_path / f'{i}.png' for i in range(4)]
  for path, digit in zip(paths, DIGITS, strict=False):
    Image.fromarray(digit).save(path)
  expected = model.predict(paths)
  names = [str(path) for path in paths]
  together = set(paths)
  np.testing.assert_array_equal(
    model.predict(together), model.predict(list(together))
  )
  for given in (
    np.array(names),
    np.array(paths, object),
    np.array(names, np.dtypes.StringDType()),
    [np.str_(name) for name in names],
    [np.array(name) for name in names],
    dict.fromkeys(names).keys(),
    (path for path in paths),
  ):
    np.testing.assert_array_equal(model.predict(given), expected)
  np.testing.assert_array_equal(
    model.predict(np.array(names[0])), model.predict(names[0])
  )


@pytest.mark.parametrize(
  'given',
  [(), iter(()), {}.values(), np.zeros((0, 8, 8), np.uint8), jnp.zeros((0,))],
)
def test_nothing_in_any_form(given, model):
  assert model.predict(given).shape == (0, 10)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (None, 'None is no image; give paths'),
    (3, '3 is no image'),
    (True, 'True is no image'),
    (b'x.png', 'bytes may be a path or a file'),
    (bytearray(b'x'), 'bytearray may be'),
    ([b'x.png'], 'image 0: bytes may be'),
    (np.array([b'x.png']), 'no list of paths'),
    (np.array([['x.png']]), 'no list of paths'),
    ({'x.png': 1}, r'a dict is no list of images; give its keys\(\)'),
    (DIGITS[:2].tolist(), r'image 0 is \[\['),
    (DIGITS[0].tolist(), r'image 0 is \['),
    ([DIGITS[0], None], 'image 1 is None'),
    (DIGITS[:2] / 255, 'image 0: .*float64 .* give uint8, 0..255'),
    (jnp.asarray(DIGITS[:2] / 255, jnp.bfloat16), 'bfloat16 .* give uint8'),
    (DIGITS[:2].astype(np.int64), 'int64 has no fixed range'),
    (np.zeros((2, 1, 8, 8), np.uint8), r'first; give it .transpose\(0, 2, 3'),
    (np.zeros((2, 3, 8, 8), np.uint8), r'first; give it .transpose\(0, 2, 3'),
    ([np.zeros((3, 8, 8), np.uint8)], r'first; give it .transpose\(1, 2, 0'),
    (np.zeros((2, 2, 8, 8, 3), np.uint8), 'is no image; give'),
    (np.zeros(8, np.uint8), 'is no image; give'),
    (np.uint8(3), 'is no image; give'),
    (np.array([[object()]]), 'array of Python objects'),
    (np.array(object()), 'image 0 is <object'),
    (np.ndarray, 'is no image|image 0 is'),
    (OnDevice(), r'an OnDevice|a OnDevice that NumPy cannot read \(copy it to'),
    (range(3), 'image 0 is 0'),
  ],
  ids=range(26),
)
def test_what_must_be_guessed_is_refused(given, message, model):
  with pytest.raises(config.InputError, match=message) as error:
    model.predict(given)
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 300


def test_an_iterable_is_taken_in_batches(model, monkeypatch):
  """No more than a batch is read before it is computed."""
  taken, computed = [], []
  run = model.probabilities
  monkeypatch.setattr(
    model, 'probabilities',
    lambda batch: computed.append(len(taken)) or run(batch),
  )  # fmt: skip

  def generator():
    for image in np.resize(DIGITS, (600, 8, 8)):
      taken.append(1)
      yield image

  assert model.predict(generator()).shape == (600, 10)
  assert computed == [256, 512, 600]


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [
    ((8, 8, 1), 256),
    ((224, 224, 3), 256),
    ((512, 512, 3), 64),
    ((8192,) * 3, 1),
  ],
)
def test_large_images_are_taken_fewer_at_once(shape, expected, model):
  other = copy.copy(model)
  other.image_shape = shape
  assert other.batch_size == expected


def test_a_batch_of_another_shape(model):
  for batch in (DIGITS[:2], DIGITS[:2, :, :, None] / 255):
    with pytest.raises(
      config.InputError, match=r'a batch is uint8 \[N, 8, 8, 1'
    ):
      model.probabilities(batch)


def test_a_pipe_is_refused(model, tmp_path):
  os.mkfifo(tmp_path / 'pipe.png')
  with pytest.raises(config.InputError, match=r'pipe\.png: .* a named pipe'):
    model.predict([tmp_path / 'pipe.png'])


def test_the_bound_on_pixels_goes_with_the_model(model, folder):
  """A model of before, which has none, takes the default."""
  path = folder / 'model.json'
  record = json.loads(path.read_text())
  assert record['preprocessing']['max_pixels'] == 128_000_000
  record['preprocessing']['max_pixels'] = 63
  path.write_text(json.dumps(record))
  digit = folder / 'digit.png'
  Image.fromarray(DIGITS[3]).save(digit)
  with pytest.raises(config.InputError, match='8x8 pixels.*max_pixels=63'):
    inference.load(folder).predict([digit])
  del record['preprocessing']['max_pixels']
  path.write_text(json.dumps(record))
  np.testing.assert_array_equal(
    inference.load(folder).predict([digit]), model.predict([digit])
  )


def test_classes_of_any_name_are_stored_and_read_back(folder):
  classes = [os.fsdecode(b'k\xfche%d' % i) for i in range(8)] + ['a\n', 'é']
  path = folder / 'model.json'
  record = json.loads(path.read_text()) | {'classes': classes}
  files.write_json(path, record)
  path.read_text(encoding='utf-8')
  assert inference.load(folder).classes == tuple(classes)


def test_no_model(tmp_path):
  with pytest.raises(config.InputError, match='holds no model.json'):
    inference.load(tmp_path)


def at(*path, to):
  """Returns what puts a value into a record, at a path."""

  def change(record):
    for name in path[:-1]:
      record = record[name]
    record[path[-1]] = to

  return change


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda record: record.pop('classes'), 'missing required field classes'),
    (lambda record: record.pop('topology'), 'missing required field topology'),
    (lambda record: record.pop('architecture'), 'field architecture'),
    (lambda record: record.pop('preprocessing'), 'field preprocessing'),
    (at('schema', to='other/9'), "schema: invalid enum value 'other/9'"),
    (at('schema', to=None), 'schema: '),
    (at('digest', to='x'), 'digest: expected int, got str'),
    (at('architecture', to=[]), 'architecture: expected object'),
    (at('architecture', to={}), 'is no name|belong there'),
    (at('architecture', 'x', to=1), "'x' is no option of level 'block'"),
    (at('architecture', 'rngs', to=1), "'rngs' is no option"),
    (at('architecture', 'name', to=['resnet8']), 'is no name'),
    (at('architecture', 'name', to='resnet99998'), 'more than 1,000 blocks'),
    (at('architecture', 'name', to='resnet2000'), r'of this network is \(999,'),
    (at('architecture', 'level', to='branch'), 'of this network is'),
    (at('architecture', 'level', to=0), 'level=0 is not one of'),
    (at('architecture', 'width', to=10**9), 'width=.* must be at most 8,192'),
    (at('architecture', 'width', to=True), 'width=True must be a whole'),
    (at('architecture', 'width', to=4), r"array 'head/kernel' is .*\[32, 10\]"),
    (at('architecture', 'fan_in', to=0), 'fan_in=0 must be at least 1'),
    (at('architecture', 'num_classes', to=11), 'there are 10 classes, but 11'),
    (at('architecture', 'num_classes', to='10'), "10 classes, but '10'"),
    (at('architecture', 'num_classes', to=True), '10 classes, but True'),
    (at('architecture', 'in_channels', to=3), '1 channels, but 3'),
    (at('architecture', 'dtype', to='float64'), "dtype='float64' is not one"),
    (at('architecture', 'adapter', to={}), 'adapter={} is not one of'),
    (at('architecture', 'scale', to=None), 'scale=None is not one of'),
    (at('architecture', 'stem_source', to=0), 'stem_source=0 must be True'),
    (at('classes', to=['a']), 'there are 1 classes, but 10'),
    (at('classes', to=[]), 'classes: expected array of length >= 1'),
    (at('classes', to='0123456789'), 'classes: expected array, got str'),
    (at('classes', 3, to=3), r'classes\[3\]: expected str, got int'),
    (at('preprocessing', to=None), 'preprocessing: expected object, got null'),
    (at('preprocessing', 'height', to=10**6), 'height: expected int <= 8192'),
    (at('preprocessing', 'width', to=0), 'width: expected int >= 1'),
    (
      at('preprocessing', 'max_pixels', to=10**9 + 1),
      'max_pixels: expected int <= 1000000000',
    ),
    (at('preprocessing', 'width', to=8.0), 'width: expected int, got float'),
    (at('preprocessing', 'channels', to=2), 'channels: invalid enum value 2'),
    (at('preprocessing', 'channels', to=3), '3 channels, but 1|in_channels'),
    (at('preprocessing', 'resize', to=4), 'resize=4 leaves no 8 x 8'),
    (at('preprocessing', 'mean', to=[]), '0 numbers as mean, but 1'),
    (at('preprocessing', 'mean', to=[1, 2, 3]), '3 numbers as mean, but 1'),
    (at('preprocessing', 'mean', to=['1']), r'mean\[0\]: expected float'),
    (at('preprocessing', 'mean', to=[float('nan')]), 'NaN is no finite'),
    (at('preprocessing', 'mean', to=[1e30]), r'mean\[0\]: expected float <='),
    (at('preprocessing', 'std', to=[0]), r'std\[0\]: expected float >= 1e-06'),
    (at('preprocessing', 'std', to=[-1]), r'std\[0\]: expected float >='),
    (at('preprocessing', 'std', to=[1e-300]), r'std\[0\]: expected float >='),
    (at('preprocessing', 'std', to=[1, 1]), '2 numbers as std, but 1'),
    (at('topology', to=[]), 'topology: expected object, got array'),
    (at('topology', 'blocks', 0, 'sources', to=[5]), r'0\.\.0 come before'),
    (at('topology', 'blocks', 0, 'sources', to=[True]), 'got bool'),
    (at('topology', 'blocks', 1, to=None), 'expected object, got null'),
    (lambda record: record.pop('classes'), 'model.json is damaged'),
    (lambda record: record.pop('topology'), 'model.json is damaged'),
    (lambda record: record.update(schema='other/9'), "value 'other/9'"),
    (lambda record: record['architecture'].update(x=1), 'json is damaged'),
    (lambda record: record['architecture'].update(width=4), "'head/kernel' is"),
    (
      lambda record: record['topology']['blocks'].pop(),
      r'shape \(2, 2\); that of this network is \(3, 3\)',
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
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 500 + len(str(folder))


@pytest.mark.parametrize(
  'content', [b'[]', b'null', b'0', b'"x"', b'', b'\xff', b'[' * 10**5]
)
def test_a_record_that_is_none(content, folder):
  (folder / 'model.json').write_bytes(content)
  with pytest.raises(config.InputError, match='model.json is damaged: '):
    inference.load(folder)


def test_a_record_of_many_blocks_does_not_build_them(folder, monkeypatch):
  """Both say 999 blocks; the arrays are of three."""
  path = folder / 'model.json'
  record = json.loads(path.read_text())
  record['architecture']['name'] = 'resnet2000'
  record['topology'] = topology.Topology(
    tuple((i,) for i in range(999))
  ).to_dict()
  path.write_text(json.dumps(record))
  monkeypatch.setattr(models, 'create_model', lambda **_: pytest.fail('built'))
  with pytest.raises(config.InputError, match='has no arrays of block'):
    inference.load(folder)


def test_arrays_of_another_network(folder):
  (folder / 'model.safetensors').unlink()
  shutil.rmtree(folder / 'arrays')
  with pytest.raises(config.InputError, match='arrays is no whole set'):
    inference.load(folder)
  model_arrays.save(folder / 'arrays', {'x': jnp.zeros(3)})
  with pytest.raises(config.InputError, match='has no arrays of block 1'):
    inference.load(folder)


def test_an_array_of_another_dtype_is_named(folder):
  stored = model_arrays.stored_in(folder / 'arrays')
  arrays = model_arrays.load(folder / 'arrays', stored)
  arrays['head/bias'] = arrays['head/bias'].astype(jnp.float16)
  shutil.rmtree(folder / 'arrays')
  model_arrays.save(folder / 'arrays', arrays)
  with pytest.raises(config.InputError, match='float16') as error:
    inference.load(folder)
  said = str(error.value)
  assert f"{folder / 'arrays'}: the array 'head/bias' is float16 [10]" in said
  assert '\n' not in said


@pytest.mark.parametrize(
  ('stored', 'message'),
  [
    ({}, r"'b' is missing, but model.json makes it float32 \[10\]"),
    ({'b': (10,), 'more': (2,)}, r"'more' is float32 \[2\], .* it missing"),
    ({'b': (9,)}, r"'b' is float32 \[9\], but .* float32 \[10\]"),
    ({'b': (10, 1)}, r"'b' is float32 \[10, 1\], but"),
  ],
)
def test_the_array_that_differs_is_named(stored, message, tmp_path):
  expected, stored = (
    {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in given.items()}
    for given in ({'b': (10,)}, stored)
  )
  with pytest.raises(config.InputError, match=message):
    model_record.check_arrays(tmp_path, expected, stored)


def test_what_the_files_cannot_hold_is_not_allocated(tmp_path):
  (tmp_path / 'data').write_bytes(bytes(100))
  arrays = {'x': jax.ShapeDtypeStruct((2**34,), jnp.float32)}
  with pytest.raises(config.InputError, match='holds 100 bytes, which cannot'):
    model_record.check_arrays(tmp_path, arrays, arrays)


def test_names_of_classes_that_are_no_utf8(folder):
  names = [
    '\udcff\n',
    '\t',
    '\x1b[31m',
    'é',
    'e\u0301',
    '😀',
    '',
    ' ',
    '"',
    '\\',
  ]
  path = folder / 'model.json'
  record = json.loads(path.read_text())
  files.write_json(path, record | {'classes': names})
  assert maskconnect_jax.load(folder).classes == tuple(names)


def test_cut_record(folder):
  (folder / 'model.json').write_text('{"schema"')
  with pytest.raises(config.InputError, match='model.json is damaged'):
    inference.load(folder)


@pytest.mark.parametrize('how', ['flipped', 'truncated', 'deleted'])
def test_damaged_arrays(how, folder):
  (folder / 'model.safetensors').unlink()
  arrays = folder / 'arrays'
  files = [path for path in arrays.rglob('*') if path.is_file()]
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
  """What four devices wrote, a machine with one reads; nothing else needed."""
  program = (
    'import sys, numpy as np, maskconnect_jax as m;'
    'model = m.load(sys.argv[1]);'
    'assert "maskconnect_jax.run.train" not in sys.modules;'
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
