"""model.safetensors: what it holds, and what a damaged one does.

The oracles read the file by hand, as the format is published, and the arrays
beside it with TensorStore.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import maskconnect_jax
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import inference


@pytest.fixture
def folder(finished, tmp_path):
  """A copy of a model without the Orbax arrays."""
  ignored = shutil.ignore_patterns('arrays')
  return shutil.copytree(
    finished.workdir / 'model', tmp_path / 'model', ignore=ignored
  )


def read_by_hand(path):
  content = path.read_bytes()
  start = 8 + int.from_bytes(content[:8], 'little')
  header = json.loads(content[8:start])
  metadata = header.pop('__metadata__')
  arrays = {}
  for name, entry in header.items():
    assert entry['dtype'] == 'F32'
    begin, end = entry['data_offsets']
    values = np.frombuffer(content[start + begin : start + end], '<f4')
    arrays[name] = values.reshape(entry['shape'])
  return arrays, metadata


def test_it_holds_the_arrays_beside_it(finished, arrays_in):
  model = finished.workdir / 'model'
  found, metadata = read_by_hand(model / 'model.safetensors')
  expected = arrays_in(model / 'arrays/state')
  assert metadata == {'schema': 'maskconnect_jax.weights/1'}
  assert found.keys() == expected.keys()
  assert 'stack/blocks/0/conv1/kernel' in found
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_it_is_enough(folder, finished):
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
  np.testing.assert_array_equal(
    maskconnect_jax.load(folder).logits(images),
    maskconnect_jax.load(finished.workdir).logits(images),
  )


def test_files_may_be_links_as_in_the_cache_of_a_hub(folder, tmp_path):
  linked = tmp_path / 'linked'
  linked.mkdir()
  for path in folder.iterdir():
    (linked / path.name).symlink_to(path)
  assert maskconnect_jax.load(linked).classes == tuple('0123456789')


def change(path, name, array):
  arrays = safetensors.numpy.load_file(path)
  if array is None:
    del arrays[name]
  else:
    arrays[name] = array
  safetensors.numpy.save_file(arrays, path)


@pytest.mark.parametrize(
  ('array', 'message'),
  [
    (None, "'head/bias' is missing, but model.json makes it float32"),
    (np.zeros(9, np.float32), r"'head/bias' is float32 \[9\], but"),
    (np.zeros(10, np.float64), r"'head/bias' is float64 \[10\], but"),
    (np.zeros(10, np.int8), "'head/bias' is of I8, which no model has"),
    (np.ones(10, np.float32), 'is damaged: not the arrays that were saved'),
  ],
)
def test_other_arrays_are_named(array, message, folder):
  path = folder / 'model.safetensors'
  change(path, 'head/bias', array)
  with pytest.raises(InputError, match=message) as error:
    inference.load(folder)
  assert str(path) in str(error.value)


@pytest.mark.parametrize('how', ['cut', 'longer', 'header', 'empty', 'folder'])
def test_a_damaged_file(how, folder):
  path = folder / 'model.safetensors'
  content = path.read_bytes()
  path.unlink()
  if how == 'folder':
    path.mkdir()
  else:
    header = (2**40).to_bytes(8, 'little')  # would be a terabyte
    path.write_bytes(
      {
        'cut': content[:-4],
        'longer': content + b'1234',
        'header': header + content[8:],
        'empty': b'',
      }[how]
    )
  with pytest.raises(InputError, match='no weights that can be read') as error:
    inference.load(folder)
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)
