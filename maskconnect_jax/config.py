"""All config fields, with their defaults and meanings, and their check.

An experiment (`configs/*.py`) starts from `default()` and sets what it needs.
Any field can be overridden from the command line:
`--config.connectivity.fan_in=4`. Durations are strings in one of four units:
'60 epochs', '400 steps', '1e6 examples' or '50%' of the whole run. An epoch has
as many steps as whole batches fit into the training images. The images left
over are not seen in that epoch; each epoch leaves out other images.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

import ml_collections

from maskconnect_jax import files, limits
from maskconnect_jax.errors import InputError as InputError
from maskconnect_jax.fields import (
  LARGEST_FLOAT32,
  Choice,
  Duration,
  Field,
  File,
  Number,
  Several,
  Switch,
  Text,
  expanded,
  shown,
  whole,
)
from maskconnect_jax.method import spec

_FINITE = LARGEST_FLOAT32  # training computes these in float32

# The kind of each field. A new field is one line here and one in `default`.
FIELDS: dict[str, Field] = {
  # jax.random.key keeps the lower 32 bits of a seed, so 2**32 would be the same
  # run as 0. Grain, which orders the images, refuses larger seeds.
  'seed': whole(0, 2**32 - 1),
  'seeds': Several(whole(0, 2**32 - 1)),
  'variants': Several(Text()),
  'init_from': File(),
  'batch_size': whole(1),
  'eval_batch_size': whole(1),
  'duration': Duration(part=False),
  'evaluate_every': Duration(),
  'checkpoint_every': Duration(),
  'keep_checkpoints': whole(1),
  'log_every': Duration(),
  'model.name': Text(),
  'model.width': whole(0, limits.MAX_WIDTH),
  'model.dtype': Choice(spec.DTYPES),
  'model.head_norm': Switch(),
  'model.batchnorm': Choice(('global', 'device')),
  'model.remat': Choice(spec.REMATS),
  'model.drop_path': Number(0, 1, open=')'),
  'model.version': Choice(spec.VERSIONS),
  'model.matmul_precision': Choice(spec.PRECISIONS),
  'connectivity.rule': Choice(spec.RULES),
  'connectivity.live': whole(0),
  'connectivity.learner': Choice(spec.LEARNERS),
  'connectivity.start': Choice(spec.STARTS),
  'connectivity.topology': File(),
  'connectivity.shuffled': Switch(),
  'connectivity.level': Choice(spec.LEVELS),
  'connectivity.fan_in': whole(1),
  'connectivity.phase': Duration(),
  'connectivity.stem_source': Switch(),
  'connectivity.moments': whole(1, 1000),
  'connectivity.measuring': Duration(),
  'connectivity.keep_readers': Switch(),
  'connectivity.gradient': Choice(spec.GRADIENTS),
  'connectivity.initial': Number(0, 1),
  'connectivity.initial_spread': Number(0, 1),
  'connectivity.temperature': Number(1e-6, 1),  # scores are divided by it
  'connectivity.scale': Choice(spec.SCALES),
  'connectivity.adapter': Choice(spec.ADAPTERS),
  'connectivity.branch_identity': Choice(spec.IDENTITIES),
  'connectivity.batchnorm_batches': whole(0),
  'masks.optimizer': Choice(('sgd', 'adam')),
  'masks.learning_rate': Number(0, _FINITE),
  'masks.schedule': Choice(('constant', 'cosine', 'step')),
  'masks.momentum': Number(0, 1),
  'optimizer.name': Choice(('sgd', 'adamw', 'lamb', 'lion')),
  'optimizer.learning_rate': Number(0, _FINITE),
  'optimizer.body_rate': Number(0, _FINITE),
  'optimizer.frozen': Text(),
  'optimizer.schedule': Choice(('constant', 'cosine', 'step')),
  'optimizer.warmup': Duration(),
  'optimizer.steps_at': Several(Duration()),
  'optimizer.momentum': Number(0, 1),
  'optimizer.nesterov': Switch(),
  'optimizer.weight_decay': Number(0, _FINITE),
  'optimizer.decay_all': Switch(),
  'optimizer.clip_norm': Number(0, _FINITE),
  'optimizer.accumulate_steps': whole(1),
  'optimizer.shard': Switch(),
  'optimizer.label_smoothing': Number(0, 1),
  'optimizer.average': Number(0, 1, open=')'),  # 1 would keep the first weights
  'data.source': Choice(
    ('digits', 'idx', 'folder', 'table', 'tfds', 'hf', 'arrays')
  ),
  'data.name': Text(),
  'data.dir': File(),
  'data.multi_label': Switch(),
  'data.image_size': whole(0, limits.MAX_SIDE),
  'data.eval_resize': whole(0, limits.MAX_SIDE),
  'data.val_labels': File(),
  'data.image_column': Text(),
  'data.label_column': Text(),
  'data.test_fraction': Number(0, 1, open='()'),
  'data.validation': whole(0),
  'data.train_images': whole(0),
  'data.skip_errors': Switch(),
  'data.max_pixels': whole(1, limits.MAX_PIXELS),
  'data.memory_gb': Number(0, 1e9),
  'data.threads': whole(1),
  'data.workers': whole(0, 1024),
  'data.crop': Choice(('pad', 'resized')),
  'data.crop_scale': Several(Number(0, 1, open='('), counts=(2,)),
  'data.pad': whole(0, limits.MAX_SIDE),
  'data.flip': Switch(),
  'data.randaugment': whole(0, 100),
  'data.randaugment_magnitude': Number(0, 10),
  'data.trivialaugment': Switch(),
  'data.mixup': Number(0, 1000),
  'data.cutmix': Number(0, 1000),
  'data.erasing': Number(0, 1),
  'data.class_weights': Choice(('none', 'balanced')),
  # On the 0..255 scale. A std below 1 reveals numbers on the 0..1 scale.
  'data.mean': Several(Number(0, 255), counts=(0, 1, 3)),
  'data.std': Several(Number(1, 255), counts=(0, 1, 3)),
}

# Fields -> other fields and values, of which one must hold: the fields do
# nothing otherwise.
ONLY_WITH: dict[tuple[str, ...], dict[str, tuple[Any, ...]]] = {
  (
    'model.remat', 'model.drop_path', 'connectivity.stem_source',
    'connectivity.scale', 'connectivity.start', 'connectivity.adapter',
  ): {'connectivity.level': ('block',)},
  ('connectivity.branch_identity',): {'connectivity.level': ('branch',)},
  ('connectivity.shuffled',): {'connectivity.rule': ('fixed_given',)},
  ('connectivity.live',): {'connectivity.rule': ('fixed_random',)},
  (
    'connectivity.gradient', 'connectivity.temperature', 'masks.optimizer',
    'masks.learning_rate', 'masks.schedule', 'masks.momentum',
  ): {'connectivity.learner': ('draws',)},
  ('connectivity.initial', 'connectivity.initial_spread'): {
    'connectivity.learner': ('draws', 'as_published')
  },
  ('connectivity.moments', 'connectivity.keep_readers'): {
    'connectivity.learner': spec.NARROWING
  },
  ('connectivity.measuring',): {'connectivity.learner': ('measured', 'fisher')},
  ('masks.momentum',): {'masks.optimizer': ('sgd',)},
  ('optimizer.nesterov',): {'optimizer.name': ('sgd',)},
  ('optimizer.steps_at',): {
    'optimizer.schedule': ('step',), 'masks.schedule': ('step',)
  },
  ('data.val_labels',): {'data.source': ('folder',)},
  ('data.image_column', 'data.label_column'): {'data.source': ('hf',)},
  ('data.randaugment', 'data.crop_scale'): {'data.crop': ('resized',)},
  ('data.class_weights',): {'data.multi_label': (False,)},
}  # fmt: skip

# Fields of version 0.1.0 that were removed, and their defaults. A config with
# the defaults means the same without them. docs/results_draws.md found
# no gain from other values.
REMOVED: dict[str, Any] = {
  'connectivity.gradient_every': 1,
  'masks.start': '0%',
  'masks.relative': 0.0,
}

# Fields that affect neither a run's weights nor its data, only how they are
# recorded. They may change each time a run goes on.
INCIDENTAL = (
  'checkpoint_every',
  'data.threads',
  'data.workers',
  'eval_batch_size',
  'evaluate_every',
  'keep_checkpoints',
  'log_every',
  'optimizer.shard',  # up to rounding
)


def default() -> ml_collections.ConfigDict:
  """Returns the config with all defaults; the comments explain each field."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # everything random is a function of (seed, step)
  # --mode=sweep trains every variant with every seed. A variant gives the
  # overrides of a row of the table: 'connectivity.rule=learned model.width=8'.
  config.seeds = ()  # (): the seed above
  config.variants = ()  # (): one row, without overrides
  # Begin with the arrays of this workdir or model; or of published weights in
  # torchvision's or timm's layout, FILE.safetensors or FILE.pth.
  config.init_from = ''
  config.batch_size = 128
  config.eval_batch_size = 500  # at most; rounded up to all devices
  config.duration = '300 epochs'  # connectivity phase and fine-tuning together
  config.evaluate_every = '10 epochs'  # on validation images, else test images
  config.checkpoint_every = '10 epochs'
  config.keep_checkpoints = 2  # so many of the newest; the best stays too
  config.log_every = '50 steps'  # a line in metrics.jsonl and TensorBoard

  config.model = ml_collections.ConfigDict()
  config.model.name = 'resnet38'  # list_models() names the networks
  config.model.width = 0  # channels of the first stage; 0: the network's own
  config.model.dtype = 'float32'  # of the activations; the rest is float32
  config.model.matmul_precision = 'default'  # see `create_model`
  config.model.head_norm = False  # a BatchNorm before the head
  # A training step normalises by statistics of the whole batch, or with
  # 'device' of the images on each device.
  config.model.batchnorm = 'global'
  config.model.remat = 'none'  # or 'block': blocks are recomputed, not kept
  # Stochastic depth: the share of images in which training leaves out the last
  # block's residual; it grows linearly with depth. 0: off.
  config.model.drop_path = 0.0
  config.model.version = '2'  # see `models.VERSION`; a workdir keeps its own

  # The last table of docs/method.md explains these fields. The study of
  # docs/results.md and docs/results_draws.md picked the defaults.
  config.connectivity = ml_collections.ConfigDict()
  wiring = spec.WiringSpec()  # has these defaults and their meanings
  config.connectivity.rule = wiring.rule
  config.connectivity.live = wiring.live  # 'fixed_random': so many live blocks
  config.connectivity.learner = wiring.learner  # how 'learned' learns
  # What a narrowing wiring begins with; 'previous': as an ordinary network.
  config.connectivity.start = wiring.start
  config.connectivity.topology = ''  # 'fixed_given': path of a topology.json
  config.connectivity.shuffled = False  # 'fixed_given': rows in random order
  config.connectivity.level = wiring.level  # or 'branch', for the ResNeXts
  config.connectivity.fan_in = wiring.fan_in  # K, sources per block or branch
  config.connectivity.phase = '25%'  # length of the connectivity phase
  config.connectivity.moments = 6  # N, when a narrowing wiring loses sources
  # What 'measured' may cost: as much arithmetic as so many training steps.
  config.connectivity.measuring = '10%'
  config.connectivity.keep_readers = True  # see `narrowing.narrowed`
  config.connectivity.stem_source = True  # may later blocks take the stem?
  config.connectivity.gradient = wiring.gradient  # see `connectivity.proxy`
  config.connectivity.initial = wiring.initial  # r starts here, ...
  config.connectivity.initial_spread = wiring.initial_spread  # ... +- this
  config.connectivity.temperature = wiring.temperature  # T falls from 1 to this
  config.connectivity.scale = wiring.scale  # of the sum of K terms
  config.connectivity.adapter = 'pool'  # for a source of another shape
  config.connectivity.branch_identity = wiring.identity  # s, of branches
  config.connectivity.batchnorm_batches = 50  # averaged at the freeze; 0: off

  config.masks = ml_collections.ConfigDict()  # how the real masks are trained
  config.masks.optimizer = 'sgd'  # or 'adam'
  config.masks.learning_rate = 1.0
  config.masks.schedule = 'constant'
  config.masks.momentum = 0.0

  config.optimizer = ml_collections.ConfigDict()  # how the weights are trained
  # 'adamw', 'lamb' or 'lion', with decoupled weight decay: set learning_rate
  # and weight_decay too, such as 1e-3 and 0.05 (Lion: 1e-4 and 0.5).
  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 0.1
  config.optimizer.body_rate = 1.0  # times the rate, of all but the head
  # Parameters that stay as they begin, by the beginnings of their names:
  # 'stem,stack.blocks.0'.
  config.optimizer.frozen = ''
  config.optimizer.schedule = 'step'
  config.optimizer.warmup = '0 steps'  # step s of w: rate times (s + 1) / w
  config.optimizer.steps_at = ('50%', '75%')  # 'step': times 0.1 at each
  config.optimizer.momentum = 0.9  # b1 of the others
  config.optimizer.nesterov = True
  config.optimizer.weight_decay = 5e-4
  config.optimizer.decay_all = False  # True: BatchNorm and biases as well
  config.optimizer.clip_norm = 0.0  # largest norm of the gradients; 0: any
  # The batch is computed in so many parts, for less memory. BatchNorm then
  # takes the statistics of each part.
  config.optimizer.accumulate_steps = 1
  # Each device keeps a part of weights, momentum and averages, not all of them.
  config.optimizer.shard = False
  config.optimizer.label_smoothing = 0.0
  config.optimizer.average = 0.0  # decay of averaged weights; 0: not used

  config.data = _default_data()
  return config


