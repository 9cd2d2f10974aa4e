"""MaskConnect: residual networks that learn their own connectivity, in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from maskconnect_jax.method.stack import MaskedStack
  from maskconnect_jax.method.wiring import freeze, prune
  from maskconnect_jax.networks.architectures import list_models
  from maskconnect_jax.networks.models import create_model
  from maskconnect_jax.run.inference import load
  from maskconnect_jax.run.train import train

__all__ = [
  'MaskedStack',
  'create_model',
  'freeze',
  'list_models',
  'load',
  'prune',
  'train',
]

# The module of each public name, imported at the name's first use. Importing
# JAX takes seconds, and a command must answer signals before they are over.
_MODULES = {
  'MaskedStack': 'method.stack',
  'create_model': 'networks.models',
  'freeze': 'method.wiring',
  'list_models': 'networks.architectures',
  'load': 'run.inference',
  'prune': 'method.wiring',
  'train': 'run.train',
}


def __getattr__(name: str) -> Any:
  """Imports and returns a name of `__all__`.

  Raises:
    AttributeError: `__all__` does not hold the name.
  """
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
