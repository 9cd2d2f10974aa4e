"""model.safetensors: a model's arrays in a file that any library can read.

It holds the same arrays under the same names as the folder `arrays/`, such as
'stack/blocks/0/conv1/kernel'. The format has no code, and its header gives the
shape, the dtype and the place of each array, which must fill the file exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from maskconnect_jax import limits
from maskconnect_jax.errors import InputError

NAME = 'model.safetensors'
_METADATA = {'schema': 'maskconnect_jax.weights/1'}
_DTYPES: dict[str, Any] = {'F32': np.float32, 'F64': np.float64}


def save(path: Path, arrays: Mapping[str, jax.Array]) -> None:
  """Writes arrays, float32 or float64 of any shapes, by name.

  Args:
    path: of the new file.
    arrays: the arrays by name.

  Raises:
    OSError: the file cannot be written, as on a full disk.
  """
  content = safetensors.numpy.save(
    {name: np.asarray(array) for name, array in arrays.items()}, _METADATA
  )
  path.write_bytes(content)


def stored(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and dtype of each array of a file; reads no array.

  Raises:
    InputError: the file is missing or damaged, or an array has another dtype
      than float32 or float64.
  """
  with _opened(path) as file:
    found = {}
    for name in file.keys():  # noqa: SIM118
      part = file.get_slice(name)
      kind = part.get_dtype()
      if kind not in _DTYPES:
        raise InputError(
          f'{path}: the array {limits.shown(name)} is of {kind}, which no model'
          ' has; write the model again with --mode=train'
        )
      found[name] = jax.ShapeDtypeStruct(part.get_shape(), _DTYPES[kind])
  return found


def load(path: Path, names: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Reads arrays onto this process's first device.

  Args:
    path: of the file.
    names: the names of the arrays to read; the values do not matter.

  Raises:
    InputError: the file is missing or damaged.
  """
  device = jax.local_devices()[0]
  with _opened(path) as file:
    return {
      name: jax.device_put(file.get_tensor(name), device) for name in names
    }


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
  """Opens a file; whatever a damaged one raises becomes an InputError."""
  try:
    if not path.is_file():  # reading a pipe could wait for ever
      raise FileNotFoundError('it is no file')
    with safetensors.safe_open(path, framework='numpy') as file:
      yield file
  except (OSError, safetensors.SafetensorError) as error:
    why = (str(error) or type(error).__name__).splitlines()[0]
    raise InputError(
      f'{path} holds no weights that can be read ({why}); write the model again'
      ' with --mode=train'
    ) from error