def _default_data() -> ml_collections.ConfigDict:
  data = ml_collections.ConfigDict()
  data.source = 'digits'
  data.name = ''  # the TFDS name, with source 'tfds'
  data.dir = ''  # folder of the files ('tfds': its data_dir); 'table': the file
  # Images may have several labels each, or none; of a table or of arrays.
  data.multi_label = False
  data.image_size = 0  # pixels of height and width; 0: as stored
  data.eval_resize = 0  # shorter side before the crop; 0: squashed, no crop
  data.val_labels = ''  # 'folder': list of the classes of a flat test/ or val/
  data.image_column = ''  # 'hf': the column of images; '': the only one
  data.label_column = ''  # 'hf': the column of classes; '': the only one
  data.test_fraction = 0.2  # for testing, of a set without test images
  data.validation = 0  # training images held out for choosing settings
  data.train_images = 0  # how many of the others to train on; 0: all
  data.skip_errors = False  # count and skip images that do not decode
  data.max_pixels = 128_000_000  # width times height; larger images are refused
  data.memory_gb = 8.0  # in 1e9 bytes; larger sets are decoded in training
  data.threads = 16  # that decode in a process; of all, at most one per core
  data.workers = 0  # processes that decode; 0: this one
  data.crop = 'pad'  # or 'resized', a random part of a random shape
  data.crop_scale = (0.08, 1.0)  # 'resized': share of the image's area
  data.pad = 4  # 'pad': pixels of padding before a random crop
  data.flip = True  # random horizontal flip
  data.randaugment = 0  # 'resized': RandAugment's N; 0: off
  data.randaugment_magnitude = 9.0  # RandAugment's M, 0 to 10
  # TrivialAugment: one operation an image, of any strength, on the host.
  data.trivialaugment = False
  data.mixup = 0.0  # alpha of mixup; 0: off
  data.cutmix = 0.0  # alpha of CutMix; with mixup, each batch has one of them
  data.erasing = 0.0  # share of images in which a random box is erased
  data.class_weights = 'none'  # or 'balanced': rare classes count more
  data.mean = ()  # of each channel, 0..255; (): measured
  data.std = ()
  return data


