"""model.json: its schema, its bounds, and whether the stored arrays fit it.

Everything is checked before anything is built. Otherwise a few bytes of a
damaged file could cost any amount of time and memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import msgspec

from maskconnect_jax import files, limits
from maskconnect_jax.data import image_headers
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import spec
from maskconnect_jax.method import topology as topology_lib
from maskconnect_jax.method.topology import BranchTopology, Topology
from maskconnect_jax.networks import architectures

# A version that knows one class an image alone must refuse a multi-label model.
SCHEMA = 'maskconnect_jax.model/1'
MULTI_LABEL_SCHEMA = 'maskconnect_jax.model/2'
REMEDY = 'write the model again with --mode=train'
# Orbax compresses arrays: equal weights to a hundredth, others hardly at all.
# A model that declares more bytes per byte on the disk than this is not read.
_MAX_RATIO = 1_000
_SLACK = 2**26  # bytes


class Preprocessing(msgspec.Struct):
  """How an image becomes an input of the network; see `inference.save`."""

  height: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE)]
  width: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE)]
  channels: Literal[1, 3]
  mean: list[Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]]
  std: list[Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]]
  resize: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_SIDE)] = 0
  max_pixels: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_PIXELS)] = (
    image_headers.MAX_PIXELS
  )


class Record(msgspec.Struct):
  """The schema of model.json; `method.topology` has that of its topology."""

  schema: Literal['maskconnect_jax.model/1', 'maskconnect_jax.model/2']
  architecture: dict[str, Any]  # `create_model` checks them
  topology: dict[str, Any]
  digest: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
  classes: Annotated[
    list[str], msgspec.Meta(min_length=1, max_length=limits.MAX_CLASSES)
  ]
  preprocessing: Preprocessing
  multi_label: bool = False  # a sigmoid for each class, not a softmax


def read(path: Path) -> tuple[dict[str, Any], Topology | BranchTopology]:
  """Reads a model.json.

  Returns:
    The content of the file, and the topology in it.

  Raises:
    InputError: the file is damaged, out of bounds, or contradicts itself.
  """
  record = files.read_json(path, dict[str, Any], remedy=REMEDY)
  try:
    own = checked(record).architecture
    frozen = topology_lib.from_dict(record['topology'])
    architecture = architectures.architecture_of(own.get('name'))
    shape = architecture.mask_shape(own.get('level', 'block'))
    if frozen.shape != shape:
      raise InputError(
        f'the topology is of a mask of shape {frozen.shape}; that of this'
        f' network is {shape}'
      )
  except InputError as error:
    raise InputError(f'{path} is damaged: {error}; {REMEDY}') from error
  return record, frozen


def checked(record: dict[str, Any]) -> Record:
  """Checks the content of model.json as far as possible without a network.

  Args:
    record: the content of model.json.

  Returns:
    The same content as a `Record`.

  Raises:
    InputError: the content does not fit the schema, or contradicts itself.
  """
  read: Record = files.of_kind(record, Record)
  own, shape = read.architecture, read.preprocessing
  limits.choice('level', own.get('level', 'block'), spec.LEVELS)
  limits.choice('dtype', own.get('dtype', 'float32'), spec.DTYPES)
  for what, declared, there in (
    ('classes', own.get('num_classes'), len(read.classes)),
    ('channels', own.get('in_channels', 3), shape.channels),
    ('numbers as mean', shape.channels, len(shape.mean)),
    ('numbers as std', shape.channels, len(shape.std)),
  ):
    if type(declared) is not int or declared != there:
      raise InputError(
        f'there are {there} {what}, but {limits.shown(declared)} belong there'
      )
  if read.multi_label != (read.schema == MULTI_LABEL_SCHEMA):
    raise InputError(
      f'{read.schema} does not go with multi_label={read.multi_label}'
    )
  if shape.resize and shape.resize < max(shape.height, shape.width):
    raise InputError(
      f'preprocessing: resize={shape.resize} leaves no {shape.height} x'
      f' {shape.width} to crop'
    )
  return read


def check_blocks(
  place: Path,
  frozen: Topology | BranchTopology,
  stored: dict[str, jax.ShapeDtypeStruct],
) -> None:
  """Checks that every live block has arrays, before the blocks are built.

  Building a block takes a tenth of a second.

  Args:
    place: the folder or file of the arrays.
    frozen: the topology; blocks that it prunes have no arrays.
    stored: shape and dtype of the arrays there, by name.

  Raises:
    InputError: a live block has no arrays.
  """
  held = {name.split('/')[2] for name in stored if name.count('/') > 2}
  for index, live in enumerate(frozen.live):
    if live and str(index) not in held:
      raise InputError(
        f'{place} has no arrays of block {index + 1}, which model.json names;'
        f' {REMEDY}'
      )


def check_arrays(
  place: Path,
  expected: dict[str, jax.ShapeDtypeStruct],
  stored: dict[str, jax.ShapeDtypeStruct],
) -> None:
  """Checks the arrays of a model before any of them is allocated.

  Args:
    place: the folder or file of the arrays.
    expected: shape and dtype of the model's arrays, by name.
    stored: shape and dtype of the arrays there, by name.

  Raises:
    InputError: an array is missing, or has another shape or dtype; or the
      arrays together need far more bytes than the files could hold.
  """
  for name in sorted(expected.keys() | stored.keys()):
    ours, theirs = (
      f'{leaf.dtype} {list(leaf.shape)}' if leaf is not None else 'missing'
      for leaf in (expected.get(name), stored.get(name))
    )
    if ours != theirs:
      raise InputError(
        f'{place}: the array {limits.shown(name)} is {theirs}, but'
        f' model.json makes it {ours}; {REMEDY}'
      )
  declared = sum(leaf.size * leaf.dtype.itemsize for leaf in expected.values())
  held = sum(
    path.stat().st_size for path in (place, *place.rglob('*')) if path.is_file()
  )
  if declared > _MAX_RATIO * held + _SLACK:
    raise InputError(
      f'{place} holds {held:,} bytes, which cannot be the {declared:,} of the'
      f' arrays that it names; {REMEDY}'
    )
