"""CIFAR-10, branch-level: each branch of resnext20_8x4d picks 4 of 8.

python -m maskconnect_jax.main --config=configs/cifar10_branch.py \
    --workdir=runs/cifar10_branch

Takes the set from TFDS, prepared once, without TensorFlow, as the README says;
or from an image folder with --config.data.source=folder --config.data.dir=DIR.
300 epochs of 50,000 images, not yet run to their end. On CIFAR-10 (JPEG) with
--config.duration='1 epochs', seed 0, and the plain settings (README): 39.43 %
after pruning, which leaves 38 of the 48 branches; 25 min on two busy CPU cores.
"""

import ml_collections

from maskconnect_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.duration = '300 epochs'
  config.batch_size = 128

  config.model.name = 'resnext20_8x4d'
  config.connectivity.level = 'branch'
  config.connectivity.fan_in = 4

  config.optimizer.learning_rate = 0.1
  config.optimizer.schedule = 'step'
  config.optimizer.steps_at = ('50%', '75%')
  config.optimizer.weight_decay = 5e-4

  config.data.source = 'tfds'
  config.data.name = 'cifar10'
  config.data.mean = (125.3, 123.0, 113.9)
  config.data.std = (63.0, 62.1, 66.7)
  return config
