"""Workdirs: which folders a run may write to, and the inputs it was made from.

A folder belongs to a run if it holds a config.json of this package. A run
therefore writes that file first. A folder without config.json must be empty, so
that no run replaces other people's files. A folder counts as empty even if it
holds files that no run writes:

- hidden files, and files that file systems and file managers leave;
- folders without any file;
- *.log, *.out, *.err and log.txt, because a shell, a cluster or a sweep may
  write there before the run begins.

config.json only names the images and a given topology. inputs.json identifies
them: the images by their number, classes and a digest, the topology by a
digest. When a run is resumed they may have moved, but must be the same. It also
names the library that resizes random crops, as libraries differ a little.
plan.json keeps the run's durations in steps for those who read the workdir; no
run reads it to resume.
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

# Fields that hold a path. inputs.json identifies the content found there.
PLACES = ('data.dir', 'data.val_labels', 'connectivity.topology')

_FOLDERS = ('checkpoints', 'figures', 'model', 'tensorboard')
FILES = (
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
_NAMED = 5  # most files or classes that a message names


def check(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Checks that a run of this config may write to this workdir.

  A workdir without a saved step has nothing to lose. It accepts any config.

  Args:
    config: the config of the run.
    workdir: the folder, which need not exist.

  Raises:
    InputError: the workdir is no folder, cannot be read, holds other files, or
      holds the saved steps of another config.
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
  """Sets config.model.version to the version of a workdir with saved steps.

  So the same command resumes a run that began with an earlier version.

  Args:
    config: the config of the run; changed in place.
    workdir: the folder of the run.

  Raises:
    InputError: the workdir holds a config.json that is not of a run.
  """
  if not (workdir / 'config.json').is_file():
    return
  if _is_ours(workdir) and has_steps(workdir):
    config.model.version = config_lib.stored(workdir).model.version


def are_of_one_run(one: Path, other: Path) -> bool:
  """Whether two workdirs are of equal configs, images and given topologies.

  Fields that tell no runs apart may differ, and the images may have moved.
  """
  try:
    ours, theirs = (
      config_lib.essential(config_lib.stored(each)) for each in (one, other)
    )
  except InputError:
    return False
  known = [read_inputs(each) for each in (one, other)]
  made_from = [
    record and (record['data'], record['topology']) for record in known
  ]
  left_out = PLACES if None not in known else ()
  return made_from[0] == made_from[1] and all(
    ours[name] == theirs[name] for name in ours if name not in left_out
  )


def has_steps(workdir: Path) -> bool:
  """Whether a run has saved a checkpoint or a summary in this workdir."""
  return (workdir / 'summary.json').exists() or any(
    path.name.isdigit() for path in (workdir / 'checkpoints').glob('*')
  )


def _is_ours(workdir: Path) -> bool:
  """Whether a run has begun in this folder; False if a run may begin there.

  Raises:
    InputError: the folder holds files that are not of a run, or a file where a
      run has a folder, or a folder where a run has a file.
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
  for name in (*_FOLDERS, *FILES):
    child, kind = workdir / name, 'folder' if name in _FOLDERS else 'file'
    fits = child.is_dir() if kind == 'folder' else child.is_file()
    if os.path.lexists(child) and not fits:
      raise InputError(
        f'{child} is not a {kind}; move it away, or give another --workdir'
      )
  return True


def _counts(path: Path) -> bool:
  """Whether a file or folder counts, so that its parent is not empty."""
  name = path.name.lower()
  if name[0] == '.' or name in _LITTER:
    return False
  if path.is_dir() and not path.is_symlink():
    return any(
      name[0] != '.' for _, _, names in os.walk(path) for name in names
    )
  return path.suffix.lower() not in _LOGS


def check_is_table(path: Path) -> None:
  """Checks that a sweep may write its table to this path.

  It may if nothing is there, or an empty file, or a file whose first line is
  that of a sweep's table.

  Raises:
    InputError: the path cannot be read, or is no table of a sweep.
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
  """Whether two paths lead to one folder; False if either path is ''."""
  if not (one and other):
    return False
  return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(
    os.path.expanduser(other)
  )


def remove_leftovers(folder: Path, names: Iterable[str] | None = None) -> None:
  """Removes files that killed processes left half written.

  Args:
    folder: the workdir of a run or of a sweep.
    names: names of the files that are written there; None: those of a run.
  """
  written = {*_FOLDERS, *FILES} if names is None else set(names)
  files.remove_leftovers(folder, written.__contains__)
  if names is None:
    # Earlier versions put the number of the process behind a figure's name.
    figure = re.compile(r'\w+\.(png|svg)(\.\d+)?')
    files.remove_leftovers(folder / 'figures', figure.fullmatch)


def read_inputs(workdir: Path) -> dict[str, Any] | None:
  """Returns the content of inputs.json, or None if it is missing or damaged.

  Runs of earlier versions have no inputs.json. A run without it is identified
  by its config alone. For a damaged one a warning names the file.
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
  workdir: Path, identity: Identity, given: Any, resizer: str | None = None
) -> dict[str, Any]:
  """Returns the content of inputs.json for a run, checked against a stored one.

  Args:
    workdir: the folder of the run.
    identity: number, classes and digest of its images.
    given: the topology of connectivity.rule=fixed_given, else None.
    resizer: the library that resizes random crops of the images; None: they
      are not resized. If another one did before, a warning says so.

  Raises:
    InputError: this workdir holds saved steps of a run on other images, or with
      another given topology.
  """
  topology = None
  if given is not None:
    text = json.dumps(given.to_dict(), sort_keys=True)
    topology = hashlib.sha256(text.encode()).hexdigest()
  ours: dict[str, Any] = {
    'schema': INPUTS_SCHEMA,
    'data': identity.record(),
    'topology': topology,
    'resizer': resizer,
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
  before = theirs.get('resizer', 'opencv')  # of runs before it was recorded
  if resizer and before and resizer != before:
    logging.warning(
      '%s was trained with crops resized by %s; it goes on with %s, to other'
      ' bits. OpenCV comes with maskconnect_jax[opencv]; without it Pillow'
      ' resizes.',
      workdir,
      before,
      resizer,
    )
  return ours


def write_inputs(inputs: dict[str, Any], workdir: Path) -> None:
  """Writes inputs.json.

  Raises:
    InputError: the file cannot be written.
  """
  files.write_json(workdir / 'inputs.json', inputs)


def write_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Writes config.json, which marks a folder as a run's workdir.

  Raises:
    InputError: the file cannot be written.
  """
  files.write_text(workdir / 'config.json', config.to_json(indent=2) + '\n')


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
  """Returns in words how a run's stored images and the given ones differ."""
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
