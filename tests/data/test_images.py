"""Images are converted the same way from files, PIL images and arrays."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from maskconnect_jax import config
from maskconnect_jax.data import images

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), np.uint8)
GREY = RNG.integers(0, 256, (6, 9), np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9, 1), np.uint8)
WIDE = RNG.integers(0, 65536, (6, 9), np.uint16)


def luma(rgb):
  """ITU-R 601-2, in floats."""
  return rgb.astype(float) @ [0.299, 0.587, 0.114]


def save(path, array, **kwargs):
  Image.fromarray(array).save(path, **kwargs)
  return path


@pytest.mark.parametrize('suffix', ['png', 'bmp', 'tif', 'ppm'])
def test_lossless_colour_is_read_back(tmp_path, suffix):
  path = save(tmp_path / f'a.{suffix}', RGB)
  decoded = images.decode(path, channels=3)
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, RGB)
  np.testing.assert_array_equal(images.decode(str(path), channels=3), RGB)
  with path.open('rb') as file:
    np.testing.assert_array_equal(images.decode(file, channels=3), RGB)


def test_colour_becomes_grey_and_grey_colour(tmp_path):
  grey = images.decode(save(tmp_path / 'c.png', RGB), channels=1)
  assert grey.shape == (6, 9, 1)
  np.testing.assert_allclose(grey[..., 0], luma(RGB), atol=1)
  path = save(tmp_path / 'g.png', GREY)
  np.testing.assert_array_equal(
    images.decode(path, channels=1), GREY[..., None]
  )
  np.testing.assert_array_equal(
    images.decode(path, channels=3), np.repeat(GREY[..., None], 3, 2)
  )


def test_alpha_is_dropped(tmp_path):
  path = save(tmp_path / 'a.png', np.concatenate([RGB, ALPHA], 2))
  np.testing.assert_array_equal(images.decode(path, channels=3), RGB)
  path = save(tmp_path / 'la.png', np.concatenate([GREY[..., None], ALPHA], 2))
  np.testing.assert_array_equal(
    images.decode(path, channels=1), GREY[..., None]
  )


@pytest.mark.parametrize('options', [{}, {'transparency': b'\0\x80\xff'}])
def test_palette_gives_its_colours(tmp_path, options):
  indices = GREY % 3
  colours = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]], np.uint8)
  image = Image.fromarray(indices).convert('P')
  image.putdata(indices.ravel().tolist())
  image.putpalette(colours.tobytes())
  image.save(tmp_path / 'p.png', **options)
  np.testing.assert_array_equal(
    images.decode(tmp_path / 'p.png', channels=3), colours[indices]
  )


def test_one_bit_is_black_and_white(tmp_path):
  path = save(tmp_path / 'b.png', GREY > 127)
  expected = np.where(GREY > 127, 255, 0)[..., None]
  np.testing.assert_array_equal(images.decode(path, channels=1), expected)
  np.testing.assert_array_equal(
    images.to_array(GREY > 127, channels=1), expected
  )


def test_cmyk(tmp_path):
  Image.new('CMYK', (4, 5), (0, 255, 255, 0)).save(tmp_path / 'c.tif')
  decoded = images.decode(tmp_path / 'c.tif', channels=3)
  np.testing.assert_array_equal(
    decoded, np.broadcast_to([255, 0, 0], (5, 4, 3))
  )
  Image.new('CMYK', (16, 16), (0, 255, 255, 0)).save(tmp_path / 'c.jpg')
  decoded = images.decode(tmp_path / 'c.jpg', channels=3)
  np.testing.assert_allclose(decoded[8, 8], [255, 0, 0], atol=6)


@pytest.mark.parametrize('name', ['w.png', 'w.tif', 'w.pgm'])
@pytest.mark.parametrize('channels', [1, 3])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name, channels):
  save(tmp_path / name, WIDE)
  decoded = images.decode(tmp_path / name, channels=channels)
  np.testing.assert_array_equal(
    decoded, np.repeat((WIDE // 256)[..., None], channels, 2)
  )
  assert len(np.unique(decoded)) > 40  # clipped, nearly all would be 255


def test_exif_orientation_turns_the_image(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera lay on its side: turn 90 degrees clockwise
  path = save(tmp_path / 'e.png', RGB, exif=exif)
  np.testing.assert_array_equal(
    images.decode(path, channels=3), np.rot90(RGB, -1)
  )
  with Image.open(path) as image:
    np.testing.assert_array_equal(
      images.to_array(image, channels=3), np.rot90(RGB, -1)
    )
    assert image.size == (9, 6)  # the caller's own image is left as it was


def test_resize_halves_by_triangle_filter():
  # Bilinear with antialiasing, reducing by 2: weights 1 3 3 1 over the four
  # nearest pixels; without antialiasing it would be 1 1 over two.
  row = np.array([0, 0, 0, 0, 200, 0, 0, 0, 0, 0, 0, 0], np.uint8)
  stripes = np.repeat(row[None], 12, 0)
  resized = images.to_array(stripes, channels=1, size=(12, 6))[5, :, 0]
  np.testing.assert_allclose(resized, [0, 25, 75, 0, 0, 0], atol=1)


def test_resize_takes_height_then_width_and_leaves_equal_sizes(tmp_path):
  path = save(tmp_path / 'a.png', RGB)
  assert images.decode(path, channels=3, size=(4, 7)).shape == (4, 7, 3)
  np.testing.assert_array_equal(
    images.decode(path, channels=3, size=(6, 9)), RGB
  )


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
  ('shape', 'resized'),
  [
    ((60, 80), (32, 42)),  # torchvision rounds 42.7 down
    ((81, 60), (43, 32)),
    ((20, 31), (32, 49)),
    ((32, 32), (32, 32)),
    ((28, 28), (32, 32)),  # of the size asked for, yet not the centre
    ((24, 900), (32, 1200)),
    ((1500, 90), (533, 32)),
    ((2222, 33), (2154, 32)),
    ((611, 37), (528, 32)),
    ((40, 1111), (32, 888)),
    ((997, 500), (63, 32)),
  ],
)
def test_centre_crop_is_resize_then_crop(shape, resized, channels):
  pixels = RNG.integers(0, 256, (*shape, 3), np.uint8)
  image = Image.fromarray(pixels).convert('L' if channels == 1 else 'RGB')
  whole = np.asarray(image.resize(resized[::-1], Image.Resampling.BILINEAR))
  top, left = (round((side - 28) / 2) for side in resized)
  expected = whole[top : top + 28, left : left + 28]
  cropped = images.to_array(pixels, channels=channels, size=(28, 28), resize=32)
  assert cropped.shape == (28, 28, channels)
  np.testing.assert_array_equal(cropped.squeeze(), expected)


def test_a_crop_of_a_very_long_image_takes_little_memory():
  # Resized whole, it would be 256 x 12,800,000 pixels.
  pixels = np.arange(50000, dtype=np.int64)[:, None] // 200
  image = pixels.astype(np.uint8)
  cropped = images.to_array(image, channels=1, size=(224, 224), resize=256)
  assert cropped.shape == (224, 224, 1)
  assert abs(int(cropped.mean()) - 125) <= 1


def test_a_crop_larger_than_the_resized_image_is_refused():
  with pytest.raises(config.InputError, match='40x40.*resized to 32.*40'):
    images.to_array(RGB, channels=3, size=(40, 40), resize=32)


@pytest.mark.parametrize(
  ('array', 'expected'),
  [
    (RGB, RGB),
    (GREY, np.repeat(GREY[..., None], 3, 2)),
    (GREY[..., None], np.repeat(GREY[..., None], 3, 2)),
    (np.concatenate([RGB, ALPHA], 2), RGB),
    (RGB[:, ::-1], RGB[:, ::-1]),
    (RGB.astype(np.uint16) * 257, RGB),
    (RGB.astype(np.uint16) * 256, RGB),
  ],
)
def test_arrays(array, expected):
  np.testing.assert_array_equal(images.to_array(array, channels=3), expected)


def test_the_three_ways_in_agree(tmp_path):
  array = RNG.integers(0, 256, (40, 31, 4), np.uint8)
  path = save(tmp_path / 'a.png', array)
  from_file = images.decode(path, channels=3, size=(8, 8))
  for image in (array, Image.fromarray(array)):
    np.testing.assert_array_equal(
      images.to_array(image, channels=3, size=(8, 8)), from_file
    )


@pytest.mark.parametrize(
  ('array', 'message'),
  [
    (np.zeros((4, 4, 3), np.float32), 'float32.*uint8'),
    (np.zeros((4, 4, 5), np.uint8), r'\(4, 4, 5\).*\[H, W'),
    (np.zeros(4, np.uint8), r'\(4,\).*\[H, W'),
    (np.zeros((0, 4, 3), np.uint8), r'\(0, 4, 3\)'),
    (Image.new('F', (4, 4)), 'floating-point.*8 or 16'),
    (Image.new('I', (4, 4), 70000), '32-bit.*8 or 16'),
  ],
)
def test_values_without_a_known_meaning_are_refused(array, message):
  with pytest.raises(config.InputError, match=message):
    images.to_array(array, channels=3)


def test_other_numbers_of_channels_are_refused():
  with pytest.raises(config.InputError, match='2 channels'):
    images.to_array(RGB, channels=2)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'bmp', 'gif', 'webp', 'tif'])
@pytest.mark.parametrize('share', [0.3, 0.8])
def test_truncated_file_is_named(tmp_path, suffix, share):
  noise = RNG.integers(0, 256, (64, 64, 3), np.uint8)
  path = save(tmp_path / f'cut.{suffix}', noise)
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])
  with pytest.raises(config.InputError, match=re.escape(str(path))) as error:
    images.decode(path, channels=3)
  assert '\n' not in str(error.value)


def test_what_is_no_image_is_named(tmp_path):
  path = tmp_path / 'text.jpg'
  for content in (b'', b'not an image\n' * 9):
    path.write_bytes(content)
    with pytest.raises(config.InputError, match=f'{path}.*not an image'):
      images.decode(path, channels=3)
  with pytest.raises(config.InputError, match=r'none\.jpg .*No such file'):
    images.decode(tmp_path / 'none.jpg', channels=3)
  with pytest.raises(config.InputError, match='the image is not an image'):
    images.decode(io.BytesIO(b'nothing'), channels=3)


def test_conversion_error_names_the_file(tmp_path):
  Image.new('F', (4, 4)).save(tmp_path / 'f.tif')
  with pytest.raises(config.InputError, match=r'f\.tif: floating-point'):
    images.decode(tmp_path / 'f.tif', channels=3)


def test_a_name_of_several_lines_is_told_in_one(tmp_path):
  path = tmp_path / os.fsdecode(b'a\nb\x1b\xe9.png')
  path.write_bytes(b'text')
  with pytest.raises(config.InputError, match=r'a\\nb\\x1b\\xe9\.png') as error:
    images.decode(path, channels=3)
  assert len(str(error.value).splitlines()) == 1
  str(error.value).encode('utf-8')


# How large an image may be.


def png_header(width, height):
  """A PNG of which nothing but the header is there."""

  def chunk(name, content):
    crc = zlib.crc32(name + content)
    return (
      struct.pack('>I', len(content)) + name + content + struct.pack('>I', crc)
    )

  header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(b''))
    + chunk(b'IEND', b'')
  )


# Warnings are errors in this suite: there is none.
@pytest.mark.parametrize(
  ('width', 'height'), [(13000, 13000), (20000, 10000), (200000, 200000)]
)
def test_a_huge_image_is_refused_by_its_header(tmp_path, width, height):
  path = tmp_path / 'huge.png'
  path.write_bytes(png_header(width, height))
  for record in (path, path.read_bytes()):
    with pytest.raises(
      config.InputError,
      match=f'{width}x{height} pixels .*config.data.max_pixels=128000000',
    ) as error:
      images.read(record, channels=3, size=(8, 8))
    assert '\n' not in str(error.value)
    assert 'damaged' not in str(error.value)


@pytest.mark.parametrize(
  'suffix', ['png', 'jpg', 'webp', 'tif', 'gif', 'bmp', 'avif', 'jp2', 'tga']
)
def test_the_bound_on_pixels(tmp_path, monkeypatch, suffix):
  # Pillow's own bound, which would warn of this image, is no matter.
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 80)
  path = save(tmp_path / f'a.{suffix}', np.zeros((10, 12, 3), np.uint8))
  decoded = images.decode(path, channels=3, max_pixels=120)
  assert decoded.shape == (10, 12, 3)
  for size in (None, (4, 4)):
    with pytest.raises(config.InputError, match=r'12x10 .*max_pixels=119'):
      images.decode(path, channels=3, size=size, max_pixels=119)


def test_what_is_in_memory_has_no_bound():
  assert images.read(RGB, channels=3, max_pixels=1) is RGB


# EXIF.


NONSENSE = b'Exif\0\0this is not TIFF at all'
# Orientation 6, and a table of further entries far beyond the end.
HALF = (
  b'Exif\0\0II*\0\x08\0\0\0\x02\0'
  b'\x12\x01\x03\0\x01\0\0\0\x06\0\0\0'
  b'\x69\x87\x04\0\x01\0\0\0\xff\xff\xff\0'
  b'\0\0\0\0'
)


@pytest.mark.parametrize('suffix', ['png', 'webp'])
@pytest.mark.parametrize('exif', [NONSENSE, NONSENSE[6:], b'Exif\0\0II', b''])
def test_exif_that_makes_no_sense_turns_nothing(tmp_path, suffix, exif):
  path = tmp_path / f'a.{suffix}'
  options = {'lossless': True} if suffix == 'webp' else {}
  save(path, RGB, exif=exif, **options)
  np.testing.assert_array_equal(images.decode(path, channels=3), RGB)


@pytest.mark.parametrize('suffix', ['png', 'webp'])
def test_an_orientation_counts_whatever_else_is_wrong(tmp_path, suffix):
  path = tmp_path / f'a.{suffix}'
  options = {'lossless': True} if suffix == 'webp' else {}
  save(path, RGB, exif=HALF, **options)
  np.testing.assert_array_equal(
    images.decode(path, channels=3), np.rot90(RGB, -1)
  )


def test_a_turned_tiff_is_turned_once(tmp_path):
  path = save(tmp_path / 'a.tif', RGB, tiffinfo={0x0112: 6})
  expected = np.rot90(RGB, -1)
  np.testing.assert_array_equal(images.decode(path, channels=3), expected)
  with Image.open(path) as image:  # not loaded yet
    np.testing.assert_array_equal(images.to_array(image, channels=3), expected)
