"""Which files count as images, and how what does not is told."""

import os
import shutil
import socket

import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import config
from maskconnect_jax.data import image_files, image_headers, images, photographs

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
  """Two images, one of them deeper."""
  root = tmp_path / 'photos'
  (root / 'sub').mkdir(parents=True)
  for name in ('a.png', 'sub/b.png'):
    Image.fromarray(PIXELS).save(root / name)
  return root


def found(root):
  return [str(path.relative_to(root)) for path in image_files.find(root).files]


def left_out(root):
  return {
    str(path.relative_to(root)): why
    for path, why in image_files.find(root).left_out
  }


def test_find(tmp_path):
  for name in ('b.PNG', 'a.jpg', 'sub/c.webp', '.x.jpg', '.h/y.jpg', 'n.txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'')
  assert found(tmp_path) == ['a.jpg', 'b.PNG', 'n.txt', 'sub/c.webp']
  kept = image_files.split(image_files.find(str(tmp_path)))
  assert [path.name for path in kept.files] == ['a.jpg', 'b.PNG', 'c.webp']
  assert kept.note() == (
    f'{tmp_path}: left out 1: n.txt (no image that Pillow reads)'
  )
  one = image_files.split(image_files.find(tmp_path / 'n.txt'))
  assert one.files == [tmp_path / 'n.txt']
  assert one.note() == ''


def test_find_says_what_is_missing(tmp_path):
  with pytest.raises(config.InputError, match='none does not exist'):
    image_files.find(tmp_path / 'none')
  with pytest.raises(config.InputError, match=f'{tmp_path} holds no images'):
    image_files.find(tmp_path)
  (tmp_path / 'n.txt').write_text('text')
  with pytest.raises(config.InputError, match=r'no images; .*n\.txt \(no im'):
    image_files.split(image_files.find(tmp_path))


def test_only_regular_files_are_images(folder):
  os.mkfifo(folder / 'pipe.png')
  os.mkfifo(folder / 'sub' / 'more.jpg')
  (folder / 'null.png').symlink_to('/dev/null')
  listening = socket.socket(socket.AF_UNIX)
  here = os.getcwd()
  os.chdir(folder)  # the path of a socket is short
  listening.bind('door.png')
  os.chdir(here)
  with listening:
    assert found(folder) == ['a.png', 'sub/b.png']
    assert left_out(folder) == {
      'pipe.png': 'a named pipe',
      'sub/more.jpg': 'a named pipe',
      'null.png': 'a device',
      'door.png': 'a socket',
    }
    note = image_files.find(folder).note()
  assert 'left out 4: door.png (a socket), null.png (a device)' in note
  assert '\n' not in note


def test_a_pipe_is_refused_wherever_a_file_is_read(tmp_path):
  pipe = tmp_path / 'pipe.png'
  os.mkfifo(pipe)
  says = r'pipe\.png.* is a named pipe'
  for read in (
    image_files.find,
    lambda path: images.decode(path, channels=3),
    lambda path: photographs.evaluation_image(path, size=8, resize=0),
    lambda path: photographs.training_image(
      path, np.random.default_rng(0), size=8
    ),
  ):
    with pytest.raises(config.InputError, match=says) as error:
      read(pipe)
    assert '\n' not in str(error.value)
  assert not image_headers.is_image(pipe)
  # Alone in a folder, it is what the folder holds.
  with pytest.raises(config.InputError, match='no images.*a named pipe'):
    image_files.find(tmp_path)


@pytest.mark.parametrize(
  'name',
  [
    '@eaDir', '__MACOSX', '.ipynb_checkpoints', 'lost+found', '$RECYCLE.BIN',
    'System Volume Information', '#recycle', '@Recycle', '#snapshot', '.git',
  ],
)  # fmt: skip
def test_folders_of_litter(folder, name):
  for parent in (folder, folder / 'sub'):
    (parent / name / 'a.png').mkdir(parents=True)
    shutil.copy(folder / 'a.png', parent / name / 'thumb.jpg')
  assert found(folder) == ['a.png', 'sub/b.png']
  assert image_files.find(folder).note() == ''


@pytest.mark.parametrize(
  'name',
  ['Thumbs.db', 'desktop.ini', '._a.png', '.DS_Store', 'Icon\r', 'ehthumbs.db',
   'a.png@SynoEAStream', 'a.png@SynoResource'],
)  # fmt: skip
def test_files_of_litter(folder, name):
  (folder / name).write_bytes(b'')
  assert found(folder) == ['a.png', 'sub/b.png']
  assert image_files.find(folder).note() == ''


def test_links_are_followed(folder, tmp_path):
  store = tmp_path / 'store'
  shutil.copytree(folder, store)
  (folder / 'linked.png').symlink_to(store / 'a.png')
  (folder / 'deep').symlink_to(store)
  assert found(folder) == [
    'a.png', 'deep/a.png', 'deep/sub/b.png', 'linked.png', 'sub/b.png',
  ]  # fmt: skip
  (tmp_path / 'whole').symlink_to(folder)
  assert len(found(tmp_path / 'whole')) == 5
  assert left_out(tmp_path / 'whole') == {}


def test_loops_and_second_ways_are_read_once(folder):
  (folder / 'again').symlink_to(folder)
  (folder / 'sub' / 'up').symlink_to(folder)
  (folder / 'sub' / 'beyond').symlink_to(folder.parent)
  (folder / 'asub').symlink_to(folder / 'sub')  # comes before it
  assert found(folder) == ['a.png', 'sub/b.png']
  why = 'a link to a folder that is read already'
  assert left_out(folder) == dict.fromkeys(
    ('again', 'asub', 'sub/beyond', 'sub/up'), why
  )


def test_a_linked_folder_does_not_bring_in_what_is_around_the_link(tmp_path):
  """train/ant is a link; in it, a link to train would add the bees."""
  for name in ('store/ant', 'train/bee'):
    (tmp_path / name).mkdir(parents=True)
    Image.fromarray(PIXELS).save(tmp_path / name / 'a.png')
  (tmp_path / 'train' / 'ant').symlink_to(tmp_path / 'store' / 'ant')
  (tmp_path / 'store' / 'ant' / 'all').symlink_to(tmp_path / 'train')
  assert found(tmp_path / 'train' / 'ant') == ['a.png']


def test_a_link_that_leads_nowhere_is_a_missing_image(folder):
  (folder / 'gone.png').symlink_to(folder / 'nothing')
  (folder / 'circle.png').symlink_to(folder / 'circle.png')
  kept = image_files.split(image_files.find(folder)).files
  assert [path.name for path in kept] == [
    'a.png', 'circle.png', 'gone.png', 'b.png',
  ]  # fmt: skip
  for name in ('gone.png', 'circle.png'):
    with pytest.raises(config.InputError, match=f'{name} cannot be read'):
      images.decode(folder / name, channels=3)


def test_a_folder_that_is_called_as_an_image(folder):
  (folder / 'x.jpg').mkdir()
  assert left_out(folder) == {'x.jpg': 'an empty folder'}
  shutil.copy(folder / 'a.png', folder / 'x.jpg')
  assert found(folder) == ['a.png', 'sub/b.png', 'x.jpg/a.png']
  assert left_out(folder) == {}


@pytest.mark.parametrize(
  'suffix',
  ['avif', 'bmp', 'dds', 'gif', 'ico', 'j2k', 'jfif', 'jp2', 'jpeg',
   'JPG', 'jpx', 'mpo', 'pbm', 'pcx', 'pgm', 'png', 'ppm', 'qoi', 'sgi', 'tga',
   'tif', 'webp'],
)  # fmt: skip
def test_every_kind_that_is_read_is_found(tmp_path, suffix):
  """What training decodes, prediction takes from a folder."""
  path = tmp_path / f'a.{suffix}'
  image = Image.fromarray(PIXELS)
  image.convert({'pbm': '1', 'pgm': 'L'}.get(suffix, 'RGB')).save(path)
  assert images.decode(path, channels=3, size=(4, 4)).shape == (4, 4, 3)
  found = image_files.split(image_files.find(tmp_path))
  assert found.files == [path]
  assert found.note() == ''


def test_an_image_without_suffix_is_known_by_its_content(folder):
  shutil.copy(folder / 'a.png', folder / 'IMG_0001')
  shutil.copy(folder / 'a.png', folder / 'copy.png.orig')
  kept = image_files.split(image_files.find(folder)).files
  assert [path.name for path in kept] == [
    'IMG_0001', 'a.png', 'copy.png.orig', 'b.png',
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('a.txt', b'not a picture'),
    ('a.pdf', b'%PDF-1.4\n'),
    ('a.mpg', b'\0\0\1\xb3' + b'0' * 99),
    ('a.eps', b'%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\n'),
    ('a.h', b'#define WIDTH 3\n'),
    ('a.heic', b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'),
    ('a.zip', b'PK\3\4'),
    ('empty', b''),
  ],
)
def test_what_is_no_image_is_left_out_and_named(folder, name, content):
  (folder / name).write_bytes(content)
  kept = image_files.split(image_files.find(folder))
  assert [path.name for path in kept.files] == ['a.png', 'b.png']
  assert f'left out 1: {name} (no image' in kept.note()
  with pytest.raises(config.InputError, match=f'{name} is not an image'):
    images.decode(folder / name, channels=3)


def test_a_note_is_one_short_line(folder):
  for i in range(100):
    (folder / f'{i:03}.txt').write_text('text')
  (folder / '000\n.txt').write_text('text')
  (folder / os.fsdecode(b'000\xe9.txt')).write_text('text')
  note = image_files.split(image_files.find(folder)).note()
  assert 'left out 102: 000\\n.txt (no image' in note
  assert r'000\xe9.txt' in note
  assert note.endswith(', ...')
  assert len(note.splitlines()) == 1
  assert len(note) < 400
  note.encode('utf-8')
