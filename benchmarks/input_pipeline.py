"""Photographs per second and core, beside Pillow and torchvision.

python benchmarks/input_pipeline.py [--quick] [--folder IMAGES] [--width 400]

It makes JPEGs of ImageNet's usual size in pixels and bytes, or takes those of a
folder. Each reader turns them into batches of 224 x 224 in one thread, and the
readers take turns. The figures are medians over the rounds of this process's
processor time, so other programs and the disk matter little.

"float" runs the steps that users of ImageFolder and DataLoader run: decode,
random resized crop, flip, tensor, normalise, batch. It needs torchvision.
Without torchvision the same steps run in Pillow and NumPy. "uint8" stops before
the flip, and so does the same work as our host: our flip and normalisation run
on the accelerator. "ours" reads by OpenCV, "ours, without OpenCV" by Pillow as
where OpenCV is not installed; the last lines are their ratios, round by round.
"""

import argparse
import functools
import math
import platform
import statistics
import tempfile
import time

import numpy as np
import PIL.features
from PIL import Image, ImageDraw

from maskconnect_jax.data import (
  datasets,
  image_files,
  jpeg,
  photographs,
  sources,
)
from maskconnect_jax.run import batches as batches_lib

try:
  import cv2
except ImportError:
  cv2 = None

try:
  import torch
  import torchvision
  from torchvision import transforms
except ImportError:
  torch = None

SIZE, RESIZE, BATCH = 224, 256, 64
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def photograph(rng, width=500, height=375):
  """Noise with the spectrum of natural scenes, 1 / f, and a few hard edges."""
  frequency = np.hypot(
    np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
  )
  frequency[0, 0] = np.inf  # no mean
  noise = np.fft.irfft2(
    rng.standard_normal((3, *frequency.shape, 2)) @ [1, 1j] / frequency,
    (height, width),
  )
  # A strong brightness and two weak, smoother colour contrasts.
  mix = np.array([[1, 1, 1], [0.25, 0, -0.25], [0.1, -0.2, 0.1]])
  pixels = 118 + 50 * np.einsum('khw,kc->hwc', noise / noise.std(), mix)
  image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
  draw = ImageDraw.Draw(image)
  for _ in range(6):
    x, y, w, h = rng.uniform(0, 1, 4) * (width, height, 150, 150)
    colour = tuple(int(value) for value in rng.integers(0, 256, 3))
    draw.ellipse((x, y, x + w, y + h), fill=colour)
  return image


def opened(path):
  with Image.open(path) as image:
    return image.convert('RGB')


def random_crop(path, rng):
  image = opened(path)
  top, left, height, width = photographs.random_box(
    image.height, image.width, rng, scale=SCALE, ratio=RATIO
  )
  image = image.crop((left, top, left + width, top + height))
  return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def centre_crop(path, _):
  image = opened(path)
  factor = RESIZE / min(image.size)
  width, height = (math.floor(side * factor) for side in image.size)
  image = image.resize((width, height), Image.Resampling.BILINEAR)
  left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
  return image.crop((left, top, left + SIZE, top + SIZE))


def flipped(image, rng):
  mirror = Image.Transpose.FLIP_LEFT_RIGHT
  return image.transpose(mirror) if rng.random() < 0.5 else image


def normalised(image):
  values = np.asarray(image, np.float32) / np.float32(255)
  return ((values - MEAN) / STD).transpose(2, 0, 1)


def batches(read):
  """Reads every image, a batch at a time."""

  def run(paths, rng):
    for start in range(0, len(paths), BATCH):
      np.stack([read(path, rng) for path in paths[start : start + BATCH]])

  return run


def without_opencv(run):
  """Returns `run` with Pillow alone."""

  def by_pillow(paths, rng):
    before, jpeg.chosen = jpeg.chosen, jpeg.PILLOW
    try:
      run(paths, rng)
    finally:
      jpeg.chosen = before

  return by_pillow


def torchvision_loader(*steps):
  """The usual training script: its transforms in a DataLoader of one thread."""
  transform = transforms.Compose(
    [
      torchvision.datasets.folder.default_loader,
      *steps,
      transforms.ToTensor(),
      transforms.Normalize(MEAN.tolist(), STD.tolist()),
    ]
  )

  class Photographs(torch.utils.data.Dataset):
    def __init__(self, paths):
      self.paths = paths

    def __len__(self):
      return len(self.paths)

    def __getitem__(self, i):
      return transform(str(self.paths[i]))

  def run(paths, _):
    for _ in torch.utils.data.DataLoader(Photographs(paths), batch_size=BATCH):
      pass

  return run


