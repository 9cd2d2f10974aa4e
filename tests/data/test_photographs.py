"""Photographs are decoded as Pillow decodes them, the crop first, only sooner.

Pillow itself, decoding everything and resizing the same box, is the oracle.
"""

import dataclasses
import hashlib
import io
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image, ImageDraw

from maskconnect_jax import config
from maskconnect_jax.data import images, jpeg, photographs


@pytest.fixture(params=['pillow', 'opencv'])
def library(request, monkeypatch):
  """What reads photographs: Pillow alone, and OpenCV."""
  found = {'pillow': jpeg.PILLOW, 'opencv': jpeg.OPENCV}[request.param]
  if found is None:
    pytest.skip('OpenCV is not installed')
  monkeypatch.setattr(jpeg, 'chosen', found)
  return found


@pytest.fixture
def opencv():
  """OpenCV, or the test is skipped."""
  return jpeg.OPENCV or pytest.skip('OpenCV is not installed')


def photograph(width=500, height=375):
  """A gradient, soft noise and hard edges."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:height, :width]
  noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
  noise = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
  ramp = np.stack([x * 255 / width, y * 255 / height, x * 0 + 99], 2)
  image = Image.fromarray((0.5 * noise + 0.5 * ramp).astype(np.uint8))
  draw = ImageDraw.Draw(image)
  draw.ellipse((width // 5, height // 5, width // 2, height // 2), (250, 9, 9))
  draw.line((0, height, width, 0), (20, 250, 30), 7)
  return image


def encoded(image, suffix='JPEG', **options):
  file = io.BytesIO()
  image.save(file, suffix, **options)
  return file.getvalue()


PHOTOGRAPH = photograph()
JPEG = encoded(PHOTOGRAPH, quality=90)
# Sides divisible by 8: of others, decoding at 1 / n ends in a part of a pixel,
# and turning puts it first, which moves the crop by that part.
DIVISIBLE = photograph(496, 376)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn 90 degrees clockwise


def plain(content, box, size):
  """The ordinary way: decode everything, crop, resize with antialiasing."""
  image = Image.open(io.BytesIO(content))
  if image.getexif().get(0x0112) == 6:
    image = image.transpose(Image.Transpose.ROTATE_270)
  top, left, height, width = box
  image = image.convert('RGB').crop((left, top, left + width, top + height))
  return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def box_of(seed, height, width, scale, ratio=(3 / 4, 4 / 3)):
  return photographs.random_box(
    height, width, np.random.default_rng(seed), scale=scale, ratio=ratio
  )


def difference(a, b):
  return np.abs(a.astype(float) - b).mean()


def aligned(box, n):
  """Edges rounded to what decoding at 1 / n makes one pixel."""
  top, left, height, width = box
  y = [n * round(edge / n) for edge in (top, top + height)]
  x = [n * round(edge / n) for edge in (left, left + width)]
  return y[0], x[0], y[1] - y[0], x[1] - x[0]


# Mean absolute differences, in units of 1 of 255. Resizing without antialiasing
# is beyond the bounds where the image shrinks (0.4, 1.0, 2.3, 5.1), and so is a
# box that is one pixel off (1.5 and more).
@pytest.mark.usefixtures('library')
@pytest.mark.parametrize(
  ('size', 'scale', 'reduction', 'bound'),
  [
    (224, (0.08, 0.2), 1, 0.25),  # magnified
    (224, (0.6, 0.9), 1, 0.35),
    (120, (0.6, 0.9), 2, 0.8),
    (60, (0.6, 0.9), 4, 0.8),
    (30, (0.6, 0.9), 8, 1.0),
  ],
)
@pytest.mark.parametrize('exif', [None, EXIF])
def test_a_crop_is_what_full_decoding_gives(
  size, scale, reduction, bound, exif
):
  content, shape = JPEG, (375, 500)
  if exif:
    content, shape = encoded(DIVISIBLE, quality=90, exif=exif), (496, 376)
  differences = []
  for seed in range(8):
    image = photographs.training_image(
      content, np.random.default_rng(seed), size=size, scale=scale
    )
    assert image.dtype == np.uint8
    assert image.shape == (size, size, 3)
    box = aligned(box_of(seed, *shape, scale), reduction)
    differences.append(difference(image, plain(content, box, size)))
  assert np.mean(differences) < bound


def test_only_what_is_needed_is_decoded(monkeypatch, library):
  decoded = []

  def decode(content, n):
    decoded.append(library.decode(content, n))
    return decoded[-1]

  monkeypatch.setattr(
    jpeg, 'chosen', dataclasses.replace(library, decode=decode)
  )
  whole = {'scale': (1.0, 1.0), 'ratio': (4 / 3, 4 / 3)}
  for size in (224, 187, 93, 46):
    photographs.training_image(
      JPEG, np.random.default_rng(0), size=size, **whole
    )
  # Rounded up, by the format.
  assert [pixels.shape for pixels in decoded] == [
    (375, 500, 3), (188, 250, 3), (94, 125, 3), (47, 63, 3),
  ]  # fmt: skip


def test_the_record_may_be_content_path_or_array(tmp_path):
  path = tmp_path / 'a.png'
  PHOTOGRAPH.save(path)
  records = (path.read_bytes(), path, str(path), np.asarray(PHOTOGRAPH))
  for channels in (1, 3):
    train, evaluate = (
      np.stack([function(record) for record in records])
      for function in (
        lambda record: photographs.training_image(
          record,
          np.random.default_rng(3),
          size=32,
          channels=channels,  # noqa: B023
        ),
        lambda record: photographs.evaluation_image(
          record,
          size=32,
          resize=40,
          channels=channels,  # noqa: B023
        ),
      )
    )
    for results in (train, evaluate):
      assert results.shape == (4, 32, 32, channels)
      np.testing.assert_array_equal(results, results[:1].repeat(4, 0))


GREY = PHOTOGRAPH.convert('L')
ALPHA = PHOTOGRAPH.copy()
ALPHA.putalpha(GREY)
WIDE = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)


@pytest.mark.parametrize(
  ('image', 'suffix', 'options', 'bound'),
  [
    (PHOTOGRAPH, 'JPEG', {'progressive': True}, 3),
    (PHOTOGRAPH, 'JPEG', {'keep_rgb': True}, 3),
    (PHOTOGRAPH, 'JPEG', {'subsampling': 0}, 3),
    (PHOTOGRAPH.convert('CMYK'), 'JPEG', {}, 3),
    (GREY, 'JPEG', {}, 3),
    (PHOTOGRAPH, 'MPO', {'save_all': True, 'append_images': [GREY]}, 3),
    (PHOTOGRAPH, 'PNG', {}, 1),  # whatever the file is called
    (PHOTOGRAPH, 'WEBP', {'lossless': True}, 1),
    (PHOTOGRAPH.quantize(), 'PNG', {}, 9),
    (PHOTOGRAPH.quantize(), 'GIF', {}, 9),
    (ALPHA, 'PNG', {}, 1),
    (WIDE, 'PNG', {}, 1),
  ],
)
def test_every_kind_of_file(tmp_path, image, suffix, options, bound):
  path = tmp_path / 'a.jpg'
  path.write_bytes(encoded(image, suffix, **options))
  grey = image in (GREY, WIDE)
  for channels in (1, 3):
    trained = photographs.training_image(
      path, np.random.default_rng(1), size=200, channels=channels
    )
    box = box_of(1, 375, 500, (0.08, 1.0))
    source = GREY if grey or channels == 1 else PHOTOGRAPH
    expected = plain(encoded(source, 'PNG'), box, 200)[..., :channels]
    assert trained.shape == (200, 200, channels)
    assert difference(trained, expected) < bound
    # In evaluation, pixel for pixel what is shown to a network in inference.
    for resize in (0, 96):
      np.testing.assert_array_equal(
        photographs.evaluation_image(
          path, size=90, resize=resize, channels=channels
        ),
        images.decode(path, channels=channels, size=(90, 90), resize=resize),
      )


@pytest.mark.usefixtures('library')
@pytest.mark.parametrize('orientation', range(10))  # 0 and 9 mean nothing
def test_orientation_is_pillows(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  content = encoded(DIVISIBLE, exif=exif)
  np.testing.assert_array_equal(
    photographs.evaluation_image(content, size=50, resize=60),
    images.decode(io.BytesIO(content), channels=3, size=(50, 50), resize=60),
  )
  size = (376, 496) if orientation in (5, 6, 7, 8) else (496, 376)
  box = aligned(box_of(0, *size[::-1], (0.5, 1)), 4)
  trained = photographs.training_image(
    content, np.random.default_rng(0), size=60, scale=(0.5, 1)
  )
  turned = images.decode(io.BytesIO(content), channels=3)
  expected = plain(encoded(Image.fromarray(turned), 'PNG'), box, 60)
  assert difference(trained, expected) < 1


@pytest.mark.usefixtures('library')
@pytest.mark.parametrize('share', [0.001, 0.01, 0.3, 0.8, 0.99])
def test_a_file_cut_short_is_named(tmp_path, share):
  path = tmp_path / 'cut.jpg'
  path.write_bytes(JPEG[: int(share * len(JPEG))])
  for record, name in (
    (path, re.escape(str(path))),
    (path.read_bytes(), 'the image'),
  ):
    for read in (
      lambda record: photographs.training_image(
        record, np.random.default_rng(0), size=50
      ),
      lambda record: photographs.evaluation_image(record, size=50, resize=60),
    ):
      with pytest.raises(config.InputError, match=f'^{name} is ') as error:
        read(record)
      assert '\n' not in str(error.value)


@pytest.mark.parametrize('content', [b'', b'no image', b'\xff\xd8\xff\xe0'])
def test_what_is_no_image_is_refused(content):
  with pytest.raises(config.InputError, match='the image is'):
    photographs.training_image(content, np.random.default_rng(0), size=50)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(config.InputError, match=r'none\.jpg .*No such file'):
    photographs.evaluation_image(tmp_path / 'none.jpg', size=5, resize=0)


@pytest.mark.usefixtures('library')
def test_the_bound_on_pixels():
  def read(content, **more):
    one = photographs.training_image(
      content, np.random.default_rng(0), size=20, **more
    )
    return one, photographs.evaluation_image(content, size=20, resize=0, **more)

  for content in (JPEG, encoded(PHOTOGRAPH, 'PNG')):
    read(content, max_pixels=500 * 375)
    with pytest.raises(config.InputError, match='500x375.*max_pixels=187499'):
      read(content, max_pixels=500 * 375 - 1)
  read(np.asarray(PHOTOGRAPH), max_pixels=1)  # in memory already


@pytest.mark.parametrize('suffix', ['PNG', 'WEBP'])
def test_exif_that_makes_no_sense_turns_nothing(suffix):
  content = encoded(
    PHOTOGRAPH, suffix, exif=b'Exif\0\0this is not TIFF at all', lossless=True
  )
  np.testing.assert_array_equal(
    photographs.evaluation_image(content, size=50, resize=60),
    photographs.evaluation_image(np.asarray(PHOTOGRAPH), size=50, resize=60),
  )


def test_what_the_library_refuses_is_decoded_otherwise(monkeypatch, library):
  expected = [
    photographs.training_image(JPEG, np.random.default_rng(0), size=size)
    for size in (150, 40)
  ]
  refusing = dataclasses.replace(library, decode=lambda *_: None)
  monkeypatch.setattr(jpeg, 'chosen', refusing)
  for image in expected:
    fallback = photographs.training_image(
      JPEG, np.random.default_rng(0), size=len(image)
    )
    assert difference(image, fallback) < 1


def test_what_makes_opencv_raise_is_refused(monkeypatch, library):
  if library is jpeg.PILLOW:
    assert library.decode(b'no image', 1) is None
    return
  import cv2

  def refuse(*_):
    raise cv2.error

  monkeypatch.setattr(cv2, 'imdecode', refuse)
  assert library.decode(JPEG, 1) is None


def test_boxes_have_uniform_area_and_log_uniform_ratio():
  # So large that neither rounding nor the border matters.
  height, width = 10_000, 10_000
  rng = np.random.default_rng(0)
  boxes = np.array(
    [
      photographs.random_box(
        height, width, rng, scale=(0.08, 0.5), ratio=(3 / 4, 4 / 3)
      )
      for _ in range(4000)
    ]
  )
  top, left, tall, wide = boxes.T
  area = tall * wide / (height * width)
  log_ratio = np.log(wide / tall) / np.log(4 / 3)
  for values, low, high in (
    ((area - 0.08) / 0.42, 0, 1),
    ((log_ratio + 1) / 2, 0, 1),
    (top / (height - tall), 0, 1),
    (left / (width - wide), 0, 1),
  ):
    assert low - 1e-3 <= values.min() < 0.01
    assert 0.99 < values.max() <= high + 1e-3
    counts = np.histogram(values, 10, (0, 1))[0]
    np.testing.assert_allclose(counts, 400, atol=5 * 400**0.5)
  assert abs(np.corrcoef(np.stack([area, log_ratio, top, left]))[0, 1]) < 0.05


@pytest.mark.parametrize(
  ('height', 'width', 'box'),
  [
    (100, 1000, (0, 434, 100, 133)),  # as wide as the largest ratio allows
    (1000, 100, (434, 0, 133, 100)),
    (100, 110, (0, 0, 100, 110)),
    (1, 1, (0, 0, 1, 1)),
  ],
)
def test_where_no_box_fits_the_centre_is_taken(height, width, box):
  drawn = photographs.random_box(
    height,
    width,
    np.random.default_rng(0),
    scale=(4, 4),
    ratio=(3 / 4, 4 / 3),
  )
  # (1000 - 133) / 2 is between two pixels.
  np.testing.assert_allclose(drawn, box, atol=1)
  assert drawn[2:] == box[2:]


@pytest.mark.usefixtures('library')
@pytest.mark.parametrize('shape', [(1, 1), (1, 300), (300, 2), (3, 5)])
def test_tiny_images(shape):
  pixels = np.full((*shape, 3), 77, np.uint8)
  for content in (pixels, encoded(Image.fromarray(pixels))):
    for seed in range(5):
      image = photographs.training_image(
        content, np.random.default_rng(seed), size=16
      )
      np.testing.assert_array_equal(image, 77)
    image = photographs.evaluation_image(content, size=16, resize=18)
    np.testing.assert_array_equal(image, 77)


def test_one_seed_is_one_image():
  def read(seed):
    return photographs.training_image(
      JPEG, np.random.default_rng(seed), size=40, randaugment_ops=2
    )

  np.testing.assert_array_equal(read(5), read(5))
  assert difference(read(5), read(6)) > 5


def test_randaugment_changes_the_resized_crop():
  grey = {'size': 40, 'scale': (1, 1), 'channels': 1}
  crops = [
    photographs.training_image(
      JPEG, np.random.default_rng(seed), randaugment_ops=ops, **grey
    )
    for ops in (0, 2)
    for seed in range(6)
  ]
  assert {image.shape for image in crops} == {(40, 40, 1)}
  changed = [
    difference(a, b) for a, b in zip(crops[:6], crops[6:], strict=True)
  ]
  assert np.median(changed) > 5


# One library instead of the other.

CHINA, FLOWER = (
  encoded(Image.fromarray(sklearn.datasets.load_sample_image(name)), quality=90)
  for name in ('china.jpg', 'flower.jpg')
)


@pytest.mark.parametrize('n', jpeg.REDUCTIONS)
@pytest.mark.parametrize(
  'content',
  [
    CHINA,
    FLOWER,
    encoded(PHOTOGRAPH, progressive=True, subsampling=1),
    encoded(PHOTOGRAPH, keep_rgb=True),
    encoded(PHOTOGRAPH.convert('L')),
    encoded(PHOTOGRAPH, 'MPO', save_all=True, append_images=[GREY]),
    encoded(photograph(499, 371), subsampling=0),
  ],
)
def test_both_libraries_decode_to_the_same_bits(content, n, opencv):
  pixels = opencv.decode(content, n)
  width, height = Image.open(io.BytesIO(content)).size
  assert pixels.shape == (-(-height // n), -(-width // n), 3)
  if n == 1:
    np.testing.assert_array_equal(
      pixels, Image.open(io.BytesIO(content)).convert('RGB')
    )
  np.testing.assert_array_equal(pixels, jpeg.PILLOW.decode(content, n))


def crops(size, **more):
  return np.stack(
    [
      photographs.training_image(
        content, np.random.default_rng(seed), size=size, **more
      )
      for content in (CHINA, FLOWER)
      for seed in range(6)
    ]
  )


# docs/data.md states these differences, of 255.
@pytest.mark.parametrize(('size', 'bound'), [(224, 0.6), (96, 0.4), (32, 1.2)])
def test_crops_of_photographs_differ_little(monkeypatch, opencv, size, bound):
  made = []
  for each in (opencv, jpeg.PILLOW):
    monkeypatch.setattr(jpeg, 'chosen', each)
    made.append(crops(size))
  assert bound / 4 < difference(*made) < bound


def test_without_opencv_pillow_reads(monkeypatch):
  monkeypatch.setattr(jpeg, 'chosen', jpeg.PILLOW)
  code = f"""
import hashlib, sys
sys.modules['cv2'] = None
import numpy as np
from maskconnect_jax.data import jpeg, photographs
image = photographs.training_image(
  bytes.fromhex({CHINA.hex()!r}), np.random.default_rng(1), size=64)
print(jpeg.chosen.name, hashlib.sha256(image.tobytes()).hexdigest())
"""
  done = subprocess.run(
    [sys.executable, '-'],
    input=code, capture_output=True, text=True, check=True,
  )  # fmt: skip
  expected = photographs.training_image(
    CHINA, np.random.default_rng(1), size=64
  )
  digest = hashlib.sha256(expected.tobytes()).hexdigest()
  assert done.stdout == f'pillow {digest}\n'
  # An OpenCV that is too old is as good as none.
  monkeypatch.setitem(sys.modules, 'cv2', types.ModuleType('cv2'))
  assert jpeg._find_opencv() is None
