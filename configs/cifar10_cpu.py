"""CIFAR-10 at a size that one CPU core carries: resnet38 at half width, 16x16.

  python -m maskconnect_jax.main --config=configs/cifar10_cpu.py \
      --workdir=runs/cifar10_cpu --config.data.dir=DIR

DIR is an image folder, train/<class>/* and test/<class>/*, as in
configs/image_folder.py. Trained on 10,000 of its images, with 5,000 others held
out: small enough for a study of many settings, too small for a claim about
CIFAR-10. 30 epochs, 9,360 steps of 32 images, 10 minutes on one core.
"""

import ml_collections

from maskconnect_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.duration = '30 epochs'
  config.batch_size = 32
  config.evaluate_every = '5 epochs'
  config.checkpoint_every = '5 epochs'
  config.keep_checkpoints = 1
  config.log_every = '1%'

  config.model.name = 'resnet38'
  config.model.width = 8
  config.connectivity.fan_in = 4

  config.optimizer.learning_rate = 0.05
  config.optimizer.schedule = 'cosine'

  config.data.source = 'folder'
  config.data.image_size = 16
  config.data.validation = 5000
  config.data.train_images = 10_000
  config.data.pad = 2
  config.data.mean = (125.3, 123.0, 113.9)
  config.data.std = (63.0, 62.1, 66.7)
  return config
