"""model.json: its schema, with bounds, and whether the arrays can be its own.

All of it is checked before anything is built: what a few bytes declare must not
decide how much time and memory are taken.
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
from maskconnect_jax.networks import models

SCHEMA = 'maskconnect_jax.model/1'
REMEDY = 'write the model again with --mode=train'
# Arrays are kept compressed: equal weights to a hundredth, others hardly at
# all. What declares more than this of its files is not read.
_MAX_RATIO = 1_000
_SLACK = 2**26  # bytes


class Preprocessing(msgspec.Struct):
  """How an image becomes what the network takes; `inference.save` says it."""

  height: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE)]
  width: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE)]
  channels: Literal[1, 3]
  mean: list[Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]]
  std: list[Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]]
  resize: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_SIDE)] = 0
  max_pixels: Annotated[int, msgspec.Meta(ge=1)] = image_headers.MAX_PIXELS


class Record(msgspec.Struct):
  """The schema of model.json; its topology has one of its own."""

  schema: Literal['maskconnect_jax.model/1']
  architecture: dict[str, Any]  # `create_model` checks them
  topology: dict[str, Any]
  digest: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
  classes: Annotated[
    list[str], msgspec.Meta(min_length=1, max_length=limits.MAX_CLASSES)
  ]
  preprocessing: Preprocessing


def read(path: Path) -> tuple[dict[str, Any], Topology | BranchTopology]:
  """Reads a model.json.

  Returns:
    Its content, and the topology in it.

  Raises:
    InputError: it is damaged, out of bounds, or contradicts itself.
  """
  record = files.read_json(path, dict[str, Any], remedy=REMEDY)
  try:
    own = checked(record).architecture
    frozen = topology_lib.from_dict(record['topology'])
    architecture = models.architecture_of(own.get('name'))
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
  """Returns the content of model.json, after all that needs no network.

  Raises:
    InputError: it is not of the schema, or contradicts itself.
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
  if shape.resize and shape.resize < max(shape.height, shape.width):
    raise InputError(
      f'preprocessing: resize={shape.resize} leaves no {shape.height} x'
      f' {shape.width} to crop'
    )
  return read


def check_blocks(
  folder: Path,
  frozen: Topology | BranchTopology,
  stored: dict[str, jax.ShapeDtypeStruct],
) -> None:
  """Checks that there are arrays of every block, before the blocks are built.

  Building takes a tenth of a second for each.

  Args:
    folder: where the arrays lie.
    frozen: the topology; what it prunes has no arrays.
    stored: what the folder says of itself, by name.

  Raises:
    InputError: a block has none.
  """
  held = {name.split('/')[2] for name in stored if name.count('/') > 2}
  for index, live in enumerate(frozen.live):
    if live and str(index) not in held:
      raise InputError(
        f'{folder} has no arrays of block {index + 1}, which model.json names;'
        f' {REMEDY}'
      )


def check_arrays(
  folder: Path,
  expected: dict[str, jax.ShapeDtypeStruct],
  stored: dict[str, jax.ShapeDtypeStruct],
) -> None:
  """Checks the arrays of a model before any of them is allocated.

  Args:
    folder: where they lie.
    expected: what the model has, by name.
    stored: what the folder says of itself, by name.

  Raises:
    InputError: one is missing, or of another shape or dtype; or all together
      are far more than the files could hold.
  """
  for name in sorted(expected.keys() | stored.keys()):
    ours, theirs = (
      f'{leaf.dtype} {list(leaf.shape)}' if leaf is not None else 'missing'
      for leaf in (expected.get(name), stored.get(name))
    )
    if ours != theirs:
      raise InputError(
        f'{folder}: the array {limits.shown(name)} is {theirs}, but'
        f' model.json makes it {ours}; {REMEDY}'
      )
  declared = sum(leaf.size * leaf.dtype.itemsize for leaf in expected.values())
  held = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
  if declared > _MAX_RATIO * held + _SLACK:
    raise InputError(
      f'{folder} holds {held:,} bytes, which cannot be the {declared:,} of the'
      f' arrays that it names; {REMEDY}'
    )
