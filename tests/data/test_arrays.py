"""Arrays as data: the same set as from files, and what does not fit."""

import dataclasses

import numpy as np
import pytest
from sklearn.utils import class_weight

from maskconnect_jax import config
from maskconnect_jax.data import arrays, datasets
from maskconnect_jax.run import experiment

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (8, 4, 4, 3), np.uint8), np.arange(8) % 2
DATA = (IMAGES, LABELS, IMAGES[:3], LABELS[:3])


def test_digits_as_arrays_are_the_digits():
  data = config.default().data
  expected = datasets.load(data)
  given = (
    expected.train.images[..., 0], expected.train.labels,
    expected.test.images[..., 0], expected.test.labels,
  )  # fmt: skip
  found = datasets.load(data, arrays.of(given))
  assert found.classes == expected.classes
  for part in ('train', 'test'):
    own, other = getattr(found, part), getattr(expected, part)
    np.testing.assert_array_equal(own.images, other.images)
    np.testing.assert_array_equal(own.labels, other.labels)
  digest = arrays.of(given).identity.digest
  assert digest() == arrays.of(given).identity.digest()
  changed = given[0].copy()
  changed[0, 0, 0] ^= 1
  assert digest() != arrays.of((changed, *given[1:])).identity.digest()


def test_labels_are_at_hand():
  for labels in (LABELS, LABELS.astype(np.uint64), LABELS.astype(str)):
    source = arrays.of((IMAGES, labels, IMAGES[:3], labels[:3]))
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [*LABELS, *LABELS[:3]]
  given = (IMAGES, SEVERAL, IMAGES[:3], SEVERAL[:3])
  source = arrays.of(given, multi_label=True)
  np.testing.assert_array_equal(source.labels[8:], SEVERAL[:3])
  data = config.default().data
  data.image_size, data.trivialaugment = 4, True
  found = datasets.load(data, source).train.read_labels()
  assert found.dtype == bool
  np.testing.assert_array_equal(found, SEVERAL)


@pytest.mark.parametrize(
  ('last', 'tested', 'says'),
  [
    (-1, 0, 'training labels from -1 to 1'),
    (1, -1, r'test images with labels \[-1\]'),
    (1, 7, r'test images with labels \[7\]'),
  ],
)
def test_a_set_that_is_decoded_later_has_its_labels_checked(last, tested, says):
  data = config.default().data
  data.image_size, data.trivialaugment = 4, True
  source = arrays.of((IMAGES, [*LABELS[:7], last], IMAGES[:1], [tested]))
  with pytest.raises(config.InputError, match=says):
    datasets.load(data, source)


def test_names_become_classes():
  names = np.array(['dog', 'cat'])[LABELS]
  source = arrays.of((IMAGES, names, IMAGES[:3], names[:3].tolist()))
  assert source.classes == ('cat', 'dog')
  image, label = source.read(8)
  assert (label, image.tobytes()) == (1, IMAGES[0].tobytes())


@pytest.mark.parametrize(
  ('data', 'says'),
  [
    (DATA[:2], 'give data=\\(images, labels'),
    ((IMAGES / 255, *DATA[1:]), 'images are float64'),
    ((IMAGES.transpose(0, 3, 1, 2), *DATA[1:]), r'images are uint8 \[8, 3, 4'),
    (
      (IMAGES, LABELS[:7], *DATA[2:]),
      r'labels are int64 \[7\], but there are 8',
    ),
    ((IMAGES, LABELS / 2, *DATA[2:]), 'labels are float64'),
    ((IMAGES, LABELS + 10**9, *DATA[2:]), 'labels go up to 10000000'),
    (
      (*DATA[:2], IMAGES[:3, ..., :1], LABELS[:3]),
      'channels and test_images 1',
    ),
    ((*DATA[:3], ['a', 'b', 'a']), 'must both be numbers or names'),
    (
      (IMAGES, list('abababab'), IMAGES[:2], ['a', 'c']),
      "test_labels have 'c', of which there are no training images",
    ),
  ],
)
def test_arrays_that_do_not_fit(data, says):
  with pytest.raises(config.InputError, match=says) as error:
    arrays.of(data)
  assert '\n' not in str(error.value)


