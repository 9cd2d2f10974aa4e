"""Many runs as one: every variant with every seed, resumable as a whole.

Each member is a process of its own: `--mode=train` in a workdir of its own. So
a member that fails leaves the others alone. The sweep writes a config.json into
each member's workdir, and the member trains from it. Later changes to the
config file do not affect the member.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import tqdm
from absl import flags
from ml_collections.config_flags import tuple_parser

from maskconnect_jax import command, fields, files, signals
from maskconnect_jax import config as config_lib
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import locks, workdirs
from maskconnect_jax.study import summarize

POLL_SECONDS = 0.2
# The arguments of `Popen` for a process that Ctrl-C does not reach. They differ
# on Windows, which has no process groups in the sense of POSIX.
OWN_GROUP: dict[str, Any] = (
  {'creationflags': getattr(subprocess, 'CREATE_NEW_PROCESS_GROUP', 0)}
  if os.name == 'nt'
  else {'process_group': 0}
)
PARSERS = {
  bool: flags.BooleanParser(),
  int: flags.IntegerParser(),
  float: flags.FloatParser(),
  str: flags.ArgumentParser(),
  tuple: tuple_parser.TupleParser(),
}


@dataclasses.dataclass(frozen=True)
class Member:
  """One run of a sweep.

  Attributes:
    name: path of its workdir inside the sweep's workdir, for example
      'rule=learned/seed0'.
    workdir: the folder of this run.
    config: the config of this run, with neither seeds nor variants.
  """

  name: str
  workdir: Path
  config: ml_collections.ConfigDict

  @property
  def finished(self) -> bool:
    """Whether the run is finished: it writes its summary last."""
    return (self.workdir / 'summary.json').is_file()


def sweep(
  config: ml_collections.ConfigDict, workdir: Path, parallel: int | None = None
) -> int:
  """Trains all unfinished members and makes the table of all members.

  Args:
    config: see `maskconnect_jax/config.py`; each of its `variants` with each of
      its `seeds` is a member.
    workdir: the folder of the members' workdirs, table.md and table.csv.
    parallel: members at once, which share the devices evenly. None: one per
      GPU; one on a CPU; on a TPU one over all of its chips.

  Returns:
    The exit status: 0, 1 if members failed, 128 + n if stopped by signal n.

  Raises:
    InputError: a member's config or workdir cannot be used, raised before
      anything runs; or another process trains a member or runs this sweep.
  """
  config_lib.check(config)
  everyone = members(config, workdir)
  tables = workdir / 'table.csv', workdir / 'table.md'
  for path in tables:
    files.check_output(path)
    workdirs.check_is_table(path)
  for member in everyone:
    config_lib.given_path(member.workdir, '--workdir')
    config_lib.check(member.config)
    config_lib.check_files(member.config)
    workdirs.keep_version(member.config, member.workdir)
    workdirs.check(member.config, member.workdir)
  with locks.locked(workdir):
    workdirs.remove_leftovers(workdir, [path.name for path in tables])
    for member in everyone:
      if member.workdir.exists() and not member.finished:
        with locks.locked(member.workdir):
          pass  # raises if another process trains it
    return _sweep(everyone, workdir, parallel)


def _sweep(everyone: list[Member], workdir: Path, parallel: int | None) -> int:
  waiting = [member for member in everyone if not member.finished]
  finished = len(everyone) - len(waiting)
  slots = environments(*devices(), parallel) if waiting else []
  say(f'{finished} of {len(everyone)} members finished')
  failures: list[str] = []
  if waiting:
    failures, number = run_members(waiting, slots)
    if number:
      say('stopped; the same command goes on')
      return 128 + number
  table = summarize.summarize([member.workdir for member in everyone])
  files.write_text(workdir / 'table.csv', table.csv())
  files.write_text(workdir / 'table.md', table.markdown())
  command.tell(table.markdown().rstrip('\n'))
  for failure in failures:
    say(failure)
  return 1 if failures else 0


def members(config: ml_collections.ConfigDict, workdir: Path) -> list[Member]:
  """Returns every variant with every seed, variant by variant.

  Args:
    config: see `sweep`.
    workdir: the folder of the sweep.

  Raises:
    InputError: a variant cannot be used, or a variant or seed is given twice.
  """
  seeds = config.seeds or (config.seed,)
  for seed in seeds:
    if list(seeds).count(seed) > 1:
      raise InputError(
        f'config.seeds={seeds} must be different whole numbers, such as 0,1,2'
      )
  rows: dict[str, tuple[str, ml_collections.ConfigDict]] = {}
  for variant in config.variants or ('',):
    overrides = parse_variant(variant)
    row = config.copy_and_resolve_references()
    row.update_from_flattened_dict({'seeds': (), 'variants': (), **overrides})
    name = folder_name(overrides)
    for other, (twin, theirs) in rows.items():
      same = config_lib.essential(theirs) == config_lib.essential(row)
      if _as_one(other) == _as_one(name) or same:
        raise InputError(
          f'config.variants: {twin!r} and {variant!r} are the same row, or'
          f' would share the folder {name}; leave one of them out'
        )
    rows[name] = variant, row
  result = []
  for name, (_, row) in rows.items():
    for seed in seeds:
      own = row.copy_and_resolve_references()
      own.seed = seed
      path = f'{name}/seed{seed}'
      result.append(Member(path, workdir / path, own))
  return result


def parse_variant(variant: str) -> dict[str, Any]:
  """Returns {'connectivity.fan_in': 4} for 'connectivity.fan_in=4'.

  Values may hold spaces: a new override begins where FIELD= follows a space.

  Raises:
    InputError: the variant names no field, or a value is not of the field's
      type.
  """
  known = config_lib.flat(config_lib.default())
  overrides = {}
  for override in re.split(r'\s+(?=[-\w.]+=)', str(variant).strip()):
    if not override:
      continue
    given, equals, text = override.partition('=')
    path = given.removeprefix('--').removeprefix('config.')
    if not equals:
      raise InputError(
        f'config.variants: {override!r} is no override; write FIELD=VALUE, such'
        ' as connectivity.rule=fixed_prev'
      )
    if path not in known:
      raise InputError(config_lib.unknown_field(path))
    if path in ('seed', 'seeds', 'variants'):
      raise InputError(
        f'config.variants: {override!r} is not for one row; config.seeds are'
        ' the seeds of all'
      )
    try:
      overrides[path] = PARSERS[type(known[path])].parse(text)
    except (ValueError, TypeError) as error:
      raise InputError(
        f'config.variants: {override!r} cannot be; give'
        f' {config_lib.FIELDS[path].noun}, such as {known[path]!r}'
      ) from error
  return overrides


def folder_name(overrides: dict[str, Any]) -> str:
  """Returns 'rule=fixed_random,fan_in=4', or 'base' without overrides.

  A name that is too long for a folder is cut, and ends in a digest of all
  overrides.
  """
  text = ','.join(
    f'{summarize.short(path)}={value}' for path, value in overrides.items()
  )
  name = re.sub(r'[^\w.,=+%-]+', '-', text) or 'base'
  encoded = name.encode()
  if len(encoded) <= fields.LONGEST_NAME:
    return name
  digest = hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()
  end = f'-{digest[:16]}'
  # A character that the cut splits is dropped.
  start = encoded[: fields.LONGEST_NAME - len(end)].decode(errors='ignore')
  return start + end


def _as_one(name: str) -> str:
  """Returns one text for all names that some file system takes for one name.

  The file system of macOS ignores case and Unicode's forms; that of Windows
  ignores case. A sweep may be moved to either.
  """
  return unicodedata.normalize('NFC', name).casefold()


def devices() -> tuple[str, int]:
  """Returns JAX's platform and the number of its devices on this machine.

  JAX runs in another process, because the process that asks it for the devices
  holds them until it ends.

  Raises:
    InputError: JAX cannot use the platform.
  """
  looked = subprocess.run(
    [
      sys.executable,
      '-c',
      'from maskconnect_jax.run import distributed as d; d.check_platform();'
      ' import jax; print(jax.default_backend(), jax.local_device_count())',
    ],
    capture_output=True,
    encoding='utf-8',
    errors='replace',
    check=False,
  )
  if looked.returncode:
    # The last line of a traceback holds the error's name and message.
    said = last_line(looked.stderr)
    raise InputError(said.removeprefix(f'{InputError.__module__}.InputError: '))
  platform, count = last_line(looked.stdout).split()
  return platform, int(count)


def environments(
  platform: str, count: int, parallel: int | None
) -> list[dict[str, str]]:
  """Returns the environment variables for each member that runs at once.

  Args:
    platform: JAX's name of the platform.
    count: number of its devices.
    parallel: members at once; None: one per GPU, or one on a CPU or TPU.

  Raises:
    InputError: several members at once would share a TPU.
  """
  if platform != 'gpu':
    if platform == 'tpu' and (parallel or 1) > 1:
      raise InputError(
        f'--parallel={parallel}: members share no TPU; each takes all chips'
      )
    # Members that share the cores of a CPU would wait for each other's devices.
    one = {'JAX_NUM_CPU_DEVICES': '1', **os.environ}['JAX_NUM_CPU_DEVICES']
    shared = platform == 'cpu' and (parallel or 1) > 1
    return [{'JAX_NUM_CPU_DEVICES': one} if shared else {}] * (parallel or 1)
  parallel = parallel or count
  given = os.environ.get('CUDA_VISIBLE_DEVICES')
  names = given.split(',') if given else [str(n) for n in range(count)]
  each = max(1, count // parallel)
  result = []
  for slot in range(parallel):
    first = slot * each % count
    result.append({'CUDA_VISIBLE_DEVICES': ','.join(names[first:][:each])})
    # By default, JAX gives its first process three quarters of a GPU's memory.
    if parallel > count:
      share = 0.9 / -(-parallel // count)
      result[-1]['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{share:.2f}'
  return result


def run_members(
  waiting: list[Member], slots: list[dict[str, str]]
) -> tuple[list[str], int]:
  """Trains members, as many at once as there are slots.

  A first signal asks the running members to save and stop. A second signal
  kills them.

  Args:
    waiting: the members to train.
    slots: environment variables for each member that runs at once.

  Returns:
    A line for each member that failed, and the signal that stopped the sweep,
    or 0.
  """
  failures: list[str] = []
  left, done, told = list(waiting), 0, 0
  running: dict[int, tuple[Member, subprocess.Popen[bytes], float]] = {}
  begun = time.monotonic()
  with caught_signals() as caught:
    try:
      while running or (left and not caught):
        for slot, environment in enumerate(slots):
          if left and not caught and slot not in running:
            member = left.pop(0)
            process = start(member, environment)
            running[slot] = member, process, time.monotonic()
            say(
              f'{member.name} begins as process {process.pid};'
              f' {member.workdir / "log.txt"}'
            )
        time.sleep(POLL_SECONDS)
        if len(caught) > told:
          told = len(caught)
          say('waiting for members to save and stop; once more kills them')
          for _, process, _ in running.values():
            process.terminate() if told == 1 else process.kill()
        for slot, (member, process, since) in list(running.items()):
          status = process.poll()
          if status is None:
            continue
          del running[slot]
          if not member.finished and caught:
            continue  # it stopped at the signal
          done += 1
          ended = outcome(member, status)
          if not member.finished:
            failures.append(ended)
          now = time.monotonic()
          took, ahead = (
            tqdm.tqdm.format_interval(seconds)
            for seconds in (
              now - since,
              (now - begun) / done * (len(waiting) - done),
            )
          )
          say(f'{ended}; took {took}, {done} of {len(waiting)}, {ahead} left')
    finally:
      for _, process, _ in running.values():
        process.terminate()
  return failures, caught[0] if caught else 0


def start(
  member: Member, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
  """Starts or resumes a member in a process group of its own.

  Ctrl-C on the terminal does not reach this group. At Ctrl-C the sweep sends a
  signal instead, at which the member saves. The member goes on if the sweep is
  killed. It holds the lock of its workdir while it runs.

  Args:
    member: the run to start.
    environment: variables to add to this process's environment.

  Raises:
    InputError: the member's workdir cannot be used, or is locked.
  """
  with locks.locked(member.workdir):
    workdirs.check(member.config, member.workdir)
    workdirs.write_config(member.config, member.workdir)
  with (member.workdir / 'log.txt').open('ab') as log:
    return subprocess.Popen(
      [
        sys.executable,
        '-m',
        'maskconnect_jax.main',
        '--mode=train',
        f'--workdir={member.workdir}',
      ],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env=os.environ | environment,
      **OWN_GROUP,
    )


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
  """Collects the signals that ask to stop; the process goes on."""
  caught: list[int] = []
  with signals.caught(lambda number, frame: caught.append(number)):
    yield caught


def outcome(member: Member, status: int) -> str:
  """Returns the line that tells how a member ended.

  Args:
    member: a run whose process has ended.
    status: its exit status; -n if signal n ended it.
  """
  if member.finished:
    run = summarize.read(member.workdir)
    return f'{member.name} ends: test {run.metric.words} {run.tested:.2%}'
  log = member.workdir / 'log.txt'
  how = f'exit status {status}' if status >= 0 else f'signal {-status}'
  said = last_line(log.read_text(encoding='utf-8', errors='replace'))
  return f'{member.name} failed ({how}): {said}; {log}'


def last_line(text: str) -> str:
  """Returns the last line that is not blank, or ''."""
  return next((line for line in text.splitlines()[::-1] if line.strip()), '')


def say(line: str) -> None:
  """Prints a line of progress to stderr."""
  print(line, file=sys.stderr, flush=True)
