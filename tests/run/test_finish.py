"""What the end of a run counts, and which pictures it leaves out."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskconnect_jax.data import datasets
from maskconnect_jax.run import finish, scores, train

CONFUSED = np.array([(0, 1, 3), (1, 1, 2)])


def scores_of(count):
  return scores.OneClass(0.5, 0.5, 1.0, count, CONFUSED)


def split_of(count):
  images = np.zeros((count, 2, 2, 1), np.uint8)
  return datasets.Split(images, np.zeros(count, np.int32))


def test_damaged_images_of_every_split_count():
  test, validation = (split_of(9), scores_of(7)), (split_of(5), scores_of(4))
  assert finish.damaged({3, 8}, [test]) == 4
  assert finish.damaged({3, 8}, [test, validation]) == 5
  assert finish.damaged(set(), [validation]) == 1


def test_no_picture_of_more_classes_than_could_be_seen(tmp_path):
  for count in (2, 1_001):
    finish.draw_confusion(
      tmp_path / f'of {count}',
      scores_of(5),
      [str(number) for number in range(count)],
      title='a title',
    )
  assert {path.name for path in tmp_path.iterdir()} == {'of 2.png', 'of 2.svg'}
  with Image.open(tmp_path / 'of 2.png') as image:
    assert min(image.size) > 100


@pytest.mark.slow
def test_a_run_counts_damaged_images_of_all_its_splits(tiny_config, tmp_path):
  rng = np.random.default_rng(0)
  for part, count in (('train', 40), ('val', 10)):
    for i in range(count):
      path = tmp_path / 'data' / part / str(i % 2) / f'{i}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 200, (9, 9, 3), np.uint8)).save(path)
  data = tiny_config.data
  data.source, data.dir = 'folder', str(tmp_path / 'data')
  data.crop, data.image_size, data.validation = 'resized', 8, 8
  data.skip_errors = True
  tiny_config.batch_size = tiny_config.eval_batch_size = 16
  tiny_config.duration = '2 epochs'  # of the 32 images, none is left out
  whole = datasets.load(data)
  bad = [
    split.source.read(int(split.chosen[place]))[0]
    for split, places in (
      (whole.train, (0, 5, 9)),
      (whole.validation, (1, 4)),
      (whole.test, (2,)),
    )
    for place in places
  ]
  for path in bad:
    Path(path).write_bytes(b'no image')
  summary = train.train(tiny_config, tmp_path / 'run').summary
  assert summary['skipped_files'] == len(set(bad)) == 6
  assert summary['num_test_examples'] == 9


UNION = """
import sys
from maskconnect_jax.run import distributed
distributed.initialize()
given = [int(number) for number in sys.argv[1:]]
print(sorted(distributed.union(set(given))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ('given', 'expected'),
  [((['7'], ['3', '7', '70000000']), '[3, 7, 70000000]'), (([], []), '[]')],
)
def test_each_process_knows_what_the_others_found(given, expected):
  with socket.socket() as server:
    server.bind(('localhost', 0))
    port = server.getsockname()[1]
  inherited = {n: v for n, v in os.environ.items() if n != 'XLA_FLAGS'}
  both = [
    subprocess.Popen(
      [sys.executable, '-c', UNION, *numbers],
      env=inherited
      | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
        'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': str(process),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process, numbers in enumerate(given)
  ]
  for process in both:
    out, err = process.communicate(timeout=120)
    assert out.splitlines()[-1:] == [expected], (out, err)
