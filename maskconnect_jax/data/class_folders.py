"""A folder of class folders. Each class folder holds one class's images."""

from __future__ import annotations

import pathlib
import unicodedata

from absl import logging

from maskconnect_jax import names
from maskconnect_jax.data import image_files, image_headers
from maskconnect_jax.errors import InputError


def class_files(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the files of every class folder in `root`, by class, both sorted.

  The name of a class is its folder's name in Unicode's form NFC, because macOS
  may give the same name in another form than other systems do. One warning
  names the files that are left out.

  Args:
    root: the folder of class folders, such as DIR/train.

  Returns:
    {class name: its files}. Classes and files are sorted.

  Raises:
    InputError: there are no class folders, a class folder has no images, two
      class folders have the same name, or images lie beside the class folders.
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
    if not path.exists()  # a broken link: it may have led to a class
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
