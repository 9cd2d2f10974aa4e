"""Tables of files and flat val/ folders, against folders of the same images."""

import json

import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import config
from maskconnect_jax.data import datasets, sources

CLASSES = ('ant', 'bee')


@pytest.fixture
def root(tmp_path):
  """train/<class>/ and val/<class>/, beside images of other places."""
  rng = np.random.default_rng(0)
  for part, count in (('train', 4), ('val', 2)):
    for name in CLASSES:
      (tmp_path / part / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (6, 6, 3), np.uint8)
        path = tmp_path / part / name / f'{name}{i}.png'
        Image.fromarray(pixels).save(path)
  return tmp_path


def load(**fields):
  data = config.default().data
  with data.unlocked():
    data.update(fields)
  return datasets.load(data)


def rows_of(root):
  """One row an image, in a mixed order."""
  paths = sorted(root.glob('*/*/*.png'), key=lambda path: path.name[::-1])
  return [
    (str(path.relative_to(root)), path.parent.name, path.parent.parent.name)
    for path in paths
  ]


def by_content(split):
  return sorted(
    (image.tobytes(), int(label))
    for image, label in zip(split.images, split.labels, strict=True)
  )


def write_csv(path, rows, head='path,label,split'):
  path.write_text('\n'.join([head, *(','.join(row) for row in rows)]) + '\n')
  return path


def test_a_table_is_the_folder_it_lists(root):
  expected = load(source='folder', dir=str(root))
  table = write_csv(root / 'all.csv', rows_of(root))
  lines = root / 'all.jsonl'
  lines.write_text(
    '\n'.join(
      json.dumps({'label': label, 'path': path, 'split': split.upper()})
      for path, label, split in rows_of(root)
    )
  )
  for file in (table, lines):
    found = load(source='table', dir=str(file))
    assert found.classes == CLASSES
    for part in ('train', 'test'):
      own = by_content(getattr(found, part))
      assert own == by_content(getattr(expected, part))


def test_a_table_that_moves_with_its_images_stays_the_same_set(root, tmp_path):
  write_csv(root / 'all.csv', rows_of(root))
  data = config.default().data
  data.source, data.dir = 'table', str(root / 'all.csv')
  before = sources.open_source(data).identity.digest()
  moved = root.rename(tmp_path.with_name(f'{tmp_path.name}-moved'))
  data.dir = str(moved / 'all.csv')
  assert sources.open_source(data).identity.digest() == before
  write_csv(moved / 'all.csv', rows_of(moved)[::-1])
  assert sources.open_source(data).identity.digest() != before


def test_numbers_are_sorted_as_numbers(root):
  rows = [
    (path, '10' if label == 'ant' else '9', split)
    for path, label, split in rows_of(root)
  ]
  found = load(source='table', dir=str(write_csv(root / 'n.csv', rows)))
  assert found.classes == ('9', '10')


def test_without_a_split_names_decide(root):
  rows = [row[:2] for row in rows_of(root)]
  table = write_csv(root / 'all.csv', rows, 'path,label')
  found = load(source='table', dir=str(table), test_fraction=0.5)
  assert len(found.train) + len(found.test) == 12
  assert {*found.train.labels} == {*found.test.labels} == {0, 1}


def test_validation_rows_beside_test_rows_are_not_used(root, caplog):
  rows = rows_of(root)
  rows = [
    (*r[:2], 'test' if '0' in r[0] and r[2] == 'val' else r[2]) for r in rows
  ]
  found = load(source='table', dir=str(write_csv(root / 'a.csv', rows)))
  assert (len(found.train), len(found.test)) == (8, 2)
  assert '2 images of the split val are not used' in caplog.text


