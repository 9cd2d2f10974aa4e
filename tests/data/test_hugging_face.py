"""Sets that `datasets` saved, against image folders of the same images."""

import contextlib
import io
import logging
import sys

import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import config
from maskconnect_jax.data import datasets, hugging_face
from maskconnect_jax.run.train import train

CLASSES = ('ant', 'bee')

with contextlib.suppress(ImportError):
  import datasets as hf


@pytest.fixture
def saved():
  """The package, or the test is skipped."""
  return pytest.importorskip('datasets')


def load(**fields):
  data = config.default().data
  with data.unlocked():
    data.update(fields)
  return datasets.load(data)


def write_folder(root, parts=(('train/', 5), ('test/', 3)), suffix='png'):
  """Writes PART/<class>/: photograph-like images of differing sizes."""
  rng = np.random.default_rng(0)
  for part, count in parts:
    for number, name in enumerate(CLASSES):
      (root / part / name).mkdir(parents=True)
      for i in range(count):
        small = rng.integers(0, 256, (3, 4, 3), np.uint8)
        image = Image.fromarray(small).resize((40 + i, 30 + number))
        image.save(root / part / name / f'{name}{i}.{suffix}')
  return root


def cells(paths, named=True):
  return [
    {'bytes': path.read_bytes(), 'path': path.name if named else None}
    for path in paths
  ]


def of_paths(paths, label=None, named=True):
  """The set of these files, the class of each by its folder."""
  paths = sorted(paths)
  label = label or hf.ClassLabel(names=list(CLASSES))
  labels = [path.parent.name for path in paths]
  if getattr(label, 'dtype', '') == 'int64' and not hasattr(label, 'names'):
    labels = [CLASSES.index(name) for name in labels]
  return hf.Dataset.from_dict(
    {'picture': cells(paths, named), 'label': labels},
    features=hf.Features({'picture': hf.Image(), 'label': label}),
  )


def of_folder(root, **more):
  return hf.DatasetDict(
    {
      part: of_paths((root / part).glob('*/*'), **more)
      for part in ('train', 'test')
    }
  )


def assert_same(actual, expected):
  assert actual.classes == expected.classes
  assert actual.image_shape == expected.image_shape
  for part in ('train', 'test'):
    ours, theirs = getattr(actual, part), getattr(expected, part)
    np.testing.assert_array_equal(ours.read_labels(), theirs.read_labels())
    np.testing.assert_array_equal(ours.sample(), theirs.sample())


def test_a_saved_set_is_the_folder_of_its_images(saved, tmp_path):
  root = write_folder(tmp_path / 'files')
  of_folder(root).save_to_disk(tmp_path / 'set', num_proc=None)
  fields = {'image_size': 16, 'eval_resize': 20}
  actual = load(source='hf', dir=str(tmp_path / 'set'), **fields)
  assert_same(actual, load(source='folder', dir=str(root), **fields))
  # The set lies elsewhere, in other files: it is the same set. Another is not.
  more = {'train': 3, 'test': 2}
  of_folder(root).save_to_disk(tmp_path / 'moved', num_shards=more)
  moved = load(source='hf', dir=str(tmp_path / 'moved'), **fields)
  assert moved.identity.record() == actual.identity.record()
  swapped = of_folder(root)
  swapped['train'] = swapped['train'].select([1, 0, *range(2, 10)])
  swapped.save_to_disk(tmp_path / 'swapped')
  other = load(source='hf', dir=str(tmp_path / 'swapped'), **fields)
  assert other.identity.record() != actual.identity.record()


def test_photographs_are_streamed_as_those_of_a_folder_are(saved, tmp_path):
  root = write_folder(tmp_path / 'files', suffix='jpg')
  of_folder(root).save_to_disk(tmp_path / 'set')
  fields = {'image_size': 16, 'crop': 'resized', 'eval_resize': 20}
  actual = load(source='hf', dir=str(tmp_path / 'set'), **fields)
  expected = load(source='folder', dir=str(root), **fields)
  assert isinstance(actual.train, datasets.LazySplit)
  assert_same(actual, expected)
  for i in range(len(actual.train)):
    ours, theirs = (
      each.train.training_example(i, np.random.default_rng(i))
      for each in (actual, expected)
    )
    np.testing.assert_array_equal(ours[0], theirs[0])


