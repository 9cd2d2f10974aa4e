"""Fashion-MNIST, or any images in MNIST's IDX files; resnet20.

  python -m maskconnect_jax.main --config=configs/fashion_mnist.py \
      --workdir=runs/fashion_mnist --config.data.dir=DIR

DIR holds train-images-idx3-ubyte[.gz] and the other three IDX files. Debian's
package dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist.

The recipe is not yet run to its end. With --config.duration='2 epochs',
seed 0 and the plain settings (docs/method.md), the test accuracy after pruning
was 89.31 %, in 23 min on two busy CPU cores.
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

  config.data.source = 'idx'
  config.data.pad = 2
  return config
