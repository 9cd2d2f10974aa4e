from __future__ import annotations

import functools
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from maskconnect_jax import config
from maskconnect_jax.data import datasets, mini_imagenet

# Nothing here has TensorFlow: it is not among the packages of [test].

# Two classes of eight PNGs. The names in the order of their SHA-256, by
# `printf NAME | sha256sum | sort`: the first two are test images, the next five
# training images, and the last is left out.
ORDER = {
  'n01532829': (4, 7, 5, 1, 3, 6, 2, 8),
  'n01558993': (5, 4, 2, 3, 6, 8, 7, 1),
}
CLASSES = tuple(ORDER)
SPLITS = {'test': slice(0, 2), 'train': slice(2, 7)}
small = functools.partial(
  mini_imagenet.MiniImagenet, classes=CLASSES, train=5, test=2
)


def name_of(wnid, number):
  return f'{wnid}{number:08d}.png'


def pixels_of(wnid, number):
  return np.full((4, 6, 3), 100 * CLASSES.index(wnid) + number, np.uint8)


@pytest.fixture
def folder(tmp_path):
  """The plain layout, DIR/<wnid>/*."""
  root = tmp_path / 'plain'
  for wnid in CLASSES:
    (root / wnid).mkdir(parents=True)
    for number in range(1, 9):
      image = Image.fromarray(pixels_of(wnid, number))
      image.save(root / wnid / name_of(wnid, number))
  return root


def load(root):
  data = config.default().data
  data.source, data.name, data.dir = 'tfds', 'mini_imagenet', str(root)
  return datasets.load(data)


def test_classes_are_ravi_and_larochelles():
  # The digest is of the three lists in another project's code, sorted.
  text = ''.join(f'{wnid}\n' for wnid in mini_imagenet.WNIDS)
  assert hashlib.sha256(text.encode()).hexdigest() == (
    '01be89a8f69ce3bf1f361d701c84ba5eb3b73993fdc56f30641256103dc45e57'
  )


def test_what_is_prepared_is_read(folder, tmp_path):
  mini_imagenet.prepare(small(folder, data_dir=tmp_path / 'tfds'))
  dataset = load(tmp_path / 'tfds')
  assert dataset.classes == CLASSES
  for split, part in (('train', dataset.train), ('test', dataset.test)):
    expected = sorted(
      (label, pixels_of(wnid, number).tobytes())
      for label, wnid in enumerate(CLASSES)
      for number in ORDER[wnid][SPLITS[split]]
    )
    actual = zip(part.labels, part.images, strict=True)
    assert sorted((label, image.tobytes()) for label, image in actual) == (
      expected
    )


def test_files_are_kept_as_they_are(folder, tmp_path):
  """Also JPEGs in CMYK, of which ImageNet has some."""
  path = folder / CLASSES[0] / name_of(CLASSES[0], ORDER[CLASSES[0]][0])
  Image.new('CMYK', (5, 3), (10, 20, 30, 40)).save(path, 'JPEG')
  mini_imagenet.prepare(small(folder, data_dir=tmp_path / 'tfds'))
  source = tfds.builder(
    'mini_imagenet', data_dir=str(tmp_path / 'tfds')
  ).as_data_source('test', decoders={'image': tfds.decode.SkipDecoding()})
  assert len(source) == 4
  for example in source:
    file = folder / CLASSES[example['label']] / example['file_name'].decode()
    assert example['image'] == file.read_bytes()


def test_manifest(folder, tmp_path):
  builder = small(folder, data_dir=tmp_path / 'tfds')
  mini_imagenet.prepare(builder)
  lines = [
    f'{split},{wnid},{file.name},{hashlib.sha256(file.read_bytes()).hexdigest()}'
    for wnid in CLASSES
    for split in ('test', 'train')
    for number in ORDER[wnid][SPLITS[split]]
    for file in [folder / wnid / name_of(wnid, number)]
  ]
  stored = Path(builder.data_path, 'manifest.csv').read_bytes()
  assert stored.decode().splitlines() == [
    'split,class,file_name,sha256',
    *lines,
  ]
  info = tfds.builder('mini_imagenet', data_dir=str(tmp_path / 'tfds')).info
  assert info.metadata == {
    'manifest_sha256': hashlib.sha256(stored).hexdigest()
  }


