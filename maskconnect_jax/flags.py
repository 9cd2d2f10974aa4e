"""The flags of the command line. A wrong flag gives a message of one line."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from maskconnect_jax import config as config_lib
from maskconnect_jax import fields
from maskconnect_jax.errors import InputError

MODES = (
  'train', 'evaluate', 'describe', 'predict', 'export', 'serve', 'sweep',
  'summarize', 'dynamics', 'report', 'prepare',
)  # fmt: skip
_HELP = ('-h', '-help', '--help', '-helpshort', '--helpshort')
BUCKETS = ('gs://', 's3://')  # how the address of a workdir may begin
_MODULE = 'config_config'  # the name under which a config file is imported


class PathParser(flags.ArgumentParser[Path]):
  """Parses a path; a ~ at its beginning is a home directory."""

  def parse(self, argument: str | os.PathLike[str]) -> Path:
    """Returns the path. Raises ValueError if no file can have it."""
    if not os.fspath(argument):
      raise ValueError('give a path')
    return fields.expanded(argument)

  def flag_type(self) -> str:
    """The type that --help shows."""
    return 'path'


class WorkdirParser(PathParser):
  """Parses a path, or the address of a folder in a bucket, which stays text."""

  def parse(self, argument: str | os.PathLike[str]) -> Any:
    """Returns the path or address. Raises ValueError if it can be neither."""
    text = os.fspath(argument)
    return text if text.startswith(BUCKETS) else super().parse(text)


class ConfigParser(flags.ArgumentParser[ml_collections.ConfigDict]):
  """Parses FILE.py, or FILE.py:WORD, to the config that get_config() returns.

  WORD is the argument of get_config(). If FILE.py does not exist, the package's
  own configs are searched: 'digits' and 'configs/digits.py' find one from any
  folder.

  The parser of ml_collections is not used: it delays some errors of a file
  until the config is used, and lets others through unchanged.
  """

  def parse(self, path: str) -> ml_collections.ConfigDict:
    """Returns the config, locked. Raises InputError."""
    name, colon, word = path.partition(':')
    file = config_lib.given_path(name, '--config')
    if not file.is_file():
      file = _shipped(path, file)
    get_config = None
    try:
      get_config = getattr(_imported(file), 'get_config', None)
      words = [word] if colon else []
      config = get_config(*words) if callable(get_config) else None
    except InputError as error:  # such as an unknown WORD
      text = ' '.join(str(error).split())
      raise InputError(f'--config={path}: {text}') from error
    except (Exception, SystemExit) as error:  # the file may run any code
      raise _no_config_file(path, _reason(error, file)) from error
    if not callable(get_config):
      raise _no_config_file(path, 'it has no get_config()')
    if not isinstance(config, ml_collections.ConfigDict):
      kind = 'None' if config is None else f'a {type(config).__name__}'
      raise _no_config_file(path, f'get_config() returns {kind}')
    config = ml_collections.ConfigDict(config)
    config.lock()
    return config


_PATH = PathParser()
_WORKDIR = WorkdirParser()
_AS_TEXT: flags.ArgumentSerializer[Path] = flags.ArgumentSerializer()


def _define_path(
  name: str, text: str, parser: PathParser = _PATH
) -> flags.FlagHolder[Any]:
  """Defines a flag whose value is what the parser returns, or None."""
  return flags.DEFINE(parser, name, None, text, serializer=_AS_TEXT)


CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment, such as digits or my_config.py.'
)
flags.FLAGS['config'].parser = ConfigParser()
WORKDIR = _define_path(
  'workdir',
  'Where a run writes, and where it goes on from: a folder, or gs://BUCKET/RUN'
  ' or s3://BUCKET/RUN.',
  _WORKDIR,
)
MODE = flags.DEFINE_enum(
  'mode',
  'train',
  MODES,
  'train (goes on from the newest checkpoint in the workdir), evaluate (the'
  ' finished model on the test images), describe (the network and the cost of'
  ' a step), predict (a class for each of --images), export (the model as a'
  ' file for other programs), serve (the model over HTTP), sweep (trains every'
  ' one'
  ' of config.variants with every one of config.seeds), summarize (the table'
  ' of the runs in --workdirs), dynamics (what their real masks did while they'
  ' were learned), report (a page to look at, of the run in --workdir or of the'
  ' runs in --workdirs) or prepare (Mini-ImageNet, from a folder of --images).',
)
IMAGES = flags.DEFINE_multi(
  _PATH,
  _AS_TEXT,
  'images',
  [],
  'predict: a file or a folder; may be repeated. prepare: the folder.',
)
JSON = flags.DEFINE_bool(
  'json',
  False,
  'predict: print one JSON object per line. evaluate: also each class.',
)
FORMAT = flags.DEFINE_enum(
  'format',
  'stablehlo',
  ('stablehlo', 'onnx'),
  'export: stablehlo, which any program with JAX runs, or onnx.',
)
OUTPUT = _define_path(
  'output', 'export: the file to write; by default WORKDIR/model.FORMAT.'
)
HOST = flags.DEFINE_string(
  'host',
  '127.0.0.1',
  'serve: the address to listen at; by default this machine alone can ask.',
)
PORT = flags.DEFINE_integer(
  'port',
  8000,
  'serve: the port; 0 takes a free one.',
  lower_bound=0,
  upper_bound=65535,
)
WORKDIRS = flags.DEFINE_multi(
  _WORKDIR,
  _AS_TEXT,
  'workdirs',
  [],
  'summarize, dynamics, report: a run, or a folder of runs; may be repeated.',
)
CSV = _define_path('csv', 'summarize: a file for the table as CSV.')
FIGURE = _define_path(
  'figure',
  'summarize, dynamics: FILE.png, a picture of it; also FILE.svg. dynamics'
  ' draws up to six runs.',
)
GRAPH = _define_path(
  'graph',
  'describe: a file for the topology as a graph, FILE.svg, FILE.dot or'
  ' FILE.graphml.',
)
HTML = _define_path(
  'html', 'report: FILE.html, the page; by default report.html in the folder.'
)
FOLLOW = flags.DEFINE_bool(
  'follow',
  False,
  'report: write the page of --workdir again while its run goes on.',
)
AGAINST = flags.DEFINE_enum(
  'against',
  None,
  ('parameters', 'multiply_adds'),
  'summarize: what --figure draws the accuracy against; counted after pruning.'
  ' By default every seed is a dot.',
)
PARALLEL = flags.DEFINE_integer(
  'parallel',
  None,
  'sweep: runs at once, which share the devices. By default one per GPU, and'
  ' one in all on CPU and TPU.',
  lower_bound=1,
)
PROFILE = flags.DEFINE_integer(
  'profile',
  0,
  'train: trace so many steps into WORKDIR/profile, for TensorBoard.',
  lower_bound=0,
)
DATA_DIR = _define_path(
  'data_dir', 'prepare: where TFDS keeps its sets; ~/tensorflow_datasets.'
)
EXPECT = flags.DEFINE_string(
  'expect', None, 'prepare: fail if the manifest has another SHA-256.'
)
MULTIHOST = flags.DEFINE_bool(
  'multihost', False, 'Join the other processes of a pod or cluster.'
)


def the_config() -> ml_collections.ConfigDict:
  """Returns --config. Raises InputError without it."""
  if CONFIG.value is None:
    raise InputError(
      f'--mode={MODE.value} needs --config, such as --config=configs/digits.py'
    )
  return CONFIG.value


def the_config_or_stored(workdir: Path) -> ml_collections.ConfigDict:
  """Returns --config, or without it the config stored in a workdir.

  Raises:
    InputError: there is neither, or the stored config cannot be used.
  """
  if CONFIG.value is None and (workdir / 'config.json').exists():
    return config_lib.stored(workdir)
  return the_config()


def the_workdir() -> Path | str:
  """Returns --workdir. Raises InputError without it."""
  if not WORKDIR.value:
    raise InputError(
      f'--mode={MODE.value} needs --workdir, such as --workdir=runs/digits'
    )
  workdir: Path | str = WORKDIR.value
  return workdir


def the_workdirs() -> Sequence[Path | str]:
  """Returns --workdirs. Raises InputError without any."""
  if not WORKDIRS.value:
    raise InputError(
      f'--mode={MODE.value} needs --workdirs, such as --workdirs=runs/rules'
    )
  workdirs: Sequence[Path | str] = WORKDIRS.value
  return workdirs


def parse(argv: Sequence[str], about: str) -> list[str]:
  """Parses the command line.

  Args:
    argv: the arguments of the process, its name first.
    about: the text that --help prints above the flags.

  Returns:
    `argv` without its flags.

  Raises:
    InputError: the value of a flag or config field is wrong, or there is no
      such flag or field.
    SystemExit: after --help.
  """
  if any(argument in _HELP for argument in argv[1:]):
    print(about + '\n' + flags.FLAGS.module_help(sys.modules[__name__]))
    sys.exit(0)
  given = [a.lstrip('-').partition('=')[0] for a in argv[1:]]
  overridden = [g.removeprefix('config.') for g in given if g[:7] == 'config.']
  if overridden and 'config' not in given:
    raise InputError(
      f'--config.{overridden[0]} changes a field of --config, which is missing;'
      ' give it too, such as --config=configs/digits.py'
    )
  known = config_lib.flat(config_lib.default())
  try:
    return flags.FLAGS([_quoted(argument) for argument in argv])
  except flags.IllegalFlagValueError as error:
    if isinstance(error.__context__, InputError):  # of --config
      raise error.__context__ from error
    for field in overridden:
      if field in known and f'--config.{field}=' in str(error):
        raise InputError(
          f'{_one_line(error)}; give {config_lib.FIELDS[field].noun}, such as'
          f' {known[field]!r}'
        ) from error
    raise InputError(f'{_one_line(error)}; --help says what is') from error
  except flags.Error as error:
    raise InputError(f'{_one_line(error)}; --help lists the flags') from error
  except (AttributeError, KeyError, TypeError) as error:
    # An unknown --config.FIELD, or the name of a section as FIELD.
    for field in overridden:
      if field not in known:
        raise InputError(config_lib.unknown_field(field)) from error
    raise


def _quoted(argument: str) -> str:
  """Quotes a variant, so that ml_collections keeps its spaces."""
  flag, _, value = argument.partition('=')
  if flag.lstrip('-') != 'config.variants' or value[:1] in ('(', "'", '"'):
    return argument
  return f'{flag}={value!r}'


def _one_line(error: Exception) -> str:
  return str(error).splitlines()[0].rstrip('.')


def configs_folder() -> Path:
  """Returns the folder of the package's own configs.

  A wheel has the folder in the package, a checkout beside the package.
  """
  package = Path(__file__).parent
  own = package / 'configs'
  return own if own.is_dir() else package.with_name('configs')


def _shipped(given: str, file: Path) -> Path:
  """Returns the package's own config that is meant by a missing file.

  Raises:
    InputError: the package has no such config.
  """
  folder = configs_folder()
  if file.parent in (Path(), Path('configs')) and file.name:
    path = folder / f'{file.name.removesuffix(".py")}.py'
    if path.is_file():
      return path
  brought = ', '.join(path.stem for path in sorted(folder.glob('*.py')))
  raise _no_config_file(
    given, f'there is no such file; the package brings {brought}'
  )


def _no_config_file(name: str, why: str) -> InputError:
  """Returns the error for a --config that is no config file."""
  return InputError(
    f'--config={name} is no config file ({why}); give a Python file whose'
    ' get_config() returns a ConfigDict, such as configs/digits.py'
  )


def _imported(file: Path) -> Any:
  """Runs a file, and returns it as a module."""
  # An explicit loader also takes a file whose name does not end in .py.
  loader = importlib.machinery.SourceFileLoader(_MODULE, str(file))
  spec = importlib.util.spec_from_loader(_MODULE, loader)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[_MODULE] = module
  loader.exec_module(module)
  return module


def _reason(error: BaseException, file: Path) -> str:
  """Returns a config file's error and its line number, on one line."""
  text = ' '.join(str(error).split()) or 'no message'
  if isinstance(error, SyntaxError):  # its text names the line
    return text
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == str(file)
  ]
  where = f'line {lines[-1]}: ' if lines else ''
  return f'{where}{type(error).__name__}: {text}'
