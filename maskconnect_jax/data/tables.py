"""Lists of images and their classes: CSV, JSON Lines, and ImageNet's flat val/.

Nothing is decoded here. A list of a million rows is read in a few seconds.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from absl import logging

from maskconnect_jax import names
from maskconnect_jax.data import image_files
from maskconnect_jax.errors import InputError

SUFFIXES = ('.csv', '.jsonl')
SEPARATOR = ';'  # of several labels in a cell of a CSV file
_SPLITS = {
  'train': 'train',
  'training': 'train',
  'test': 'test',
  'val': 'val',
  'valid': 'val',
  'validation': 'val',
}

ByClass = dict[str, list[Path]]
# The labels of an image, and its path.
Labelled: TypeAlias = tuple[tuple[str, ...], Path]
_Label = TypeVar('_Label')


def read(path: Path) -> tuple[ByClass, ByClass]:
  """Reads a table of images: path, label and, if it has one, split.

  Paths are relative to the table's folder. Rows of the split `val` are for
  testing if no row is of `test`, else they are not used.

  Args:
    path: FILE.csv, whose first line names the columns; or FILE.jsonl, an object
      a line.

  Returns:
    The training and the test images of each class. Without a split all images
    are in the first. Classes are sorted, as numbers if all are numbers.

  Raises:
    InputError: the table cannot be used; the message names file and line.
  """
  train_rows, test_rows = _parts(
    path, lambda row, where: _cell(row, 'label', where)
  )
  train, test = _grouped(train_rows), _grouped(test_rows)
  _check_known(path, train, test)
  if test:
    test = {name: test.get(name, []) for name in train}
  return train, test


def read_several(
  path: Path,
) -> tuple[list[Labelled], list[Labelled], tuple[str, ...]]:
  """Reads a table whose images have several labels each, or none.

  It is a table as `read` takes it. In a CSV file SEPARATOR stands between the
  labels of a cell. In JSON Lines they are a list.

  Returns:
    The training and the test images in the order of the table, and the labels
    that there are, sorted as the classes of `read`. Without a split all images
    are in the first.

  Raises:
    InputError: the table cannot be used; the message names file and line.
  """
  in_cells = path.suffix.lower() == '.csv'

  def labels(row: dict[str, Any], where: str) -> tuple[str, ...]:
    given = row.get('label')
    if in_cells and isinstance(given, str):
      parts = given.split(SEPARATOR) if given.strip() else []
      given = [part.strip() for part in parts]
    if not isinstance(given, list):
      raise InputError(
        f'{where}: label is {given!r}; with config.data.multi_label=True it'
        ' must be ' + ('a;b' if in_cells else '["a", "b"]') + ' or empty'
      )
    found = [_cell({'label': label}, 'label', where) for label in given]
    if twice := [name for name in found if found.count(name) > 1]:
      raise InputError(
        f'{where}: the label {names.one_line(twice[0])} is there twice'
      )
    return tuple(found)

  train, test = _parts(path, labels)
  known, tested = (
    dict.fromkeys(name for found, _ in rows for name in found)
    for rows in (train, test)
  )
  _check_known(path, known, tested)
  return train, test, tuple(_in_order(known))


def _check_known(path: Path, train: Iterable[str], test: Iterable[str]) -> None:
  known = set(train)
  if odd := [name for name in test if name not in known]:
    raise InputError(
      f'{path}: there are test images of'
      f' {names.some(map(names.distinct, odd))}, but no training images'
    )


def _parts(
  path: Path, label_of: Callable[[dict[str, Any], str], _Label]
) -> tuple[list[tuple[_Label, Path]], list[tuple[_Label, Path]]]:
  """Returns label and path of the training and of the test images.

  Args:
    path: of the table.
    label_of: returns the label in a row, named by its second argument.
  """
  found: dict[str, list[tuple[_Label, Path]]] = {
    'train': [],
    'test': [],
    'val': [],
  }
  seen: set[str] = set()
  for line, row in _rows(path):
    where = f'{path}, line {line}'
    name, label = _cell(row, 'path', where), label_of(row, where)
    if name in seen:
      raise InputError(
        f'{where}: {names.one_line(name)} is there twice; it has one row'
      )
    seen.add(name)
    split = str(row.get('split') or 'train').strip().lower()
    if split not in _SPLITS:
      raise InputError(
        f'{where}: the split {names.one_line(split)} is none of train, test and'
        ' val'
      )
    found[_SPLITS[split]].append((label, path.parent / name))
  if not found['train']:
    raise InputError(f'{path} has no training images')
  if found['test'] and found['val']:
    logging.warning(
      '%s: %d images of the split val are not used, as it has a split test;'
      ' config.data.validation holds out training images',
      path,
      len(found['val']),
    )
  return found['train'], found['test'] or found['val']


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields line number and content of each row."""
  if path.suffix.lower() not in SUFFIXES:
    raise InputError(f'{path} is no table; give FILE.csv or FILE.jsonl')
  try:
    with path.open(encoding='utf-8-sig', newline='') as file:
      if path.suffix.lower() == '.csv':
        table = csv.DictReader(file)
        columns = table.fieldnames or []
        if not {'path', 'label'} <= set(columns):
          raise InputError(
            f'{path} has the columns {", ".join(columns) or "(none)"}; its'
            ' first line must name path and label, and may name split'
          )
        for row in table:
          yield table.line_num, row
        return
      for line, text in enumerate(file, start=1):
        if not text.strip():
          continue
        row = json.loads(text)
        if not isinstance(row, dict):
          raise InputError(f'{path}, line {line}: not an object')
        yield line, row
  except OSError as error:
    raise InputError(f'{path} cannot be read: {error.strerror}') from error
  except (ValueError, RecursionError, csv.Error) as error:
    why = str(error).splitlines()[0]
    raise InputError(f'{path} is no {path.suffix[1:]} file: {why}') from error


