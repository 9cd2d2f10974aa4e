"""The programs that time and weigh the training step, on a tiny one."""

from __future__ import annotations

import functools
import json
import os
import runpy
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / 'benchmarks'
TINY = ('--quick', '--models=resnet8', '--batches=8', '--fan_in=2')


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.syspath_prepend(str(FOLDER))


def functions_of(name: str) -> dict[str, Any]:
  return runpy.run_path(str(FOLDER / f'{name}.py'))


@pytest.fixture
def measured(
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> Callable[..., dict[str, Any]]:
  """Runs a program; its table must say what its JSON does."""

  def run(name: str, *arguments: str) -> dict[str, Any]:
    path = tmp_path / 'result.json'
    argv = [f'{name}.py', *arguments, f'--json={path}']
    monkeypatch.setattr(sys, 'argv', argv)
    runpy.run_path(str(FOLDER / argv[0]), run_name='__main__')
    result = json.loads(path.read_text())
    assert result['jax'] == jax.__version__
    about, _, header, _, *table = capsys.readouterr().out.splitlines()
    assert result['device'] in about
    assert len(table) == len(result['rows'])
    for line, row in zip(table, result['rows'], strict=True):
      columns = [column.strip() for column in header.split('|')[1:-1]]
      cells = [text.strip() for text in line.split('|')[1:-1]]
      assert columns == list(row)
      for text, value in zip(cells, row.values(), strict=True):
        if isinstance(value, float):  # three digits, two after the point
          assert float(text) == pytest.approx(value, rel=0.01, abs=0.005)
        else:
          assert text == ('' if value is None else str(value))
    return result

  return run


def by_rule(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
  return {row['rule']: row for row in result['rows']}


def test_calls_take_turns_and_their_times_are_right() -> None:
  common = functions_of('common')
  calls: list[str] = []

  def sleeper(name: str, seconds: float) -> Callable[[], Any]:
    def call() -> Any:
      calls.append(name)
      time.sleep(seconds)
      return jax.numpy.zeros(())

    return call

  times = common['in_turns'](
    {'a': sleeper('a', 0.02), 'b': sleeper('b', 0.04)}, rounds=5, count=2
  )
  # Two rounds to warm up and five, each begun by another one.
  assert ''.join(calls) == 'aabb' + 'bbaa' + 'aabb' + ('bbaa' + 'aabb') * 2
  (_, a), (_, b) = times['a'], times['b']
  assert len(a) == len(b) == 5
  assert np.median(a) == pytest.approx(0.02, rel=0.4)
  assert common['ratio'](b, a) == pytest.approx(2, rel=0.3)


def test_what_the_device_does_is_not_dispatch() -> None:
  timed = functions_of('common')['timed']
  matrix = jax.numpy.ones((1500, 1500))
  product = jax.jit(lambda x: x @ x @ x @ x)  # 20 GFLOP
  timed(lambda: product(matrix), 1)
  dispatched, done = timed(lambda: product(matrix), 1)
  assert dispatched < done / 3
  host, done = timed(lambda: time.sleep(0.02), 2)
  assert 0.02 <= host <= done < 1.1 * host


def test_spread_and_ratio_are_those_of_the_rounds() -> None:
  common = functions_of('common')
  # A machine that is ten times slower in one round changes no ratio.
  assert common['ratio']([2, 20, 2], [1, 10, 1]) == 2
  assert common['spread']([1.0, 2.0, 3.0]) == 100.0


def test_busy_is_the_share_of_the_step() -> None:
  in_loop = functions_of('step_time')['in_loop']

  class Step:
    batch = 'own'

    def __call__(self) -> Any:
      time.sleep(0.01)
      return jax.numpy.zeros(())

  taken = []

  def batches() -> Iterator[str]:
    while True:
      time.sleep(0.03)
      taken.append(1)
      yield 'new'

  step = Step()
  alone, fed = in_loop(step, batches(), rounds=5, count=2, ahead=3)
  assert len(taken) == 3 + 2 + 5 * 2
  assert step.batch == 'own'
  assert np.median(alone) / np.median(fed) == pytest.approx(0.25, rel=0.4)


def test_step_time_compares_the_rules(
  measured: Callable[..., dict[str, Any]],
) -> None:
  result = measured('step_time', *TINY, '--rules=learned,fixed_prev')
  rows = by_rule(result)
  assert rows['fixed_prev']['÷ fixed_prev'] == 1
  assert (rows['fixed_prev']['K'], rows['learned']['K']) == (None, 2)
  assert rows['learned']['÷ fixed_random'] is None  # not asked for
  for row in result['rows']:
    assert row['ms'] * row['images/s'] == pytest.approx(8 * 1e3)
    assert 0 < row['dispatch %'] <= 100


def convolution_flops(batch: int) -> float:
  """A training step of resnet8, convolutions only: thrice the forward pass,

  but for the stem, whose input needs no gradient.
  """
  flops = 0.0
  for stage in range(3):
    pixels, width = batch * (32 >> stage) ** 2, 16 << stage
    before = width if stage == 0 else width // 2
    flops += 3 * 2 * pixels * 9 * width * (before + width)
  return flops + 2 * 2 * batch * 32**2 * 9 * 3 * 16


def test_memory_counts_as_one_does_by_hand(
  measured: Callable[..., dict[str, Any]],
) -> None:
  result = measured(
    'memory', *TINY, '--models=resnet8,resnet14', '--rules=fixed_prev,fixed_all'
  )
  first, _, second, _ = result['rows']
  assert [row['L'] for row in result['rows']] == [3, 3, 6, 6]
  devices = jax.device_count()
  assert first['GFLOP'] * 1e9 == pytest.approx(
    convolution_flops(8) / devices, rel=0.1
  )
  # One block in each stage, of half as many numbers as the one before.
  one_each = 8 / devices * 32**2 * 16 * 4 * (1 + 1 / 2 + 1 / 4) / 1e6
  assert first['temporary MB'] / first['a block'] == pytest.approx(one_each)
  assert second['O(L) MB'] == pytest.approx(2 * first['temporary MB'])
  # Weights and momentum in, and a batch of bytes; weights and momentum out.
  weights = 78_042 * 4 / 1e6  # of resnet8, 10 classes
  assert first['arguments MB'] == pytest.approx(2 * weights, rel=0.05)
  assert first['results MB'] == pytest.approx(2 * weights, rel=0.05)
  for row in result['rows']:
    everything = next(
      other
      for other in result['rows']
      if (other['L'], other['rule']) == (row['L'], 'fixed_all')
    )
    assert row['temporary MB ÷ fixed_all'] * everything[
      'temporary MB'
    ] == pytest.approx(row['temporary MB'])


def test_bytes_of_library_calls() -> None:
  program = """
%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
}
ENTRY %main {
  %image = bf16[8,32,32,16]{3,2,1,0} parameter(0)
  %kernel.1 = bf16[16,3,3,16]{3,2,1,0} fusion(%p), kind=kLoop
  %conv = (bf16[8,32,32,16]{3,2,1,0}, u8[99999]{0}) custom-call(%image, %kernel.1), window={size=3x3}, custom_call_target="__cudnn$convForward"
  %top = (f32[9,4]{1,0}, s32[9,4]{1,0}) custom-call(%p), custom_call_target="TopK"
  %out = bf16[8,32,32,16]{3,2,1,0} get-tuple-element(%conv), index=0
  ROOT %gemm = (f32[10,10]{1,0}, s8[64]{0}) custom-call(%a.2, %a.2), custom_call_target="__cublas$gemm"
  %a.2 = f32[10,10]{1,0} parameter(1)
}
"""  # noqa: E501
  image, kernel = 8 * 32 * 32 * 16 * 2, 16 * 3 * 3 * 16 * 2
  assert functions_of('common')['library_bytes'](program) == (
    2 * image + kernel + 3 * 10 * 10 * 4
  )


def test_a_targets_program_is_read() -> None:
  targets = functions_of('targets')
  program = """
%body (p: f32[4]) -> f32[4] {
  ROOT %fusion.9 = f32[4]{0} fusion(%p), kind=kLoop, calls=%f
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %c = (f32[4]{0}, u8[0]{0}) custom-call(%a), custom_call_target="__cudnn$c"
  %g = f32[4]{0} get-tuple-element(%c), index=0
  %b = f32[4]{0} bitcast(%g)
  %f.1 = f32[4]{0} fusion(%b), calls=%f, backend_config={"estimated_cycles":"70"}
  ROOT %k = f32[4]{0} copy(%f.1), backend_config={"estimated_cycles":"8"}
}
"""  # noqa: E501
  assert targets['launches'](program) == 3
  assert targets['cycles'](program) == 78
  assert targets['cycles'](program.replace('estimated', 'x')) is None


def test_a_target_that_cannot_be_compiled_for_is_named(
  measured: Callable[..., dict[str, Any]],
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', ''))
  with pytest.raises(SystemExit, match='2'):
    measured('memory', '--quick', '--models=resnet8', '--target=v99:1x1')
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith(
    "error: --target=v99:1x1 needs pip install 'jax[tpu]'"
  )


def test_roofline_takes_the_longer_of_two_times(
  measured: Callable[..., dict[str, Any]],
) -> None:
  result = measured('roofline', *TINY, '--rules=fixed_prev')
  (row,) = result['rows']
  arithmetic = row['GFLOP'] / result['float32_tflops']  # ms
  memory = 1e3 * row['GB'] / result['copy_gb_per_second']
  assert row['arithmetic ms'] == pytest.approx(arithmetic)
  assert row['memory ms'] == pytest.approx(memory)
  assert row['measured ÷ bound'] == pytest.approx(
    row['measured ms'] / max(arithmetic, memory)
  )
  assert row['bound'] == ('arithmetic' if arithmetic > memory else 'memory')


@pytest.mark.slow  # and wrong by chance where other programs run
def test_rates_are_of_the_order_of_numpys() -> None:
  roofline = functions_of('roofline')
  matrix, array = np.ones((512, 512), np.float32), np.ones(2**24, np.float32)

  def seconds(call: Callable[[], Any]) -> float:
    return min(timeit.repeat(call, number=1, repeat=5))

  product = 2 * 512**3 / seconds(lambda: matrix @ matrix)
  add = 2 * array.nbytes / seconds(lambda: np.add(array, 1, out=array))
  assert 0.1 < roofline['matrix_rate'](512, 'float32') / product < 10
  assert 0.1 < roofline['copy_bandwidth'](array.nbytes) / add < 10


@pytest.mark.slow
def test_learning_takes_at_most_a_quarter_more_memory(tmp_path: Path) -> None:
  # In a process of its own, since the suite's four devices are not usual.
  path = tmp_path / 'result.json'
  options = ['--models=resnet38', '--rules=learned,fixed_all', '--fan_in=10']
  subprocess.run(
    [sys.executable, FOLDER / 'memory.py', *options, f'--json={path}'],
    env=os.environ | {'XLA_FLAGS': ''},
    check=True,
  )
  rows = json.loads(path.read_text())['rows']
  assert rows[0]['rule'] == 'learned'
  assert 1 < rows[0]['temporary MB ÷ fixed_all'] <= 1.25


@pytest.mark.slow
def test_pruned_networks_meet_one_of_as_many_blocks(
  measured: Callable[..., dict[str, Any]],
) -> None:
  result = measured('step_time', *TINY, '--models=resnet20', '--inference')
  rows = by_rule(result)
  pruned, ordinary = rows['pruned'], rows['fixed_prev']
  assert pruned['blocks'] == ordinary['blocks'] == ordinary['reads'] < 9
  assert ordinary['blocks'] < pruned['reads'] <= 2 * ordinary['blocks']
  assert pruned['bytes ÷'] > 1 == ordinary['bytes ÷']


@pytest.mark.slow
@pytest.mark.parametrize('streamed', [False, True])
def test_busy_is_measured_on_real_batches(
  streamed: bool, measured: Callable[..., dict[str, Any]]
) -> None:
  with functions_of('common')['noise'](64, 10, 40) as folder:
    data = folder if streamed else 'memory'
    (row,) = measured(
      'step_time', *TINY, '--rules=fixed_prev', f'--data={data}'
    )['rows']
  assert row['in the loop ms'] * row['images/s'] == pytest.approx(8e3)
  assert row['alone ms'] / row['in the loop ms'] == pytest.approx(
    row['busy %'] / 100
  )
  assert 10 < row['busy %'] < 150


@pytest.mark.slow
def test_a_second_start_reads_the_cache(
  measured: Callable[..., dict[str, Any]],
) -> None:
  result = measured('compile_time', *TINY, '--rules=fixed_prev')
  (row,) = result['rows']
  assert row['2nd: compile s'] < row['compile s'] / 2
  assert row['÷ fixed_prev'] == 1
  for start in ('', '2nd: '):
    stages = [
      row[f'{start}{stage} s'] for stage in ('trace', 'lower', 'compile')
    ]
    assert row[f'{start}step s'] == pytest.approx(sum(stages))
    assert row[f'{start}start s'] > row[f'{start}build s'] + sum(stages)


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--rules=learnt', "rule='learnt' is not one of"),
    ('--data=nowhere', "config.data.dir='nowhere' does not exist"),
    ('--fan_in=4,0', 'fan_in=0 must be a whole number'),
    ('--models=resnet9', 'the depth must be 6n+2'),
    ('--set=connectivity.fanin=3', 'did you mean config.connectivity.fan_in'),
  ],
)
def test_bad_input_is_one_line(
  argument: str,
  message: str,
  measured: Callable[..., dict[str, Any]],
  capsys: pytest.CaptureFixture[str],
) -> None:
  with pytest.raises(SystemExit) as exited:
    measured('step_time', *TINY, argument)
  assert exited.value.code == 2
  assert message in capsys.readouterr().err.splitlines()[-1]


class Steady:
  """A side of cpu_peer.py whose turns are given."""

  def __init__(self, turn: Any, seconds: float, others: list[float]) -> None:
    self._turn, self._seconds, self._others = turn, seconds, iter(others)
    self.taken = 0

  def turn(self, count: int) -> Any:
    self.taken += count
    return self._turn(self._seconds * self.taken, 0, 1, next(self._others))


def test_a_turn_beside_other_programs_is_taken_again(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  peer = functions_of('cpu_peer')
  monkeypatch.setattr(time, 'sleep', lambda seconds: None)
  # Two rounds are not counted; the first one that is meets a busy machine.
  busy = [0.9, 0.9, 0.2, 0.06, 0.0, 0.04, 0.0, 0.0, 0.0, 0.0]
  sides = {
    'ours': Steady(peer['Turn'], 2.0, busy),
    'torch eager': Steady(peer['Turn'], 1.0, [0.0] * 20),
  }
  turns, dropped = peer['in_turns'](sides, 4, 1)
  assert dropped == 2
  assert [turn.seconds for turn in turns['ours']] == [10, 12, 14, 16]
  assert [turn.seconds for turn in turns['torch eager']] == [3, 4, 5, 6]
  ours, theirs = peer['rows_of']({'batch': 1}, turns, dropped=dropped)
  assert ours['÷ theirs'] == pytest.approx((3 + 14 / 5) / 2)
  assert theirs['÷ theirs'] == 1
  sides['ours'] = Steady(peer['Turn'], 2.0, [0.5] * 99)
  with pytest.raises(peer['Refused'], match='50 % of the cores'):
    peer['in_turns'](sides, 4, 1)


@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_a_side_times_a_layer_in_a_process_of_its_own() -> None:
  peer = functions_of('cpu_peer')
  given = peer['argparse'].Namespace(seed=0, set='')
  layer = {'layer': '1x1 32x32 32-256', 'batch': 8}
  side = peer['Side']('ours', given, [min(os.sched_getaffinity(0))])
  try:
    value = side.ask(**layer)['value']
    x, _, y = functions_of('cpu_side')['layer_arrays'](layer)
    gradient = np.einsum('nhwi,nhwo->io', x, y)
    assert value == pytest.approx(np.abs(gradient).mean(), rel=1e-4)
    turn = side.turn(2)
    assert 0 < turn.seconds < 1
    assert turn.peak > 100
  finally:
    side.end()
  with pytest.raises(peer['Refused'], match='ended'):
    side.ask(steps=1)


def test_cores_are_busy_while_they_work() -> None:
  if sys.platform != 'linux':
    pytest.skip('needs /proc')
  peer, cores = functions_of('cpu_peer'), sorted(os.sched_getaffinity(0))
  before, began = peer['busy_seconds'](cores), time.process_time()
  while time.process_time() < began + 0.5:
    pass
  assert peer['busy_seconds'](cores) - before > 0.4


def test_source_gradients(measured: Callable[..., dict[str, Any]]) -> None:
  rows = measured('source_gradients', '--quick', '--blocks=3')['rows']
  assert [row['form'] for row in rows] == [
    'fan_out', 'by source, 4', 'by source, 18', 'by source, 9, apart',
    'by reader',
  ]  # fmt: skip
  found = functions_of('source_gradients')
  rng = np.random.default_rng(0)
  w, y, g = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((3, 3, 2), (3, 2, 4, 4, 5), (3, 2, 4, 4, 5))
  )
  for form in (
    found['fan_out'],
    functools.partial(found['by_source'], size=2),
    functools.partial(found['by_source'], size=2, apart=True),
    found['by_reader'],
  ):
    sums, products = form(w, [*map(jax.numpy.asarray, y)], [*g])
    for i in range(3):
      total = np.einsum('jn,jnhwc->nhwc', w[i, i:], g[i:])
      np.testing.assert_allclose(sums[i], total, rtol=1e-5, atol=1e-5)
      expected = np.einsum('nhwc,jnhwc->jn', y[i], g[i:])
      np.testing.assert_allclose(products[i], expected, rtol=1e-4, atol=1e-4)


def test_scaling_counts_the_collectives_of_a_program() -> None:
  """Of HLO as XLA prints it; the sizes are 4 (3 + 8) and 2 * 6 bytes."""
  collectives = functions_of('common')['collectives']
  program = """
  %all-reduce.1 = (f32[3]{0}, f32[2,4]{1,0}) all-reduce(%a, %b), channel_id=1
  ROOT %x = bf16[6]{0} all-gather(%c), channel_id=2, dimensions={0}
  %y = f32[9]{0} add(%all-reduce.1, %z)
"""
  assert collectives(program) == {'all-reduce': (1, 44), 'all-gather': (1, 12)}


@pytest.mark.slow
def test_scaling(measured: Callable[..., dict[str, Any]]) -> None:
  arguments = '--quick', '--models=resnet8', '--devices=1,4', '--fan_in=2'
  one, four = measured('scaling', *arguments)['rows']
  assert one['messages'] == 0
  assert one['sent MB'] == 0
  assert four['other'] == '0'
  assert four['of ideal'] == pytest.approx(1, rel=0.02)
  assert four['sent MB'] == pytest.approx(four['ideal MB'], rel=0.02)


@pytest.mark.slow
def test_the_service_answers_ten_thousand_requests(
  finished: Any, tmp_path: Path
) -> None:
  """All of them, and more a second together than one after the other."""
  path = tmp_path / 'rows.json'
  program = [sys.executable, str(FOLDER / 'serve.py'), '--requests=10000']
  program += [f'--workdir={finished.workdir}', f'--json={path}']
  ran = subprocess.run(program, capture_output=True, text=True, check=False)
  assert ran.returncode == 0, ran.stderr
  alone, together = json.loads(path.read_text())
  assert (together['clients'], together['requests']) == (64, 10_000)
  assert alone['failed'] == together['failed'] == 0
  assert together['per_second'] > alone['per_second']
