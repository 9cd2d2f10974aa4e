r"""Trains, evaluates, describes and predicts from the command line.

  python -m maskconnect_jax.main --config=configs/digits.py \
      --workdir=runs/digits
  python -m maskconnect_jax.main --mode=describe --config=configs/digits.py
  python -m maskconnect_jax.main --mode=evaluate --workdir=runs/digits
  python -m maskconnect_jax.main --mode=predict --workdir=runs/digits \
      --images=photos
  python -m maskconnect_jax.main --mode=sweep --config=configs/digits.py \
      --workdir=runs/rules --config.seeds=0,1,2 \
      --config.variants=connectivity.rule=learned \
      --config.variants='connectivity.rule=fixed_random connectivity.fan_in=4'
  python -m maskconnect_jax.main --mode=summarize --workdirs=runs/rules

Any config field is overridden by --config.FIELD=VALUE, such as
--config.connectivity.rule=fixed_random.
"""

from __future__ import annotations

if __name__ == '__main__':  # before the seconds that importing JAX takes
  from maskconnect_jax import command

  command.begin()

import gc
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from maskconnect_jax import arguments, command, files, names
from maskconnect_jax import config as config_lib
from maskconnect_jax.data import image_files
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import (
  compilation_cache,
  describe,
  distributed,
  evaluation,
  finish,
  inference,
  train,
)
from maskconnect_jax.study import summarize, sweep

PATH = arguments.PathParser()
AS_TEXT: flags.ArgumentSerializer[Path] = flags.ArgumentSerializer()

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment, such as configs/digits.py.'
)
flags.FLAGS['config'].parser = arguments.ConfigParser()
WORKDIR = flags.DEFINE(
  PATH,
  'workdir',
  None,
  'Where a run writes, and where it goes on from.',
  serializer=AS_TEXT,
)
MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'evaluate', 'describe', 'predict', 'sweep', 'summarize'],
  'train (goes on from the newest checkpoint in the workdir), evaluate (the'
  ' finished model on the test images), describe (the network and the cost of'
  ' a step), predict (a class for each of --images), sweep (trains every one'
  ' of config.variants with every one of config.seeds) or summarize (the table'
  ' of the runs in --workdirs).',
)
IMAGES = flags.DEFINE_multi(
  PATH, AS_TEXT, 'images', [], 'predict: a file or a folder; may be repeated.'
)
JSON = flags.DEFINE_bool(
  'json', False, 'predict: print one JSON object per line.'
)
WORKDIRS = flags.DEFINE_multi(
  PATH,
  AS_TEXT,
  'workdirs',
  [],
  'summarize: a run, or a folder of runs; may be repeated.',
)
CSV = flags.DEFINE(
  PATH,
  'csv',
  None,
  'summarize: a file for the table as CSV.',
  serializer=AS_TEXT,
)
FIGURE = flags.DEFINE(
  PATH,
  'figure',
  None,
  'summarize: FILE.png, a picture of it; also FILE.svg.',
  serializer=AS_TEXT,
)
PARALLEL = flags.DEFINE_integer(
  'parallel',
  None,
  'sweep: runs at once, which share the devices. By default one per GPU, and'
  ' one in all on CPU and TPU.',
  lower_bound=1,
)
MULTIHOST = flags.DEFINE_bool(
  'multihost', False, 'Join the other processes of a pod or cluster.'
)


def main(argv: Sequence[str]) -> None:
  """Runs one mode, in this process and in those it joins."""
  if len(argv) > 1:
    raise InputError(f'{argv[1]!r} is no flag; write --flag=value')
  if MULTIHOST.value:
    if MODE.value not in ('train', 'describe'):
      raise InputError(
        f'--mode={MODE.value} is for one machine; omit --multihost'
      )
    distributed.initialize()
  with distributed.failing_together():
    run_mode()


def run_mode() -> None:
  """Runs what --mode says."""
  if MODE.value not in ('sweep', 'summarize'):  # which compute nothing here
    distributed.check_platform()
  {
    'train': run_train,
    'evaluate': run_evaluate,
    'describe': run_describe,
    'predict': run_predict,
    'sweep': run_sweep,
    'summarize': run_summarize,
  }[MODE.value]()


def run_train() -> None:
  """Trains and prints the result; a workdir brings its own config."""
  workdir = the_workdir()
  result = train.train(the_config_or_stored(), workdir)
  if result.interrupted:
    sys.exit(128 + result.interrupted)
  if jax.process_index() == 0:
    command.tell(finish.table(result.summary, workdir))


def run_evaluate() -> None:
  """Prints what a finished model scores on its test images, as JSON."""
  workdir = the_workdir()
  config = CONFIG.value or config_lib.stored(workdir)
  config_lib.check(config)
  scores = evaluation.of_model(inference.load(workdir), config)
  record = scores.named('test') | {'num_test_examples': scores.count}
  print(json.dumps(files.finite(record), allow_nan=False))


def run_describe() -> None:
  """Prints the network and what a step costs."""
  print(describe.describe(the_config_or_stored()))


