"""MaskConnect: residual networks that learn their own connectivity, in JAX."""

from maskconnect_jax.inference import load
from maskconnect_jax.models import create_model, list_models
from maskconnect_jax.stack import MaskedStack
from maskconnect_jax.wiring import freeze, prune

__all__ = [
  'MaskedStack',
  'create_model',
  'freeze',
  'list_models',
  'load',
  'prune',
]
