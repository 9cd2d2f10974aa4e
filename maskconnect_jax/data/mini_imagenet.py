r"""Mini-ImageNet for ordinary classification, prepared for TFDS.

  pip install 'maskconnect_jax[tfds]'
  python -m maskconnect_jax.main --mode=prepare --images=DIR [--data_dir=DIR]

makes a set of 100 classes, with 500 training and 100 test images of each class.
`config.data.source='tfds'` with `config.data.name='mini_imagenet'` reads it.
The usual splits of Mini-ImageNet are for few-shot learning: their classes are
disjoint, so a classifier trained on one split cannot be tested on another.
Preparing needs neither TensorFlow nor the internet. No image is encoded anew:
the set holds the bytes of the files.

DIR has one of these layouts:

  DIR/<wnid>/*                      a folder per class; DIR may be all ImageNet
  DIR/{train,val,test}/<wnid>/*     few-shot distributions, 64/16/20 classes
  DIR/images/* and DIR/{train,val,test}.csv    Ravi and Larochelle's layout

The first two layouts may also lie in DIR/images/. <wnid> is a WordNet ID, such
as n01532829. ImageNet has 1,000 class folders; only the 100 are read.

**The split.** The files of a class are sorted by the SHA-256 of their names
(`n0153282900000005.jpg`, without the folder). The first 100 are the test
images, the next 500 the training images; further files are left out. So the
split depends on the names alone. It does not depend on the machine, the layout
or the order of the folder, and nobody has to pass a list around. Files sorted
by name would be in the order in which ImageNet numbered a class's images, which
may not be random; the order of the hashes is unrelated to it. A copy with other
file names gives another split. A copy of ImageNet itself has about 1,300 images
per class, and the 600 taken from it are not the 600 that Ravi and Larochelle
drew.

**The checksum.** `manifest.csv` is stored with the set. It has a line for each
image: split, class, file name and SHA-256 of the file. The SHA-256 of the
manifest is printed, and stored in the set's metadata. Two people with the same
SHA-256 have the same images in the same split. --expect=SHA256 fails for any
other SHA-256.
"""

from __future__ import annotations

import concurrent.futures
import csv
import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import tensorflow_datasets as tfds
import tqdm

from maskconnect_jax import names, signals
from maskconnect_jax.config import given_path
from maskconnect_jax.data import image_files
from maskconnect_jax.data import images as images_lib
from maskconnect_jax.errors import InputError

