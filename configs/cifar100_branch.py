"""CIFAR-100, branch-level: each branch of resnext29_8x8d picks 4 of 8.

  python -m maskconnect_jax.main --config=configs/cifar100_branch.py \
      --workdir=runs/cifar100_branch

Takes the set from TFDS, prepared once, as the README says; or from an image
folder with --config.data.source=folder --config.data.dir=DIR. 300 epochs of
50,000 images. Not yet run to its end.
"""

import ml_collections

from maskconnect_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.duration = '300 epochs'
  config.batch_size = 128

  config.model.name = 'resnext29_8x8d'
  config.connectivity.level = 'branch'
  config.connectivity.fan_in = 4

  config.optimizer.learning_rate = 0.1
  config.optimizer.schedule = 'step'
  config.optimizer.steps_at = ('50%', '75%')
  config.optimizer.weight_decay = 5e-4

  config.data.source = 'tfds'
  config.data.name = 'cifar100'
  config.data.mean = (129.3, 124.1, 112.4)
  config.data.std = (68.2, 65.4, 70.4)
  return config
