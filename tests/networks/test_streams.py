"""Every random thing has a key of its own."""

import jax
import numpy as np
import pytest

from maskconnect_jax import config as config_lib
from maskconnect_jax.networks import layers, models, streams
from maskconnect_jax.run import experiment, workdirs


def bits(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_no_two_draws_share_a_key():
  """Of all kernels, masks, and the first steps of every stream."""
  kernels = streams.of_network(seed=5)
  keys = [bits(kernels.params()) for _ in range(300)]
  keys += [bits(kernels.connectivity()) for _ in range(3)]
  for stream in range(8):
    keys.append(bits(streams.root(5, stream)))
    if stream not in (streams.WEIGHTS, streams.WIRING):
      keys += [bits(streams.at_step(5, stream, step)) for step in range(50)]
  assert len(set(keys)) == len(keys) == 300 + 3 + 8 + 6 * 50


def test_no_kernel_is_drawn_with_the_key_of_a_stream_of_training():
  """The stem's was drawn with that of the order, the next with the crops'."""
  model = models.create_model('resnet8', num_classes=3, width=4, seed=5)
  kernels = [
    model.stem.conv.kernel[...],
    *(block.conv1.kernel[...] for block in model.stack.blocks),
    *(block.conv2.kernel[...] for block in model.stack.blocks),
  ]
  for stream in range(6):
    key = jax.random.fold_in(jax.random.key(5), stream)
    for kernel in kernels:
      drawn = layers.he_normal_by_fan_out(key, kernel.shape)
      assert abs(np.asarray(drawn - kernel)).max() > 0.01


def sources(name, **options):
  model = models.create_model(
    name, num_classes=3, rule='fixed_random', fan_in=2, seed=3, **options
  )
  return model.topology.sources


def test_a_seeds_random_topology_hangs_on_its_shape_alone():
  """Nine blocks: of two or three kernels, with projections or without."""
  topology = sources('resnet20', width=4)
  assert topology == sources('resnet20', width=8, adapter='projection')
  assert topology == sources('resnet29_bottleneck', width=4)


def test_a_seeds_first_real_mask_hangs_on_its_shape_alone():
  masks = [
    models.create_model(
      'resnet8', num_classes=3, initial_spread=0.5, seed=3, **options
    ).stack.real_mask[...]
    for options in ({'width': 4}, {'width': 8, 'adapter': 'projection'})
  ]
  np.testing.assert_array_equal(*masks)


def test_version_1_draws_what_it_did():
  """Numbers of the last commit that had no versions."""
  assert sources('resnet20', width=4, version='1') == (
    ((0,), (0, 1), (0, 1), (0, 2), (0, 1), (0, 3), (0, 1), (3, 4), (2, 8))
  )
  model = models.create_model(
    'resnet8',
    num_classes=10,
    width=4,
    seed=3,
    initial_spread=0.5,
    version='1',
    learner='draws',
  )
  mask, stem = model.stack.real_mask[...], model.stem.conv.kernel[...]
  np.testing.assert_allclose(mask.sum(), 3.4750905, rtol=1e-5)
  np.testing.assert_allclose(
    stem.ravel()[:3], [-0.5605801, -0.40214735, -0.11582325], rtol=1e-5
  )


@pytest.fixture
def before_versions(tmp_path, tiny_config):
  """The workdir of a run that was cut, whose config had no version."""
  with tiny_config.unlocked():
    config = config_lib.default()
    config.update(tiny_config)
    del config.model.version
  (tmp_path / 'config.json').write_text(config.to_json())
  (tmp_path / 'checkpoints/4').mkdir(parents=True)
  return tmp_path


def test_a_run_begun_before_goes_on_as_it_began(before_versions, tiny_config):
  tiny_config.connectivity.rule = 'fixed_random'
  tiny_config.model.name = 'resnet20'
  path = before_versions / 'config.json'
  text = path.read_text().replace('"learned"', '"fixed_random"')
  path.write_text(text.replace('"resnet8"', '"resnet20"'))
  assert config_lib.stored(before_versions).model.version == '1'
  workdirs.keep_version(tiny_config, before_versions)
  workdirs.check(tiny_config, before_versions)
  begun = experiment.build(tiny_config)
  tiny_config.model.version = '2'
  assert begun.architecture['version'] == '1'
  assert begun.model.topology != experiment.build(tiny_config).model.topology


def test_where_nothing_was_saved_a_run_begins_anew(
  before_versions, tiny_config
):
  (before_versions / 'checkpoints/4').rmdir()
  workdirs.keep_version(tiny_config, before_versions)
  assert tiny_config.model.version == '2'
