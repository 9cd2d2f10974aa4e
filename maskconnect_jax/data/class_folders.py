"""A folder of class folders, of which each holds the images of one class."""

from __future__ import annotations

import pathlib
import unicodedata

from absl import logging

from maskconnect_jax import names
from maskconnect_jax.data import image_files, image_headers
from maskconnect_jax.errors import InputError


def class_files(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the files of every class folder in `root`, by class, both sorted.

  The name of a class is that of its folder in Unicode's form NFC: macOS may
  give the same name in another form than other systems do. What is left out is
  told in one warning.

  Args:
    root: such as DIR/train.

  Raises:
    InputError: there are no class folders, one has no images, two have the
      same name, or images lie beside them.
  """
  folders: dict[str, pathlib.Path] = {}
  beside: list[pathlib.Path] = []
  for path in sorted(root.glob('*')):
    if image_files.is_litter(path.name):
      continue
    if not path.is_dir():
      beside.append(path)
      continue
    name = unicodedata.normalize('NFC', path.name)
    if name in folders:
      raise InputError(
        f'{root} has the class {name} twice, in two forms of Unicode'
        f' ({folders[name].name!a} and {path.name!a}); put all its'
        ' images into one folder'
      )
    folders[name] = path
  if not folders:
    raise InputError(
      f'{root} holds no class folders; put its images in {root}/<class>/'
    )
  stray = [
    names.one_line(path.name)
    for path in beside
    if not path.exists()  # a link that leads nowhere: it may be to a class
    or image_headers.is_image(path)
    or (image_headers.has_suffix(path) and path.is_file())
  ]
  if stray:
    raise InputError(
      f'{root} holds {len(stray)} images or broken links beside its class'
      f' folders ({names.some(stray)}); put each into the folder of its class,'
      ' or remove it'
    )
  left_out = [
    (path, image_headers.kind_of(path) or 'no class folder') for path in beside
  ]
  files = {}
  for name in sorted(folders):
    found = image_files.find(folders[name])
    files[name] = found.files
    left_out += found.left_out
  if left_out:
    logging.warning('%s', image_files.note(root, left_out))
  return files
