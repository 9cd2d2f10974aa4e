"""Seconds from start to compiled training step, at a first and a second start.

python benchmarks/compile_time.py [--quick] [--models=resnet38,resnet110]
  [--rules=fixed_prev,learned] [--fan_in=10] [--batches=128] [--json=FILE]

Every start is a process of its own. The first start finds an empty cache of
compiled programs and fills it; the second start finds it filled. "compile" at
the second start is the time to read the cache. "start" is the time of the whole
process: imports, the network's first weights, tracing, lowering, compiling.
"÷ fixed_prev" compares tracing, lowering and compiling of first starts.
"""

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import common
from common import Form

STAGES = ('trace', 'lower', 'compile')


def start(form: Form, given: argparse.Namespace) -> dict[str, float]:
  """Returns the seconds of each stage, in this process."""
  gc.freeze()  # as main.py
  marks = [time.perf_counter()]
  job = common.build(form, given)
  marks.append(time.perf_counter())
  traced = common.traced(job)
  marks.append(time.perf_counter())
  lowered = traced.lower()
  marks.append(time.perf_counter())
  lowered.compile()
  marks.append(time.perf_counter())
  return {
    stage: after - before
    for stage, before, after in zip(
      ('build', *STAGES), marks[:-1], marks[1:], strict=True
    )
  }


def in_a_process(
  form: Form, given: argparse.Namespace, cache: str
) -> dict[str, float]:
  began = time.perf_counter()
  done = subprocess.run(
    [
      sys.executable,
      __file__,
      f'--models={form.network}',
      f'--batches={form.batch}',
      f'--rules={form.rule}',
      f'--fan_in={form.K or 1}',
      f'--dtype={given.dtype}',
      f'--set={given.set}',
      '--one',
    ],
    env={
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': cache,
      # As main.py: the many small programs that build a network are kept too.
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    },
    stdout=subprocess.PIPE,
    check=True,
  )
  seconds = json.loads(done.stdout)
  return {**seconds, 'start': time.perf_counter() - began}


def measure(form: Form, given: argparse.Namespace) -> dict[str, Any]:
  common.say(f'starting {form}')
  with tempfile.TemporaryDirectory() as cache:
    first = in_a_process(form, given, cache)
    second = in_a_process(form, given, cache)
  row = dataclasses.asdict(form)
  for name, seconds in (('', first), ('2nd: ', second)):
    row |= {f'{name}{stage} s': seconds[stage] for stage in ('build', *STAGES)}
    row[f'{name}step s'] = sum(seconds[stage] for stage in STAGES)
    row[f'{name}start s'] = seconds['start']
  return row


def main() -> None:
  # This process and those it starts are on one device at the same time.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  parser = common.parser(
    __doc__,
    models='resnet38,resnet110',
    batches='128',
    rules='fixed_prev,learned',
    fan_in='10',
  )
  parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
  given = common.parsed(parser, models='resnet20', fan_in='4')
  if given.one:
    print(json.dumps(start(common.forms(given)[0], given)))
    return
  rows = {form: measure(form, given) for form in common.forms(given)}
  for form, row in rows.items():
    other = rows.get(form.like('fixed_prev'))
    row['÷ fixed_prev'] = other and row['step s'] / other['step s']
  common.report(rows.values(), given)


if __name__ == '__main__':
  common.run(main)
