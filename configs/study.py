"""The studies of docs/results.md: sweeps that can be cut and extended.

  python -m maskconnect_jax.main --mode=sweep --config=configs/study.py:PART \
      --workdir=runs/study/PART --config.data.dir=DIR

PART is one of

  learners   does a learned wiring win over random wirings? K = 1, 2, 4, with
             the controls that a claim needs; block level
  branches   the same at the branch level
  wiring     trained from scratch, is the learned wiring better than others? It
             takes --config.connectivity.topology=RUN/topology.json
  settings   which settings of drawn masks learn best? resnet20, one field at a
             time
  block      does a learned wiring win over fixed rules? resnet38, resnet74,
             resnet110
  branch     the same question for the branches of ResNeXts, as in the published
             table
  topology   is it the topology or the training? The topology of a run, the same
             with its rows shuffled, and a random one:
             --config.connectivity.topology=RUN/topology.json
  fashion    the rules on Fashion-MNIST (DIR holds its IDX files)

DIR is an image folder, such as CIFAR-10. Every part except `branch` also exists
with `cpu-` before its name. Of these, the first three train resnet26 of width 8
(`cpu-branches`: resnext20_8x4d of width 16) on 10,000 images of 16x16 for 20
epochs, in 2 min on one core. The others are older and train resnet38 of width 8
for 30 epochs, in 10 min. Both are too small for a claim about CIFAR-10. The
results are in docs/results.md and docs/results_draws.md. Settings are compared
on 5,000 held out training images, everything else on the test images.
"""

import ml_collections

from maskconnect_jax import config as config_lib

RULES = (
  'connectivity.rule=fixed_prev',
  'connectivity.rule=fixed_random',
  'connectivity.rule=fixed_all',
  'connectivity.rule=learned',
)
LEARNERS = tuple(
  f'connectivity.fan_in={fan_in} connectivity.{how}'
  for fan_in in (2, 1, 4)
  for how in ('rule=fixed_random', 'rule=learned')
)
CONTROLS = (
  'connectivity.fan_in=2 connectivity.learner=random',
  'connectivity.fan_in=2 connectivity.learner=draws',
  'connectivity.fan_in=2 connectivity.learner=fisher',
  'connectivity.fan_in=2 connectivity.rule=fixed_near',
  'connectivity.rule=fixed_prev',
  'connectivity.rule=fixed_all',
)
OTHER_LEARNERS = tuple(
  f'connectivity.fan_in=2 connectivity.learner={learner}'
  for learner in ('measured', 'random', 'draws')
)
# The plain settings of docs/method.md, around which the settings vary. The
# winning settings are the defaults now.
CENTRE = {
  'connectivity.learner': 'draws',
  'connectivity.gradient': 'all',
  'connectivity.temperature': 1.0,
  'connectivity.phase': '50%',
  'masks.learning_rate': 0.1,
}
SETTINGS = (
  '',
  *(f'masks.learning_rate={rate}' for rate in (0.003, 0.01, 0.03, 0.3)),
  'masks.schedule=cosine',
  'masks.momentum=0.9',
  'masks.momentum=0.9 masks.learning_rate=0.01',
  'connectivity.gradient=drawn',
  'connectivity.gradient=centered masks.learning_rate=0.3',
  'connectivity.gradient=normalized masks.learning_rate=1.0',
  'connectivity.gradient=normalized masks.learning_rate=1.0'
  ' connectivity.temperature=0.1',
  'connectivity.gradient=normalized masks.learning_rate=1.0'
  ' connectivity.temperature=0.1 connectivity.phase=25%',
  'connectivity.scale=sum',
  'connectivity.initial=0.25',
  'connectivity.initial=0.75',
  'connectivity.phase=25%',
  'connectivity.phase=75%',
  *(f'connectivity.fan_in={fan_in}' for fan_in in (1, 2, 8)),
  'connectivity.temperature=0.1',
)


