"""A model folder, and what it predicts.

`model/` holds `arrays/` (Orbax, one array per parameter, named by its path)
and `model.json`: architecture, topology, classes and preprocessing. Nothing
else is needed to predict.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from maskconnect_jax import (
  checkpoint,
  files,
  images,
  models,
  topology,
  wiring,
)
from maskconnect_jax.config import InputError

MODEL_SCHEMA = 'maskconnect_jax.model/1'
BATCH = 256


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
    'architecture': {'version': model.version} | architecture,
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
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
    if record['schema'] != MODEL_SCHEMA:
      raise ValueError(f'schema {record["schema"]!r} is not {MODEL_SCHEMA!r}')
    frozen = topology.from_dict(record['topology'])
    given = {'version': '1'} | record['architecture']  # had no name then
    architecture = given | {'rule': 'fixed_prev'}
    abstract = nnx.eval_shape(
      lambda: wiring.prune(
        wiring.freeze(models.create_model(**architecture), frozen)
      )
    )
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(f'{path} is damaged: {error}') from error
  arrays = checkpoint.load_arrays(folder / 'arrays', _named_arrays(abstract))
  if checkpoint.digest(arrays) != record.get('digest'):
    raise InputError(
      f'{folder / "arrays"} is damaged: not the arrays that were saved; write'
      ' the model again with --mode=train'
    )
  network, state = nnx.split(abstract)
  flat = nnx.to_flat_state(state)
  loaded = nnx.from_flat_state(
    (path, leaf.replace(arrays['/'.join(map(str, path))]))
    for path, leaf in flat
  )
  try:
    return Classifier(network, loaded, record)
  except (KeyError, TypeError) as error:
    raise InputError(f'{folder / "model.json"} is damaged: {error}') from error


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
