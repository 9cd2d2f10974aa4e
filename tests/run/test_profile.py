"""--profile: a trace that TensorBoard and Perfetto open."""

import gzip
import json

from maskconnect_jax.run import profile, train


def test_a_trace_of_some_steps(tiny_config, tmp_path, capsys):
  tiny_config.duration = '8 steps'
  tiny_config.checkpoint_every = '8 steps'
  tiny_config.evaluate_every = '8 steps'
  tiny_config.connectivity.rule = 'fixed_prev'
  train.train(tiny_config, tmp_path, profile_steps=2)
  assert 'traced 2 steps: tensorboard --logdir=' in capsys.readouterr().err
  (path,) = tmp_path.glob('profile/plugins/profile/*/*.trace.json.gz')
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  names = [str(event.get('name')) for event in events]
  calls = [name for name in names if 'PjitFunction(train_step)' in name]
  ran = [name for name in names if 'Execute' in name]
  assert calls or ran
  (raw,) = tmp_path.glob('profile/plugins/profile/*/*.xplane.pb')
  assert raw.stat().st_size


def test_a_trace_that_the_run_cuts_short_is_closed(tiny_config, tmp_path):
  tiny_config.duration = '5 steps'
  tiny_config.checkpoint_every = '5 steps'
  tiny_config.evaluate_every = '5 steps'
  tiny_config.connectivity.rule = 'fixed_prev'
  train.train(tiny_config, tmp_path, profile_steps=100)
  assert list(tmp_path.glob('profile/plugins/profile/*/*.xplane.pb'))


def test_no_trace_by_default(tmp_path):
  traced = profile.Profile(tmp_path, 0, 0)
  for step in range(9):
    traced.before(step)
    assert traced.after(step + 1, None) == ''
  assert not list(tmp_path.iterdir())