def test_labels_are_at_hand(saved, tmp_path, monkeypatch):
  """Else each start would fetch every image, as of all ImageNet."""
  root = write_folder(tmp_path / 'files')
  of_folder(root).save_to_disk(tmp_path / 'set')
  of_paths(root.glob('train/*/*')).save_to_disk(tmp_path / 'one')
  fields = {'image_size': 16, 'crop': 'resized', 'validation': 2}
  for name in ('set', 'one'):
    given = {'source': 'hf', 'dir': str(tmp_path / name), **fields}
    dataset = load(**given)
    source = dataset.train.source
    expected = [source.read(i)[1] for i in dataset.train.chosen]
    assert source.read(len(source) - 1)[1] == source.labels[-1]
    with monkeypatch.context() as patch:
      patch.setattr(hugging_face.Rows, 'read', None)
      assert load(**given).train.read_labels().tolist() == expected


def test_one_split_is_divided_as_a_folder_of_classes_is(saved, tmp_path):
  root = write_folder(tmp_path / 'files', parts=(('', 40),))
  of_paths(root.glob('*/*')).save_to_disk(tmp_path / 'set')
  actual = load(source='hf', dir=str(tmp_path / 'set'), image_size=8)
  assert_same(actual, load(source='folder', dir=str(root), image_size=8))
  assert 4 < len(actual.test) < 30


def test_without_names_the_content_divides_one_split(saved, tmp_path):
  root = write_folder(tmp_path / 'files', parts=(('', 40),))
  unnamed = of_paths(root.glob('*/*'), named=False)
  hf.DatasetDict(train=unnamed).save_to_disk(tmp_path / 'set')
  whole = load(source='hf', dir=str(tmp_path / 'set'), image_size=8)
  assert 4 < len(whole.test) < 30
  # In another order, with fewer images: each stays on its side.
  order = np.random.default_rng(1).permutation(80)[:60]
  unnamed.select(order).save_to_disk(tmp_path / 'part')
  part = load(source='hf', dir=str(tmp_path / 'part'), image_size=8)
  for side in ('train', 'test'):
    ours, all_of_them = (
      {image.tobytes() for image in getattr(each, side).images}
      for each in (part, whole)
    )
    assert ours < all_of_them


def test_validation_images_are_tested_on_where_there_are_no_others(
  saved, tmp_path, caplog
):
  root = write_folder(tmp_path / 'files')
  both = of_folder(root)
  both['validation'] = both.pop('test')
  both.save_to_disk(tmp_path / 'set')
  expected = load(source='folder', dir=str(root), image_size=8)
  actual = load(source='hf', dir=str(tmp_path / 'set'), image_size=8)
  assert_same(actual, expected)
  assert not caplog.records
  both['test'] = both['train'].select([0, 9])
  both.save_to_disk(tmp_path / 'three')
  with caplog.at_level(logging.WARNING):
    three = load(source='hf', dir=str(tmp_path / 'three'), image_size=8)
  assert len(three.test) == 2
  assert 'the splits validation are not used' in caplog.text


@pytest.mark.parametrize('dtype', ['string', 'large_string', 'int64'])
def test_labels_may_be_text_or_numbers(saved, tmp_path, dtype):
  root = write_folder(tmp_path / 'files')
  of_folder(root, label=hf.Value(dtype)).save_to_disk(tmp_path / 'set')
  actual = load(source='hf', dir=str(tmp_path / 'set'), image_size=8)
  assert actual.classes == (('0', '1') if dtype == 'int64' else CLASSES)
  assert actual.train.labels.tolist() == [0] * 5 + [1] * 5
  assert actual.test.labels.tolist() == [0] * 3 + [1] * 3


