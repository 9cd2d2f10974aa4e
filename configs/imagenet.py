"""ImageNet with the published recipe, at either level.

  python -m maskconnect_jax.main --config=configs/imagenet.py \
      --workdir=runs/imagenet --config.data.dir=DIR
  python -m maskconnect_jax.main --config=configs/imagenet.py:branch \
      --workdir=runs/imagenet_branch --config.data.dir=DIR

Each block of resnet50 picks 4 sources. With `branch`, each branch of
resnext50_32x4d picks 16 of 32 branches. The paper's table has two more
networks: --config.model.name=resnext101_32x4d, and
--config.model.name=resnext101_64x4d --config.connectivity.fan_in=32.

DIR holds train/n01440764/*.JPEG and val/n01440764/*.JPEG, 144 GB as published.
Or DIR is a TFDS data_dir with imagenet2012 prepared as ArrayRecord, with
--config.data.source=tfds --config.data.name=imagenet2012. Photographs are
decoded while the devices work, 1.7 times as many with OpenCV: pip install
'maskconnect_jax[opencv]'.

The recipe takes 90 epochs of 1,281,167 images, and is not yet run to its
end. On 4,000 made-up JPEGs (benchmarks/imagenet_folder.py), one epoch at 64x64
takes 6 min on two busy CPU cores.

Other rules: --config.connectivity.rule=fixed_prev is the ordinary ResNet-50;
fixed_random and fixed_all are the others.
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

  config.data.source = 'folder'
  config.data.skip_errors = True  # some copies have damaged files
  config.data.image_size = 224
  config.data.crop = 'resized'
  config.data.eval_resize = 256
  config.data.mean = (123.675, 116.28, 103.53)
  config.data.std = (58.395, 57.12, 57.375)
  return config