def get_config(name: str = 'settings') -> ml_collections.ConfigDict:
  part, on_cpu = name.removeprefix('cpu-'), name.startswith('cpu-')
  config = _small() if on_cpu else _full()
  if part in ('learners', 'branches', 'wiring'):
    config = _quick() if on_cpu else _whole()
    config.seeds = tuple(range(10, 15))
    config.variants = LEARNERS + CONTROLS
    if part == 'branches':
      config.connectivity.level = 'branch'
      config.connectivity.learner = 'fisher'
      config.model.name = 'resnext20_8x4d'
      config.model.width = 16 if on_cpu else 0
      config.variants = LEARNERS + OTHER_LEARNERS
    elif part == 'wiring':
      config.connectivity.rule = 'fixed_given'
      config.variants = ('', 'connectivity.shuffled=true')
  elif part == 'settings':
    config.seeds, config.variants = (0, 1), SETTINGS
    config.update_from_flattened_dict(CENTRE)
    config.data.validation = 5000
    if not on_cpu:
      config.model.name, config.duration = 'resnet20', '30 epochs'
  elif part == 'block':
    config.seeds = (0, 1, 2)
    names = ('resnet38',) if on_cpu else ('resnet38', 'resnet74', 'resnet110')
    config.variants = tuple(
      f'model.name={name} {rule}' for name in names for rule in RULES
    )
  elif part == 'branch' and not on_cpu:
    config.connectivity.level = 'branch'
    config.duration, config.seeds = '300 epochs', (0, 1, 2)
    config.optimizer.schedule = 'step'
    config.variants = tuple(
      f'model.name={name} {rule}'
      for name in ('resnext20_8x4d', 'resnext29_8x8d')
      for rule in (
        'connectivity.rule=fixed_all connectivity.fan_in=8',
        'connectivity.rule=learned connectivity.fan_in=4',
      )
    )
  elif part == 'topology':
    config.connectivity.rule = 'fixed_given'
    config.seeds = (1, 2, 3)
    config.variants = (
      '',
      'connectivity.shuffled=true',
      'connectivity.rule=fixed_random connectivity.topology=',
    )
  elif part == 'fashion':
    config.seeds, config.variants = (0, 1, 2), RULES
    config.data.source = 'idx'
    config.data.mean, config.data.std = (), ()
  else:
    raise config_lib.InputError(
      f'there is no part {name!r}; give learners, branches, wiring, settings,'
      ' block, branch, topology or fashion, all but branch also with cpu-'
      ' before it'
    )
  return config


def _full() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.duration = '100 epochs'
  config.batch_size = 128
  config.checkpoint_every = '5 epochs'
  config.keep_checkpoints = 1

  config.model.name = 'resnet38'
  config.connectivity.fan_in = 4

  config.optimizer.learning_rate = 0.1
  config.optimizer.schedule = 'cosine'
  config.optimizer.weight_decay = 5e-4

  config.data.source = 'folder'
  config.data.image_size = 32
  config.data.mean = (125.3, 123.0, 113.9)
  config.data.std = (63.0, 62.1, 66.7)
  return config


def _whole() -> ml_collections.ConfigDict:
  config = _full()
  config.duration = '20 epochs'
  config.batch_size = 256
  config.evaluate_every = '10 epochs'
  config.checkpoint_every = '10 epochs'
  config.log_every = '2%'
  config.model.dtype = 'bfloat16'
  config.optimizer.learning_rate = 0.2
  config.optimizer.warmup = '5%'
  return config


def _small() -> ml_collections.ConfigDict:
  config = _full()
  config.duration = '30 epochs'
  config.batch_size = 32
  config.evaluate_every = '5 epochs'
  config.log_every = '1%'
  config.model.width = 8
  config.optimizer.learning_rate = 0.05
  config.data.image_size = 16
  config.data.pad = 2
  config.data.validation = 5000
  config.data.train_images = 10_000
  return config


def _quick() -> ml_collections.ConfigDict:
  config = _small()
  config.duration = '20 epochs'
  config.batch_size = 64
  config.evaluate_every = '10 epochs'
  config.checkpoint_every = '10 epochs'
  config.log_every = '2%'
  config.model.name = 'resnet26'
  config.optimizer.learning_rate = 0.1
  config.optimizer.warmup = '5%'
  config.data.mean, config.data.std = (), ()
  return config
