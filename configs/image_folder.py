"""Your own images, DIR/train/<class>/* and DIR/test/<class>/*: resnet20.

  python -m maskconnect_jax.main --config=configs/image_folder.py \
      --workdir=runs/mine --config.data.dir=DIR

JPEG and PNG of any size, resized to 32x32 (--config.data.image_size=N) and
kept in memory. On CIFAR-10 (JPEG) with --config.duration='2 epochs', seed 0:
70.34 % after pruning, 7 min on two CPU cores. Not yet run to its end.
"""

import ml_collections

from maskconnect_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.duration = '30 epochs'
  config.batch_size = 128
  config.evaluate_every = '5 epochs'
  config.checkpoint_every = '1 epochs'

  config.model.name = 'resnet20'
  config.connectivity.fan_in = 4

  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup = '5%'

  config.data.source = 'folder'
  config.data.image_size = 32
  return config