def few_shot(folder, root):
  for part, wnid in zip(('train', 'test'), CLASSES, strict=True):
    shutil.copytree(folder / wnid, root / part / wnid)


def listed(folder, root):
  (root / 'images').mkdir(parents=True)
  for part, wnid in zip(('val', 'train'), CLASSES, strict=True):
    rows = ['filename,label']
    for file in (folder / wnid).iterdir():
      shutil.copy(file, root / 'images')
      rows.append(f'{file.name},{wnid}')
    (root / f'{part}.csv').write_text('\n'.join(rows))


def images_by_class(folder, root):
  shutil.copytree(folder, root / 'images')
  (root / 'train.csv').write_text('filename,label\nelsewhere.jpg,n01532829')


def of_imagenet(folder, root):
  shutil.copytree(folder, root / 'train')
  shutil.copytree(folder / CLASSES[0], root / 'train' / 'n01440764')
  (root / 'val').mkdir()
  (root / 'val' / 'ILSVRC2012_val_00000001.JPEG').write_bytes(b'')
  (root / 'train' / CLASSES[0] / '.DS_Store').write_bytes(b'')


@pytest.mark.parametrize(
  'layout', [few_shot, listed, images_by_class, of_imagenet]
)
def test_every_layout_gives_the_same(folder, tmp_path, layout):
  layout(folder, tmp_path / 'other')
  other = small(tmp_path / 'other', data_dir=tmp_path)
  assert other.manifest == small(folder, data_dir=tmp_path).manifest


def one_too_few(root):
  for number in (1, 2):
    (root / CLASSES[1] / name_of(CLASSES[1], number)).unlink()


def no_class(root):
  shutil.rmtree(root / CLASSES[1])


def no_folder(root):
  shutil.rmtree(root)


def cut_short(root):
  path = root / CLASSES[0] / name_of(CLASSES[0], 1)
  path.write_bytes(path.read_bytes()[:-30])


def text(root):
  (root / CLASSES[0] / name_of(CLASSES[0], 1)).write_text('no image')


def bitmap(root):
  path = root / CLASSES[0] / name_of(CLASSES[0], 1)
  Image.new('RGB', (2, 2)).save(path, 'BMP')


def same_name(root):
  (root / CLASSES[0] / 'more').mkdir()
  name = name_of(CLASSES[0], 3)
  shutil.copy(root / CLASSES[0] / name, root / CLASSES[0] / 'more')


def in_two_parts(root):
  shutil.copytree(root / CLASSES[0], root / 'train' / CLASSES[0])
  shutil.copytree(root / CLASSES[0], root / 'val' / CLASSES[0])


def other_columns(root):
  for wnid in CLASSES:
    shutil.rmtree(root / wnid)
  (root / 'val.csv').write_text('path,class\na.jpg,n01532829\n')


def listed_twice(root):
  other_columns(root)
  (root / 'val.csv').write_text(
    'filename,label\n' + 'a.jpg,n01532829\n' * 2 + 'b.jpg,n01558993\n'
  )


def listed_but_missing(root):
  other_columns(root)
  rows = [f'{i}.jpg,{wnid}\n' for wnid in CLASSES for i in range(9)]
  (root / 'val.csv').write_text('filename,label\n' + ''.join(rows))


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (one_too_few, 'class n01558993 has 6 images in .*plain; 7 are needed'),
    (no_class, r'lacks 1 of the 2 classes of .* \(n01558993\); it needs a'),
    (no_folder, 'plain is not a folder; it must hold'),
    (cut_short, 'n0153282900000001.png is damaged or cut short'),
    (text, 'n0153282900000001.png is not an image'),
    (bitmap, 'n0153282900000001.png is neither JPEG nor PNG; convert'),
    (same_name, 'n01532829/more/n0153282900000003.png .*have the same name'),
    (in_two_parts, 'train/n01532829 and .*val/n01532829 are of the same class'),
    (other_columns, 'val.csv has no columns filename and label'),
    (listed_twice, 'a.jpg and .*a.jpg have the same name'),
    (listed_but_missing, r'jpg cannot be read \(No such file'),
  ],
)  # fmt: skip
def test_images_that_cannot_be_used(folder, tmp_path, damage, message):
  damage(folder)
  builder = small(folder, data_dir=tmp_path / 'tfds')
  with pytest.raises(config.InputError, match=message) as error:
    mini_imagenet.prepare(builder)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'tfds').exists()


