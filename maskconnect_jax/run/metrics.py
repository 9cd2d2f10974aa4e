"""The records of a run: metrics.jsonl, TensorBoard, progress, real masks."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging

from maskconnect_jax import files
from maskconnect_jax.errors import InputError
from maskconnect_jax.run import scores


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
  """Returns a context in which a module that is not imported is not there."""
  if name in sys.modules:
    yield
    return
  sys.modules[name] = None  # type: ignore[assignment]
  try:
    yield
  finally:
    del sys.modules[name]


# tensorboardX imports PyTorch if it is there, for two seconds, to name a type.
with _without('torch'):
  from tensorboardX import record_writer, summary
  from tensorboardX.proto import event_pb2

PLAIN_SECONDS = 10.0  # between lines when stderr is no terminal
FLUSH_SECONDS = 120.0  # between writes of TensorBoard's events to the disk

# Writing to stderr raises these for a closed pipe, a terminal that hung up, a
# full disk or a closed file.
_UNSEEN = contextlib.suppress(OSError, ValueError)


class MetricsWriter:
  """Appends each logged step to metrics.jsonl and to TensorBoard events."""

  def __init__(
    self, workdir: Path, start_step: int, *, enabled: bool = True
  ) -> None:
    """Opens the files and drops the records of steps after `start_step`.

    Damaged lines of metrics.jsonl move to metrics.jsonl.damaged, and a warning
    names them.

    Args:
      workdir: the folder of the run.
      start_step: steps already done.
      enabled: False on all processes except one; they write nothing.

    Raises:
      InputError: a file cannot be written.
    """
    self._enabled, self._failed = enabled, False
    if not enabled:
      return
    self._path = workdir / 'metrics.jsonl'
    records, damaged = _parse(self._path)
    kept = [record for record in records if record['step'] <= start_step]
    if damaged:
      aside = _keep_lines(self._path, list(damaged.values()))
      logging.warning(
        '%s: %s damaged and now in %s; the other %d are kept',
        self._path,
        f'line {next(iter(damaged))} is'
        if len(damaged) == 1
        else f'{len(damaged)} lines from line {next(iter(damaged))} on are',
        aside.name,
        len(records),
      )
    files.write_text(self._path, ''.join(map(_line, kept)))
    # Absolute, because tensorboardX takes a relative "s3:x" for a bucket.
    self._folder = (workdir / 'tensorboard').absolute()
    with self._failing_at(self._path):
      self._file = self._path.open('a', encoding='utf-8')
    with self._failing_at(self._folder):
      self._folder.mkdir(exist_ok=True)
      # Not SummaryWriter: its queue hangs after its thread meets a full disk.
      name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}'
      self._events = record_writer.RecordWriter(str(self._folder / name))
      self._flushed = time.time()
      self._add(0, file_version='brain.Event:2')
      # Makes TensorBoard hide the events that a cut run wrote of later steps.
      self._add(
        start_step + 1,
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
      )

  def write(self, step: int, phase: str, values: dict[str, Any]) -> None:
    """Writes one line {"step": ..., "phase": ..., **values}.

    A value that is not finite becomes null in metrics.jsonl. TensorBoard gets
    the finite values only.

    Args:
      step: steps done.
      phase: the phase of the last step, see `Plan.phase`.
      values: numbers or None, by name.

    Raises:
      InputError: a file cannot be written, for example on a full disk.
    """
    if not self._enabled:
      return
    with self._failing_at(self._path):
      self._file.write(_line({'step': step, 'phase': phase, **values}))
      self._file.flush()
    with self._failing_at(self._folder):
      for name, value in values.items():
        if value is not None and math.isfinite(value):
          self._add(step, summary=summary.scalar(name, value))

  def write_mask(self, step: int, mask: np.ndarray, valid: Any) -> None:
    """Gives TensorBoard the real mask, as an image and as a histogram.

    Args:
      step: steps done.
      mask: r, float32 [L, L] or [L - 1, C, C].
      valid: bool, of its shape; the other entries do not exist.

    Raises:
      InputError: see `write`.
    """
    if not self._enabled:
      return
    valid = np.asarray(valid)
    picture = mask_image(mask, valid)
    with self._failing_at(self._folder):
      self._add(
        step, summary=summary.image('real_mask', picture, dataformats='HWC')
      )
      bins = np.linspace(0, 1, 21)
      self._add(
        step, summary=summary.histogram('real_mask_entries', mask[valid], bins)
      )

  def write_fields(self, fields: dict[str, Any]) -> None:
    """Gives TensorBoard's hparams page the config of the run.

    Args:
      fields: every field by its path; see `config.flat`.

    Raises:
      InputError: see `write`.
    """
    if not self._enabled:
      return
    plain = {
      name: value if isinstance(value, bool | int | float | str) else str(value)
      for name, value in fields.items()
    }
    metric = scores.metric(fields.get('data.multi_label', False)).field
    measured = dict.fromkeys((f'test_{metric}', f'validation_{metric}', 'loss'))
    with self._failing_at(self._folder):
      for part in summary.hparams(plain, measured):
        self._add(0, summary=part)

  def close(self) -> None:
    """Flushes and closes both files.

    Raises:
      InputError: a file cannot be written. After a failed `write` nothing is
        raised.
    """
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


def mask_image(mask: np.ndarray, valid: np.ndarray) -> np.ndarray:
  """Returns a real mask as pixels: pale for 0, dark for 1, white for none.

  Args:
    mask: r, float32 [L, L], or [L - 1, C, C], whose squares stand side by side.
    valid: bool, of its shape.

  Returns:
    uint8 [H, W, 3]; an entry has 8 x 8 pixels.
  """
  pale, dark = np.array([232, 238, 245]), np.array([8, 48, 107])
  colours = pale + mask[..., None] * (dark - pale)
  pixels = np.where(valid[..., None], np.rint(colours), 255).astype(np.uint8)
  if mask.ndim == 3:
    apart = np.pad(
      pixels, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255
    )
    pixels = np.concatenate(list(apart), axis=1)[:, :-1]
  return pixels.repeat(8, 0).repeat(8, 1)


def read(workdir: Path) -> list[dict[str, Any]]:
  """Returns the records of metrics.jsonl without its damaged lines."""
  return _parse(workdir / 'metrics.jsonl')[0]


def _parse(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
  """Returns the records of a file, and its damaged lines by their number.

  A last line without a newline was cut short by a kill. If it is damaged, it
  is dropped and does not count as a damaged line.
  """
  records: list[dict[str, Any]] = []
  damaged: dict[int, bytes] = {}
  if not path.exists():
    return records, damaged
  *lines, rest = path.read_bytes().split(b'\n')
  for number, line in enumerate([*lines, rest], 1):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      record = None
    if (
      isinstance(record, dict)
      and type(record.get('step')) is int
      and not any(isinstance(value, dict | list) for value in record.values())
    ):
      records.append(record)
    elif number <= len(lines) and line.strip():
      damaged[number] = line
  return records, damaged


def _keep_lines(path: Path, lines: list[bytes]) -> Path:
  """Appends damaged lines of `path` to `path`.damaged; returns that path."""
  aside = path.with_name(f'{path.name}.damaged')
  before = aside.read_bytes() if aside.is_file() else b''
  with files.replacing(aside) as temporary:
    temporary.write_bytes(before + b''.join(line + b'\n' for line in lines))
  return aside


def _line(record: dict[str, Any]) -> str:
  finite = {
    name: None
    if isinstance(value, float) and not math.isfinite(value)
    else value
    for name, value in record.items()
  }
  return json.dumps(finite, allow_nan=False) + '\n'


class Throughput:
  """Counts images and seconds of training, without pauses.

  Attributes:
    images: images trained on.
    seconds: seconds of training.
  """

  def __init__(self, images: int = 0, seconds: float = 0.0) -> None:
    """Begins with the counts of the run before it was cut."""
    self.images = images
    self.seconds = seconds
    self._since: float | None = None

  def start(self) -> None:
    """Starts the clock, at first or after a pause."""
    self._since = time.perf_counter()

  def stop(self, images: int, results: Any = None) -> float:
    """Stops the clock and adds the images done since `start`.

    Args:
      images: how many.
      results: arrays that come of them. They are waited for, as a device may
        still be at work on steps that the host has only handed over.

    Returns:
      Images per second since `start`; 0 if the clock was not running.
    """
    if self._since is None:
      return 0.0
    jax.block_until_ready(results)
    elapsed = time.perf_counter() - self._since
    self._since = None
    self.images += images
    self.seconds += elapsed
    return images / elapsed

  @property
  def images_per_second(self) -> float:
    """The rate over all counted images and seconds; 0 before the first."""
    return self.images / self.seconds if self.seconds else 0.0


class ProgressBar:
  """One bar on a terminal; elsewhere a plain line every few seconds.

  Output that cannot be written, because the terminal has gone, is dropped.
  """

  def __init__(self, total: int, start: int, *, enabled: bool = True) -> None:
    """Shows `start` of `total` steps as done; shows nothing unless enabled."""
    self._total, self._start = total, start
    self._enabled = enabled and sys.stderr is not None
    self._begun = self._printed = time.monotonic()
    self._bar = (
      tqdm.tqdm(
        total=total,
        initial=start,
        unit='step',
        dynamic_ncols=True,
        smoothing=0.1,
      )
      if self._enabled and sys.stderr.isatty()
      else None
    )

  def update(self, step: int, phase: str, values: dict[str, Any]) -> None:
    """Shows the step and its record.

    Args:
      step: steps done.
      phase: the phase of the last step.
      values: the record, with 'loss', 'accuracy', 'learning_rate' and
        'images_per_second'.
    """
    shown = {
      'loss': f'{values["loss"]:.3f}',
      'acc': f'{values["accuracy"]:.3f}',
      'lr': f'{values["learning_rate"]:.2g}',
      'img/s': f'{values["images_per_second"]:.0f}',
    }
    if self._bar is not None:
      self._bar.set_description(phase, refresh=False)
      self._bar.set_postfix(shown, refresh=False)
      with _UNSEEN:
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

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Keeps what is done meanwhile, such as compiling, out of the time left."""
    begun = time.monotonic()
    yield
    self._begun += time.monotonic() - begun
    if self._bar is not None:
      self._bar.unpause()

  def say(self, line: str) -> None:
    """Prints a line without breaking the bar."""
    with _UNSEEN:
      if self._bar is not None:
        self._bar.write(line, file=sys.stderr)
      elif self._enabled:
        print(line, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the bar and leaves its last state on the terminal."""
    if self._bar is not None:
      with _UNSEEN:
        self._bar.close()


class MaskHistory:
  """The real mask at every logged step, in real_masks.npz."""

  def __init__(
    self,
    workdir: Path,
    start: int,
    shape: tuple[int, ...] | None = None,
    *,
    enabled: bool = True,
  ) -> None:
    """Reads the masks that a cut run recorded up to `start`.

    A file that is damaged or holds masks of another shape is set aside, and a
    warning names it. The record then begins at `start`.

    Args:
      workdir: the folder of the run.
      start: steps already done.
      shape: shape of the run's real mask; None accepts the shape in the file.
      enabled: False on all processes except one; they move and write nothing.
    """
    self._path = workdir / 'real_masks.npz'
    self._enabled = enabled
    self._records: list[tuple[int, np.ndarray]] = []
    if not (start and self._path.exists()):
      return
    try:
      steps, masks = read_masks(self._path)
      if shape is not None and masks.shape[1:] != shape:
        raise InputError(
          f'{self._path} is damaged (masks of shape {masks.shape[1:]}, not'
          f' {shape})'
        )
    except InputError as error:
      if enabled:
        aside = files.set_aside(self._path).name
        logging.warning(
          '%s; now %s. The record of the mask begins anew after step %d',
          error,
          aside,
          start,
        )
      return
    self._records = [
      (int(step), mask)
      for step, mask in zip(steps, masks, strict=True)
      if step <= start
    ]

  def add(self, step: int, masks: Any) -> np.ndarray:
    """Records the real mask after `step`, and returns it.

    Args:
      step: steps done.
      masks: a tree with one leaf: r, float32 [L, L] or [L - 1, C, C].
    """
    mask: np.ndarray
    (mask,) = jax.tree.leaves(jax.device_get(masks))
    self._records.append((step, mask))
    return mask

  @property
  def steps(self) -> np.ndarray:
    """The recorded steps, int64 [T]."""
    return np.array([step for step, _ in self._records])

  @property
  def masks(self) -> np.ndarray:
    """The recorded real masks, float32 [T, L, L] or [T, L - 1, C, C]."""
    return np.stack([mask for _, mask in self._records])

  def __len__(self) -> int:
    return len(self._records)

  def save(self) -> None:
    """Writes real_masks.npz unless nothing was recorded."""
    if self._enabled and self._records:
      with (
        files.replacing(self._path) as temporary,
        temporary.open('wb') as file,
      ):
        np.savez_compressed(file, steps=self.steps, masks=self.masks)


def read_masks(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """Reads a real_masks.npz.

  Returns:
    Steps, int64 [T]; real masks, float32 [T, L, L] or [T, L - 1, C, C].

  Raises:
    InputError: the file is missing or damaged.
  """
  try:
    with np.load(path) as file:
      steps, masks = file['steps'], file['masks']
    if (
      steps.ndim != 1
      or steps.dtype.kind != 'i'
      or masks.dtype != np.float32
      or masks.shape[:1] != steps.shape
      or not np.isfinite(masks).all()
    ):
      raise ValueError('not a mask for each step')
  except Exception as error:  # NumPy raises many kinds for a broken archive
    raise InputError(f'{path} is damaged ({error!r})') from error
  return steps, masks
