"""CIFAR-10 with the published recipe: resnet38 learns its connectivity.

  python -m maskconnect_jax.main --config=configs/cifar10.py \
      --workdir=runs/cifar10

Takes the set from TFDS, prepared once, without TensorFlow, as the README says;
or from an image folder with --config.data.source=folder --config.data.dir=DIR.
300 epochs of 50,000 images, not yet run to their end. On CIFAR-10 (JPEG) with
--config.duration='1 epochs', seed 0: 60.23 % after pruning, 7 min on two CPU
cores.
"""

import ml_collections

from maskconnect_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.duration = '300 epochs'
  config.batch_size = 128

  config.model.name = 'resnet38'
  config.connectivity.fan_in = 10

  config.optimizer.learning_rate = 0.1
  config.optimizer.schedule = 'step'
  config.optimizer.steps_at = ('50%', '75%')
  config.optimizer.weight_decay = 5e-4

  config.data.source = 'tfds'
  config.data.name = 'cifar10'
  config.data.mean = (125.3, 123.0, 113.9)
  config.data.std = (63.0, 62.1, 66.7)
  return config
