"""MaskConnect: residual networks that learn their own connectivity, in JAX."""

from maskconnect_jax.inference import load
from maskconnect_jax.models import create_model, list_models

__all__ = ['create_model', 'list_models', 'load']