def wiring_spec(config: ml_collections.ConfigDict) -> spec.WiringSpec:
  """Returns the `WiringSpec` of a config: how it wires a network.

  Raises:
    InputError: see `WiringSpec`.
  """
  own = config.connectivity
  return spec.WiringSpec(
    level=own.level,
    fan_in=own.fan_in,
    rule=own.rule,
    live=own.live,
    learner=own.learner,
    start=own.start,
    gradient=own.gradient,
    temperature=own.temperature,
    initial=own.initial,
    initial_spread=own.initial_spread,
    scale=own.scale,
    identity=own.branch_identity,
  )


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns every leaf by its path: {'optimizer.warmup': '0 steps', ...}."""
  leaves: dict[str, Any] = {}
  for name in config:
    try:
      value = config[name]
    except ml_collections.config_dict.RequiredValueError:
      value = None  # a placeholder that nobody filled in
    if isinstance(value, ml_collections.ConfigDict):
      leaves |= {f'{name}.{path}': leaf for path, leaf in flat(value).items()}
    else:
      leaves[name] = value
  return leaves


def check(config: ml_collections.ConfigDict) -> None:
  """Raises InputError for a field or value that no run can use.

  Every config is checked here before it is used, wherever it comes from.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise InputError(
      f'the config is a {type(config).__name__}, not a ConfigDict such as'
      ' maskconnect_jax.config.default() returns'
    )
  known, given = flat(default()), flat(config)
  for path in given:
    if path not in known:
      raise InputError(unknown_field(path))
  check_values(given)
  if bool(given['connectivity.topology']) != (
    given['connectivity.rule'] == 'fixed_given'
  ):
    raise InputError(
      "config.connectivity.rule='fixed_given' and config.connectivity.topology,"
      ' the path of a topology.json, go together'
    )
  for paths, others in ONLY_WITH.items():
    if any(given[other] in values for other, values in others.items()):
      continue
    for path in paths:
      if given[path] != known[path]:
        needs = ' or '.join(
          f'config.{other}={value!r}'
          for other, values in others.items()
          for value in values
        )
        found = ' and '.join(repr(given[other]) for other in others)
        raise InputError(
          f'config.{path}={given[path]!r} is for {needs} alone, not for'
          f' {found}; leave it at {known[path]!r}'
        )
  _check_data(config.data)


