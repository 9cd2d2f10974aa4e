"""What version 0.1.0 wrote still loads, and goes on.

`golden/old` was written at commit 6d96f3d: a workdir that was killed after step
16 of 24, the models of a finished run at either level, and in expected.json
what that version made of them. `safetensors` was written later: the block-level
model, with model.safetensors in the place of the arrays.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import maskconnect_jax
from maskconnect_jax import config as config_lib
from maskconnect_jax.run import train

OLD = Path(__file__).parent / 'golden/old'
EXPECTED = json.loads((OLD / 'expected.json').read_text())


@pytest.mark.parametrize('folder', ['block', 'branch', 'safetensors'])
def test_a_model(folder):
  level = 'block' if folder == 'safetensors' else folder
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
  model = maskconnect_jax.load(OLD / folder)
  assert not model.multi_label  # the entry is newer
  np.testing.assert_allclose(
    model.logits(images),
    EXPECTED[level],
    rtol=1e-4,
    atol=1e-5,
  )


def test_a_workdir_goes_on(tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(OLD / 'workdir', workdir)
  train.train(config_lib.stored(workdir), workdir)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  losses = {str(r['step']): r['loss'] for r in map(json.loads, lines)}
  blocks = json.loads((workdir / 'topology.json').read_text())['blocks']
  then = EXPECTED['workdir']
  assert [block['sources'] for block in blocks] == then['topology']
  assert losses.keys() == then['losses'].keys()
  for step, loss in then['losses'].items():
    # Kinds of CPU round otherwise, more with each step.
    np.testing.assert_allclose(losses[step], loss, rtol=2e-3, err_msg=step)
