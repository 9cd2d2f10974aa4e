"""What a network costs: its parameters and the multiply-adds of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from maskconnect_jax import backend


def count_parameters(model: Any) -> int:
  """Returns the number of parameters, without statistics and real masks."""
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def forward_products(model: Any, shape: Sequence[int]) -> int:
  """Returns the multiply-adds of a forward pass over one image.

  As in papers, convolutions and matrix products count. Multiply-adds with
  padding count too. BatchNorm, sums and pooling do not count.

  Args:
    model: any network.
    shape: (height, width, channels) of the image.
  """

  def of_images(count: int) -> int:
    images = jax.ShapeDtypeStruct((count, *shape), np.float32)
    network, state = nnx.split(model)
    # Without the forms for single platforms, which count alike.
    with backend.native(False), backend.without_platforms():
      jaxpr = jax.make_jaxpr(
        lambda state, images: nnx.merge(network, state)(images)
      )(state, images)
    return _products(jaxpr.jaxpr)

  # The difference leaves out products of kernels with kernels, which a pass
  # does once for any number of images.
  return of_images(2) - of_images(1)


def _products(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    params, out = equation.params, equation.outvars[0].aval
    if equation.primitive.name == 'conv_general_dilated':
      kernel = equation.invars[1].aval
      features = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
      total += out.size * kernel.size // features
    elif equation.primitive.name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      left = equation.invars[0].aval
      total += out.size * math.prod(left.shape[i] for i in contracted)
    elif equation.primitive.name == 'cond':
      # A user's block may choose by platform; the last branch is the default.
      total += _products(params['branches'][-1].jaxpr)
    else:
      for value in params.values():
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns'):
          total += _products(inner)
  return total