def run_predict() -> None:
  """Prints path, class and probability of each image, one line each.

  An image that cannot be read is named on stderr, and does not stop the rest;
  so is what a folder holds that is no image.
  """
  if not IMAGES.value:
    raise InputError('--mode=predict needs --images, a file or a folder')
  found = [image_files.split(image_files.find(name)) for name in IMAGES.value]
  model = inference.load(the_workdir())
  for folder in found:
    if note := folder.note():
      print(f'note: {note}', file=sys.stderr)
  paths = [path for folder in found for path in folder.files]
  classes = [names.encodable(name) for name in model.classes]
  unread = []

  def prepared() -> Iterator[tuple[Path, np.ndarray]]:
    for path in paths:
      try:
        yield path, model.prepare(path)
      except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        unread.append(path)

  for path, row in model.rows(prepared()):
    best = int(row.argmax())
    if JSON.value:
      record = {
        'image': names.encodable(path),
        'class': classes[best],
        'probability': float(row[best]),
        'probabilities': dict(zip(classes, row.tolist(), strict=True)),
      }
      line = json.dumps(files.finite(record), allow_nan=False)
    else:
      label = names.one_line(classes[best])
      line = f'{names.one_line(path)}\t{label}\t{row[best]:.4f}'
    print(line, flush=True)  # a line is not lost to a signal
  if unread:
    sys.exit(2)


def run_sweep() -> None:
  """Trains many runs and prints their table."""
  sys.exit(sweep.sweep(the_config(), the_workdir(), PARALLEL.value))


def run_summarize() -> None:
  """Prints the table of the runs in --workdirs."""
  if not WORKDIRS.value:
    raise InputError(
      '--mode=summarize needs --workdirs, such as --workdirs=runs/rules'
    )
  if FIGURE.value:
    summarize.check_figure(FIGURE.value)
  if CSV.value:
    files.check_output(CSV.value)
  table = summarize.summarize(WORKDIRS.value)
  if FIGURE.value:
    table.draw(FIGURE.value)
  if CSV.value:
    files.write_text(CSV.value, table.csv())
  print(table.markdown(), end='')


def the_config() -> ml_collections.ConfigDict:
  """Returns --config. Raises InputError without it."""
  if CONFIG.value is None:
    raise InputError(
      f'--mode={MODE.value} needs --config, such as --config=configs/digits.py'
    )
  return CONFIG.value


def the_config_or_stored() -> ml_collections.ConfigDict:
  """Returns --config, or without it the one that --workdir was written with."""
  if CONFIG.value is not None or not WORKDIR.value:
    return the_config()
  if (WORKDIR.value / 'config.json').exists():
    return config_lib.stored(WORKDIR.value)
  return the_config()


def the_workdir() -> Path:
  """Returns --workdir. Raises InputError without it."""
  if not WORKDIR.value:
    raise InputError(
      f'--mode={MODE.value} needs --workdir, such as --workdir=runs/digits'
    )
  path: Path = WORKDIR.value
  return path


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the command line; what is wrong with it is an InputError."""
  given = [a.lstrip('-').partition('=')[0] for a in argv[1:]]
  fields = [g.removeprefix('config.') for g in given if g[:7] == 'config.']
  if fields and 'config' not in given:
    raise InputError(
      f'--config.{fields[0]} changes a field of --config, which is missing;'
      ' give it too, such as --config=configs/digits.py'
    )
  known = config_lib.flat(config_lib.default())
  try:
    return flags.FLAGS([_quoted(argument) for argument in argv])
  except flags.IllegalFlagValueError as error:
    if isinstance(error.__context__, InputError):  # of --config
      raise error.__context__ from error
    for field in fields:
      if field in known and f'--config.{field}=' in str(error):
        raise InputError(
          f'{_one_line(error)}; give {config_lib.FIELDS[field].noun}, such as'
          f' {known[field]!r}'
        ) from error
    raise InputError(f'{_one_line(error)}; --help says what is') from error
  except flags.Error as error:
    raise InputError(f'{_one_line(error)}; --help lists the flags') from error
  except (AttributeError, KeyError, TypeError) as error:
    # An unknown --config.field; or a section as one.
    for field in fields:
      if field not in known:
        raise InputError(config_lib.unknown_field(field)) from error
    raise


def _quoted(argument: str) -> str:
  """Makes a variant, which may hold spaces, one string to ml_collections."""
  flag, _, value = argument.partition('=')
  if flag.lstrip('-') != 'config.variants' or value[:1] in ('(', "'", '"'):
    return argument
  return f'{flag}={value!r}'


def _one_line(error: Exception) -> str:
  return str(error).splitlines()[0].rstrip('.')


def run() -> None:
  """Entry point: bad input is one line on stderr and exit status 2."""
  logging.set_verbosity(logging.WARNING)
  logging.use_absl_handler()
  compilation_cache.use()
  # What imports have made stays: looking through it again and again is a fifth
  # of the time that a step takes to trace.
  gc.freeze()
  try:
    with command.results():
      app.run(main, flags_parser=parse_flags)
  except InputError as error:
    _fail(str(error))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    _fail(
      f'{str(error).splitlines()[0]} Lower config.batch_size,'
      ' config.eval_batch_size or config.data.image_size; a block-level run'
      ' takes less with config.model.remat=block'
    )
  except OSError as error:
    # Of the system, not of the program: a folder that cannot be written to, a
    # file that cannot be read.
    if error.filename is None:
      raise
    _fail(f'{error.filename}: {error.strerror}')
  except KeyboardInterrupt:
    print(
      'interrupted; a run goes on from its newest checkpoint', file=sys.stderr
    )
    sys.exit(128 + signal.SIGINT)


def _fail(message: str) -> NoReturn:
  """Ends with one line, and has the other processes of a run end with it."""
  print(f'error: {message}', file=sys.stderr)
  # What cannot be parsed may be wrong on this host alone.
  joining = any(a.lstrip('-') == 'multihost' for a in sys.argv[1:])
  distributed.fail(message, joining=joining)
  sys.exit(2)


if __name__ == '__main__':
  run()
