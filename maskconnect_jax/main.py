r"""Learns how the blocks of a network are wired. Each mode is one task.

  python -m maskconnect_jax.main --config=configs/digits.py \
      --workdir=runs/digits
  python -m maskconnect_jax.main --mode=describe --config=configs/digits.py
  python -m maskconnect_jax.main --mode=evaluate --workdir=runs/digits
  python -m maskconnect_jax.main --mode=predict --workdir=runs/digits \
      --images=photos
  python -m maskconnect_jax.main --mode=export --workdir=runs/digits \
      --format=onnx --output=digits.onnx
  python -m maskconnect_jax.main --mode=serve --workdir=runs/digits --port=8000
  python -m maskconnect_jax.main --mode=sweep --config=configs/digits.py \
      --workdir=runs/rules --config.seeds=0,1,2 \
      --config.variants=connectivity.rule=learned \
      --config.variants='connectivity.rule=fixed_random connectivity.fan_in=4'
  python -m maskconnect_jax.main --mode=summarize --workdirs=runs/rules
  python -m maskconnect_jax.main --mode=dynamics --workdirs=runs/rules
  python -m maskconnect_jax.main --mode=report --workdir=runs/digits
  python -m maskconnect_jax.main --mode=prepare --images=mini_imagenet

pip also installs this program as the command `maskconnect`. The package
contains its configs: --config=digits and --config=configs/digits.py find them
from any folder.

--config.FIELD=VALUE overrides any config field, such as
--config.connectivity.rule=fixed_random.
"""

from __future__ import annotations

if __name__ == '__main__':  # before JAX is imported, which takes seconds
  from maskconnect_jax import command

  command.begin()

import contextlib
import json
import logging as standard_logging
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np
from absl import app, logging

from maskconnect_jax import command, files, flags, names
from maskconnect_jax import config as config_lib
from maskconnect_jax.data import image_files
from maskconnect_jax.errors import InputError
from maskconnect_jax.flags import (
  FIGURE,
  IMAGES,
  JSON,
  MODE,
  the_config,
  the_config_or_stored,
  the_workdir,
  the_workdirs,
)
from maskconnect_jax.run import (
  bucket,
  compilation_cache,
  cores,
  describe,
  distributed,
  evaluation,
  export,
  finish,
  inference,
  report,
  train,
  workdirs,
)
from maskconnect_jax.study import dynamics, summarize, sweep
from maskconnect_jax.study import report as study_report


def main(argv: Sequence[str]) -> None:
  """Runs one mode; with --multihost, together with the other processes.

  Args:
    argv: the program's name; all flags have been parsed and removed.

  Raises:
    InputError: the input cannot be used.
  """
  if len(argv) > 1:
    raise InputError(f'{argv[1]!r} is no flag; write --flag=value')
  if flags.MULTIHOST.value:
    if MODE.value not in ('train', 'describe'):
      raise InputError(
        f'--mode={MODE.value} is for one machine; omit --multihost'
      )
    distributed.initialize()
  with distributed.failing_together():
    run_mode()


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the command line; --help prints this module's docstring."""
  return flags.parse(argv, __doc__)


def run_mode() -> None:
  """Runs the mode that --mode names."""
  {
    'train': run_train,
    'evaluate': run_evaluate,
    'describe': run_describe,
    'predict': run_predict,
    'export': run_export,
    'serve': run_serve,
    'sweep': run_sweep,
    'summarize': run_summarize,
    'dynamics': run_dynamics,
    'report': run_report,
    'prepare': run_prepare,
  }[MODE.value]()


def run_train() -> None:
  """Trains and prints the result; without --config, uses the workdir's own."""
  workdir = the_workdir()
  result = train.train(
    _config(workdir), workdir, profile_steps=flags.PROFILE.value
  )
  if result.interrupted:
    sys.exit(128 + result.interrupted)
  if jax.process_index() == 0:
    command.tell(finish.table(result.summary, workdir))


