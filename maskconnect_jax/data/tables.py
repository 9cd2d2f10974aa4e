"""Lists of images and their classes: CSV, JSON Lines, and ImageNet's flat val/.

Nothing is decoded here. A list of a million rows is read in a few seconds.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

from maskconnect_jax import names
from maskconnect_jax.data import image_files
from maskconnect_jax.errors import InputError

SUFFIXES = ('.csv', '.jsonl')
_SPLITS = {
  'train': 'train',
  'training': 'train',
  'test': 'test',
  'val': 'val',
  'valid': 'val',
  'validation': 'val',
}

ByClass = dict[str, list[Path]]


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
  found: dict[str, list[tuple[str, Path]]] = {
    'train': [],
    'test': [],
    'val': [],
  }
  seen: set[str] = set()
  for line, row in _rows(path):
    where = f'{path}, line {line}'
    name, label = _cell(row, 'path', where), _cell(row, 'label', where)
    if name in seen:
      raise InputError(
        f'{where}: {names.one_line(name)} is there twice; it has one label'
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
  train = _grouped(found['train'])
  test = _grouped(found['test'] or found['val'])
  if odd := [name for name in test if name not in train]:
    raise InputError(
      f'{path}: there are test images of'
      f' {names.some(map(names.distinct, odd))}, but no training images'
    )
  if test:
    test = {name: test.get(name, []) for name in train}
  return train, test


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
    raise InputError(
      f'{where}: {name} is {value!r}; it must be text'
      + (' or a whole number' if name == 'label' else '')
    )
  return (
    unicodedata.normalize('NFC', str(value)) if name == 'label' else str(value)
  )


def _grouped(rows: Iterable[tuple[str, Path]]) -> ByClass:
  groups: ByClass = {}
  for label, path in rows:
    groups.setdefault(label, []).append(path)
  numbers = all(label.isascii() and label.isdigit() for label in groups)
  return {
    label: groups[label]
    for label in sorted(groups, key=int if numbers else None)
  }


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