def check_values(given: dict[str, Any]) -> None:
  """Raises InputError for a missing field, or a value that FIELDS forbids.

  Args:
    given: every field by its path, as `flat` returns. It may hold unknown
      fields.
  """
  for path, field in FIELDS.items():
    if path not in given:
      raise InputError(
        f'config.{path} is missing; its default is {flat(default())[path]!r}'
      )
    if fault := field.wrong(given[path]):
      raise InputError(f'config.{path}={shown(given[path])} {fault}')


def _check_data(data: ml_collections.ConfigDict) -> None:
  """Raises InputError for fields of `config.data` that contradict others."""
  if data.multi_label and data.source not in ('table', 'arrays'):
    raise InputError(
      'config.data.multi_label=True needs several labels an image, which'
      " config.data.source='table' and 'arrays' can give and"
      f' {data.source!r} cannot'
    )
  smaller, larger = data.crop_scale
  if smaller > larger:
    raise InputError(
      f'config.data.crop_scale={shown(data.crop_scale)} must be two shares, the'
      ' smaller first, such as (0.08, 1.0)'
    )
  if data.trivialaugment and data.randaugment:
    raise InputError(
      'config.data.trivialaugment and config.data.randaugment are two ways to'
      ' one end; leave one of them out'
    )
  if data.mean and data.std and len(data.mean) != len(data.std):
    raise InputError(
      f'config.data.mean={shown(data.mean)} and'
      f' config.data.std={shown(data.std)} must have as many values'
    )
  if data.eval_resize and not 0 < data.image_size <= data.eval_resize:
    raise InputError(
      f'config.data.eval_resize={data.eval_resize} needs a smaller'
      f' config.data.image_size to crop to, not {data.image_size}'
    )


