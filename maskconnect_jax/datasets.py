"""The sources of images: digits, IDX files, image folders and TFDS.

`load` returns a whole data set decoded in host memory. The split into train,
validation and test is fixed: it never depends on the seed, so runs of
different seeds are measured on the same images.
"""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
import zlib
from collections.abc import Callable

import ml_collections
import numpy as np
from absl import logging

from maskconnect_jax import config
from maskconnect_jax import images as images_lib


@dataclasses.dataclass(frozen=True)
class Split:
  """Images uint8 [N, H, W, C], 0..255, and their class indices int32 [N]."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Every image of a data set, decoded.

  Attributes:
    train: what is trained on, without the validation images.
    validation: images held out of train to choose settings on, or None.
    test: what the result is measured on.
    classes: name of each label.
    skipped: files left out because they do not decode.
  """

  train: Split
  validation: Split | None
  test: Split
  classes: tuple[str, ...]
  skipped: int = 0

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels), pixels."""
    _, height, width, channels = self.train.images.shape
    return height, width, channels

  def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the training images' channels.

    Returns:
      Two float64 [C] on the 0..255 scale. A constant channel has std 1, so
      that dividing by it is safe.
    """
    channels = self.image_shape[2]
    # 256 counts a channel hold all of it exactly; the images themselves are
    # widened (8 bytes a value) only a chunk at a time.
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(self.train), 1024):
      chunk = self.train.images[start : start + 1024]
      for channel in range(channels):
        counts[channel] += np.bincount(
          chunk[..., channel].ravel(), minlength=256
        )
    share, values = counts / counts.sum(1, keepdims=True), np.arange(256.0)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)


def load(data: ml_collections.ConfigDict) -> Dataset:
  """Reads the data set that `config.data` describes into host memory.

  Args:
    data: `config.data`.

  Returns:
    Images in a fixed order, resized to `data.image_size` where that is set.
    Holding out validation images copies the training images once.

  Raises:
    InputError: the data is missing, damaged, inconsistent or larger than
      `data.memory_gb`; one line that names the folder, file or field.
  """
  if data.source not in SOURCES:
    raise config.InputError(
      f'config.data.source={data.source!r} is not one of {", ".join(SOURCES)}'
    )
  dataset = SOURCES[data.source](data)
  _check(dataset, data)
  return _hold_out(dataset, data.validation) if data.validation else dataset


def _digits(data: ml_collections.ConfigDict) -> Dataset:
  """scikit-learn's 1,797 digits [8, 8, 1], split 1,437 / 360."""
  import sklearn.datasets

  bunch = sklearn.datasets.load_digits()
  pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
  train, test = _stratified(bunch.target, 360)
  order = np.concatenate([train, test])
  return _read(
    lambda i: images_lib.to_array(
      pixels[order[i]], channels=1, size=_size(data)
    ),
    labels=bunch.target[order].astype(np.int32),
    num_train=len(train),
    classes=tuple(map(str, bunch.target_names)),
    data=data,
  )


def _idx(data: ml_collections.ConfigDict) -> Dataset:
  """MNIST's file layout: four IDX files of unsigned bytes, plain or .gz."""
  folder = _folder_of(data, 'train-images-idx3-ubyte[.gz] and the other three')
  pixels, labels = [], []
  for part in ('train', 't10k'):
    images_file = _idx_path(folder, f'{part}-images', 3)
    labels_file = _idx_path(folder, f'{part}-labels', 1)
    pixels.append(_read_idx(images_file, 3))
    labels.append(_read_idx(labels_file, 1))
    if len(pixels[-1]) != len(labels[-1]):
      raise config.InputError(
        f'{images_file} holds {len(pixels[-1])} images but {labels_file}'
        f' holds {len(labels[-1])} labels; both must be of the same set'
      )
  num_train = len(labels[0])
  num_classes = int(labels[0].max(initial=0)) + 1

  def read(i: int) -> np.ndarray:
    image = pixels[0][i] if i < num_train else pixels[1][i - num_train]
    return images_lib.to_array(image[..., None], channels=1, size=_size(data))

  return _read(
    read,
    labels=np.concatenate(labels).astype(np.int32),
    num_train=num_train,
    data=data,
    classes=tuple(map(str, range(num_classes))),
  )


def _idx_path(folder: pathlib.Path, stem: str, rank: int) -> pathlib.Path:
  for name in (f'{stem}-idx{rank}-ubyte', f'{stem}.idx{rank}-ubyte'):
    for path in (folder / name, folder / f'{name}.gz'):
      if path.is_file():
        return path
  raise config.InputError(
    f'config.data.dir={str(folder)!r} has no'
    f' {stem}-idx{rank}-ubyte, plain or .gz'
  )


