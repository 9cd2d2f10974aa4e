"""What a workdir is: whose it is, and what it was made from.

A folder is a run's if it holds a config.json of ours, which is therefore the
first file that a run writes. One without it must be empty, so that nothing of
somebody else's is replaced. What no run touches is overlooked: hidden files and
what file systems and file managers leave, folders without any file, and *.log,
*.out, *.err and log.txt, into which a shell, a cluster or a sweep may write
before the run begins.

inputs.json keeps what config.json only names: the images, by their number,
classes and a digest, and a given topology. So they may lie elsewhere when the
run goes on, but may not be others. plan.json keeps the run's durations in steps
for those who read the workdir; no run goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections
from absl import logging

from maskconnect_jax import config as config_lib
from maskconnect_jax import files
from maskconnect_jax.data.fingerprint import Identity
from maskconnect_jax.errors import InputError

INPUTS_SCHEMA = 'maskconnect_jax.inputs/1'

# Fields that say where something is; inputs.json says what it is.
PLACES = ('data.dir', 'connectivity.topology')

_FOLDERS = ('checkpoints', 'figures', 'model', 'tensorboard')
_FILES = (
  'config.json',
  'inputs.json',
  'metrics.jsonl',
  'plan.json',
  'real_masks.npz',
  'summary.json',
  'topology.json',
)
_SECTIONS = ('connectivity', 'data', 'masks', 'model', 'optimizer')
_LITTER = frozenset(
  {'@eadir', 'desktop.ini', 'log.txt', 'lost+found', 'nohup.out', 'thumbs.db'}
)
_LOGS = frozenset({'.err', '.log', '.out'})
_NAMED = 5  # of what is in the way


def check(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Raises InputError unless a run of this config may write this workdir.

  Where no step was saved there is nothing to lose, and the new config stands.
  """
  try:
    if not workdir.is_dir():
      if os.path.lexists(workdir):
        raise InputError(
          f'{workdir} is not a folder; give another --workdir, or move it away'
        )
      return
    if not _is_ours(workdir):
      return
    saved = has_steps(workdir)
  except OSError as error:
    raise InputError(
      f'{workdir} cannot be read ({error.strerror}); give another --workdir'
    ) from error
  theirs = config_lib.essential(config_lib.stored(workdir))
  ours = config_lib.essential(config)
  known = read_inputs(workdir) is not None
  differing = [
    f'{name} ({theirs[name]!r} there, {ours[name]!r} now)'
    for name in sorted(ours)
    if theirs[name] != ours[name]
    and not (name in PLACES and (known or _same(theirs[name], ours[name])))
  ]
  if differing and saved:
    raise InputError(
      f'{workdir} was written by another config: {", ".join(differing)};'
      ' give another --workdir'
    )


