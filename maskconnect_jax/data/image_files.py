"""Finds the images in a folder, for training and for prediction alike.

Every regular file counts as an image, by any name. Hidden files do not count,
nor does the litter that systems and network drives leave in folders. Anything
else, such as a named pipe, is left out without being opened, and `Found.note`
names it. Links are followed, and a folder that is reached twice is read once.

Only decoding shows whether a file's content is an image. In training, a file
that is no image is an error: leaving it out would silently train on less data.
For prediction, `split` sets aside the files that are no images.
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

# Names that Windows, macOS, network drives and tools leave, in lower case.
_LITTER = frozenset({
  '#recycle', '#snapshot', '$recycle.bin', '@eadir', '@recently-snapshot',
  '@recycle', '@tmp', '__macosx', '__pycache__', 'desktop.ini',
  'ehthumbs.db', 'ehthumbs_vista.db', 'icon\r', 'lost+found', 'picasa.ini',
  'recycled', 'recycler', 'system volume information', 'thumbs.db',
})  # fmt: skip
# Synology's drives append these to an image's name.
_LITTER_ENDS = ('@synoeastream', '@synoresource')


@dataclasses.dataclass(frozen=True)
class Found:
  """The images that a folder holds, and the entries that are left out.

  Attributes:
    root: the folder, or the one file that was asked for.
    files: the files to be read as images, sorted. A broken link is among them:
      its image is missing, and reading it reports that.
    left_out: every other entry with the reason why it is left out, sorted.
  """

  root: pathlib.Path
  files: list[pathlib.Path]
  left_out: list[tuple[pathlib.Path, str]]

  def note(self) -> str:
    """Returns one line that names `left_out`; '' if it is empty."""
    return note(self.root, self.left_out)


def is_litter(name: str) -> bool:
  """Returns whether a file or folder of this name is hidden or litter."""
  lower = name.lower()
  return name[0] == '.' or lower in _LITTER or lower.endswith(_LITTER_ENDS)


def find(path: str | os.PathLike[str]) -> Found:
  """Finds the images at `path`.

  Args:
    path: a file, which may have any name, or a folder, which is searched with
      its subfolders.

  Returns:
    The images, and the entries that are left out.

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
  # A link may lead to a folder that holds the link. Following it would add the
  # images of other classes to this class.
  around = {*root.absolute().parents, *root.resolve().parents}
  seen = {_identity(root), *map(_identity, around)}
  folders, linked = [root], list[pathlib.Path]()
  while folders or linked:
    # Linked folders come last, so that a folder that is also reached directly
    # goes by its own name.
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
    # The listing tells files from folders, unless the entry is a link. Asking
    # about each file would take minutes for a large set on a network drive.
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
  """Leaves out the files that neither suffix nor content marks as images.

  Args:
    found: the result of `find`. A `root` that is a file stays.

  Returns:
    The same with fewer `files` and more `left_out`.

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
    root: the folder that the names are relative to.
    left_out: each path that was left out, and the reason.

  Returns:
    The line; '' if nothing was left out.
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
  """Returns the device and inode of a folder: they are the same by any path."""
  status = folder.stat()
  return status.st_dev, status.st_ino