def _read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
  """Returns the uint8 array of `rank` dimensions in an IDX file."""
  content, whole = bytearray(), True
  with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
    try:
      # read() would lose what it has read when it comes upon the damage.
      while block := file.read1(1 << 20):
        content += block
    except (EOFError, gzip.BadGzipFile, zlib.error):
      whole = False
  header = np.frombuffer(
    content[: 4 + 4 * rank].ljust(4 + 4 * rank, b'\0'), '>u4'
  ).tolist()
  # Two zero bytes, 8 for unsigned byte, and the number of dimensions.
  if len(content) >= 4 and header[0] != 0x0800 + rank:
    raise config.InputError(
      f'{path} is not an IDX file of {rank} dimensions: it begins with'
      f' {header[0]:#010x}, not {0x0800 + rank:#010x};'
      ' get it again'
    )
  expected = 4 + 4 * rank
  if len(content) >= expected:
    size = 1
    for dimension in header[1:]:
      size *= dimension  # Python's integers: a damaged header cannot overflow
    expected += size
  if len(content) != expected or not whole:
    raise config.InputError(
      f'{path} is damaged or cut short: {expected} bytes expected,'
      f' {len(content)} found; get it again'
    )
  return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(
    header[1:]
  )


def _image_folder(data: ml_collections.ConfigDict) -> Dataset:
  """DIR/train/<class>/* and DIR/test/<class>/* (else val/), always as RGB.

  Every file that is not hidden counts as an image, whatever its suffix: one
  that is none is an error rather than silently less data.
  """
  root = _folder_of(data, 'train/<class>/*.jpg and test/<class>/*.jpg')
  test_root = next(
    (root / name for name in ('test', 'val') if (root / name).is_dir()), None
  )
  if test_root is None:
    raise config.InputError(
      f'config.data.dir={data.dir!r} has no test images;'
      ' it needs test/<class>/* or val/<class>/*'
    )
  train, test = _class_files(root / 'train'), _class_files(test_root)
  if odd := sorted(set(train) ^ set(test)):
    where = [
      f'{name} is only in {"train" if name in train else test_root.name}'
      for name in odd[:5]
    ] + ['...'] * (len(odd) > 5)
    raise config.InputError(
      f'config.data.dir={data.dir!r}: train and test differ in classes'
      f' ({", ".join(where)}); both need the same class folders'
    )
  found = [*train.values(), *test.values()]
  paths = [path for files in found for path in files]
  return _read(
    lambda i: images_lib.decode(paths[i], channels=3, size=_size(data)),
    labels=np.repeat(
      np.tile(np.arange(len(train), dtype=np.int32), 2),
      [len(files) for files in found],
    ),
    num_train=sum(map(len, train.values())),
    classes=tuple(train),
    data=data,
  )


