"""The gradients of L sources and of their masks, in several forms, in turns.

python benchmarks/source_gradients.py [--quick] [--blocks=18,54]
  [--batch=1024 --side=32 --channels=16] [--dtype=bfloat16] [--json=FILE]

Source i is read by all blocks from i on, as where every block may read every
source; there are no convolutions. Each form computes

  dloss/dy_i = sum_j w[j, i] * g_j   and   dloss/dw[j, i] = <g_j, y_i>

"fan_out" is the package's own. "by source, N" meets the g_j at their source as
it does, in parts of N in place of 9. "apart" reads them once for the sum and
once more for the products. "by reader" is the order of autodiff: a g with all
its y, and dloss/dy_i added up edge by edge. "GB/s" counts each y once, each g
once for every source, and each result; above the bandwidth of the memory, some
g came from a cache. "÷" compares with fan_out.
"""

import argparse
import functools
import time
from collections.abc import Iterator
from typing import Any

import common
import jax
import jax.numpy as jnp

from maskconnect_jax import backend
from maskconnect_jax.method import aggregate


def fan_out(weights: Any, sources: Any, gradients: Any) -> Any:
  """Returns the gradients of the sources, and those of weights for each."""
  products, sums = [], []
  for i, source in enumerate(sources):
    _, pull = jax.vjp(aggregate.fan_out, weights[i][i:], source)
    product, total = pull(tuple(gradients[i:]))
    products.append(product)
    sums.append(total)
  return tuple(sums), tuple(products)


def weighted(row: jax.Array, gradients: Any) -> jax.Array:
  terms = [
    w[:, None, None, None] * g.astype(jnp.float32)
    for w, g in zip(row, gradients, strict=True)
  ]
  return sum(terms[1:], start=terms[0])


@functools.partial(jax.jit, static_argnums=(3, 4))
def at_a_source(
  row: jax.Array, source: jax.Array, gradients: Any, size: int, apart: bool
) -> tuple[jax.Array, jax.Array]:
  exact, sums, products = source.astype(jnp.float32), [], []
  again = jax.lax.optimization_barrier(gradients) if apart else gradients
  for start in range(0, len(gradients), size):
    part = slice(start, start + size)
    sums.append(weighted(row[part], gradients[part]))
    products.append(backend.inner_products(exact, again[part]))
  total = sum(sums[1:], start=sums[0])
  return total.astype(source.dtype), jnp.concatenate(products)


def by_source(
  weights: Any, sources: Any, gradients: Any, *, size: int, apart: bool = False
) -> Any:
  """Returns the same as `fan_out`."""
  found = [
    at_a_source(weights[i][i:], source, gradients[i:], size, apart)
    for i, source in enumerate(sources)
  ]
  return tuple(zip(*found, strict=True))


def by_reader(weights: Any, sources: Any, gradients: Any) -> Any:
  """Returns the same; the products are gathered by reader."""
  totals: list[Any] = [None] * len(sources)
  products = [[] for _ in sources]
  for j in reversed(range(len(gradients))):
    exact = gradients[j].astype(jnp.float32)
    for start in range(0, j + 1, backend.TERMS_AT_ONCE):
      own = range(start, min(j + 1, start + backend.TERMS_AT_ONCE))
      found = backend.inner_products(exact, [sources[i] for i in own])
      for i, product in zip(own, found, strict=True):
        products[i].insert(0, product)
    for i in range(j + 1):
      edge = weights[i][j][:, None, None, None] * exact
      edge = edge.astype(sources[i].dtype)
      totals[i] = edge if totals[i] is None else totals[i] + edge
  return tuple(totals), tuple(map(jnp.stack, products))


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
  dtype = jnp.dtype(given.dtype)
  shape = given.batch, given.side, given.side, given.channels
  size = dtype.itemsize * given.batch * given.side**2 * given.channels
  for count in given.blocks:
    keys = jax.random.split(jax.random.key(0), 2 * count + 1)
    draws = [jax.random.normal(key, shape, dtype) for key in keys[1:]]
    weights = jax.random.bernoulli(keys[0], 0.3, (count, count, given.batch))
    arrays = weights.astype(jnp.float32), draws[:count], draws[count:]
    forms = {
      'fan_out': fan_out,
      'by source, 4': functools.partial(by_source, size=4),
      'by source, 18': functools.partial(by_source, size=18),
      'by source, 9, apart': functools.partial(by_source, size=9, apart=True),
      'by reader': by_reader,
    }
    calls, seconds, expected = {}, {}, None
    for name, form in forms.items():
      common.say(f'compiling {name}, {count} blocks')
      began = time.perf_counter()
      compiled = jax.jit(form).lower(*arrays).compile()
      seconds[name] = time.perf_counter() - began
      calls[name] = functools.partial(compiled, *arrays)
      found = calls[name]()
      expected = expected or found
      for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
      ):
        apart = jnp.abs(ours - theirs).max() / jnp.abs(theirs).max()
        if apart > (0.05 if dtype == jnp.bfloat16 else 1e-4):
          raise SystemExit(f'{name} differs by {float(apart):.1e}')
    times = common.in_turns(calls, given.rounds, given.steps)
    moved = size * (count * (count + 1) / 2 + 2 * count)
    for name, (_, whole) in times.items():
      middle = sorted(whole)[len(whole) // 2]
      yield {
        'blocks': count,
        'form': name,
        'ms': middle * 1e3,
        '± %': common.spread(whole),
        'GB/s': moved / middle / 1e9,
        '÷': common.ratio(whole, times['fan_out'][1]),
        'compile s': seconds[name],
      }


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('--blocks', type=common.numbers, default=[18, 54])
  for name, default in (('batch', 1024), ('side', 32), ('channels', 16)):
    parser.add_argument(f'--{name}', type=int, default=default)
  common.add_turns(parser)
  if parser.parse_known_args()[0].quick:
    parser.set_defaults(blocks=[4], batch=8, rounds=3)
  given = parser.parse_args()
  on_cpu = jax.default_backend() == 'cpu'
  given.steps = given.steps or (1 if on_cpu else 3)
  given.dtype = given.dtype or ('float32' if on_cpu else 'bfloat16')
  common.report(rows(given), given)


if __name__ == '__main__':
  common.run(main)
