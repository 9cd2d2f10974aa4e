"""config.init_from: which arrays a run begins with, read back from files."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import maskconnect_jax
from maskconnect_jax.errors import InputError
from maskconnect_jax.networks import models
from maskconnect_jax.run import init_from, train


@pytest.fixture
def still(tiny_config, finished, tmp_path):
  """A run whose weights do not move, from a copy of the finished one."""
  shutil.copytree(finished.workdir / 'model', tmp_path / 'from')
  tiny_config.init_from = str(tmp_path / 'from')
  tiny_config.duration = '2 steps'
  tiny_config.connectivity.phase = '1 steps'
  tiny_config.optimizer.learning_rate = 0.0
  tiny_config.masks.learning_rate = 0.0
  tiny_config.seed = 1
  return tiny_config


def test_a_run_begins_with_the_arrays_of_a_model(
  still, finished, tmp_path, arrays_in, capsys
):
  train.train(still, tmp_path / 'run')
  told = capsys.readouterr().err
  there = arrays_in(finished.workdir / 'model/arrays/state')
  begun = arrays_in(tmp_path / 'run/checkpoints/2/state')
  weights = {
    name.removeprefix('weights.').replace('.', '/'): array
    for name, array in begun.items()
    if name.startswith('weights.')
  }
  taken = weights.keys() & there.keys()
  for name in taken:
    np.testing.assert_array_equal(weights[name], there[name])
  dead = weights.keys() - there.keys()
  assert dead  # the finished run has pruned a block
  for name in dead:
    assert f'{name} {list(weights[name].shape)} (is missing there)' in told
  assert ' arrays begin as in ' in told


def test_a_run_that_goes_on_needs_the_model_no_more(still, tmp_path):
  still.checkpoint_every = '1 steps'
  train.train(still, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run/checkpoints/2')
  (tmp_path / 'run/summary.json').unlink()
  shutil.rmtree(tmp_path / 'from')
  assert train.train(still, tmp_path / 'run').summary['steps'] == 2


def test_a_head_for_other_classes_begins_anew(finished):
  model = models.create_model(
    'resnet8', num_classes=3, in_channels=1, width=8, fan_in=2
  )
  before = np.asarray(model.head.kernel[...])
  after, line = init_from.filled(model, finished.workdir)
  np.testing.assert_array_equal(after.head.kernel[...], before)
  assert 'head/kernel [32, 3] (is [32, 10] there)' in line
  theirs = maskconnect_jax.load(finished.workdir).arrays
  np.testing.assert_array_equal(
    after.stem.conv.kernel[...], theirs['stem/conv/kernel']
  )
  np.testing.assert_array_equal(
    after.stack.real_mask[...], model.stack.real_mask[...]
  )


def test_a_model_of_which_nothing_fits_is_refused(finished):
  class Other(nnx.Module):
    def __init__(self):
      self.own = nnx.Param(jnp.zeros(3))

  with pytest.raises(InputError, match=r'no array that fits.*own \[3\]'):
    init_from.filled(Other(), finished.workdir)


def test_a_folder_without_a_model_is_refused(still, tmp_path):
  still.init_from = str(tmp_path)
  with pytest.raises(InputError, match='holds no model.json'):
    train.train(still, tmp_path / 'run')