def test_grey_images_may_be_stored_as_such(saved, tmp_path):
  root = write_folder(tmp_path / 'files')
  grey = of_folder(root).cast_column('picture', hf.Image(mode='L'))
  grey.save_to_disk(tmp_path / 'set')
  actual = load(source='hf', dir=str(tmp_path / 'set'), image_size=8)
  assert actual.image_shape == (8, 8, 1)
  with Image.open(root / 'train' / 'ant' / 'ant0.png') as image:
    expected = image.convert('L').resize((8, 8), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(
    actual.train.images[0, :, :, 0], np.asarray(expected)
  )


def test_fields_name_one_of_several_columns(saved, tmp_path):
  root = write_folder(tmp_path / 'files')
  two = of_folder(root)
  for part in two:
    table = two[part]
    names = hf.ClassLabel(names=['x', 'y', 'z'])
    paths = sorted((root / part).glob('*/*'), reverse=True)
    table = table.add_column('mask', cells(paths), feature=hf.Image())
    two[part] = table.add_column(
      'kind', [2, 0] * (len(paths) // 2), feature=names
    )
  two.save_to_disk(tmp_path / 'set')
  fields = {'source': 'hf', 'dir': str(tmp_path / 'set'), 'image_size': 8}
  with pytest.raises(config.InputError, match='image; .*image_column names'):
    load(**fields)
  with pytest.raises(config.InputError, match='label; .*label_column names'):
    load(**fields, image_column='mask')
  actual = load(**fields, image_column='mask', label_column='kind')
  assert actual.classes == ('x', 'y', 'z')
  assert actual.train.labels.tolist() == [2, 0] * 5
  one = load(**fields, image_column='picture', label_column='kind')
  np.testing.assert_array_equal(one.train.images, actual.train.images[::-1])
  with pytest.raises(config.InputError, match="column='size' is not an Image"):
    load(**fields, image_column='size')


def png(*size):
  file = io.BytesIO()
  Image.new('RGB', size, (9, 90, 200)).save(file, 'PNG')
  return {'bytes': file.getvalue(), 'path': None}


def split_of(images, labels, label=None, **more):
  features = {'image': hf.Image(), 'label': label or hf.ClassLabel(2)}
  rows = {'image': images, 'label': labels, **more}
  features |= {name: hf.Value('string') for name in more}
  return hf.Dataset.from_dict(rows, features=hf.Features(features))


TWO = ([0, 1], {})


@pytest.mark.parametrize(
  ('training', 'test', 'message'),
  [
    (TWO, ([0, -1], {}), r'test, row 1 has the label -1, which is no class'),
    (TWO, ([0, None], {}), r'test, row 1 has the label None'),
    (TWO, ([1, 1], {'drop': 'label'}), "'label' is another in test than in"),
    (([0.5, 1.0], {'label': 'float32'}), TWO, r'label \(float32\): none is'),
    (
      (['a', ''], {'label': 'string'}),
      (['a', 'a'], {'label': 'string'}),
      r"train, row 1 has the label ''",
    ),
    (
      (['a', 'b'], {'label': 'string'}),
      (['a', 'c'], {'label': 'string'}),
      'test images of c, but no training images',
    ),
    (([0, 0], {}), ([0, 0], {}), 'of one class only'),
  ],
)
def test_labels_that_cannot_be_used(saved, tmp_path, training, test, message):
  both = hf.DatasetDict()
  for name, (labels, more) in (('train', training), ('test', test)):
    kind = hf.Value(more['label']) if 'label' in more else None
    table = split_of([png(8, 8)] * 2, labels, kind)
    both[name] = table.remove_columns(more['drop']) if 'drop' in more else table
  both.save_to_disk(tmp_path / 'set')
  with pytest.raises(config.InputError, match=message) as error:
    load(source='hf', dir=str(tmp_path / 'set'))
  assert '\n' not in str(error.value)


def test_several_labels_an_image_are_refused(saved, tmp_path):
  several = hf.List(hf.ClassLabel(2))
  table = split_of([png(8, 8)] * 2, [[0], [0, 1]], several)
  table.save_to_disk(tmp_path / 'set')
  with pytest.raises(config.InputError, match=r'label \(List\): none is found'):
    load(source='hf', dir=str(tmp_path / 'set'))


def test_splits_of_other_names_are_refused(saved, tmp_path):
  table = split_of([png(8, 8)] * 2, [0, 1])
  hf.DatasetDict(a=table, b=table).save_to_disk(tmp_path / 'set')
  with pytest.raises(config.InputError, match='splits a, b; it needs train'):
    load(source='hf', dir=str(tmp_path / 'set'))


def test_rows_without_an_image_or_with_a_damaged_one(saved, tmp_path, caplog):
  whole = png(8, 8)
  cut = {'bytes': whole['bytes'][:45], 'path': None}
  train = split_of([whole, None, cut, whole], [0, 1, 0, 1])
  both = hf.DatasetDict(train=train, test=split_of([whole] * 2, [0, 1]))
  both.save_to_disk(tmp_path / 'set')
  fields = {'source': 'hf', 'dir': str(tmp_path / 'set')}
  with pytest.raises(
    config.InputError, match=r"set', train, row 1 is not an image"
  ):
    load(**fields)
  with caplog.at_level(logging.WARNING):
    kept = load(**fields, skip_errors=True)
  assert 'train, row 2 is damaged' in caplog.text
  assert (len(kept.train), kept.skipped) == (2, 2)
  table = split_of([png(9, 9)] * 2, [0, 1])
  hf.DatasetDict(train=table, test=table).save_to_disk(tmp_path / 'large')
  fields['dir'] = str(tmp_path / 'large')
  with pytest.raises(config.InputError, match=r'9x9 pixels.*max_pixels=80'):
    load(**fields, max_pixels=80)


def test_an_image_may_lie_outside_of_the_set(saved, tmp_path):
  root = write_folder(tmp_path / 'files')
  sets = hf.DatasetDict()
  for part in ('train', 'test'):
    paths = sorted((root / part).glob('*/*'))
    images = [{'bytes': None, 'path': str(path)} for path in paths]
    labels = [CLASSES.index(path.parent.name) for path in paths]
    sets[part] = split_of(images, labels)
  sets.save_to_disk(tmp_path / 'set')
  actual = load(source='hf', dir=str(tmp_path / 'set'), image_size=8)
  expected = load(source='folder', dir=str(root), image_size=8)
  np.testing.assert_array_equal(actual.train.images, expected.train.images)


def test_a_folder_that_is_no_saved_set(saved, tmp_path):
  write_folder(tmp_path)
  with pytest.raises(
    config.InputError, match=r'neither a `Dataset`.*save_to_disk\(FOLDER\)'
  ) as error:
    load(source='hf', dir=str(tmp_path))
  assert '\n' not in str(error.value)


def test_a_damaged_set_is_named(saved, tmp_path):
  table = split_of([png(8, 8)] * 2, [0, 1])
  table.save_to_disk(tmp_path / 'set')
  (path,) = (tmp_path / 'set').glob('*.arrow')
  path.write_bytes(path.read_bytes()[:-300])
  with pytest.raises(config.InputError, match='no whole data set') as error:
    load(source='hf', dir=str(tmp_path / 'set'))
  assert '\n' not in str(error.value)


# Without the package.


def test_the_package_is_missing(tmp_path, monkeypatch):
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set' / 'state.json').write_text('{}')
  monkeypatch.setitem(sys.modules, 'datasets', None)
  given = config.default()
  given.data.source, given.data.dir = 'hf', str(tmp_path / 'set')
  with pytest.raises(
    config.InputError, match=r"pip install 'maskconnect_jax\[hf\]'"
  ) as error:
    train(given, tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()
