"""Checks stored files: are they damaged, unreadable, or of another run?"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from absl import logging

from maskconnect_jax.errors import InputError

X64 = 'JAX_ENABLE_X64'
_Kind: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]

_METADATA = '_CHECKPOINT_METADATA'
# The fields that Orbax writes there. It fails on other types when it opens the
# folder.
_KINDS: dict[str, tuple[type, ...]] = {
  'item_handlers': (dict, str),
  'metrics': (dict,),
  'performance_metrics': (dict,),
  'init_timestamp_nsecs': (int, type(None)),
  'commit_timestamp_nsecs': (int, type(None)),
  'custom_metadata': (dict, type(None)),
}


def set_aside_damaged(folder: Path) -> None:
  """Renames damaged metrics and metadata of checkpoints to NAME.damaged.

  Orbax reads these files of all checkpoints when it opens a folder, and fails
  at a damaged one. A checkpoint without metrics counts as one whose accuracy
  was not measured. A checkpoint without metadata counts as damaged.

  Args:
    folder: the folder of the checkpoints.
  """
  for path in folder.glob('[0-9]*/metrics/metrics'):
    if not _is_json(path, lambda content: float(content['accuracy'])):
      logging.warning('%s is damaged; going on without it', path)
      _set_aside(path)
  for path in folder.glob(f'[0-9]*/{_METADATA}'):
    if not _is_json(path, _check_metadata):
      _set_aside(path)


def _is_json(path: Path, check: Any) -> bool:
  try:
    check(json.loads(path.read_bytes()))
  except (ValueError, TypeError, KeyError, RecursionError, IsADirectoryError):
    return False
  except FileNotFoundError:  # another process was faster
    return True
  return True


def _check_metadata(content: Any) -> None:
  if not isinstance(content, dict):
    raise TypeError('no object')
  for name, kinds in _KINDS.items():
    if name in content and not isinstance(content[name], kinds):
      raise TypeError(name)


def digest_of(folder: Path) -> Any:
  """Returns the digest that is kept beside the arrays of a checkpoint.

  Raises:
    OSError, ValueError, KeyError or TypeError: it is missing or damaged.
  """
  content = json.loads((folder / _METADATA).read_bytes())
  return content['custom_metadata']['digest']


def _set_aside(path: Path) -> None:
  with contextlib.suppress(FileNotFoundError):  # another process was faster
    path.rename(path.with_name(f'{path.name}.damaged'))


def check_permissions(folder: Path) -> None:
  """Checks that the user may read a folder and all files in it.

  A file without permission to read would otherwise look damaged.

  Raises:
    InputError: the user may not read the folder or a file in it.
  """
  for path in (folder, *folder.rglob('*')):
    needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    effective = os.access in os.supports_effective_ids
    if not os.access(path, needed, effective_ids=effective):
      raise unreadable(path, os.strerror(errno.EACCES))


def unreadable(path: Path | str, why: str | None) -> InputError:
  """Returns the error for a path that cannot be read but may be undamaged.

  Args:
    path: a file or folder.
    why: the reason, as the operating system words it.
  """
  return InputError(
    f'{path} cannot be read: {why}; mend that, or give another --workdir'
  )


def accuracies(path: Path) -> dict[int, float]:
  """Returns the accuracies by step; {} if the file is missing or damaged."""
  try:
    return {
      int(step): float(accuracy)
      for step, accuracy in json.loads(path.read_bytes()).items()
    }
  except FileNotFoundError:
    return {}
  except (ValueError, TypeError, AttributeError, RecursionError):
    logging.warning('%s is damaged; going on without it', path)
    return {}


def of_another_version(metadata: Any, arrays: Any, schema: str) -> str:
  """Returns how a checkpoint of another version differs, else ''.

  The text is the first half of a sentence; the caller adds a remedy.

  Args:
    metadata: what stands beside the stored arrays, or None.
    arrays: tree of the stored arrays, or of their shapes and dtypes.
    schema: the schema that this version writes and reads.
  """
  theirs = (metadata or {}).get('schema', schema)
  if theirs != schema:
    return (
      f'has the schema {str(theirs)[:60]!r}, and this version reads {schema!r};'
      ' go on with the version that wrote it, or'
    )
  if any(name.endswith('/value') for name, _ in _described(arrays)):
    return (
      "was written before version 0.1.0, when arrays had names in '.value'; go"
      ' on with the version that wrote it, or'
    )
  return ''


def difference(found: Any, own: Any) -> str:
  """Returns how stored arrays differ from the run's own, '' if they do not.

  The text is the first half of a sentence; the caller adds a remedy. It names
  the first array that differs in name, shape or dtype. A store without any
  array is damaged, and gives ''.

  Args:
    found: tree of the stored arrays, or of their shapes and dtypes.
    own: tree of the run's own arrays, or of their shapes and dtypes.
  """
  there, here = dict(_described(found)), dict(_described(own))
  differing = {
    name: (there.get(name), here.get(name))
    for name in (*here, *there)
    if there and there.get(name) != here.get(name)
  }
  if not differing:
    return ''
  name = next(iter(differing))
  was, now = map(_in_words, differing[name])
  told = f'array {name} is {was} there, and {now} now'
  wide = {_is_wide(*pair) for pair in differing.values()}
  if wide == {True}:
    return f'was written with {X64}=1 ({told}); set it, or'
  if wide == {False}:
    return f'was written without {X64} ({told}); unset it, or'
  return f'is of another network ({told});'


def _is_wide(there: _Kind | None, here: _Kind | None) -> bool | None:
  """Compares the widths of a stored array and the run's own.

  Returns:
    True if only the stored array has 64 bits, False if only the run's own has
    64 bits; None if they differ in anything else.
  """
  if there is None or here is None:
    return None
  (shape, kind), (own_shape, own_kind) = there, here
  sizes = kind.itemsize, own_kind.itemsize
  if (shape, kind.kind, {*sizes}) != (own_shape, own_kind.kind, {4, 8}):
    return None
  return sizes == (8, 4)


def _described(tree: Any) -> Iterator[tuple[str, _Kind]]:
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if hasattr(leaf, 'shape'):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      yield name, (tuple(leaf.shape), np.dtype(leaf.dtype))


def _in_words(kind: _Kind | None) -> str:
  return 'missing' if kind is None else f'{kind[1]} {list(kind[0])}'
