"""The versions that a run records in summary.json."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from typing import Any

# What decides a run's numbers, in the order in which it is shown.
_NAMES = ('python', 'maskconnect_jax', 'jax', 'jaxlib', 'flax', 'numpy')


def versions() -> dict[str, str]:
  """Returns name and version of Python and of the packages behind a run."""
  found = {'python': platform.python_version()}
  for name in _NAMES[1:]:
    # A checkout that was not installed has no version.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def recorded(summary: dict[str, Any] | None) -> dict[str, str]:
  """Returns the versions that a run recorded; of earlier runs, JAX's alone.

  Args:
    summary: the content of summary.json; None while the run goes on.
  """
  found = summary or {}
  return {name: str(found[name]) for name in _NAMES if name in found}
