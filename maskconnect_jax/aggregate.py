"""The masked sum that gives a block its input, and its gradients.

  x_j = sum_i w[j, i] * y_i                                        forward
  dloss/dy_i = sum_j w[j, i] * g_j,   g_j = dloss/dx_j             backward
  dloss/dw[j, i] = <g_j, y_i>, of all j and i one product G Y^T

Autodiff would compute the last entry by entry, each reading a g and a y: for L
blocks L^2 reads. As one product it is 2 L. But no g_j is known before the
backward pass comes to block j, and the product must wait for all of them. So
`tapes` makes, before the blocks run, a dummy input for every sum and every
source: nothing in the forward pass, and in the backward pass what brings each
g_j (`masked_sum`) and each y_i (`noted`) back to where all are multiplied.

It is accumulated in float32 also when the activations are bfloat16, whose 8
bits would lose nearly all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from maskconnect_jax.config import InputError

Valid = tuple[tuple[bool, ...], ...]
Tapes = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]


def tapes(
  weights: jax.Array, valid: Valid, every: int, like: jax.Array
) -> Tapes:
  """Returns a tape for each sum and for each source of one shape.

  Each is used at most once, in `masked_sum` and `noted`. The gradient of the
  weights, dloss/dw[j, i] = <g_j, y_i>, is made here; 0 where it is not valid
  or j or i is unused.

  Args:
    weights: float32 [J, n], of J sums of n sources.
    valid: [J, n], which sources each sum may have.
    every: the products are taken over every so many images, and multiplied by
      that: unbiased over batches in random order, and that much cheaper.
    like: an array of the shape and dtype of the sources, [batch, ...].

  Raises:
    InputError: the batch is not a multiple of `every`.
  """
  if like.shape[0] % every:
    raise InputError(
      f'gradient_every={every} must divide the batch of {like.shape[0]}'
    )
  shape = (like.shape[0] // every, *like.shape[1:])
  return _tapes(weights, valid, every, shape, like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _tapes(
  weights: jax.Array,
  valid: Valid,
  every: int,
  shape: tuple[int, ...],
  dtype: DTypeLike,
) -> Tapes:
  del valid, every
  num_sums, num_sources = weights.shape
  zeros = jnp.zeros(shape, dtype)
  return (zeros,) * num_sums, (zeros,) * num_sources


def _tapes_forward(
  weights: Any,
  valid: Valid,
  every: int,
  shape: tuple[int, ...],
  dtype: DTypeLike,
) -> tuple[Tapes, jax.Array]:
  return _tapes(weights.value, valid, every, shape, dtype), weights.value


def _tapes_backward(
  valid: Valid,
  every: int,
  shape: tuple[int, ...],
  dtype: DTypeLike,
  weights: jax.Array,
  brought: tuple[Sequence[Any], Sequence[Any]],
) -> tuple[jax.Array]:
  del shape, dtype
  # What was not used has brought nothing.
  sums, sources = (
    [i for i, one in enumerate(kind) if not isinstance(one, SymbolicZero)]
    for kind in brought
  )
  if not (sums and sources):
    return (jnp.zeros_like(weights),)
  wanted = np.array(valid)[np.ix_(sums, sources)]
  product = _products(
    tuple(brought[0][j] for j in sums),
    tuple(brought[1][i] for i in sources),
    wanted,
  )
  rows, columns = np.ix_(sums, sources)
  return (
    jnp.zeros_like(weights)
    .at[rows, columns]
    .set(jnp.where(wanted, every * product, 0).astype(weights.dtype)),
  )


_tapes.defvjp(_tapes_forward, _tapes_backward, symbolic_zeros=True)


def _products(
  gradients: tuple[jax.Array, ...],
  sources: tuple[jax.Array, ...],
  wanted: np.ndarray,
) -> jax.Array:
  """Returns <g_j, y_i> where wanted, [J, n], in float32 or better.

  Of a batch that is sharded over the mesh axis 'data' each device takes its
  own images, and the products are summed.
  """
  local = functools.partial(_local_products, wanted=wanted)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or sources[0].shape[0] % mesh.size:
    return local(gradients, sources)
  batch, whole = PartitionSpec('data'), PartitionSpec()
  return jax.shard_map(
    lambda *arrays: jax.lax.psum(local(*arrays), 'data'),
    in_specs=(batch, batch),
    out_specs=whole,
  )(gradients, sources)


def _local_products(
  gradients: tuple[jax.Array, ...],
  sources: tuple[jax.Array, ...],
  wanted: np.ndarray,
) -> jax.Array:
  """Returns <g_j, y_i> where wanted, in the form that suits the backend.

  A matrix product wants its operands side by side in memory. A TPU, which keeps
  the batch innermost, would turn every array round for that: a reduction for
  each pair costs it less. Of a deep network those are thousands of kernels, too
  many for a GPU. docs/performance.md has the figures.
  """
  return jax.lax.platform_dependent(
    gradients,
    sources,
    tpu=functools.partial(pairwise_products, wanted=wanted),
    default=batched_products,
  )


def batched_products(
  gradients: Sequence[jax.Array], sources: Sequence[jax.Array]
) -> jax.Array:
  """Returns all <g_j, y_i>: a matrix product for each image, then their sum.

  One product over all images would have few results and a long sum for each,
  of which a GPU makes little.
  """
  axes = tuple(range(2, 1 + sources[0].ndim))
  return jax.lax.dot_general(
    jnp.stack(gradients),
    jnp.stack(sources),
    ((axes, axes), ((1,), (1,))),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=_exact(sources[0].dtype),
  ).sum(0)


def pairwise_products(
  gradients: Sequence[jax.Array],
  sources: Sequence[jax.Array],
  wanted: np.ndarray,
) -> jax.Array:
  """Returns <g_j, y_i> where wanted, else 0: a reduction for each."""
  exact = _exact(sources[0].dtype)
  zero = jnp.zeros((), exact)
  return jnp.stack(
    [
      jnp.stack(
        [
          jnp.sum(g.astype(exact) * y.astype(exact)) if ok else zero
          for y, ok in zip(sources, row, strict=True)
        ]
      )
      for g, row in zip(gradients, wanted, strict=True)
    ]
  )


def _exact(dtype: DTypeLike) -> jnp.dtype:
  """Returns float32, or float64 for float64: what sums are accumulated in."""
  return jnp.promote_types(dtype, jnp.float32)


def _images_of(x: jax.Array, tape: jax.Array) -> jax.Array:
  """Returns every so many images of x that there are as many as in the tape.

  By reshape: of a sharded batch each device keeps its own.
  """
  return x.reshape(tape.shape[0], -1, *x.shape[1:])[:, 0]


@jax.custom_vjp
def noted(source: jax.Array, tape: jax.Array) -> jax.Array:
  """Returns the source; its value reaches the tape in the backward pass."""
  del tape
  return source


noted.defvjp(
  lambda source, tape: (source, _images_of(source, tape)),
  lambda kept, gradient: (gradient, kept),
)


@jax.custom_vjp
def masked_sum(
  weights: jax.Array, sources: tuple[jax.Array, ...], tape: jax.Array
) -> jax.Array:
  """Returns the sum of the sources, each times its weight.

  The gradient of the weights comes by way of the tape, not from here.

  Args:
    weights: float32 [n], a row of the mask times the scale of its terms.
    sources: n arrays of one shape and dtype, [batch, ...].
    tape: of this sum.

  Returns:
    An array of a source's shape, in float32 or better, for other sums to be
    added to before it is rounded to the sources' dtype.
  """
  del tape
  exact = _exact(sources[0].dtype)
  terms = [
    weight.astype(exact) * source.astype(exact)
    for weight, source in zip(weights, sources, strict=True)
  ]
  return sum(terms[1:], start=terms[0])


def _sum_forward(
  weights: jax.Array, sources: tuple[jax.Array, ...], tape: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return masked_sum(weights, sources, tape), (weights, tape)


def _sum_backward(
  residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
  weights, tape = residuals
  for_sources = tuple(
    (weight.astype(gradient.dtype) * gradient).astype(tape.dtype)
    for weight in weights
  )
  brought = _images_of(gradient, tape).astype(tape.dtype)
  return jnp.zeros_like(weights), for_sources, brought


masked_sum.defvjp(_sum_forward, _sum_backward)


def static_sum(sources: Sequence[jax.Array], scale: float) -> jax.Array:
  """Returns the scaled sum of the sources of a frozen block.

  One source with scale 1 is returned as it is, so that Fixed-Prev is the
  ordinary network bit for bit.

  Args:
    sources: at least one array, all of one shape and dtype.
    scale: c, 1 or 1/k.
  """
  if len(sources) == 1:
    return sources[0] if scale == 1 else sources[0] * scale
  exact = _exact(sources[0].dtype)
  terms = [source.astype(exact) for source in sources]
  total = sum(terms[1:], start=terms[0])
  return (total * scale).astype(sources[0].dtype)