def _cell(row: dict[str, Any], name: str, where: str) -> str:
  value = row.get(name)
  if isinstance(value, bool | float | list | dict) or value in (None, ''):
    several = name == 'label' and isinstance(value, list)
    raise InputError(
      f'{where}: {name} is {value!r}; it must be text'
      + (' or a whole number' if name == 'label' else '')
      + (', or set config.data.multi_label=True' if several else '')
    )
  return (
    unicodedata.normalize('NFC', str(value)) if name == 'label' else str(value)
  )


def _grouped(rows: Iterable[tuple[str, Path]]) -> ByClass:
  groups: ByClass = {}
  for label, path in rows:
    groups.setdefault(label, []).append(path)
  return {label: groups[label] for label in _in_order(groups)}


def _in_order(labels: Iterable[str]) -> list[str]:
  """Returns labels sorted, as numbers if all are numbers."""
  labels = list(labels)
  numbers = all(label.isascii() and label.isdigit() for label in labels)
  return sorted(labels, key=int if numbers else None)


def listed(folder: Path, path: Path, classes: Iterable[str]) -> ByClass:
  """Returns the images of a folder without class folders, by class.

  Args:
    folder: such as ImageNet's flat val/.
    path: the list of their classes: FILE.txt with a class a line, in the order
      of the images' names; or FILE.csv with a name and a class a line, such as
      Kaggle's LOC_val_solution.csv, of which only the first word counts.
    classes: the class folders of train/.

  Raises:
    InputError: the list is of other images or other classes.
  """
  images = sorted(image_files.find(folder).files)
  try:
    with path.open(encoding='utf-8-sig', newline='') as file:
      if path.suffix.lower() == '.csv':
        rows = [row for row in csv.reader(file) if len(row) > 1]
        by_name = {
          os.path.splitext(row[0])[0]: row[1].split()[0]
          if row[1].split()
          else ''
          for row in rows
        }
        labels = [by_name.get(image.stem, '') for image in images]
      else:
        labels = [line.strip() for line in file if line.strip()]
  except OSError as error:
    raise InputError(f'{path} cannot be read: {error.strerror}') from error
  except (ValueError, csv.Error) as error:
    raise InputError(f'{path} is no list of classes: {error}') from error
  if len(labels) != len(images):
    raise InputError(
      f'{path} has {len(labels)} lines, but {folder} has {len(images)} images;'
      ' it needs a class for each of them'
    )
  files: ByClass = {name: [] for name in classes}
  for image, label in zip(images, labels, strict=True):
    if label not in files:
      raise InputError(
        f'{path} gives {names.one_line(image.name)} the class'
        f' {names.one_line(label) or "(none)"}, which is no folder of train/;'
        ' give a list of folder names, such as'
        ' imagenet_2012_validation_synset_labels.txt or LOC_val_solution.csv'
      )
    files[label].append(image)
  return files
