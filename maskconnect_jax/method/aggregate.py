"""The masked sum that gives a block its input, and its gradients.

  x_j = sum_i w[j, i] * y_i                                        forward
  dloss/dy_i = sum_j w[j, i] * g_j,   g_j = dloss/dx_j             backward
  dloss/dw[j, i] = <g_j, y_i>, for drawn and undrawn i alike

Autodiff would compute the last two lines edge by edge, and would read one g and
one y for each edge. Here `fan_out` computes them for all readers of a source
together, when the backward pass reaches the source: y_i is read once, and so is
each g_j. They are accumulated in float32 even if the activations are bfloat16:
its 8 bits of precision would lose nearly all of the sum.

A CPU takes aggregate.cc if `backend.native` is on. For a sum it reads no source
whose weight is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from maskconnect_jax import backend
from maskconnect_jax.method import adapters

NATIVE = ('maskconnect_masked_sum', 'maskconnect_source_gradients')
_ROWS, _BATCH = PartitionSpec(None, 'data'), PartitionSpec('data')


@jax.custom_vjp
def fan_out(weights: jax.Array, source: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the source n times, for the `masked_sum` of each block.

  `masked_sum` hands g_j back to its own copy. Here all of them arrive, and make
  the gradients of the source and of its weights. A copy that nothing reads
  costs nothing.

  Args:
    weights: float32 [n, batch], w[j, i] for each block j, in each image; see
      `backend.rows_for_images`.
    source: y_i, [batch, ...].
  """
  return (source,) * len(weights)


def _fan_out_forward(weights: Any, source: Any) -> Any:
  # The mask of a wiring that is measured has no gradient, and needs no y.
  needed = source.value if weights.perturbed else None
  return fan_out(weights.value, source.value), (weights.value, needed)


def _fan_out_backward(kept: Any, gradients: Sequence[Any]) -> Any:
  weights, source = kept
  readers = [
    j for j, g in enumerate(gradients) if not isinstance(g, SymbolicZero)
  ]
  if not readers:
    return None, None
  first, end = readers[0], readers[-1] + 1
  arrived = tuple(
    jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g
    for g in gradients[first:end]
  )
  own = weights[first:end]
  if source is None:
    total = weighted_sum(own, arrived, arrived[0].shape[-1])
    return None, total.astype(arrived[0].dtype)
  for_source, products = _source_gradients(own, source, arrived)
  around = ((first, len(weights) - end), (0, 0))
  return (
    jnp.pad(products.astype(weights.dtype), around),
    for_source.astype(source.dtype),
  )