def check_is_one_run(config: ml_collections.ConfigDict) -> None:
  """Raises InputError for a config of several runs."""
  for name in ('seeds', 'variants'):
    if config[name]:
      raise InputError(
        f'config.{name}={config[name]} are several runs; --mode=sweep trains'
        f' them, --config.{name}="()" leaves them out'
      )


def check_files(config: ml_collections.ConfigDict) -> None:
  """Raises InputError if the path in a field does not exist."""
  for path, value in flat(config).items():
    unused = path == 'data.dir' and config.data.source in ('digits', 'arrays')
    if not isinstance(FIELDS[path], File) or not value or unused:
      continue
    name = f'config.{path}'
    if not given_path(value, name).exists():
      raise InputError(f'{name}={shown(value)} does not exist')


def given_path(path: str | os.PathLike[str], name: str) -> Path:
  """Returns a path that a user gave, ~ expanded; see `fields.expanded`.

  Config fields keep the given path, which is expanded only where it is used. So
  config.json means the same to another user.

  Args:
    path: the path as given.
    name: the flag or field that holds the path, for the message.

  Returns:
    The path without a leading ~.

  Raises:
    InputError: no file can have this path.
  """
  try:
    return expanded(path)
  except ValueError as error:
    raise InputError(f'{name}={shown(os.fspath(path))} {error}') from error