SEVERAL = RNG.uniform(size=(8, 3)) < 0.5
SEVERAL[0], SEVERAL[3] = True, False


@pytest.mark.parametrize('kind', [bool, np.uint8, np.int64])
def test_several_labels_an_image(kind):
  given = (IMAGES, SEVERAL.astype(kind), IMAGES[:3], SEVERAL[:3].tolist())
  source = arrays.of(given, multi_label=True)
  assert source.classes == ('0', '1', '2')
  found = datasets.load(config.default().data, source)
  for part, count in (('train', 8), ('test', 3)):
    split = getattr(found, part)
    assert split.labels.dtype == bool
    np.testing.assert_array_equal(split.labels, SEVERAL[:count])
    np.testing.assert_array_equal(split.images, IMAGES[:count])
  other = (IMAGES, ~SEVERAL, *given[2:])
  same = arrays.of((IMAGES, SEVERAL, *given[2:]), multi_label=True)
  assert source.identity.digest() == same.identity.digest()
  other = arrays.of(other, multi_label=True).identity.digest()
  assert source.identity.digest() != other


def test_images_that_are_held_out_have_a_label():
  labels = np.eye(8, 1, dtype=bool)  # only the first image has one
  data = config.default().data
  data.validation = 1
  source = arrays.of((IMAGES, labels, IMAGES[:1], labels[:1]), multi_label=True)
  with pytest.raises(config.InputError, match='=1 draws images without any'):
    datasets.load(data, source)


@pytest.mark.parametrize(
  ('labels', 'test_labels', 'several', 'says'),
  [
    (SEVERAL, SEVERAL[:3], False, 'or set config.data.multi_label=True'),
    (
      LABELS,
      LABELS[:3],
      True,
      r'labels are int64 \[8\], .*multi_label=True give',
    ),
    (SEVERAL[:7], SEVERAL[:3], True, r'labels are bool \[7, 3\], of 8 im'),
    (SEVERAL, SEVERAL[:3, :2], True, r'test_labels are bool \[3, 2\]'),
    (SEVERAL * 2, SEVERAL[:3], True, r'labels are int64 \[8, 3\]'),
    (SEVERAL / 1, SEVERAL[:3], True, r'labels are float64 \[8, 3\]'),
    (SEVERAL[:, :0], SEVERAL[:3, :0], True, r'labels are bool \[8, 0\]'),
    (SEVERAL & False, SEVERAL[:3], True, 'no training image has a label'),
    (SEVERAL, SEVERAL[:3] & False, True, 'no test image has a label'),
    (
      SEVERAL & [True, True, False],
      SEVERAL[:3],
      True,
      'test images of 2, but no training images',
    ),
  ],
)
def test_several_labels_that_do_not_fit(labels, test_labels, several, says):
  data = (IMAGES, labels, IMAGES[:3], test_labels)
  with pytest.raises(config.InputError, match=says) as error:
    arrays.of(data, multi_label=several)
  assert '\n' not in str(error.value)


def test_arrays_and_their_source_go_together(tiny_config):
  with pytest.raises(config.InputError, match='go together'):
    experiment.build(tiny_config, DATA)
  tiny_config.data.source = 'arrays'
  with pytest.raises(config.InputError, match='go together'):
    experiment.build(tiny_config)


def test_rare_classes_weigh_more(tiny_config):
  uneven = np.array([0, 1, 1, 1, 1, 1, 1, 1])
  found = datasets.load(
    tiny_config.data, arrays.of((IMAGES, uneven, *DATA[2:]))
  )
  assert experiment.class_weights(tiny_config, found) == ()
  tiny_config.data.class_weights = 'balanced'
  expected = class_weight.compute_class_weight(
    'balanced', classes=np.arange(2), y=uneven
  )
  weights = experiment.class_weights(tiny_config, found)
  assert weights == pytest.approx(expected)
  one = dataclasses.replace(found, classes=('a', 'b', 'c'))
  with pytest.raises(config.InputError, match='c has none'):
    experiment.class_weights(tiny_config, one)
