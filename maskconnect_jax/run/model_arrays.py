"""The arrays of a model in a folder of its own, written and read by Orbax.

`model/arrays/` of a run, by the names that model.json's reader knows.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from maskconnect_jax.errors import InputError
from maskconnect_jax.run import storage, stored


def digest(arrays: Any) -> int:
  """Returns a CRC-32 over the bytes of all arrays of a pytree."""
  crc = 0
  for leaf in jax.tree.leaves(arrays):
    crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
  return crc


def whole(array: jax.Array) -> jax.Array | np.ndarray:
  """Returns a whole array, as Orbax takes it from one of several processes.

  All processes call it together, because each may hold a part of the array.
  """
  if jax.process_count() == 1:
    return array
  if array.is_fully_replicated:
    return np.array(array.addressable_data(0))  # a copy: it may be donated
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def first_device() -> jax.sharding.Sharding:
  """Returns the place of an array on this process's first device."""
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def save(folder: Path, arrays: dict[str, jax.Array]) -> None:
  """Writes named arrays into a new folder, and waits until they are written.

  Ctrl-C is raised after the arrays are written.

  Args:
    folder: the new folder.
    arrays: the arrays by name.

  Raises:
    OSError: the arrays cannot be written, as on a full disk.
    InputError: Orbax cannot take the path.
  """
  failure = None
  arrays = jax.tree.map(whole, arrays)
  with storage.Session(folder) as session:
    try:
      session.call(ocp.save, session.path, arrays)
    except Exception as error:
      failure = storage.os_error(error)
      if failure is None:
        raise
    if failure:
      with storage.quiet() as settle:
        settle()
  if failure:
    raise failure


def stored_in(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and dtype of each array of `save`; reads no array.

  Raises:
    InputError: the folder is missing or damaged.
  """
  with storage.Session(folder) as session, storage.quiet() as settle:
    try:
      found: Any = session.call(ocp.metadata, session.path).metadata
      return {
        str(name): jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
        for name, leaf in found.items()
      }
    except Exception as error:  # a broken file makes Orbax raise anything
      damage = storage.first_line(error)
      settle()
  raise InputError(
    f'{folder} is no whole set of arrays ({damage}); write it again with'
    ' --mode=train'
  )


def load(
  folder: Path, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Reads the arrays of `save` onto this process's first device.

  Args:
    folder: the folder that `save` wrote.
    abstract: shape and dtype of each array, by name.

  Raises:
    InputError: the folder is missing or damaged, or holds other arrays.
  """
  sharding = first_device()
  own = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    for name, leaf in abstract.items()
  }
  other = ''
  with storage.Session(folder) as session, storage.quiet() as settle:
    try:
      found = session.call(ocp.metadata, session.path).metadata
      other = stored.difference(found, own)
      if not other:
        return session.call(ocp.load, session.path, own)
    except Exception as error:  # a broken file makes Orbax raise anything
      damage = storage.first_line(error)
      settle()
  if other:
    raise InputError(f'{folder} {other} write it again with --mode=train')
  raise InputError(
    f'{folder} is no whole set of arrays ({damage}); write it again with'
    ' --mode=train'
  )
