"""What a run tells: metrics.jsonl, TensorBoard, progress and time left."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from tensorboardX import record_writer, summary
from tensorboardX.proto import event_pb2

from maskconnect_jax import files

PLAIN_SECONDS = 10.0  # between lines when the output is no terminal
FLUSH_SECONDS = 120.0  # between writes of TensorBoard's events to the disk


class MetricsWriter:
  """Appends each logged step to metrics.jsonl and to TensorBoard events."""

  def __init__(
    self, workdir: Path, start_step: int, *, enabled: bool = True
  ) -> None:
    """Opens the files and drops what a cut run logged after `start_step`.

    Args:
      workdir: of the run.
      start_step: steps already done.
      enabled: False on all but one process, which then write nothing.
    """
    self._enabled, self._failed = enabled, False
    if not enabled:
      return
    self._path = workdir / 'metrics.jsonl'
    kept = [record for record in read(workdir) if record['step'] <= start_step]
    files.write_text(
      self._path, ''.join(json.dumps(record) + '\n' for record in kept)
    )
    # Absolute: a relative "s3:x" would be a bucket to tensorboardX.
    self._folder = (workdir / 'tensorboard').absolute()
    with self._failing_at(self._path):
      self._file = self._path.open('a', encoding='utf-8')
    with self._failing_at(self._folder):
      self._folder.mkdir(exist_ok=True)
      # Not SummaryWriter: its queue hangs once its thread has met a full disk.
      name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}'
      self._events = record_writer.RecordWriter(str(self._folder / name))
      self._flushed = time.time()
      self._add(0, file_version='brain.Event:2')
      # Hides what a cut run told TensorBoard of later steps.
      self._add(
        start_step + 1,
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
      )

  def write(self, step: int, phase: str, values: dict[str, float]) -> None:
    """Writes one line {"step": ..., "phase": ..., **values}.

    Raises:
      InputError: it cannot be written, as on a full disk.
    """
    if not self._enabled:
      return
    record = {'step': step, 'phase': phase, **values}
    with self._failing_at(self._path):
      self._file.write(json.dumps(record) + '\n')
      self._file.flush()
    with self._failing_at(self._folder):
      for name, value in values.items():
        self._add(step, summary=summary.scalar(name, value))

  def close(self) -> None:
    """Flushes both. Raises InputError as `write`, unless that has done so."""
    if not self._enabled:
      return
    self._enabled = False
    for path, file in ((self._path, self._file), (self._folder, self._events)):
      if self._failed:
        with contextlib.suppress(OSError):
          file.close()
      else:
        with self._failing_at(path):
          file.close()

  def _add(self, step: int, **content: Any) -> None:
    now = time.time()
    event = event_pb2.Event(wall_time=now, step=step, **content)
    self._events.write(event.SerializeToString())
    if now - self._flushed > FLUSH_SECONDS:
      self._events.flush()
      self._flushed = now

  @contextlib.contextmanager
  def _failing_at(self, path: Path) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      self._failed = True
      raise files.unwritten(path, error) from error


def read(workdir: Path) -> list[dict[str, Any]]:
  """Returns the records of metrics.jsonl; a line cut by a kill is left out."""
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return []
  records = []
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records


class Throughput:
  """Images per second and seconds of training, pauses left out."""

  def __init__(self, images: int = 0, seconds: float = 0.0) -> None:
    """Goes on from what a run had done before it was cut."""
    self.images = images
    self.seconds = seconds
    self._since: float | None = None

  def start(self) -> None:
    """Begins, or goes on after a pause."""
    self._since = time.perf_counter()

  def stop(self, images: int) -> float:
    """Adds the images done since `start`; returns their rate per second."""
    if self._since is None:
      return 0.0
    elapsed = time.perf_counter() - self._since
    self._since = None
    self.images += images
    self.seconds += elapsed
    return images / elapsed

  @property
  def images_per_second(self) -> float:
    """Over everything counted."""
    return self.images / self.seconds if self.seconds else 0.0


class Progress:
  """One bar on a terminal; elsewhere a plain line every few seconds."""

  def __init__(self, total: int, start: int, *, enabled: bool = True) -> None:
    """Shows `start` of `total` steps as done; nothing unless enabled."""
    self._total, self._start, self._enabled = total, start, enabled
    self._begun = self._printed = time.monotonic()
    self._bar = (
      tqdm.tqdm(
        total=total,
        initial=start,
        unit='step',
        dynamic_ncols=True,
        smoothing=0.1,
      )
      if enabled and sys.stderr.isatty()
      else None
    )

  def update(self, step: int, phase: str, values: dict[str, float]) -> None:
    """Shows the step and what was logged there."""
    shown = {
      'loss': f'{values["loss"]:.3f}',
      'acc': f'{values["accuracy"]:.3f}',
      'lr': f'{values["learning_rate"]:.2g}',
      'img/s': f'{values["images_per_second"]:.0f}',
    }
    if self._bar is not None:
      self._bar.set_description(phase, refresh=False)
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if now - self._printed < PLAIN_SECONDS and step < self._total:
      return
    self._printed = now
    left = (
      (now - self._begun) / max(1, step - self._start) * (self._total - step)
    )
    self.say(
      f'{phase} step {step}/{self._total}  '
      + '  '.join(f'{name} {value}' for name, value in shown.items())
      + f'  {tqdm.tqdm.format_interval(left)} left'
    )

  def say(self, line: str) -> None:
    """Prints a line without breaking the bar."""
    if self._bar is not None:
      self._bar.write(line, file=sys.stderr)
    elif self._enabled:
      print(line, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()


class MaskHistory:
  """The real mask at every logged step, in real_masks.npz."""

  def __init__(self, workdir: Path, start: int) -> None:
    """Reads what a cut run recorded up to `start`."""
    self._path = workdir / 'real_masks.npz'
    self._records: list[tuple[int, np.ndarray]] = []
    if start and self._path.exists():
      with np.load(self._path) as file:
        self._records = [
          (int(step), mask)
          for step, mask in zip(file['steps'], file['masks'], strict=True)
          if step <= start
        ]

  def add(self, step: int, masks: Any) -> None:
    """Records r [L, L] after `step`."""
    (mask,) = jax.tree.leaves(jax.device_get(masks))
    self._records.append((step, mask))

  @property
  def steps(self) -> np.ndarray:
    """int64 [T]."""
    return np.array([step for step, _ in self._records])

  @property
  def masks(self) -> np.ndarray:
    """float32 [T, L, L]."""
    return np.stack([mask for _, mask in self._records])

  def __len__(self) -> int:
    return len(self._records)

  def save(self) -> None:
    """Writes the file, if there is something to write."""
    if self._records:
      with (
        files.replacing(self._path) as temporary,
        temporary.open('wb') as file,
      ):
        np.savez_compressed(file, steps=self.steps, masks=self.masks)