# Ravi and Larochelle's classes ("Optimization as a Model for Few-Shot
# Learning", ICLR 2017): training, validation and test classes together, sorted.
# The index is the label. Vinyals et al. (2016) made the first Mini-ImageNet but
# did not publish its classes.
WNIDS = (
    'n01532829', 'n01558993', 'n01704323', 'n01749939', 'n01770081',
    'n01843383', 'n01855672', 'n01910747', 'n01930112', 'n01981276',
    'n02074367', 'n02089867', 'n02091244', 'n02091831', 'n02099601',
    'n02101006', 'n02105505', 'n02108089', 'n02108551', 'n02108915',
    'n02110063', 'n02110341', 'n02111277', 'n02113712', 'n02114548',
    'n02116738', 'n02120079', 'n02129165', 'n02138441', 'n02165456',
    'n02174001', 'n02219486', 'n02443484', 'n02457408', 'n02606052',
    'n02687172', 'n02747177', 'n02795169', 'n02823428', 'n02871525',
    'n02950826', 'n02966193', 'n02971356', 'n02981792', 'n03017168',
    'n03047690', 'n03062245', 'n03075370', 'n03127925', 'n03146219',
    'n03207743', 'n03220513', 'n03272010', 'n03337140', 'n03347037',
    'n03400231', 'n03417042', 'n03476684', 'n03527444', 'n03535780',
    'n03544143', 'n03584254', 'n03676483', 'n03770439', 'n03773504',
    'n03775546', 'n03838899', 'n03854065', 'n03888605', 'n03908618',
    'n03924679', 'n03980874', 'n03998194', 'n04067472', 'n04146614',
    'n04149813', 'n04243546', 'n04251144', 'n04258138', 'n04275548',
    'n04296562', 'n04389033', 'n04418357', 'n04435653', 'n04443257',
    'n04509417', 'n04515003', 'n04522168', 'n04596742', 'n04604644',
    'n04612504', 'n06794110', 'n07584110', 'n07613480', 'n07697537',
    'n07747607', 'n09246464', 'n09256479', 'n13054560', 'n13133613',
)  # fmt: skip
_PARTS = ('train', 'val', 'test')
_SIGNATURES = (b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n')  # JPEG, PNG


class Entry(NamedTuple):
  """A line of the manifest: split, class, file, and SHA-256 of its bytes."""

  split: str
  wnid: str
  path: Path
  sha256: str


# If it were registered, TFDS would find this class by the set's name, and not
# the prepared set.
class MiniImagenet(  # type: ignore[call-arg]  # TFDS has no types
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Builds the TFDS set 'mini_imagenet' from a folder of images.

  Features: `image` (JPEG or PNG bytes of any size, decoded to uint8 [H, W, 3]),
  `label` (index into `classes`) and `file_name`. The module's docstring
  describes the layouts of the folder, the split and the checksum.
  """

  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self,
    images: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    classes: Sequence[str] = WNIDS,
    train: int = 500,
    test: int = 100,
  ):
    """Prepares nothing yet, and does not look into `images`.

    Args:
      images: the folder; the module's docstring has its layouts.
      data_dir: where TFDS keeps its sets; None is ~/tensorflow_datasets.
      classes: names of the class folders.
      train: how many training images of each class to take.
      test: how many test images of each class to take.

    Raises:
      InputError: no file can have the path `images` or `data_dir`.
    """
    self._images = given_path(images, '--images')
    self._classes, self._train, self._test = tuple(classes), train, test
    super().__init__(
      data_dir=given_path(data_dir, '--data_dir') if data_dir else None,
      file_format='array_record',  # can be read without TensorFlow
    )

  def _info(self) -> Any:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict({
        'image': tfds.features.Image(),
        'label': tfds.features.ClassLabel(names=self._classes),
        'file_name': tfds.features.Text(),
      }),
      supervised_keys=('image', 'label'),
      homepage='https://openreview.net/forum?id=rJY0-Kcll',
      metadata=tfds.core.MetadataDict(),
    )  # fmt: skip

  @functools.cached_property
  def entries(self) -> list[Entry]:
    """Every image of the set, by class, split and rank in its split.

    Raises:
      InputError: a class is missing or has too few images, a file is damaged,
        or a file is neither JPEG nor PNG. The message names the class or file.
    """
    chosen, needed = [], self._test + self._train
    for wnid, paths in find_files(self._images, self._classes).items():
      ranked = rank(paths)
      if len(ranked) < needed:
        raise InputError(
          f'class {wnid} has {len(ranked)} images in {self._images};'
          f' {needed} are needed'
        )
      ranked = ranked[:needed]
      for path in ranked:
        if names.one_line(path.name) != path.name:
          raise InputError(
            f'{names.one_line(path)} has a name that is no line of UTF-8, which'
            ' the set cannot hold; rename it'
          )
      chosen += [('test', wnid, path) for path in ranked[: self._test]]
      chosen += [('train', wnid, path) for path in ranked[self._test :]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      hashes = tqdm.tqdm(
        pool.map(checked_sha256, [path for _, _, path in chosen]),
        total=len(chosen),
        desc='checking',
        unit=' images',
        delay=2,
        leave=False,
        disable=None,
      )
      return [
        Entry(*image, sha256)
        for image, sha256 in zip(chosen, hashes, strict=True)
      ]

  @functools.cached_property
  def manifest(self) -> bytes:
    """The content of manifest.csv: a heading, and a line for each `Entry`."""
    return os.fsencode(
      'split,class,file_name,sha256\n'
      + ''.join(
        f'{entry.split},{entry.wnid},{entry.path.name},{entry.sha256}\n'
        for entry in self.entries
      )
    )

  @property
  def digest(self) -> str:
    """SHA-256 of the manifest, in hexadecimal."""
    return hashlib.sha256(self.manifest).hexdigest()

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    # data_path is a temporary folder until everything is written.
    (self.data_path / 'manifest.csv').write_bytes(self.manifest)
    self.info.metadata['manifest_sha256'] = self.digest
    return {name: self._generate_examples(name) for name in ('train', 'test')}

  def _generate_examples(
    self, split: str
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in self.entries:
      if entry.split == split:
        yield (
          f'{entry.wnid}/{entry.path.name}',
          {
            'image': entry.path,
            'label': entry.wnid,
            'file_name': entry.path.name,
          },
        )


def rank(paths: Sequence[Path]) -> list[Path]:
  """Returns files in the order of the SHA-256 of their names.

  Raises:
    InputError: two files have the same name, so that their order would be
      undefined.
  """
  names = [path.name for path in paths]
  if len(set(names)) < len(names):
    twice = max(names, key=names.count)
    one, other, *_ = (path for path in paths if path.name == twice)
    raise InputError(
      f'{one} and {other} have the same name, by which the split is made; keep'
      ' one of them'
    )
  return sorted(
    paths, key=lambda path: hashlib.sha256(os.fsencode(path.name)).digest()
  )


def find_files(
  root: Path, classes: Sequence[str] = WNIDS
) -> dict[str, list[Path]]:
  """Returns the files of each class, from any of the module's layouts.

  As in other image folders, every file that `image_files` finds counts as an
  image.

  Args:
    root: DIR of the module's docstring.
    classes: names of the class folders.

  Returns:
    {class: its files}. The classes are in the order of `classes`; the files of
    a class are in no particular order.

  Raises:
    InputError: a class has no files, a class is in several parts of the folder,
      or a CSV file has no columns filename and label.
  """
  if not root.is_dir():
    raise InputError(
      f'{root} is not a folder; it must hold the images of Mini-ImageNet'
    )
  base = root / 'images' if (root / 'images').is_dir() else root
  parts = [base / name for name in _PARTS if (base / name).is_dir()]
  files: dict[str, list[Path]] = {}
  left_out: list[tuple[Path, str]] = []
  for wnid in classes:
    found = [part / wnid for part in parts or [base] if (part / wnid).is_dir()]
    if len(found) > 1:
      raise InputError(
        f'{found[0]} and {found[1]} are of the same class; give the folder that'
        f' holds all of it, such as {parts[0]}'
      )
    if found:
      own = image_files.find(found[0])
      files[wnid], left_out = own.files, [*left_out, *own.left_out]
  if left_out:
    print(image_files.note(root, left_out), file=sys.stderr)
  if not files:
    files = _listed_files(root, base, classes)
  if missing := [wnid for wnid in classes if wnid not in files]:
    names = ', '.join(missing[:3]) + ', ...' * (len(missing) > 3)
    raise InputError(
      f'{root} lacks {len(missing)} of the {len(classes)} classes of'
      f' Mini-ImageNet ({names});'
      ' it needs a folder for each, named by its WordNet ID, or images/ with'
      ' train.csv, val.csv and test.csv'
    )
  return {wnid: files[wnid] for wnid in classes}


def _listed_files(
  root: Path, base: Path, classes: Sequence[str]
) -> dict[str, list[Path]]:
  """Returns the files in `base` that {train,val,test}.csv in `root` list."""
  files: dict[str, list[Path]] = {}
  for path in (root / f'{name}.csv' for name in _PARTS):
    if not path.is_file():
      continue
    with path.open(newline='', encoding='utf-8', errors='replace') as lines:
      reader = csv.DictReader(lines)
      if not {'filename', 'label'} <= set(reader.fieldnames or ()):
        raise InputError(f'{path} has no columns filename and label')
      for row in reader:
        if row['label'] in classes:
          name = row['filename'] or ''
          files.setdefault(row['label'], []).append(base / name)
  return files


def checked_sha256(path: Path) -> str:
  """Returns the SHA-256 of an image file, in hexadecimal.

  Raises:
    InputError: the file is missing, damaged, or neither JPEG nor PNG.
  """
  images_lib.decode(path, channels=3)
  content = path.read_bytes()
  if not content.startswith(_SIGNATURES):
    raise InputError(f'{path} is neither JPEG nor PNG; convert it to PNG')
  return hashlib.sha256(content).hexdigest()


def prepare(builder: MiniImagenet, expect: str | None = None) -> None:
  """Prepares the set, unless the same one is there already.

  TFDS writes into a temporary folder and renames it at the end. If the process
  is killed before, nothing looks prepared.

  Args:
    builder: the builder of the set.
    expect: the `digest` that the images must have; None accepts any.

  Raises:
    InputError: the images cannot be used, their digest is not `expect`, a set
      with other images is in the way, or the set cannot be written.
  """
  digest = builder.digest  # checks all images before anything is written
  if expect and digest != expect.lower():
    raise InputError(
      f'the images have the manifest SHA-256 {digest}, not --expect={expect}:'
      ' get the same files under the same names'
    )
  if builder.data_path.exists():
    stored = builder.info.metadata.get('manifest_sha256')
    if stored != digest:
      raise InputError(
        f'{builder.data_path} holds other images (manifest SHA-256 {stored},'
        f' not {digest}); remove it or give another --data_dir'
      )
  try:
    builder.download_and_prepare()
  except OSError as error:
    reason = ' '.join(str(error).split())
    raise InputError(
      f'{builder.data_path} could not be prepared ({reason}); see that there is'
      ' room and that the images stay, and run it again'
    ) from error


def report(
  images: Path, data_dir: Path | None = None, expect: str | None = None
) -> str:
  """Prepares the set for --mode=prepare.

  Args:
    images: see `MiniImagenet`.
    data_dir: see `MiniImagenet`.
    expect: see `prepare`.

  Returns:
    The text that the command prints: the folder of the set, the counts of
    images and the SHA-256 of the manifest.

  Raises:
    InputError: see `prepare`.
  """
  builder = MiniImagenet(images, data_dir=data_dir)
  with signals.caught(_interrupt):  # TFDS removes the temporary folder
    prepare(builder, expect)
  splits = builder.info.splits
  return (
    f'{builder.data_path}: {splits["train"].num_examples} training and'
    f' {splits["test"].num_examples} test images\n'
    f'manifest SHA-256 {builder.digest}'
  )


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
  del frame
  print('interrupted; nothing is prepared', file=sys.stderr)
  sys.exit(128 + number)