def test_what_lies_in_the_folder_besides(folder, tmp_path, capsys):
  expected = small(folder, data_dir=tmp_path / 'tfds').manifest
  own = folder / CLASSES[0]
  (own / '@eaDir').mkdir()
  shutil.copy(next(own.glob('*.png')), own / '@eaDir' / 'thumb.jpg')
  os.mkfifo(own / 'pipe.png')
  (own / 'loop').symlink_to(folder)
  other = tmp_path / 'other'
  (folder / CLASSES[1]).rename(other)
  (folder / CLASSES[1]).mkdir()
  (folder / CLASSES[1] / 'linked').symlink_to(other)
  assert small(folder, data_dir=tmp_path / 'tfds').manifest == expected
  (said,) = capsys.readouterr().err.splitlines()
  assert 'left out 2: n01532829/loop (a link to' in said
  assert 'n01532829/pipe.png (a named pipe)' in said


def test_a_listed_pipe_is_named(folder, tmp_path):
  listed(folder, tmp_path / 'other')
  (file, *_) = (tmp_path / 'other' / 'images').iterdir()
  file.unlink()
  os.mkfifo(file)
  with pytest.raises(config.InputError, match=f'{file.name}.* a named pipe'):
    small(tmp_path / 'other', data_dir=tmp_path, train=6).entries  # noqa: B018


@pytest.mark.parametrize('name', [b'caf\xe9.png', b'a\nb.png'])
def test_a_name_that_no_manifest_holds_is_refused(folder, tmp_path, name):
  (file, *_) = (folder / CLASSES[0]).iterdir()
  file.rename(file.with_name(os.fsdecode(name)))
  with pytest.raises(config.InputError, match='no line of UTF-8') as error:
    small(folder, data_dir=tmp_path, train=6).entries  # noqa: B018
  assert '\n' not in str(error.value)


def test_failing_in_between_leaves_nothing(folder, tmp_path):
  builder = small(folder, data_dir=tmp_path / 'tfds')
  path = builder.entries[-1].path  # checked, then gone
  path.rename(tmp_path / 'away.png')
  with pytest.raises(config.InputError, match='could not be prepared') as error:
    mini_imagenet.prepare(builder)
  assert '\n' not in str(error.value)
  with pytest.raises(config.InputError, match='is not a set that TFDS'):
    load(tmp_path / 'tfds')
  (tmp_path / 'away.png').rename(path)
  mini_imagenet.prepare(small(folder, data_dir=tmp_path / 'tfds'))
  assert len(load(tmp_path / 'tfds').train) == 10


def test_command(folder, tmp_path, monkeypatch, cli):
  monkeypatch.setattr(mini_imagenet, 'MiniImagenet', small)
  where = tmp_path / 'tfds' / 'mini_imagenet' / '1.0.0'

  def run(*more):
    flags = [f'--images={folder}', f'--data_dir={tmp_path / "tfds"}']
    ran = cli('--mode=prepare', *flags, *more)
    return ran.code, ran.err if ran.code else ran.out

  code, message = run('--expect=0123')
  assert code == 2
  assert 'not --expect=0123' in message
  assert message.count('\n') == 1
  assert not where.exists()

  code, first = run()
  assert code == 0
  assert f'{where}: 10 training and 4 test images' in first
  digest = hashlib.sha256((where / 'manifest.csv').read_bytes()).hexdigest()
  assert f'manifest SHA-256 {digest}\n' in first
  written = where.stat().st_mtime_ns

  assert run(f'--expect={digest.upper()}')[0] == 0  # nothing left to do
  assert where.stat().st_mtime_ns == written

  name = name_of(CLASSES[0], ORDER[CLASSES[0]][3])
  Image.new('RGB', (2, 2)).save(folder / CLASSES[0] / name)
  code, message = run()
  assert code == 2
  assert f'holds other images (manifest SHA-256 {digest}, not' in message
  assert message.count('\n') == 1
  assert where.stat().st_mtime_ns == written
