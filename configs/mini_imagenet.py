"""Mini-ImageNet, 100 classes of 500 + 100 images: resnet50 learns its wiring.

  python -m maskconnect_jax.main --config=configs/mini_imagenet.py \
      --workdir=runs/mini_imagenet

Prepared once, without TensorFlow, from a folder of the classes' images:
python -m maskconnect_jax.data.mini_imagenet --images=DIR. The split is that of
ordinary classification, not the few-shot one of disjoint classes. 90 epochs of
50,000 images: not yet run to their end.
"""

import ml_collections

from maskconnect_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.duration = '90 epochs'
  config.batch_size = 256
  config.eval_batch_size = 256
  config.evaluate_every = '5 epochs'
  config.checkpoint_every = '1 epochs'

  config.model.name = 'resnet50'
  config.model.dtype = 'bfloat16'
  config.connectivity.fan_in = 4

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