def training_batches(paths, rng):
  """An epoch in order of its own, through the iterator of a run."""
  stream = datasets.LazySplit(
    sources.Source(
      lambda i: (str(paths[i]), 0),
      num_train=len(paths),
      num_test=0,
      classes=('one',),
      channels=3,
      name='photographs',
    ),
    np.arange(len(paths)),
    augment=functools.partial(photographs.training_image, size=SIZE),
    decode=None,
    skip_errors=False,
  )
  size = min(BATCH, len(paths))
  examples = batches_lib.training_examples(
    stream, int(rng.integers(1 << 30)), size
  )
  shares = batches_lib.share_of_batches(examples, size, 0, 0, 1)
  for i in range(len(paths) // size):
    shares[i]


def contestants():
  """Returns (name, what it is compared with) -> what reads all paths."""
  if torch is not None:
    train = torchvision_loader(
      transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()
    )
    evaluate = torchvision_loader(
      transforms.Resize(RESIZE), transforms.CenterCrop(SIZE)
    )
    peer = 'torchvision'
  else:
    train = batches(
      lambda path, rng: normalised(flipped(random_crop(path, rng), rng))
    )
    evaluate = batches(lambda path, rng: normalised(centre_crop(path, rng)))
    peer = 'Pillow + NumPy'
  ours = batches(
    lambda path, rng: photographs.training_image(path, rng, size=SIZE)
  )
  ours_evaluating = batches(
    lambda path, _: photographs.evaluation_image(path, size=SIZE, resize=RESIZE)
  )
  return {
    ('training', f'{peer}, float'): train,
    ('training', 'Pillow, uint8'): batches(random_crop),
    ('training', 'ours'): ours,
    ('training', 'ours, without OpenCV'): without_opencv(ours),
    ('training', 'ours, RandAugment 2 of 9'): batches(
      lambda path, rng: photographs.training_image(
        path, rng, size=SIZE, randaugment_ops=2
      )
    ),
    ('training', 'ours, as the training loop gets it'): training_batches,
    ('evaluation', f'{peer}, float'): evaluate,
    ('evaluation', 'Pillow, uint8'): batches(centre_crop),
    ('evaluation', 'ours'): ours_evaluating,
    ('evaluation', 'ours, without OpenCV'): without_opencv(ours_evaluating),
  }


def measure(paths, rounds):
  """Returns images per second of processor time of each round."""
  runs = contestants()
  rates = {key: [] for key in runs}
  for run in runs.values():
    run(paths[:BATCH], np.random.default_rng(0))  # caches, files, lazy imports
  for i in range(rounds):
    for key, run in runs.items():
      began = time.process_time()
      run(paths, np.random.default_rng(i))  # the same crops, where ours to say
      rates[key].append(len(paths) / (time.process_time() - began))
  return rates


def report(rounds, paths):
  rates = {key: statistics.median(values) for key, values in rounds.items()}
  weight = statistics.mean(path.stat().st_size for path in paths) / 1e3
  turbo = PIL.features.version('libjpeg_turbo')
  versions = (
    f'Python {platform.python_version()}, NumPy {np.__version__}, Pillow'
    f' {PIL.__version__} (libjpeg-turbo {turbo}), OpenCV'
    f' {cv2.__version__ if cv2 else "none"}'
  )
  if torch is not None:
    versions += f', torch {torch.__version__}'
    versions += f', torchvision {torchvision.__version__}'
  print(f'{platform.machine()}, one thread; {versions}.')
  print(f'{len(paths)} images of {weight:.0f} kB on average.\n')
  print('| | images/s/core | to float | to uint8 |')
  print('| --- | --- | --- | --- |')
  for (path, name), rate in rates.items():
    peers = [value for (other, _), value in rates.items() if other == path][:2]
    ratios = ' | '.join(f'{rate / peer:.2f}' for peer in peers)
    print(f'| {path}: {name} | {rate:.0f} | {ratios} |')
  for path in ('training', 'evaluation'):
    ratios = np.divide(
      rounds[path, 'ours'], rounds[path, 'ours, without OpenCV']
    )
    print(
      f'{path}, OpenCV to Pillow: {np.median(ratios):.2f}'
      f' ({ratios.min():.2f} to {ratios.max():.2f})'
    )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='under a minute')
  parser.add_argument('--folder', help='of images, instead of made ones')
  parser.add_argument('--images', type=int, help='default 512, quick 128')
  parser.add_argument('--width', type=int, default=500, help='of made ones')
  parser.add_argument('--rounds', type=int, help='default 7, quick 3')
  given = parser.parse_args()
  count = given.images or (128 if given.quick else 512)
  if cv2 is not None:
    cv2.setNumThreads(1)
  if torch is not None:
    torch.set_num_threads(1)
  with tempfile.TemporaryDirectory() as folder:
    if not given.folder:
      rng = np.random.default_rng(0)
      for i in range(count):
        image = photograph(rng, given.width, given.width * 3 // 4)
        image.save(f'{folder}/{i:04d}.jpg', quality=90)
    paths = image_files.find(given.folder or folder).files[:count]
    report(measure(paths, given.rounds or (3 if given.quick else 7)), paths)


if __name__ == '__main__':
  main()