def _class_files(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the files of every class folder in `root`, both sorted."""
  folders = sorted(
    path for path in root.glob('*') if path.is_dir() and path.name[0] != '.'
  )
  if not folders:
    raise config.InputError(
      f'{root} holds no class folders; put its images in {root}/<class>/'
    )
  return {
    folder.name: images_lib.find_images(folder, suffixes=None)
    for folder in folders
  }


def _tfds(data: ml_collections.ConfigDict) -> Dataset:
  """A TFDS set prepared as ArrayRecord, read without TensorFlow."""
  if not data.name:
    raise config.InputError(
      'config.data.name is empty; config.data.source='
      "'tfds' needs the name of a set, such as 'cifar10'"
    )
  if data.dir:
    _folder_of(data, 'the prepared TFDS sets')
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise config.InputError(
      f"config.data.source='tfds' needs a package ({error}); pip install"
      " 'maskconnect_jax[tfds]'"
    ) from error
  name = f'config.data.name={data.name!r}'
  try:
    builder = tfds.builder(data.name, data_dir=data.dir or None)
  except ValueError as error:
    raise config.InputError(
      f'{name} is not a set that TFDS knows or finds in'
      ' config.data.dir; https://www.tensorflow.org/datasets/catalog lists them'
    ) from error
  splits = set(builder.info.splits)
  held_out = (
    'validation'
    if splits & {'test', 'validation'} == {'validation'}
    else 'test'
  )
  if splits and not splits >= {'train', held_out}:
    raise config.InputError(
      f'{name} has the splits {sorted(splits)}; it needs'
      ' train, and test or validation'
    )
  try:
    train, test = map(builder.as_data_source, ('train', held_out))
  except (AssertionError, NotImplementedError, ValueError) as error:
    # Reading takes no TensorFlow, but encoding a set's images does.
    where = f', data_dir={data.dir!r}' if data.dir else ''
    raise config.InputError(
      f'{name} is not prepared as ArrayRecord; once, where tensorflow is'
      ' installed too: python -c "import tensorflow_datasets as tfds;'
      f" tfds.builder({data.name!r}{where}, file_format='array_record')"
      '.download_and_prepare()"'
    ) from error
  features = builder.info.features
  if not {'image', 'label'} <= set(features) or not hasattr(
    features['label'], 'names'
  ):
    raise config.InputError(
      f'{name} is not a set of classified images: it has'
      " no features 'image' and 'label'"
    )
  channels = 1 if features['image'].shape[-1] == 1 else 3
  labels = np.full(len(train) + len(test), -1, np.int32)

  def read(i: int) -> np.ndarray:
    example = train[i] if i < len(train) else test[i - len(train)]
    labels[i] = example['label']
    return images_lib.to_array(
      example['image'], channels=channels, size=_size(data)
    )

  return _read(
    read,
    labels=labels,
    num_train=len(train),
    data=data,
    classes=tuple(features['label'].names),
  )


SOURCES: dict[str, Callable[[ml_collections.ConfigDict], Dataset]] = {
  'digits': _digits,
  'idx': _idx,
  'folder': _image_folder,
  'tfds': _tfds,
}


def _folder_of(data: ml_collections.ConfigDict, needs: str) -> pathlib.Path:
  """Returns `data.dir`, which must be a folder with something in it."""
  path = pathlib.Path(data.dir).expanduser()
  if not data.dir:
    fault = 'is not set'
  elif not path.is_dir():
    fault = 'is not a folder' if path.exists() else 'does not exist'
  elif not any(path.iterdir()):
    fault = 'is empty'
  else:
    return path
  raise config.InputError(
    f'config.data.dir={data.dir!r} {fault}; it must be the folder that holds'
    f' {needs}'
  )


def _size(data: ml_collections.ConfigDict) -> tuple[int, int] | None:
  return (data.image_size, data.image_size) if data.image_size else None


def _read(
  read: Callable[[int], np.ndarray],
  *,
  labels: np.ndarray,
  num_train: int,
  classes: tuple[str, ...],
  data: ml_collections.ConfigDict,
) -> Dataset:
  """Reads all images and puts the data set together.

  Args:
    read: image i as uint8 [H, W, C]; raises InputError where it cannot.
    labels: int32 [N]; may be filled in by `read`.
    num_train: the first so many of the N are for training, the rest for test.
    classes: name of each label.
    data: `config.data`.
  """
  pixels, kept, errors = images_lib.read_all(
    read,
    len(labels),
    name=_where(data),
    memory_gb=data.memory_gb,
    skip_errors=data.skip_errors,
  )
  if errors:
    logging.warning(
      '%d images do not decode and are skipped: %s%s',
      len(errors),
      '; '.join(errors[:3]),
      '; ...' if len(errors) > 3 else '',
    )
  labels, num_train = labels[kept], int(kept[:num_train].sum())
  return Dataset(
    train=Split(pixels[:num_train], labels[:num_train]),
    validation=None,
    test=Split(pixels[num_train:], labels[num_train:]),
    classes=classes,
    skipped=len(errors),
  )


def _where(data: ml_collections.ConfigDict) -> str:
  """Names the data set in a message, by the field that chose it."""
  field = 'dir' if data.dir else 'name' if data.name else 'source'
  return f'config.data.{field}={data[field]!r}'


def _check(dataset: Dataset, data: ml_collections.ConfigDict) -> None:
  """Raises InputError for a data set that no classifier can be trained on."""
  for name, split in (('training', dataset.train), ('test', dataset.test)):
    if not len(split):
      raise config.InputError(
        f'{_where(data)} has no {name} images; both'
        ' training and test images are needed'
      )
  known = np.unique(dataset.train.labels)
  if len(dataset.classes) < 2 or len(known) < 2:
    raise config.InputError(
      f'{_where(data)} has training images of one class only'
      f' ({dataset.classes[known[0]]}); at least 2 are needed'
    )
  last = len(dataset.classes) - 1
  if known[0] < 0 or known[-1] > last:
    raise config.InputError(
      f'{_where(data)} has training labels from {known[0]} to {known[-1]};'
      f' its {last + 1} classes need labels from 0 to {last}'
    )
  if len(odd := np.setdiff1d(dataset.test.labels, known)):
    raise config.InputError(
      f'{_where(data)} has test images with labels {odd.tolist()}, of which'
      ' there are no training images; both need the same classes'
    )


def _stratified(
  labels: np.ndarray, held_out: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the same sorted indices every time: (the rest, held out)."""
  import sklearn.model_selection

  rest, held = sklearn.model_selection.train_test_split(
    np.arange(len(labels)), test_size=held_out, random_state=0, stratify=labels
  )
  return np.sort(rest), np.sort(held)


def _hold_out(dataset: Dataset, count: int) -> Dataset:
  """Moves `count` training images to validation."""
  images, labels = dataset.train.images, dataset.train.labels
  if count >= len(labels):
    raise config.InputError(
      f'config.data.validation={count} must be smaller'
      f' than the {len(labels)} training images'
    )
  try:
    rest, held = _stratified(labels, count)
  except ValueError as error:
    raise config.InputError(
      f'config.data.validation={count} cannot be drawn evenly from the'
      f' {len(np.unique(labels))} classes of {len(labels)} training images'
      f' ({str(error).split(". ")[0]}); use another number'
    ) from error
  return dataclasses.replace(
    dataset,
    train=Split(images[rest], labels[rest]),
    validation=Split(images[held], labels[held]),
  )
