"""The tiny run against numbers that were right when they were written.

Renew them, after a change that is meant to move them, with

  RENEW_GOLDEN=1 python -m pytest tests/test_golden.py

and say in CHANGELOG.md why they moved.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from maskconnect_jax.method import connectivity
from maskconnect_jax.networks import streams
from maskconnect_jax.run import experiment

GOLDEN = Path(__file__).parent / 'golden/tiny.json'


@pytest.fixture
def actual(finished, tiny_config):
  job = experiment.build(tiny_config)
  text = (finished.workdir / 'metrics.jsonl').read_text()
  records = [json.loads(line) for line in text.splitlines()]
  with np.load(finished.workdir / 'real_masks.npz') as file:
    real_mask = file['masks'][2]
  found = {
    'drawn_masks': [
      np.asarray(
        connectivity.draw(
          job.recipe.key(streams.MASK, step),
          jnp.full((6, 6), 0.5),
          np.tri(6, dtype=bool),
          2,
        ),
        int,
      ).tolist()
      for step in range(4)
    ],
    'initial_real_mask': job.model.stack.real_mask.get_value().tolist(),
    'real_mask_after_6': real_mask.tolist(),
    'losses': [record['loss'] for record in records[:3]],
    'topology': [
      block['sources']
      for block in json.loads((finished.workdir / 'topology.json').read_text())[
        'blocks'
      ]
    ],
  }
  if os.environ.get('RENEW_GOLDEN'):
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found, indent=1) + '\n')
  return found


def test_golden(actual):
  expected = json.loads(GOLDEN.read_text())
  assert set(actual) == set(expected)
  assert actual['drawn_masks'] == expected['drawn_masks']
  assert actual['topology'] == expected['topology']
  for name in ('initial_real_mask', 'real_mask_after_6', 'losses'):
    np.testing.assert_allclose(
      actual[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name
    )
