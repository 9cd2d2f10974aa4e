"""Makes a small folder with ImageNet's layout, to try all of a run on.

python benchmarks/imagenet_folder.py DIR [--classes=1000 --train=3 --val=1]

DIR/train/n00000000/*.JPEG and DIR/val/... hold made-up pictures of mixed sizes.
Every 25th is grey, every 50th CMYK, every 100th a PNG despite its name, and
every 500th damaged. ImageNet has fewer of each kind. The pictures mean nothing.
"""

import argparse
import pathlib

import numpy as np
from input_pipeline import photograph
from PIL import Image, ImageOps


def save(image, path, number):
  """Saves as most files are, or as some are."""
  if number % 100 == 7:
    image.save(path, 'PNG')
    return
  if number % 50 == 3:
    image = image.convert('CMYK')
  elif number % 25 == 1:
    image = image.convert('L')
  image.save(path, 'JPEG', quality=90)
  if number % 500 == 11:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--classes', type=int, default=1000)
  parser.add_argument('--train', type=int, default=3, help='images a class')
  parser.add_argument('--val', type=int, default=1, help='images a class')
  given = parser.parse_args()
  rng = np.random.default_rng(0)
  originals = [photograph(rng) for _ in range(50)]
  number = 0
  for part, count in (('train', given.train), ('val', given.val)):
    for label in range(given.classes):
      folder = given.folder / part / f'n{label:08d}'
      folder.mkdir(parents=True, exist_ok=True)
      for i in range(count):
        image = originals[rng.integers(len(originals))]
        size = tuple(int(side) for side in rng.integers(120, 640, 2))
        image = ImageOps.fit(image, size, centering=tuple(rng.random(2)))
        tint = Image.new('RGB', size, tuple(rng.integers(0, 256, 3).tolist()))
        image = Image.blend(image, tint, 0.2)
        save(image, folder / f'{part}_{i}.JPEG', number)
        number += 1
  print(f'{number} images in {given.folder}')


if __name__ == '__main__':
  main()
