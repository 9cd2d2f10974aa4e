"""Data sets of Hugging Face's `datasets`, as `save_to_disk` writes them.

Images stay encoded here. They are decoded as the files of a folder are, within
the same bounds. A set is mapped into memory, not read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import unicodedata
from typing import Any

import numpy as np
from absl import logging

from maskconnect_jax import names
from maskconnect_jax.data import images
from maskconnect_jax.errors import InputError

_HELD_OUT = ('test', 'validation', 'valid', 'val')  # the first is tested on
_LABELS = ('label', 'labels')  # columns of plain numbers or text that are found
_CHUNK = 1024  # rows that are looked at together


@dataclasses.dataclass(frozen=True)
class Rows:
  """Images and classes of some rows of a split.

  Attributes:
    name: the split's name in a message.
    table: a `datasets.Dataset` of one column, `column`: the encoded images.
    column: the name of the column.
    numbers: int64 [N], the rows' numbers in `table`.
    labels: int64 [N], class indices.
  """

  name: str
  table: Any
  column: str
  numbers: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.numbers)

  def part(self, chosen: list[int]) -> Rows:
    """Returns the rows whose places in this one `chosen` names, in order."""
    places = np.array(sorted(chosen), np.int64)
    return dataclasses.replace(
      self, numbers=self.numbers[places], labels=self.labels[places]
    )

  def read(self, i: int) -> images.Content | str:
    """Returns the i-th image: its file's content, or a path to the file.

    A row without an image has no content, which decoding reports.
    """
    number = int(self.numbers[i])
    cell = self.table[number][self.column] or {}
    if cell.get('bytes') is None and cell.get('path'):
      return str(cell['path'])
    content = images.Content(cell.get('bytes') or b'')
    content.name = f'{self.name}, row {number}'
    return content

  def described(self) -> list[tuple[str, int | None]]:
    """Returns file name and bytes of each image; no image is read.

    A name may be ''. The size of an image outside of the set is None.
    """
    import pyarrow.compute as pc

    found: list[tuple[str, int | None]] = []
    for chunk in self.table.with_format('arrow').iter(_CHUNK):
      cells = chunk.column(0).combine_chunks()
      sizes = pc.binary_length(pc.struct_field(cells, 'bytes')).to_pylist()
      paths = pc.struct_field(cells, 'path').to_pylist()
      found += [
        (os.path.basename(path or ''), size)
        for path, size in zip(paths, sizes, strict=True)
      ]
    return [found[number] for number in self.numbers]

  def keys(self) -> list[str]:
    """Returns a name for each image that stays when others are added.

    It is the file's name if all files of a class have names of their own, else
    the SHA-256 of the content; then all images are read.
    """
    own = [name for name, _ in self.described()]
    distinct = {*zip(own, self.labels.tolist(), strict=True)}
    if all(own) and len(distinct) == len(own):
      return own
    contents = map(self.read, range(len(self)))
    return [
      content
      if isinstance(content, str)
      else hashlib.sha256(content).hexdigest()
      for content in contents
    ]


@dataclasses.dataclass(frozen=True)
class Saved:
  """A data set that was opened.

  Attributes:
    train: the training images; all images if `test` is None.
    test: the test images, or None if the set has one split only.
    classes: name of each class.
    channels: 1 if the images are stored to be read as grey, else 3.
  """

  train: Rows
  test: Rows | None
  classes: tuple[str, ...]
  channels: int


def read(
  folder: pathlib.Path, *, name: str, image_column: str, label_column: str
) -> Saved:
  """Opens a folder that `Dataset.save_to_disk` or `DatasetDict`'s wrote.

  Args:
    folder: the folder.
    name: its name in a message.
    image_column: the column of images; '': the only one.
    label_column: the column of classes; '': the only one of `ClassLabel`, or
      `label` or `labels` of whole numbers or text.

  Raises:
    InputError: the package is missing, or the set cannot be used. The message
      is one line that names the set and the column or split.
  """
  try:
    import datasets
    from datasets import load_from_disk  # a mere folder `datasets` has none
  except ImportError as error:
    raise InputError(
      f"config.data.source='hf' needs a package ({error}); pip install"
      " 'maskconnect_jax[hf]'"
    ) from error
  try:
    saved = load_from_disk(os.fspath(folder))
  except Exception as error:  # of Arrow, of JSON, of the file system ...
    why = ' '.join(str(error).split())[:200] or type(error).__name__
    raise InputError(
      f'{name} is no whole data set of save_to_disk ({why});'
      ' datasets.load_dataset(NAME).save_to_disk(FOLDER) writes one'
    ) from error
  if isinstance(saved, datasets.Dataset):
    saved = {str(saved.split or 'rows'): saved}
  splits = _train_and_test(dict(saved), name)
  (train_name, train), *held_out = splits
  features = train.features
  kinds = {
    column: 'image'
    if isinstance(feature, datasets.Image)
    else _kind_of_label(feature)
    for column, feature in features.items()
  }
  image = _column(kinds, image_column, name, 'image', ('image',), 'an Image')
  label = _column(
    kinds,
    label_column,
    name,
    'label',
    ('classes', 'plain'),
    'a ClassLabel, whole numbers or text',
  )
  for part_name, part in held_out:
    for column in (image, label):
      if part.features.get(column) != features[column]:
        raise InputError(
          f'{name}: the column {column!r} is another in {part_name} than in'
          f' {train_name}; save both with the same features'
        )
  classes = tuple(getattr(features[label], 'names', ()))
  labels = [
    _labels(part, label, f'{name}, {part_name}', len(classes) or np.inf)
    for part_name, part in splits
  ]
  if not classes:
    classes, labels = _indexed(labels, name)
  rows = [
    Rows(
      f'{name}, {part_name}',
      part.select_columns([image])
      .cast_column(image, datasets.Image(decode=False))
      .with_format(None),
      image,
      np.arange(len(part)),
      np.array(own, np.int64),
    )
    for (part_name, part), own in zip(splits, labels, strict=True)
  ]
  return Saved(
    train=rows[0],
    test=rows[1] if held_out else None,
    classes=tuple(unicodedata.normalize('NFC', each) for each in classes),
    channels=1 if features[image].mode == 'L' else 3,
  )


def _train_and_test(splits: dict[str, Any], name: str) -> list[tuple[str, Any]]:
  """Returns names and rows of the split to train on and of that to test on.

  A set of one split has no other to test on.
  """
  if len(splits) == 1:
    return list(splits.items())
  held_out = next((each for each in _HELD_OUT if each in splits), None)
  if held_out is None or 'train' not in splits:
    raise InputError(
      f'{name} has the splits {", ".join(map(names.one_line, splits))}; it'
      ' needs train, and test or validation, or one split alone'
    )
  if unused := sorted(set(splits) - {'train', held_out}):
    logging.warning(
      '%s: the splits %s are not used; config.data.validation holds out'
      ' training images',
      name,
      ', '.join(map(names.one_line, unused)),
    )
  return [(each, splits[each]) for each in ('train', held_out)]


def _kind_of_label(feature: Any) -> str:
  """Returns 'classes', 'plain', or the name of what no label can be."""
  kind = type(feature).__name__
  if kind == 'ClassLabel':
    return 'classes'
  dtype = str(getattr(feature, 'dtype', '')) if kind == 'Value' else ''
  if dtype.startswith(('int', 'uint')) or dtype.endswith('string'):
    return 'plain'
  return dtype or kind


def _column(
  kinds: dict[str, str],
  given: str,
  name: str,
  what: str,
  allowed: tuple[str, ...],
  wanted: str,
) -> str:
  """Returns the column that is given, or the only one that could be meant.

  Args:
    kinds: the kind of each column.
    given: the column that the field names, or ''.
    name: the set's name in a message.
    what: 'image' or 'label'.
    allowed: the kinds that the column may have. Columns of the first are found
      by it, others by their names, `_LABELS`.
    wanted: the kinds in words.
  """
  fits = [column for column, kind in kinds.items() if kind == allowed[0]]
  fits = fits or [each for each in _LABELS if kinds.get(each) in allowed[1:]]
  if given and kinds.get(given) in allowed:
    return given
  if not given and len(fits) == 1:
    return fits[0]
  field = f'config.data.{what}_column'
  columns = names.some(
    (f'{names.one_line(each)} ({kind})' for each, kind in kinds.items()), 8
  )
  if given:
    fault = f'{field}={given!r} is not {wanted} of it'
  elif fits:
    fault = f'more than one could be the {what}; {field} names one'
  else:
    fault = f'none is found to be the {what}; {field} names one, {wanted}'
  raise InputError(f'{name} has the columns {columns}: {fault}')


def _labels(table: Any, column: str, name: str, below: float) -> list[Any]:
  """Returns the values of the column of classes: text, or whole numbers.

  Raises:
    InputError: a row has none. The sets of the Hub write -1 where the classes
      of a test split are kept secret.
  """
  rows = table.select_columns([column]).with_format('arrow')
  values: list[Any] = rows[:].column(0).to_pylist()
  for row, value in enumerate(values):
    known = value if isinstance(value, str) else value is not None
    if not known or (isinstance(value, int) and not 0 <= value < below):
      raise InputError(
        f'{name}, row {row} has the label {value!r}, which is no class; save'
        ' the set without such rows, or without this split'
      )
  return values


def _indexed(
  values: list[list[Any]], name: str
) -> tuple[tuple[str, ...], list[list[int]]]:
  """Returns classes, sorted, and class indices of plain numbers or text.

  Classes are sorted as numbers if all are numbers, as those of a table are.
  """
  plain = [
    [unicodedata.normalize('NFC', str(value)) for value in part]
    for part in values
  ]
  numbers = all(text.isascii() and text.isdigit() for text in set(plain[0]))
  classes = sorted(set(plain[0]), key=int if numbers else None)
  for part in plain:
    if odd := sorted(set(part) - set(classes)):
      raise InputError(
        f'{name} has test images of {names.some(map(names.distinct, odd))},'
        ' but no training images'
      )
  index = {text: i for i, text in enumerate(classes)}
  return tuple(classes), [[index[text] for text in part] for part in plain]