def stored(workdir: Path) -> ml_collections.ConfigDict:
  """Returns the config that a workdir was written with.

  A field that is newer than the workdir has its default, except model.version,
  which is '1', and connectivity.learner, which is 'draws'.

  Raises:
    InputError: there is no config, it is damaged, or it gives a field of
      REMOVED another value than its default.
  """
  config, removed = record_of(workdir)
  if used := [path for path, v in removed.items() if v != REMOVED[path]]:
    names = ', '.join(f'config.{path}={shown(removed[path])}' for path in used)
    raise InputError(
      f'{workdir} was written with {names}, which this version cannot train;'
      ' go on with version 0.1.0, or give another --workdir'
    )
  return config


def record_of(
  workdir: Path,
) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
  """Returns a workdir's config, and its values of the fields of REMOVED.

  It is for code that reports on runs; code that trains needs `stored`.

  Returns:
    The config, and {field: value} for each field of REMOVED.

  Raises:
    InputError: there is no config, or it is damaged.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise InputError(
      f'{workdir} holds no config.json; give the workdir of a run, or --config'
    )
  config, removed = default(), dict(REMOVED)
  remedy = 'give another --workdir'
  record = files.read_json(path, dict[str, Any], remedy=remedy)
  try:
    for field in REMOVED:
      section, _, name = field.partition('.')
      if name in record.get(section, {}):
        removed[field] = record[section].pop(name)
    with config.ignore_type():  # JSON has lists where the config has tuples
      config.update(record)
    if 'version' not in record.get('model', {}):
      config.model.version = '1'
    if 'learner' not in record.get('connectivity', {}):
      config.connectivity.learner = 'draws'
    check_values(flat(config))
  except (
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
  ) as error:
    raise InputError(f'{path} is damaged: {error}; {remedy}') from error
  return config, removed


def essential(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields that tell runs apart: `flat` without INCIDENTAL.

  Values are as in JSON: lists for tuples.
  """
  plain = flat(ml_collections.ConfigDict(json.loads(config.to_json())))
  return {path: v for path, v in plain.items() if path not in INCIDENTAL}


def unknown_field(path: str) -> str:
  """Returns the message for an unknown field; it names the nearest field."""
  if path in REMOVED:
    return (
      f'config.{path} is not a config field any more, since it brought nothing'
      ' (docs/results_draws.md); leave it out'
    )
  known = list(flat(default()))
  near = difflib.get_close_matches(path, known, n=1, cutoff=0.4)
  hint = (
    f'did you mean config.{near[0]}?'
    if near
    else ('maskconnect_jax/config.py lists the fields')
  )
  return f'config.{path} is not a config field; {hint}'