@pytest.mark.parametrize(
  ('name', 'text', 'says'),
  [
    ('a.csv', 'file,label\nx,y\n', 'has the columns file, label; its first'),
    ('a.csv', '', 'has the columns \\(none\\)'),
    ('a.csv', 'path,label\n,ant\n', "line 2: path is ''; it must be text"),
    ('a.csv', 'path,label\nx\n', 'line 2: label is None'),
    ('a.csv', 'path,label,split\nx,ant,trian\n', 'line 2: the split trian is'),
    ('a.csv', 'path,label\nx,ant\nx,bee\n', 'line 3: x is there twice'),
    ('a.csv', 'path,label,split\nx,ant,test\n', 'has no training images'),
    (
      'a.csv',
      'path,label,split\nx,ant,train\ny,bee,test\n',
      'test images of bee, but no training images',
    ),
    ('a.jsonl', '{"path": "x"', 'is no jsonl file'),
    ('a.jsonl', '\n[1]\n', 'line 2: not an object'),
    (
      'a.jsonl',
      '{"path": "x", "label": ["a", "b"]}',
      r"'b'\]; it .*, or set config.data.multi_label=True",
    ),
    ('a.txt', 'path,label\n', 'is no table; give FILE.csv or FILE.jsonl'),
    ('a.csv', 'path,label\nx,ant\ny,ant\n', 'test_fraction=0.2 leaves'),
  ],
)
def test_tables_that_cannot_be_used(name, text, says, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(config.InputError, match=says) as error:
    load(source='table', dir=str(tmp_path / name))
  assert '\n' not in str(error.value)
  with pytest.raises(config.InputError, match='is no file'):
    load(source='table', dir=str(tmp_path))


# Several labels an image.


def names_of(split, classes):
  """The labels of each image, by its pixels."""
  return {
    image.tobytes(): [
      name for name, own in zip(classes, row, strict=True) if own
    ]
    for image, row in zip(split.images, split.labels, strict=True)
  }


SEVERAL = {
  'ant0': ['small', 'black'],
  'ant1': ['black'],
  'bee0': [],
  'bee1': ['yellow', 'small'],
}


def several_rows(root):
  return [
    (path, SEVERAL.get(path[-8:-4], ['small']), split)
    for path, _, split in rows_of(root)
  ]


def test_several_labels_of_csv_and_of_json_lines(root):
  rows = several_rows(root)
  cells = [(path, ' ; '.join(labels), split) for path, labels, split in rows]
  lines = root / 'all.jsonl'
  lines.write_text(
    '\n'.join(
      json.dumps({'path': path, 'label': labels, 'split': split})
      for path, labels, split in rows
    )
  )
  for file in (write_csv(root / 'all.csv', cells), lines):
    found = load(source='table', dir=str(file), multi_label=True)
    assert found.classes == ('black', 'small', 'yellow')
    assert found.train.labels.dtype == bool
    for name, part in (('train', found.train), ('val', found.test)):
      assert names_of(part, found.classes) == {
        np.asarray(Image.open(root / path)).tobytes(): sorted(labels)
        for path, labels, split in rows
        if split == name
      }


def test_several_labels_decoded_while_training(root):
  rows = [(path, ';'.join(n), split) for path, n, split in several_rows(root)]
  table = str(write_csv(root / 'all.csv', rows))
  fields = {'source': 'table', 'dir': table, 'multi_label': True}
  whole = load(**fields, image_size=6)
  lazy = load(**fields, image_size=6, crop='resized')
  np.testing.assert_array_equal(lazy.train.read_labels(), whole.train.labels)
  for i, label in enumerate(whole.test.labels):
    image, own, counts = lazy.test.evaluation_example(i)
    assert own.dtype == bool
    np.testing.assert_array_equal(own, label)
    np.testing.assert_array_equal(image, whole.test.images[i])
    assert counts
  _, own, _ = lazy.train.training_example(1, np.random.default_rng(0))
  np.testing.assert_array_equal(own, whole.train.labels[1])
  held = load(**fields, validation=3)
  assert (len(held.train), len(held.validation)) == (5, 3)


def test_other_labels_are_another_set(root):
  rows = [(path, ';'.join(n), split) for path, n, split in several_rows(root)]
  data = config.default().data
  data.source, data.multi_label = 'table', True
  data.dir = str(write_csv(root / 'all.csv', rows))
  before = sources.open_source(data).identity.digest()
  assert sources.open_source(data).identity.digest() == before
  rows[0] = (rows[0][0], 'yellow', rows[0][2])
  write_csv(root / 'all.csv', rows)
  assert sources.open_source(data).identity.digest() != before


def test_several_labels_without_a_split(root):
  rows = [(path, ';'.join(n)) for path, n, _ in several_rows(root)]
  table = write_csv(root / 'all.csv', rows, 'path,label')
  fields = {'source': 'table', 'multi_label': True, 'test_fraction': 0.2}
  found = load(dir=str(table), **fields)
  assert len(found.train) + len(found.test) == 12
  # An image keeps its side when others go.
  fewer = write_csv(root / 'fewer.csv', rows[:-1], 'path,label')
  left = load(dir=str(fewer), **fields)
  for part in ('train', 'test'):
    own = {image.tobytes() for image in getattr(left, part).images}
    assert own <= {image.tobytes() for image in getattr(found, part).images}


@pytest.mark.parametrize(
  ('name', 'text', 'says'),
  [
    ('a.csv', 'path,label\nx\n', 'line 2: label is None; with config.data.mul'),
    ('a.csv', 'path,label\nx,a;;b\n', "line 2: label is ''; it must be text"),
    ('a.csv', 'path,label\nx,a;b; a\n', 'line 2: the label a is there twice'),
    ('a.jsonl', '{"path": "x", "label": "a"}', "line 1: label is 'a'; with"),
    (
      'a.jsonl',
      '{"path": "x", "label": [["a"]]}',
      "label is \\['a'\\]; it must",
    ),
    (
      'a.csv',
      'path,label,split\nx,,train\ny,,test\n',
      'no training image has a label',
    ),
    (
      'a.csv',
      'path,label,split\nx,a,train\ny,,test\n',
      'no test image has a label',
    ),
    (
      'a.csv',
      'path,label,split\nx,a,train\ny,a;b,test\n',
      'test images of b, but no training images',
    ),
    ('a.csv', 'path,label\nx,a\n', 'leaves no training images; give it a col'),
  ],
)
def test_several_labels_that_cannot_be_used(name, text, says, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(config.InputError, match=says) as error:
    load(source='table', dir=str(tmp_path / name), multi_label=True)
  assert '\n' not in str(error.value)


@pytest.fixture
def flat(root, tmp_path):
  """The same images, but val/ is flat, as ImageNet's; and its classes."""
  expected = load(source='folder', dir=str(root))
  names = {}
  for number, path in enumerate(sorted(root.glob('val/*/*.png'), reverse=True)):
    name = f'ILSVRC2012_val_{number:08}'
    names[name] = path.parent.name
    path.rename(root / 'val' / f'{name}.JPEG')
  for name in CLASSES:
    (root / 'val' / name).rmdir()
  (root / 'labels.txt').write_text('\n'.join(names.values()) + '\n')
  solution = [f'{name},{label} 1 2 30 40 ' for name, label in names.items()]
  text = '\n'.join(['ImageId,PredictionString', *reversed(solution)])
  (root / 'LOC_val_solution.csv').write_text(text)
  return root, expected


@pytest.mark.parametrize('name', ['labels.txt', 'LOC_val_solution.csv'])
def test_a_flat_val_is_that_of_class_folders(name, flat):
  root, expected = flat
  found = load(source='folder', dir=str(root), val_labels=str(root / name))
  assert by_content(found.test) == by_content(expected.test)
  assert by_content(found.train) == by_content(expected.train)


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ('ant\n', 'has 1 lines, but .* has 4 images'),
    ('1\n2\n3\n4\n', 'the class 1, which is no folder of train/'),
  ],
)
def test_lists_of_other_images(text, says, flat):
  root, _ = flat
  (root / 'labels.txt').write_text(text)
  with pytest.raises(config.InputError, match=says):
    load(source='folder', dir=str(root), val_labels=str(root / 'labels.txt'))
