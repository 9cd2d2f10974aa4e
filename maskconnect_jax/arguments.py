"""What flags of the command line take: paths, and the file of a config."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from maskconnect_jax import fields
from maskconnect_jax.config import given_path
from maskconnect_jax.errors import InputError

_MODULE = 'config_config'  # the name under which a config file is imported


class PathParser(flags.ArgumentParser[Path]):
  """Parses a path; a ~ at its beginning is a home directory."""

  def parse(self, argument: str | os.PathLike[str]) -> Path:
    """Returns the path. Raises ValueError if no file can have it."""
    if not os.fspath(argument):
      raise ValueError('give a path')
    return fields.expanded(argument)

  def flag_type(self) -> str:
    """What --help calls it."""
    return 'path'


class ConfigParser(flags.ArgumentParser[ml_collections.ConfigDict]):
  """Parses FILE.py, or FILE.py:WORD, to what its get_config() returns.

  ml_collections has its own, which keeps some errors of a file to itself until
  the config is used, and lets others through as they are.
  """

  def parse(self, path: str) -> ml_collections.ConfigDict:
    """Returns the config, locked. Raises InputError."""
    name, colon, word = path.partition(':')
    file = given_path(name, '--config')
    if not file.is_file():
      raise no_config_file(path, 'there is no such file')
    try:
      config = _get_config(file, [word] if colon else [])
    except (Exception, SystemExit) as error:  # it may do whatever Python may
      raise no_config_file(path, _reason(error, file)) from error
    if not isinstance(config, ml_collections.ConfigDict):
      kind = 'None' if config is None else f'a {type(config).__name__}'
      raise no_config_file(path, f'get_config() returns {kind}')
    config = ml_collections.ConfigDict(config)
    config.lock()
    return config


def no_config_file(name: str, why: str) -> InputError:
  """Returns the error for a --config that is none."""
  return InputError(
    f'--config={name} is no config file ({why}); give a Python file whose'
    ' get_config() returns a ConfigDict, such as configs/digits.py'
  )


def _get_config(file: Path, arguments: list[str]) -> Any:
  """Runs a file and then its get_config()."""
  # Named, a loader takes a file without .py at its end, too.
  loader = importlib.machinery.SourceFileLoader(_MODULE, str(file))
  spec = importlib.util.spec_from_loader(_MODULE, loader)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[_MODULE] = module
  loader.exec_module(module)
  if not callable(getattr(module, 'get_config', None)):
    raise InputError('it has no get_config()')
  return module.get_config(*arguments)


def _reason(error: BaseException, file: Path) -> str:
  """Returns what went wrong in a config file, and where, on one line."""
  text = ' '.join(str(error).split()) or 'no message'
  if isinstance(error, InputError | SyntaxError):  # which names its line
    return text
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == str(file)
  ]
  where = f'line {lines[-1]}: ' if lines else ''
  return f'{where}{type(error).__name__}: {text}'