def run_evaluate() -> None:
  """Prints the scores of a model on its test images, as JSON.

  With --json, also those of each class.
  """
  with inference.reading(the_workdir(), also=['config.json']) as workdir:
    config = flags.CONFIG.value or config_lib.stored(workdir)
    config_lib.check(config)
    cores.use(cores.for_batches(config.eval_batch_size, config.data))
    distributed.check_platform()
    model = inference.load(workdir)
  scores = evaluation.of_model(model, config)
  record: dict[str, Any] = {
    **scores.named('test'),
    'num_test_examples': scores.count,
  }
  if JSON.value:
    record |= scores.by_class(model.classes)
  print(json.dumps(files.finite(record), allow_nan=False))


def run_describe() -> None:
  """Prints the network and the cost of a step."""
  graph, workdir = flags.GRAPH.value, flags.WORKDIR.value
  if graph:
    describe.check_graph(graph)
  config = _config(workdir)
  if workdir:
    with bucket.reading(workdir, ['topology.json']) as folder:
      print(describe.describe(config, graph, folder))
  else:
    print(describe.describe(config, graph))
  if graph:
    print(f'graph        {graph}')


def _config(workdir: Path | str | None) -> ml_collections.ConfigDict:
  """Returns --config, or without it the config stored in a workdir."""
  if flags.CONFIG.value is not None or not workdir:
    return the_config()
  with bucket.reading(workdir, ['config.json']) as folder:
    return the_config_or_stored(folder)


def run_predict() -> None:
  """Prints path, class and probability of each image, one line each.

  Of a multi-label model the line has each label above 0.5 and its probability.
  An image that cannot be read is named on stderr, does not stop the others, and
  makes the status 2. The files of a folder that are no images are also named on
  stderr.
  """
  if not IMAGES.value:
    raise InputError('--mode=predict needs --images, a file or a folder')
  # How many of them share a batch is known once the model is loaded.
  cores.use(cores.available())
  distributed.check_platform()
  found = [image_files.split(image_files.find(name)) for name in IMAGES.value]
  model = inference.load(the_workdir())
  for folder in found:
    if note := folder.note():
      print(f'note: {note}', file=sys.stderr)
  paths = [path for folder in found for path in folder.files]
  unread = []

  def prepared() -> Iterator[tuple[Path, np.ndarray]]:
    for path in paths:
      try:
        yield path, model.prepare(path)
      except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        unread.append(path)

  for path, row in model.rows(prepared()):
    if JSON.value:
      record = {'image': names.encodable(path)} | model.answer(row)
      line = json.dumps(files.finite(record), allow_nan=False)
    else:
      line = names.one_line(path)
      for label, probability in model.best(row):
        line += f'\t{names.one_line(label)}\t{probability:.4f}'
    print(line, flush=True)  # so that no signal loses a line
  if unread:
    sys.exit(2)


def run_export() -> None:
  """Writes the model of --workdir as a file, and prints the file's path."""
  workdir, kind = the_workdir(), flags.FORMAT.value
  path = flags.OUTPUT.value or a_folder(workdir) / f'model.{kind}'
  files.check_output(path)
  distributed.check_platform()
  export.write(inference.load(workdir), kind, path)
  print(path)


def run_serve() -> None:
  """Serves the model of --workdir over HTTP until a signal."""
  try:
    from maskconnect_jax.serve import server
  except ImportError as error:  # starlette and uvicorn are an extra
    raise InputError(
      f"a package is missing ({error}); pip install 'maskconnect_jax[serve]'"
    ) from error
  cores.use(cores.available())
  distributed.check_platform()
  number = server.serve(
    inference.load(the_workdir()),
    host=flags.HOST.value,
    port=flags.PORT.value,
    begun=lambda address: command.tell(f'serving at {address}'),
  )
  sys.exit(128 + number if number else 0)


def run_sweep() -> None:
  """Trains many runs and prints their table."""
  config, workdir = the_config(), a_folder(the_workdir())
  sys.exit(sweep.sweep(config, workdir, flags.PARALLEL.value))


