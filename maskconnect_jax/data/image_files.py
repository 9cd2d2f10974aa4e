"""Which files of a folder are images: for training and prediction alike.

Every regular file counts, however it is called, except hidden ones and the
litter that systems and network drives leave in folders. What else lies there,
such as a named pipe, is left out and can be told by `Found.note`; nothing of
it is opened. Links are followed, and a folder that is reached twice is read
once.

Whether a file's content is an image shows when it is decoded. Where images are
trained on, one that is none is an error rather than silently less data; where
they are predicted, `split` sets the others aside.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable

from maskconnect_jax import names
from maskconnect_jax.config import given_path
from maskconnect_jax.data import image_headers
from maskconnect_jax.errors import InputError

# What Windows, macOS, network drives and tools leave in folders, in lower case.
_LITTER = frozenset({
  '#recycle', '#snapshot', '$recycle.bin', '@eadir', '@recently-snapshot',
  '@recycle', '@tmp', '__macosx', '__pycache__', 'desktop.ini',
  'ehthumbs.db', 'ehthumbs_vista.db', 'icon\r', 'lost+found', 'picasa.ini',
  'recycled', 'recycler', 'system volume information', 'thumbs.db',
})  # fmt: skip
# Synology's drives put these behind a picture's name.
_LITTER_ENDS = ('@synoeastream', '@synoresource')


@dataclasses.dataclass(frozen=True)
class Found:
  """What a folder holds.

  Attributes:
    root: the folder, or the one file that was asked for.
    files: the files to be read as images, sorted. A link that leads nowhere is
      among them: that image is missing, and reading it says so.
    left_out: what is no such file, and why.
  """

  root: pathlib.Path
  files: list[pathlib.Path]
  left_out: list[tuple[pathlib.Path, str]]

  def note(self) -> str:
    """Returns one line on what was left out; '' if nothing was."""
    return note(self.root, self.left_out)


def is_litter(name: str) -> bool:
  """Whether a file or folder of this name is no part of a set of images."""
  lower = name.lower()
  return name[0] == '.' or lower in _LITTER or lower.endswith(_LITTER_ENDS)


def find(path: str | os.PathLike[str]) -> Found:
  """Finds the images at `path`.

  Args:
    path: a file, taken whatever it is called, or a folder, searched with its
      subfolders.

  Raises:
    InputError: `path` does not exist, is neither file nor folder, or is a
      folder without files.
  """
  root = given_path(path, '--images')
  if root.is_file():
    return Found(root, [root], [])
  if not root.is_dir():
    fault = (
      f'is {image_headers.kind_of(root)}' if root.exists() else 'does not exist'
    )
    raise InputError(
      f'{names.one_line(path)} {fault}; give an image file or a folder of'
      ' images'
    )
  files: list[pathlib.Path] = []
  left_out: list[tuple[pathlib.Path, str]] = []
  # A link to a folder that holds it would make the images around it, of other
  # classes, those of this folder.
  around = {*root.absolute().parents, *root.resolve().parents}
  seen = {_identity(root), *map(_identity, around)}
  folders, linked = [root], list[pathlib.Path]()
  while folders or linked:
    # Linked folders come last: a folder is called by its own name, if it is
    # reached by that too.
    folder = folders.pop() if folders else linked.pop(0)
    if folder != root and folder.is_symlink() and _identity(folder) in seen:
      left_out.append((folder, 'a link to a folder that is read already'))
      continue
    seen.add(_identity(folder))
    try:
      with os.scandir(folder) as listing:
        entries = [entry for entry in listing if not is_litter(entry.name)]
    except OSError as error:
      left_out.append((folder, f'a folder: {error.strerror}'))
      continue
    if not entries and image_headers.has_suffix(folder):
      left_out.append((folder, 'an empty folder'))
    # The listing itself says what an entry is, unless that is a link: to ask
    # for each file would take minutes of a large set on a network drive.
    for entry in sorted(entries, key=lambda entry: entry.name):
      path, is_link = folder / entry.name, entry.is_symlink()
      if path.is_dir() if is_link else entry.is_dir():
        (linked if is_link else folders).append(path)
      elif not is_link and entry.is_file():
        files.append(path)
      elif kind := image_headers.kind_of(path):
        left_out.append((path, kind))
      else:
        files.append(path)
  found = Found(root, sorted(files), sorted(left_out))
  if not files:
    raise _nothing_in(found)
  return found


def split(found: Found) -> Found:
  """Leaves out the files that neither suffix nor content says are images.

  Raises:
    InputError: no file is left.
  """
  kept, others = [], []
  for file in found.files:
    if (
      image_headers.has_suffix(file)
      or file == found.root
      or image_headers.is_image(file)
    ):
      kept.append(file)
    else:
      others.append((file, 'no image that Pillow reads'))
  split = Found(found.root, kept, sorted([*found.left_out, *others]))
  if not kept:
    raise _nothing_in(split)
  return split


def _nothing_in(found: Found) -> InputError:
  besides = f' ({found.note()})' if found.left_out else ''
  return InputError(
    f'{names.one_line(found.root)} holds no images; it needs files such as'
    f' *.jpg or *.png{besides}'
  )


def note(
  root: pathlib.Path, left_out: Iterable[tuple[pathlib.Path, str]]
) -> str:
  """Returns one line: 'photos: left out 2, a.txt (no image), p (a named pipe)'.

  Args:
    root: what the names are relative to.
    left_out: what was left out, and why.
  """
  named = [
    f'{names.one_line(path.relative_to(root))} ({why})'
    for path, why in left_out
  ]
  if not named:
    return ''
  return (
    f'{names.one_line(root)}: left out {len(named)}: {names.some(named, 5)}'
  )


def _identity(folder: pathlib.Path) -> tuple[int, int]:
  """Returns what is the same however a folder is reached."""
  status = folder.stat()
  return status.st_dev, status.st_ino
