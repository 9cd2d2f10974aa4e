"""A model folder, and predictions from it.

`model/` holds `arrays/`, `model.safetensors` and `model.json`. Orbax writes
`arrays/`: one array per parameter, named by its path. `model.safetensors` holds
the same arrays. `model.json` holds architecture, topology, classes and
preprocessing. It and one of the two others are all that is needed to predict.
"""

from __future__ import annotations

import contextlib
import html
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from maskconnect_jax import files, limits, names
from maskconnect_jax.data import image_headers, image_inputs, images
from maskconnect_jax.drawing import svg
from maskconnect_jax.errors import InputError
from maskconnect_jax.method import topology, wiring
from maskconnect_jax.networks import architectures, models
from maskconnect_jax.run import (
  augment,
  bucket,
  cores,
  distributed,
  model_arrays,
  model_record,
  native,
  snapshot,
  weights,
)

K = TypeVar('K')

BATCH = 256
# What `load` reads: names of files and folders, of a workdir or a model folder.
_READS = ('inputs.json', 'model', 'model.json', 'arrays', weights.NAME)
_BATCH_BYTES = 2**26  # most bytes of a batch's images as uint8


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
  max_pixels: int = image_headers.MAX_PIXELS,
  multi_label: bool = False,
  extra: Mapping[str, bytes] | None = None,
) -> None:
  """Writes a frozen, pruned model; a folder already there is replaced.

  Of several processes the first one calls it.

  Args:
    folder: the folder to write, such as workdir/model.
    model: from `wiring.prune`; has spec and topology.
    architecture: the other arguments of `create_model`.
    classes: name of each output.
    image_shape: (height, width, channels) of the network's input.
    resize: pixels of the shorter side before the centre is cropped; 0: no crop,
      the whole image is resized to `image_shape`.
    mean: one number per channel, on the 0..255 scale.
    std: one number per channel, on the 0..255 scale.
    max_pixels: width times height of the largest image to decode.
    multi_label: whether an image has several labels: each output has a sigmoid,
      not all of them a softmax.
    extra: more files for the folder, content by name, such as a model card.

  Raises:
    InputError: the model cannot be written, as on a full disk; a folder already
      there stays.
  """
  arrays = _named_arrays(model)
  record = snapshot.description(
    model,
    architecture=architecture,
    classes=classes,
    image_shape=image_shape,
    resize=resize,
    mean=mean,
    std=std,
    max_pixels=max_pixels,
    multi_label=multi_label,
  ) | {'digest': model_arrays.digest(arrays)}
  size = 2 * sum(array.nbytes for array in arrays.values())
  with files.replacing(folder, size) as temporary:
    temporary.mkdir(parents=True)
    model_arrays.save(temporary / 'arrays', arrays)
    weights.save(temporary / weights.NAME, arrays)
    for name, content in (extra or {}).items():
      (temporary / name).write_bytes(content)
    files.write_json(temporary / 'model.json', record)


def load(folder: str | Path, step: int | str | None = None) -> Classifier:
  """Reads a model.

  No code of the folder runs. Shapes are checked before arrays are read.

  Args:
    folder: the workdir of a run, such as 'runs/digits', or a model folder,
      which may have been moved anywhere; or the address of one in a bucket,
      such as 's3://bucket/run'. Of a run that is not finished, the newest whole
      checkpoint is read. Of `arrays` and `model.safetensors` a model folder
      needs one; `arrays` is read if both are there.
    step: reads a checkpoint of a workdir instead: that after so many steps; or
      'best', that with the best accuracy on the images that the run was
      evaluated on. A network that still learns its wiring is wired as it is
      evaluated then.

  Raises:
    InputError: the folder holds no whole model, or no such checkpoint, or
      cannot be read.
  """
  if step not in (None, 'best') and type(step) is not int:
    raise InputError(
      f"step={limits.shown(step)} is neither 'best' nor a whole number"
    )
  with reading(folder, step) as there:
    model = _load(there, step)
  native.wait()  # before anything is traced
  return model


def reading(
  folder: str | Path, step: int | str | None = None, also: Sequence[str] = ()
) -> contextlib.AbstractContextManager[Path]:
  """Yields a local folder that holds what `load` reads.

  Of an address it fetches the model, or the one checkpoint that is loaded, and
  not the others.

  Args:
    folder: see `load`.
    step: see `load`.
    also: names of more files to fetch, such as 'config.json'.

  Raises:
    InputError: see `load`.
  """

  def chosen(local: Path, steps: list[int]) -> list[str]:
    if step is None and not (steps and _has_no_model(local)):
      return []
    number = snapshot.choose(local / 'checkpoints', steps, step)[0]
    return [f'checkpoints/{number}']

  names = _READS if step is None else ('inputs.json',)
  measured = snapshot.MEASURED if step == 'best' else ()
  return bucket.reading(folder, (*names, *measured, *also), more=chosen)