def run_summarize() -> None:
  """Prints the table of the runs in --workdirs."""
  csv = flags.CSV.value
  if FIGURE.value:
    summarize.check_figure(FIGURE.value)
  if csv:
    files.check_output(csv)
  with _read_workdirs() as places:
    table = summarize.summarize(list(places))
    if FIGURE.value:
      table.draw(FIGURE.value, flags.AGAINST.value)
    if csv:
      files.write_text(csv, bucket.named(table.csv(), places))
    print(bucket.named(table.markdown(), places), end='')


def run_dynamics() -> None:
  """Prints how the real masks of the runs in --workdirs moved."""
  with _read_workdirs() as places:
    report = dynamics.report(list(places), FIGURE.value)
    print(bucket.named(report, places), end='')


@contextlib.contextmanager
def _read_workdirs() -> Iterator[dict[Path, str]]:
  """Yields a local folder for each of --workdirs, and its name."""
  with contextlib.ExitStack() as stack:
    yield {
      stack.enter_context(
        bucket.reading(workdir, workdirs.FILES, flag='--workdirs')
      ): str(workdir).rstrip('/')
      for workdir in the_workdirs()
    }


def run_report() -> None:
  """Writes the page of a run, or of the runs in --workdirs; prints its path."""
  if not flags.WORKDIRS.value:
    workdir = a_folder(the_workdir())
    if flags.HTML.value:
      raise InputError(
        f'--html is for several runs; the page of one is {workdir}/report.html'
      )
    if not flags.FOLLOW.value:
      print(report.write(workdir))
      return
    print(report.follow(workdir, lambda line: print(line, file=sys.stderr)))
    return
  if flags.FOLLOW.value or flags.WORKDIR.value:
    raise InputError(
      '--follow and --workdir are for the page of one run; omit them, or'
      ' --workdirs'
    )
  print(
    study_report.write([a_folder(w) for w in the_workdirs()], flags.HTML.value)
  )


def a_folder(workdir: Path | str) -> Path:
  """Returns a workdir to which this mode writes; raises for one in a bucket."""
  if isinstance(workdir, str):
    raise InputError(
      f'{workdir}: --mode={flags.MODE.value} writes to a folder; copy the run'
      ' from the bucket, or mount the bucket'
    )
  return workdir


def run_prepare() -> None:
  """Prepares Mini-ImageNet for TFDS, and prints its folder."""
  try:
    from maskconnect_jax.data import mini_imagenet
  except ImportError as error:  # TFDS is an extra
    raise InputError(
      f"a package is missing ({error}); pip install 'maskconnect_jax[tfds]'"
    ) from error
  if len(IMAGES.value) != 1:
    raise InputError('--mode=prepare needs --images=DIR, one folder')
  data_dir, expect = flags.DATA_DIR.value, flags.EXPECT.value
  print(mini_imagenet.report(IMAGES.value[0], data_dir, expect))


def run() -> None:
  """Entry point: bad input is one line on stderr and exit status 2."""
  logging.set_verbosity(logging.WARNING)
  logging.use_absl_handler()
  # Without the date, thread and line of code that absl puts before a message.
  logging.get_absl_handler().setFormatter(
    standard_logging.Formatter('%(levelname)s: %(message)s')
  )
  compilation_cache.use()
  command.enter()
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
    # An error with a file's name comes from the system: a folder that cannot be
    # written to, a file that cannot be read.
    if error.filename is None:
      raise
    _fail(f'{error.filename}: {error.strerror}')
  except KeyboardInterrupt:
    print(
      'interrupted; a run goes on from its newest checkpoint', file=sys.stderr
    )
    sys.exit(128 + signal.SIGINT)


def _fail(message: str) -> NoReturn:
  """Prints the message, and ends all processes of the run with status 2."""
  print(f'error: {message}', file=sys.stderr)
  # The flags may be unparsable, and on this host alone: so read sys.argv.
  joining = any(a.lstrip('-') == 'multihost' for a in sys.argv[1:])
  distributed.fail(message, joining=joining)
  sys.exit(2)


if __name__ == '__main__':
  run()