fan_out.defvjp(_fan_out_forward, _fan_out_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def masked_sum(
  weights: jax.Array, sources: tuple[jax.Array, ...], features: int
) -> jax.Array:
  """Returns x_j, the sum of the sources, each times its weight.

  Args:
    weights: float32 [n, batch], w[j, i] of each source in each image. They get
      no gradient here: `fan_out` computes it.
    sources: the n sources, see `weighted_sum`. Each is a copy by `fan_out` and
      gets g_j, not its own gradient.
    features: channels of the sum.

  Returns:
    [batch, ..., features], in float32, or in float64 for float64.
  """
  return weighted_sum(weights, sources, features)


def _masked_sum_forward(
  weights: jax.Array, sources: tuple[jax.Array, ...], features: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return masked_sum(weights, sources, features), sources


def _masked_sum_backward(
  features: int, sources: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[None, tuple[jax.Array, ...]]:
  # g_j is the gradient of a sum that was rounded to this dtype: it has no more.
  gradient = gradient.astype(sources[0].dtype)
  narrow = {
    width: backend.with_channels(gradient, width)
    for width in {y.shape[-1] for y in sources}
  }
  return None, tuple(narrow[y.shape[-1]] for y in sources)


masked_sum.defvjp(_masked_sum_forward, _masked_sum_backward)


def weighted_sum(
  weights: jax.Array, terms: Sequence[jax.Array], features: int
) -> jax.Array:
  """Returns sum_i w_i t_i, in float32 or better.

  Args:
    weights: [n, batch], in each image.
    terms: n arrays of one dtype, [batch, ..., C_i] with C_i at most `features`,
      alike but for C_i. Zero channels are appended to them.
    features: channels of the sum.
  """
  add: Callable[..., jax.Array]
  add = functools.partial(_plain_sum, features=features)
  if _is_native(terms[0]):
    local = functools.partial(_native_sum, features=features)
    add = backend.natively(local, add, (_ROWS, _BATCH), _BATCH)
  return add(weights, tuple(terms))


def _plain_sum(
  weights: jax.Array, terms: tuple[jax.Array, ...], *, features: int
) -> jax.Array:
  """Computes `weighted_sum`; terms of one width are added before zeros are.

  So no zero is read or kept.
  """
  widths = sorted({t.shape[-1] for t in terms})
  groups = [
    [i for i, t in enumerate(terms) if t.shape[-1] == width] for width in widths
  ]
  sums = []
  for row, group in zip(backend.rows_of(weights, groups), groups, strict=True):
    parts = backend.in_parts(row, [terms[i] for i in group])
    own = [_sum_of_part(*part) for part in parts]
    sums.append(backend.with_channels(sum(own[1:], start=own[0]), features))
  return sum(sums[1:], start=sums[0])


@backend.traced_once()
def _sum_of_part(weights: jax.Array, terms: tuple[jax.Array, ...]) -> jax.Array:
  exact = _exact(terms[0].dtype)
  products = [
    weight * term.astype(exact)
    for weight, term in zip(
      _beside(weights.astype(exact), terms[0]), terms, strict=True
    )
  ]
  return sum(products[1:], start=products[0])


def _source_gradients(
  weights: jax.Array, source: jax.Array, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of a source and of its weights, [n, batch].

  Args:
    weights: [n, batch], of the source in the sum of each reader.
    source: y_i, [batch, ...].
    gradients: g_j of the n readers, of y_i's shape and dtype.
  """
  compute = _plain_gradients
  if _is_native(source):
    compute = backend.natively(
      _native_gradients,
      _plain_gradients,
      (_ROWS, _BATCH, _BATCH),
      (_BATCH, _ROWS),
    )
  return compute(weights, source, gradients)


def _plain_gradients(
  weights: jax.Array, source: jax.Array, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  parts = [
    _gradients_of_part(row, source, part)
    for row, part in backend.in_parts(weights, gradients)
  ]
  sums, products = zip(*parts, strict=True)
  return sum(sums[1:], start=sums[0]), jnp.concatenate(products)


@backend.traced_once()
def _gradients_of_part(
  weights: jax.Array, source: jax.Array, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  exact = source.astype(_exact(source.dtype))
  return (
    _sum_of_part(weights, gradients),
    backend.inner_products(exact, gradients),
  )


def _is_native(x: jax.Array) -> bool:
  return backend.native.value and x.dtype == jnp.float32


def _native_sum(
  weights: jax.Array, terms: tuple[jax.Array, ...], *, features: int
) -> jax.Array:
  like = jax.ShapeDtypeStruct((*terms[0].shape[:-1], features), jnp.float32)
  return backend.native_call(NATIVE[0], like)(weights, *terms)


def _native_gradients(
  weights: jax.Array, source: jax.Array, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  return backend.native_call(NATIVE[1], (source, weights))(
    weights, source, *gradients
  )


def _beside(weights: jax.Array, x: jax.Array) -> jax.Array:
  """Returns weights, [n, batch], with axes of length 1 appended.

  Each row then multiplies x, [batch, ...].
  """
  return weights.reshape(*weights.shape, *[1] * (x.ndim - 1))


def _exact(dtype: DTypeLike) -> jnp.dtype:
  """Returns the dtype that sums are accumulated in: float32 or float64."""
  return jnp.promote_types(dtype, jnp.float32)


def static_sum(
  sources: Sequence[jax.Array], scale: float, features: int
) -> jax.Array:
  """Returns c * sum_i y_i, the scaled sum of the sources of a frozen block.

  One source with scale 1 is returned unchanged. So Fixed-Prev equals the
  ordinary network to the bit. A CPU takes `weighted_sum`, with which
  Fixed-Random's step of resnet38 takes 0.84 to 0.87 of the time.

  Args:
    sources: the y_i, at least one array, [batch, ..., C_i] with C_i at most
      `features`, of one dtype and alike but for C_i.
    scale: c, 1 or 1/k.
    features: channels of the sum; zero channels are appended to the others.

  Returns:
    [batch, ..., features], of the sources' dtype.
  """
  dtype = sources[0].dtype
  if len(sources) == 1:
    total = adapters.zero_pad_channels(sources[0], features)
    return total if scale == 1 else total * scale

  def default(*sources: jax.Array) -> jax.Array:
    padded = [adapters.zero_pad_channels(y, features) for y in sources]
    exact = [y.astype(_exact(dtype)) for y in padded]
    return backend.scaled_sum(exact, scale).astype(dtype)

  def cpu(*sources: jax.Array) -> jax.Array:
    shape = len(sources), sources[0].shape[0]  # perhaps symbolic
    weights = jnp.full(shape, scale, _exact(dtype))
    return weighted_sum(weights, sources, features).astype(dtype)

  return backend.by_platform(cpu=cpu, default=default)(*sources)