def keep_version(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Sets config.model.version to that of what is saved in a workdir.

  So a run that was begun with a version before goes on with the same command.
  """
  if not (workdir / 'config.json').is_file():
    return
  if _is_ours(workdir) and has_steps(workdir):
    config.model.version = config_lib.stored(workdir).model.version


def has_steps(workdir: Path) -> bool:
  """Whether a run has saved something there that it could go on from."""
  return (workdir / 'summary.json').exists() or any(
    path.name.isdigit() for path in (workdir / 'checkpoints').glob('*')
  )


def _is_ours(workdir: Path) -> bool:
  """Whether a run has begun in this folder; False if it may begin there.

  Raises:
    InputError: what is there is not of a run, or is of another kind than the
      run's own of that name.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    if found := sorted(filter(_counts, workdir.iterdir())):
      names = [child.name for child in found[:_NAMED]]
      more = f' and {len(found) - _NAMED} more' if found[_NAMED:] else ''
      raise InputError(
        f'{workdir} holds {", ".join(map(repr, names))}{more}, and no'
        ' config.json of a run; give another --workdir, or an empty folder'
      )
    return False
  record = files.read_json(path, remedy='give another --workdir')
  if not isinstance(record, dict) or not all(
    isinstance(record.get(name), dict) for name in _SECTIONS
  ):
    raise InputError(
      f'{path} is not of a run of maskconnect_jax; give another --workdir, or'
      ' an empty folder'
    )
  for name in (*_FOLDERS, *_FILES):
    child, kind = workdir / name, 'folder' if name in _FOLDERS else 'file'
    fits = child.is_dir() if kind == 'folder' else child.is_file()
    if os.path.lexists(child) and not fits:
      raise InputError(
        f'{child} is not a {kind}; move it away, or give another --workdir'
      )
  return True


def _counts(path: Path) -> bool:
  """Whether something in a folder is somebody's."""
  name = path.name.lower()
  if name[0] == '.' or name in _LITTER:
    return False
  if path.is_dir() and not path.is_symlink():
    return any(
      name[0] != '.' for _, _, names in os.walk(path) for name in names
    )
  return path.suffix.lower() not in _LOGS


def check_is_table(path: Path) -> None:
  """Raises InputError unless a table may be written there.

  That is where nothing is, or a table of ours, as its first line says.
  """
  if not os.path.lexists(path):
    return
  try:
    with path.open('rb') as file:
      begins = file.readline(1000)
  except OSError as error:
    raise InputError(
      f'{path} cannot be read ({error.strerror}); move it away, or give another'
      ' --workdir'
    ) from error
  if begins and not begins.startswith((b'row,num_seeds,', b'|  | seeds |')):
    raise InputError(
      f'{path} is no table of a sweep; move it away, or give another --workdir'
    )


def _same(one: str, other: str) -> bool:
  """Whether two paths are of one folder, both given and neither empty."""
  if not (one and other):
    return False
  return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(
    os.path.expanduser(other)
  )


def remove_leftovers(folder: Path, names: Iterable[str] | None = None) -> None:
  """Removes what killed processes left half written; under the lock alone.

  Args:
    folder: a workdir, or that of a sweep.
    names: of the files that are written there; None: those of a run.
  """
  written = {*_FOLDERS, *_FILES} if names is None else set(names)
  for name in written:
    files.remove(files.temporary_of(folder / name))
  if names is None:
    for path in (folder / 'figures').glob('.*.tmp'):
      if re.fullmatch(r'\.\w+\.(png|svg)(\.\d+)?\.tmp', path.name):
        files.remove(path)


def read_inputs(workdir: Path) -> dict[str, Any] | None:
  """Returns the content of inputs.json, or None.

  Runs of earlier versions have none, and damaged it is as good as none: they
  are told apart by their config alone.
  """
  path = workdir / 'inputs.json'
  try:
    record = json.loads(path.read_bytes())
    data = record['data']
    whole = (
      record['schema'] == INPUTS_SCHEMA
      and {type(data['train']), type(data['test'])} == {int}
      and isinstance(data['digest'], str)
      and all(isinstance(name, str) for name in data['classes'])
      and isinstance(record['topology'], str | None)
    )
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, KeyError, RecursionError):
    whole = False
  if not whole:
    logging.warning('%s is damaged; its run is known by its config alone', path)
    return None
  return record


def checked_inputs(
  workdir: Path, identity: Identity, given: Any
) -> dict[str, Any]:
  """Returns the content of inputs.json: what a run is trained on.

  Args:
    workdir: of the run.
    identity: of its images.
    given: the topology of connectivity.rule=fixed_given, else None.

  Raises:
    InputError: a run has saved steps in this workdir, of other inputs.
  """
  topology = None
  if given is not None:
    text = json.dumps(given.to_dict(), sort_keys=True)
    topology = hashlib.sha256(text.encode()).hexdigest()
  ours: dict[str, Any] = {
    'schema': INPUTS_SCHEMA,
    'data': identity.record(),
    'topology': topology,
  }
  theirs = read_inputs(workdir)
  if theirs is None or not has_steps(workdir):
    return ours
  if theirs['data'] != ours['data']:
    raise InputError(
      f'{identity.name} is not what {workdir} was trained on:'
      f' {_difference(theirs["data"], ours["data"])}; give those images, or'
      ' another --workdir'
    )
  if theirs['topology'] != ours['topology']:
    raise InputError(
      f'config.connectivity.topology is not what {workdir} was trained with;'
      ' give that file, or another --workdir'
    )
  return ours


def write_inputs(inputs: dict[str, Any], workdir: Path) -> None:
  """Writes inputs.json."""
  files.write_json(workdir / 'inputs.json', inputs)


def write_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Writes config.json, by which a folder is known as a run's workdir."""
  files.write_text(workdir / 'config.json', config.to_json(indent=2) + '\n')


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
  """Returns in words how the images of a run and those found differ."""
  parts = []
  for what, left, right in (
    ('new', ours, theirs),
    ('gone', theirs, ours),
  ):
    known = set(right['classes'])
    names = [name for name in left['classes'] if name not in known]
    if names:
      shown = ', '.join(map(repr, names[:_NAMED]))
      shown += ', ...' if names[_NAMED:] else ''
      many = 'class' if len(names) == 1 else 'classes'
      parts.append(f'{many} {shown} {what}')
  if not parts and theirs['classes'] != ours['classes']:
    parts.append('its classes are in another order')
  for part, words in (('train', 'training'), ('test', 'test')):
    if theirs[part] != ours[part]:
      parts.append(f'{theirs[part]:,} {words} images there, {ours[part]:,} now')
  return ', '.join(parts) or 'as many images, of other names or sizes'
