"""What a run tells: metrics.jsonl, TensorBoard, progress and time left."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

from maskconnect_jax import files

PLAIN_SECONDS = 10.0  # between lines when the output is no terminal

# A closed pipe, a terminal that hung up, a full disk, a closed stream.
_UNSEEN = contextlib.suppress(OSError, ValueError)


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
    self._enabled = enabled
    if not enabled:
      return
    self._path = workdir / 'metrics.jsonl'
    kept = [record for record in read(workdir) if record['step'] <= start_step]
    files.write_text(
      self._path, ''.join(json.dumps(record) + '\n' for record in kept)
    )
    self._file = self._path.open('a', encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=start_step + 1
    )

  def write(self, step: int, phase: str, values: dict[str, float]) -> None:
    """Writes one line {"step": ..., "phase": ..., **values}."""
    if not self._enabled:
      return
    record = {'step': step, 'phase': phase, **values}
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes both."""
    if self._enabled:
      self._file.close()
      self._events.close()


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
  """One bar on a terminal; elsewhere a plain line every few seconds.

  What cannot be shown, since the terminal has gone, is dropped.
  """

  def __init__(self, total: int, start: int, *, enabled: bool = True) -> None:
    """Shows `start` of `total` steps as done; nothing unless enabled."""
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

  def say(self, line: str) -> None:
    """Prints a line without breaking the bar."""
    with _UNSEEN:
      if self._bar is not None:
        self._bar.write(line, file=sys.stderr)
      elif self._enabled:
        print(line, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      with _UNSEEN:
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
