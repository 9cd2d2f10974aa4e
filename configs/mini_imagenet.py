"""Mini-ImageNet, 100 classes of 500 + 100 images, at either level.

  python -m maskconnect_jax.main --config=configs/mini_imagenet.py \
      --workdir=runs/mini_imagenet
  python -m maskconnect_jax.main --config=configs/mini_imagenet.py:branch \
      --workdir=runs/mini_imagenet_branch

Each block of resnet50 picks 4 sources. With `branch`, each branch of
resnext50_32x4d picks 16 of 32 branches.

The data set is prepared once, without TensorFlow, from a folder of the images:

  python -m maskconnect_jax.main --mode=prepare --images=DIR

The split is that of ordinary classification: training and test images share
their classes. The few-shot split, of disjoint classes, is another one. The
recipe takes 90 epochs of 50,000 images, and is not yet run to its end.
"""

import ml_collections

from maskconnect_jax import config as config_lib


def get_config(level: str = 'block') -> ml_collections.ConfigDict:
  if level not in ('block', 'branch'):
    raise config_lib.InputError(f'there is no {level!r}; give block or branch')
  config = config_lib.default()
  config.duration = '90 epochs'
  config.batch_size = 256
  config.eval_batch_size = 256
  config.evaluate_every = '5 epochs'
  config.checkpoint_every = '1 epochs'

  config.model.name = 'resnet50'
  config.model.dtype = 'bfloat16'
  config.connectivity.fan_in = 4
  if level == 'branch':
    config.model.name = 'resnext50_32x4d'
    config.connectivity.level = 'branch'
    config.connectivity.learner = 'fisher'  # so many edges: docs/results.md
    config.connectivity.fan_in = 16

  config.optimizer.learning_rate = 0.1  # for a batch of 256
  config.optimizer.schedule = 'step'
  config.optimizer.steps_at = ('30 epochs', '60 epochs')
  config.optimizer.weight_decay = 1e-4

  config.data.source = 'tfds'
  config.data.name = 'mini_imagenet'
  config.data.image_size = 224
  config.data.crop = 'resized'
  config.data.eval_resize = 256
  config.data.mean = (123.675, 116.28, 103.53)
  config.data.std = (58.395, 57.12, 57.375)
  return config