def _load(folder: Path, step: int | str | None) -> Classifier:
  if step is not None or _is_unfinished(folder):
    return Classifier(*snapshot.read(folder, step))
  if (folder / 'model' / 'model.json').is_file():  # a workdir
    folder /= 'model'
  path = folder / 'model.json'
  if not path.is_file():
    raise InputError(
      f'{folder} holds no model.json; give the workdir of a finished run, such'
      ' as runs/digits, or its model folder (--mode=train goes on with a run'
      ' that was interrupted)'
    )
  record, frozen = model_record.read(path)
  place = folder / 'arrays'
  stored_in: Any = model_arrays.stored_in
  read: Any = model_arrays.load
  if not place.exists() and (folder / weights.NAME).exists():
    place = folder / weights.NAME
    stored_in, read = weights.stored, weights.load
  stored = stored_in(place)
  model_record.check_blocks(place, frozen, stored)
  # The first models have no 'version': version 1 was the only one.
  architecture = {'version': '1'} | record['architecture']
  # Version 0.1.0 wrote this field, which only training used.
  architecture.pop('gradient_every', None)
  try:
    abstract = nnx.eval_shape(
      lambda: wiring.prune(models.create_model(**architecture, topology=frozen))
    )
  except (TypeError, ValueError) as error:
    why = str(error).splitlines()[0]
    raise InputError(
      f'{path} is damaged: {why}; {model_record.REMEDY}'
    ) from error
  expected = _named_arrays(abstract)
  model_record.check_arrays(place, expected, stored)
  arrays = read(place, expected)
  if model_arrays.digest(arrays) != record['digest']:
    raise InputError(
      f'{place} is damaged: not the arrays that were saved;'
      f' {model_record.REMEDY}'
    )
  network, state = nnx.split(abstract)
  flat = nnx.to_flat_state(state)
  loaded = nnx.from_flat_state(
    (path, leaf.replace(arrays['/'.join(map(str, path))]))
    for path, leaf in flat
  )
  return Classifier(network, loaded, record)


def _is_unfinished(folder: Path) -> bool:
  """Whether this is the workdir of a run without a model, with checkpoints."""
  return _has_no_model(folder) and any(
    path.name.isdigit() for path in (folder / 'checkpoints').glob('[0-9]*')
  )


def _has_no_model(folder: Path) -> bool:
  """Whether this is the workdir of a run that is not finished."""
  finished = (folder / 'model' / 'model.json').is_file()
  return not finished and (folder / 'inputs.json').is_file()


def _named_arrays(model: Any) -> dict[str, Any]:
  """Returns {'stack/blocks/0/conv1/kernel': array, ...}."""
  return {
    '/'.join(map(str, path)): leaf.get_value()
    if isinstance(leaf, nnx.Variable)
    else leaf
    for path, leaf in nnx.to_flat_state(nnx.state(model))
  }


