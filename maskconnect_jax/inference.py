"""A model folder, and what it predicts.

`model/` holds `arrays/` (Orbax, one array per parameter, named by its path)
and `model.json`: architecture, topology, classes and preprocessing. Nothing
else is needed to predict.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from PIL import Image

from maskconnect_jax import (
  checkpoint,
  files,
  images,
  limits,
  models,
  topology,
  wiring,
)
from maskconnect_jax.config import InputError, check_choice

MODEL_SCHEMA = 'maskconnect_jax.model/1'
BATCH = 256
_REMEDY = 'write the model again with --mode=train'
# Arrays are kept compressed: equal weights to a hundredth, others hardly at
# all. What declares more than this of its files is not read.
_MAX_RATIO = 1_000
_SLACK = 2**26  # bytes


class _Preprocessing(msgspec.Struct):
  height: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE)]
  width: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_SIDE)]
  channels: Literal[1, 3]
  mean: list[Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]]
  std: list[Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]]
  resize: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_SIDE)] = 0


class _Record(msgspec.Struct):
  """The schema of model.json; its topology has one of its own."""

  schema: Literal['maskconnect_jax.model/1']
  architecture: dict[str, Any]  # `create_model` checks them
  topology: dict[str, Any]
  digest: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
  classes: Annotated[
    list[str], msgspec.Meta(min_length=1, max_length=limits.MAX_CLASSES)
  ]
  preprocessing: _Preprocessing


def save(
  folder: Path,
  model: Any,
  *,
  architecture: dict[str, Any],
  classes: Sequence[str],
  image_shape: Sequence[int],
  resize: int,
  mean: Sequence[float],
  std: Sequence[float],
) -> None:
  """Writes a frozen, pruned model; a folder already there is replaced.

  Called by all processes together, of which the first one writes.

  Args:
    folder: such as workdir/model.
    model: from `wiring.prune`.
    architecture: the arguments of `create_model`.
    classes: name of each output.
    image_shape: (height, width, channels) that images are brought to.
    resize: of the shorter side, before the centre is cropped; 0: none.
    mean: per channel, on the 0..255 scale.
    std: likewise.
  """
  height, width, channels = image_shape
  arrays = _named_arrays(model)
  if jax.process_index():
    checkpoint.save_arrays(files.temporary_of(folder) / 'arrays', arrays)
    return
  record = {
    'schema': MODEL_SCHEMA,
    'architecture': architecture,
    'topology': model.topology.to_dict(),
    'digest': checkpoint.digest(arrays),
    'classes': list(classes),
    'preprocessing': {
      'height': height,
      'width': width,
      'channels': channels,
      'resize': resize,
      'mean': list(mean),
      'std': list(std),
    },
  }
  with files.replacing(folder) as temporary:
    temporary.mkdir(parents=True)
    checkpoint.save_arrays(temporary / 'arrays', arrays)
    files.write_json(temporary / 'model.json', record)


def load(folder: str | Path) -> Classifier:
  """Reads a model.

  Args:
    folder: the workdir of a finished run, such as 'runs/digits', or the model
      folder in it, which may lie anywhere.

  Raises:
    InputError: there is no whole model in it.
  """
  folder = Path(folder)
  if (folder / 'model' / 'model.json').is_file():  # a workdir
    folder /= 'model'
  path = folder / 'model.json'
  if not path.is_file():
    raise InputError(
      f'{folder} holds no model.json; give the workdir of a finished run, such'
      ' as runs/digits, or its model folder (--mode=train goes on with a run'
      ' that was interrupted)'
    )
  record = files.read_json(path, dict[str, Any], remedy=_REMEDY)
  arrays_folder = folder / 'arrays'
  try:
    read = _checked(record)
    frozen = topology.from_dict(read.topology)
    shape = models.architecture_of(read.architecture.get('name')).mask_shape(
      read.architecture.get('level', 'block')
    )
    if frozen.shape != shape:
      raise InputError(
        f'the topology is of a mask of shape {frozen.shape}; that of this'
        f' network is {shape}'
      )
  except ValueError as error:
    raise InputError(f'{path} is damaged: {error}; {_REMEDY}') from error
  # A network of many blocks takes long to build: not of what is not there.
  stored = checkpoint.stored_arrays(arrays_folder)
  for index, live in enumerate(frozen.live):
    if live and not any(n.startswith(f'stack/blocks/{index}/') for n in stored):
      raise InputError(
        f'{arrays_folder} has no arrays of block {index + 1}, which {path}'
        f' names; {_REMEDY}'
      )
  # The rule and the seed decide what a network starts from, and no shape.
  architecture = read.architecture | {'rule': 'fixed_prev', 'seed': 0}
  try:
    abstract = nnx.eval_shape(
      lambda: wiring.prune(
        wiring.freeze(models.create_model(**architecture), frozen)
      )
    )
  except (TypeError, ValueError) as error:
    why = str(error).splitlines()[0]
    raise InputError(f'{path} is damaged: {why}; {_REMEDY}') from error
  expected = _named_arrays(abstract)
  check_arrays(arrays_folder, expected, stored)
  arrays = checkpoint.load_arrays(arrays_folder, expected)
  if checkpoint.digest(arrays) != read.digest:
    raise InputError(
      f'{arrays_folder} is damaged: not the arrays that were saved; write'
      ' the model again with --mode=train'
    )
  network, state = nnx.split(abstract)
  flat = nnx.to_flat_state(state)
  loaded = nnx.from_flat_state(
    (path, leaf.replace(arrays['/'.join(map(str, path))]))
    for path, leaf in flat
  )
  return Classifier(network, loaded, record)


def _checked(record: dict[str, Any]) -> _Record:
  """Returns the content of model.json, after all that needs no network.

  Raises:
    InputError: it is not of the schema, or contradicts itself.
  """
  read: _Record = files.of_kind(record, _Record)
  own, shape = read.architecture, read.preprocessing
  check_choice('connectivity.level', own.get('level', 'block'), 'level')
  check_choice('model.dtype', own.get('dtype', 'float32'), 'dtype')
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
        f' model.json makes it {ours}; {_REMEDY}'
      )
  declared = sum(leaf.size * leaf.dtype.itemsize for leaf in expected.values())
  held = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
  if declared > _MAX_RATIO * held + _SLACK:
    raise InputError(
      f'{folder} holds {held:,} bytes, which cannot be the {declared:,} of the'
      f' arrays that it names; {_REMEDY}'
    )


def _named_arrays(model: Any) -> dict[str, Any]:
  """Returns {'stack/blocks/0/conv1/kernel': array, ...}."""
  return {
    '/'.join(map(str, path)): leaf.get_value()
    if isinstance(leaf, nnx.Variable)
    else leaf
    for path, leaf in nnx.to_flat_state(nnx.state(model))
  }


def _is_one(given: Any) -> bool:
  """Whether it is an image, rather than several."""
  if isinstance(given, (str, os.PathLike, Image.Image)):
    return True
  shape: tuple[int, ...] = getattr(given, 'shape', ())
  return len(shape) == 2 or (len(shape) == 3 and shape[-1] <= 4)


class Classifier:
  """A trained, frozen and pruned network, ready to predict.

  Attributes:
    classes: name of each output.
    topology: which sources feed each block.
    image_shape: (height, width, channels) that images are brought to.
    record: the content of model.json.
  """

  def __init__(self, network: Any, state: Any, record: dict[str, Any]) -> None:
    """Made by `load`."""
    self.record = record
    self.classes: tuple[str, ...] = tuple(record['classes'])
    self.topology = topology.from_dict(record['topology'])
    shape = record['preprocessing']
    self.image_shape = (shape['height'], shape['width'], shape['channels'])
    mean = jnp.asarray(shape['mean'], jnp.float32)
    std = jnp.asarray(shape['std'], jnp.float32)
    self._state = state

    @jax.jit
    def forward(state: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
      model = nnx.merge(network, state)
      logits = model((batch.astype(jnp.float32) - mean) / std)
      return logits, jax.nn.softmax(logits)

    self._forward = forward

  def predict(self, images_or_paths: Any) -> np.ndarray:
    """Returns class probabilities, float32 [N, len(classes)].

    Args:
      images_or_paths: uint8 [N, H, W, C] or [N, H, W], or a sequence of paths,
        Pillow images and uint8 arrays; or one of these, [H, W, C] with C up to
        4 or [H, W], as if alone in a sequence. Any size; they are resized and
        converted as in training.

    Raises:
      InputError: an image cannot be read, or an array is not an image.
    """
    given = images_or_paths
    if _is_one(given):
      given = [given]
    batches = [
      self.probabilities(
        np.stack([*map(self.prepare, given[start : start + BATCH])])
      )
      for start in range(0, len(given), BATCH)
    ]
    if not batches:
      return np.zeros((0, len(self.classes)), np.float32)
    return np.concatenate(batches)

  def prepare(self, item: Any) -> np.ndarray:
    """Returns one image as the network takes it, uint8 `image_shape`.

    Args:
      item: a path, Pillow image or uint8 array.

    Raises:
      InputError: it cannot be read, or is not an image.
    """
    height, width, channels = self.image_shape
    return images.read(
      item,
      channels=channels,
      size=(height, width),
      resize=self.record['preprocessing'].get('resize', 0),
    )

  def probabilities(self, batch: np.ndarray) -> np.ndarray:
    """Returns class probabilities of images that are prepared already.

    Args:
      batch: uint8 [N, H, W, C], of `image_shape`.

    Returns:
      float32 [N, len(classes)].
    """
    return self._run(batch)[1]

  def logits(self, batch: np.ndarray) -> np.ndarray:
    """Returns what the softmax of is `probabilities`, float32 of that shape."""
    return self._run(batch)[0]

  def _run(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Powers of two: few shapes to compile for, whatever number is asked for.
    padded = 1 << (len(batch) - 1).bit_length()
    filled = np.pad(batch, ((0, padded - len(batch)), (0, 0), (0, 0), (0, 0)))
    logits, probabilities = jax.device_get(self._forward(self._state, filled))
    return logits[: len(batch)], probabilities[: len(batch)]