class Classifier:
  """A trained, frozen and pruned network, ready to predict.

  Attributes:
    classes: name of each output.
    multi_label: whether an image has several labels, not one class.
    topology: which sources feed each block.
    image_shape: (height, width, channels) of the network's input.
    record: the content of model.json.
  """

  def __init__(self, network: Any, state: Any, record: dict[str, Any]) -> None:
    """Takes the parts of a model; call `load` instead.

    Args:
      network: the model's graph.
      state: its arrays.
      record: the content of model.json.
    """
    self.record = record
    self.classes: tuple[str, ...] = tuple(record['classes'])
    self.multi_label: bool = record.get('multi_label', False)
    self.topology = topology.from_dict(record['topology'])
    probabilities = jax.nn.sigmoid if self.multi_label else jax.nn.softmax
    shape = record['preprocessing']
    self.image_shape = (shape['height'], shape['width'], shape['channels'])
    mean, std = shape['mean'], shape['std']
    # Plain arrays: with Flax's variables, a call would take twice as long.
    self._states: dict[int, tuple[Any, Any]] = {1: (nnx.as_pure(state), None)}

    @jax.jit
    def forward(state: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
      model = nnx.merge(network, state)
      logits = model(augment.normalize(batch, mean, std))
      return logits, probabilities(logits)

    self._network = network
    self._forward = forward
    self._features: dict[int | None, Any] = {}

  def _repr_html_(self) -> str:
    """Shows the model in a notebook: what it is, and its topology."""
    own, shape = self.record['architecture'], self.image_shape
    name = f'{own["name"]}, {len(self.classes)} classes'
    drawing = svg.topology_svg(
      self.topology.sources,
      stages=architectures.architecture_of(own['name']).stages,
      live=getattr(self.topology, 'live_branches', self.topology.live),
      title=f'Topology of {name}',
    )
    size = ' × '.join(map(str, shape))
    return (
      '<figure style="max-width:720px;margin:0">'
      f'<figcaption><b>{html.escape(name)}</b>, images of {size}</figcaption>'
      f'{drawing}</figure>'
    )

  @property
  def model(self) -> Any:
    """The network, a Flax NNX module; each call gives a copy of its own.

    It takes float images normalised as `model.json` says, and returns logits.
    """
    return nnx.merge(self._network, self._states[1][0])

  def finetune(self, num_classes: int, *, seed: int = 0) -> Any:
    """Returns the network with a new head, for other classes.

    Its wiring stays the learned one. Train it as any NNX module, or begin a run
    with `config.init_from`.

    Args:
      num_classes: outputs of the head.
      seed: of the head's weights.

    Raises:
      InputError: `num_classes` is no number from 1 to `limits.MAX_CLASSES`.
    """
    limits.whole('num_classes', num_classes, 1, limits.MAX_CLASSES)
    model, rngs = self.model, nnx.Rngs(seed)
    model.head = nnx.Linear(model.head.in_features, num_classes, rngs=rngs)
    return model

  def features(
    self, images_or_paths: Any, *, block: int | None = None
  ) -> np.ndarray:
    """Returns what a block gives for each image, averaged over space.

    Args:
      images_or_paths: see `predict`.
      block: the block, from 1; None takes what the head reads.

    Returns:
      float32 [N, channels].

    Raises:
      InputError: see `predict`; or there is no such block, or it was pruned.
    """
    items = image_inputs.each(images_or_paths, channels=self.image_shape[-1])
    prepared = (self._prepared(n, item) for n, item in enumerate(items))
    rows = []
    while part := list(itertools.islice(prepared, self.batch_size)):
      rows.append(self._run(np.stack(part), self._features_of(block)))
    if not rows:
      raise InputError('there are no images to take features of')
    return np.concatenate(rows)

  def _features_of(self, block: int | None) -> Any:
    if block not in self._features:
      mean, std = (self.record['preprocessing'][n] for n in ('mean', 'std'))

      @jax.jit
      def features(state: Any, batch: jax.Array) -> jax.Array:
        model = nnx.merge(self._network, state)
        return model.features(augment.normalize(batch, mean, std), block)

      self._features[block] = features
    return self._features[block]

  @property
  def arrays(self) -> dict[str, jax.Array]:
    """The network's arrays by name, such as 'stack/blocks/0/conv1/kernel'."""
    return {
      '/'.join(map(str, path)): leaf
      for path, leaf in nnx.to_flat_state(self._states[1][0])
    }

  def predict(self, images_or_paths: Any) -> np.ndarray:
    """Returns class probabilities, float32 [N, len(classes)].

    Those of an image add up to 1. Of a multi-label model each is that of a
    label by itself.

    Args:
      images_or_paths: an array of any library, uint8 [N, H, W, C] or [N, H, W];
        or any iterable of paths, Pillow images and uint8 arrays; or a single
        path, image or array. A single array is [H, W, C] with C up to 4, or
        [H, W]. Images may have any size; they are resized and converted as in
        evaluation. An iterable is consumed `batch_size` images at a time.

    Raises:
      InputError: an image cannot be read, an item is no image, or an array can
        be read as one image or as several.
    """
    items = image_inputs.each(images_or_paths, channels=self.image_shape[-1])
    prepared = ((n, self._prepared(n, item)) for n, item in enumerate(items))
    rows = [row for _, row in self.rows(prepared)]
    return np.array(rows, np.float32).reshape(-1, len(self.classes))

  def rows(
    self, prepared: Iterable[tuple[K, np.ndarray]]
  ) -> Iterator[tuple[K, np.ndarray]]:
    """Yields the class probabilities of images, one after the other.

    Args:
      prepared: pairs of a name, which may be any object, and an image from
        `prepare`. They are consumed `batch_size` at a time.

    Yields:
      The name, and float32 [len(classes)].
    """
    prepared = iter(prepared)
    while part := list(itertools.islice(prepared, self.batch_size)):
      keys, batch = zip(*part, strict=True)
      yield from zip(keys, self.probabilities(np.stack(batch)), strict=True)

  def best(self, row: np.ndarray) -> list[tuple[str, float]]:
    """Returns what an image is taken for.

    Args:
      row: its probabilities, float32 [len(classes)].

    Returns:
      The most probable class and its probability. Of a multi-label model all
      labels with a probability above 0.5, the most probable one first. Bytes
      of a name that are no UTF-8 are written as in `names.encodable`.
    """
    chosen = [int(row.argmax())]
    if self.multi_label:
      chosen = [int(n) for n in np.argsort(-row, stable=True) if row[n] > 0.5]
    return [(names.encodable(self.classes[n]), float(row[n])) for n in chosen]

  def answer(self, row: np.ndarray) -> dict[str, Any]:
    """Returns what an image is taken for, as --mode=predict --json prints it.

    Args:
      row: see `best`.

    Returns:
      {'class': name, 'probability': its own, 'probabilities': {name: of each
      class}}. A multi-label model has 'labels', the names of `best`, in place
      of the first two.
    """
    best = self.best(row)
    of_all = dict(
      zip(map(names.encodable, self.classes), row.tolist(), strict=True)
    )
    if self.multi_label:
      return {'labels': [name for name, _ in best], 'probabilities': of_all}
    ((name, probability),) = best
    return {
      'class': name, 'probability': probability, 'probabilities': of_all,
    }  # fmt: skip

  @property
  def batch_size(self) -> int:
    """Images in a batch: a power of two, smaller for large images."""
    most = max(1, _BATCH_BYTES // math.prod(self.image_shape))
    return int(min(BATCH, 1 << (most.bit_length() - 1)))

  def _prepared(self, number: int, item: Any) -> np.ndarray:
    try:
      return self.prepare(item)
    except InputError as error:
      if isinstance(item, str | os.PathLike):  # the error names it
        raise
      raise InputError(f'image {number}: {error}') from error

  def prepare(self, item: Any) -> np.ndarray:
    """Returns one image resized for the network, uint8 `image_shape`.

    Args:
      item: a path, a Pillow image, a uint8 array, or a file's content as bytes.

    Raises:
      InputError: the item cannot be read, or is no image.
    """
    height, width, channels = self.image_shape
    return images.read(
      item if isinstance(item, bytes) else image_inputs.one(item),
      channels=channels,
      size=(height, width),
      resize=self.record['preprocessing'].get('resize', 0),
      max_pixels=self.record['preprocessing'].get(
        'max_pixels', image_headers.MAX_PIXELS
      ),
    )

  def probabilities(self, batch: np.ndarray) -> np.ndarray:
    """Returns the class probabilities of prepared images.

    Args:
      batch: uint8 [N, H, W, C], of `image_shape`.

    Returns:
      float32 [N, len(classes)].

    Raises:
      InputError: the batch has another shape or dtype.
    """
    found: np.ndarray = self._run(batch, self._forward)[1]
    return found

  def logits(self, batch: np.ndarray) -> np.ndarray:
    """Returns the logits, of which `probabilities` is softmax or sigmoid.

    Args:
      batch: uint8 [N, H, W, C], of `image_shape`.

    Returns:
      float32 [N, len(classes)].

    Raises:
      InputError: the batch has another shape or dtype.
    """
    found: np.ndarray = self._run(batch, self._forward)[0]
    return found

  def _run(self, batch: np.ndarray, function: Any) -> Any:
    """Returns what a compiled function gives for a batch, as NumPy arrays."""
    if batch.dtype != np.uint8 or batch.shape[1:] != self.image_shape:
      raise InputError(
        f'a batch is uint8 [N, {", ".join(map(str, self.image_shape))}], not'
        f' {batch.dtype} {list(batch.shape)}; predict() takes any images'
      )
    # N is padded to a power of two, so few shapes are compiled.
    padded = 1 << (len(batch) - 1).bit_length()
    filled = np.pad(batch, ((0, padded - len(batch)), (0, 0), (0, 0), (0, 0)))
    state, images, mesh = self._placed(filled)
    with jax.sharding.use_abstract_mesh(mesh):  # for `convolution.conv`
      found = jax.device_get(function(state, images))
    return jax.tree.map(lambda rows: rows[: len(batch)], found)

  def _placed(self, batch: np.ndarray) -> tuple[Any, Any, Any]:
    """Returns the network's arrays and a batch on as many devices, their mesh.

    A GPU or a TPU takes a whole batch. The cores of a CPU share it.
    """
    count = 1
    if jax.default_backend() == 'cpu':
      count = cores.devices(
        len(batch), batch.shape[1], jax.local_device_count()
      )
    if count not in self._states:
      mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:count]), ('data',))
      self._states[count] = (
        jax.device_put(self._states[1][0], distributed.replicated(mesh)),
        distributed.sharded(mesh),
      )
    state, sharding = self._states[count]
    if count == 1:
      return state, batch, jax.sharding.get_abstract_mesh()
    mesh = sharding.mesh.abstract_mesh
    return state, jax.device_put(batch, sharding), mesh
