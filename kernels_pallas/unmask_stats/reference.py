"""The statistics of a head's logits, written plainly and in tiles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.kernels_pallas import precision
from giantsteps.kernels_pallas.unmask_stats import noise

TILE = 8192  # columns of the head per turn of the loop


class Stats(NamedTuple):
  """What a decoder needs of one position's logits.

  Attributes:
    token: [T] int32, argmax of logits + temperature * Gumbel noise; the lowest
      of equals.
    logit: [T] of that token, without noise.
    logsumexp: [T], so that logit - logsumexp is its log probability.
    entropy: [T] nats of softmax(logits).
    second: [T] the highest logit of all other tokens.
  """

  token: jax.Array
  logit: jax.Array
  logsumexp: jax.Array
  entropy: jax.Array
  second: jax.Array


class Partial(NamedTuple):
  """The same of some columns, such that two of them can be merged: [T] each.

  `total` and `moment` are the sums of e^(l - first) and of (l - first) times
  that; `first` and `runner_up` are the two highest logits, `best` the highest
  one with noise and `token`, `logit` whose it is.
  """

  first: jax.Array
  first_token: jax.Array
  runner_up: jax.Array
  total: jax.Array
  moment: jax.Array
  best: jax.Array
  token: jax.Array
  logit: jax.Array


def unmask_stats(
  hidden: jax.Array,
  head: jax.Array,
  bias: jax.Array | None,
  temperature: jax.Array | None,
  seeds: jax.Array | None,
  tile: int = TILE,
) -> Stats:
  """`unmask_stats`, one tile of the vocabulary after the other."""
  return finish(partial(hidden, head, bias, temperature, seeds, tile=tile))


def partial(
  hidden: jax.Array,
  head: jax.Array,
  bias: jax.Array | None,
  temperature: jax.Array | None,
  seeds: jax.Array | None,
  offset: jax.Array | None = None,
  *,
  transposed: bool = False,
  tile: int = TILE,
) -> Partial:
  """Of all columns of the head; holds [T, tile] logits at a time.

  Args:
    hidden, head, bias, temperature, seeds: as of `unmask_stats`.
    offset: [] int32, the token of column 0; None is 0.
    transposed: the head is [V, D].
    tile: most columns per turn of the loop.
  """
  axis = 0 if transposed else 1
  size = head.shape[axis]
  count = -(-size // tile)
  if count > 1:  # tiles of one size, multiples of what a TPU computes
    tile = min(tile, -(-size // (128 * count)) * 128)
  tile = min(tile, size)
  column = jnp.arange(tile, dtype=jnp.int32)

  def part(start, fresh):
    """Columns start .. start + tile, those before `fresh` left out."""
    columns = jax.lax.dynamic_slice_in_dim(head, start, tile, axis)
    logits = project(hidden, columns.T if transposed else columns)
    if bias is not None:
      these = jax.lax.dynamic_slice_in_dim(bias, start, tile, 0)
      logits += these.astype(logits.dtype)[None]
    token = start + column
    logits = jnp.where((token >= fresh)[None], logits, -jnp.inf)
    if offset is not None:
      token += offset
    noised = logits
    if temperature is not None:
      assert seeds is not None
      random = noise.gumbel(seeds[:, None], token[None])
      noised = logits + temperature[:, None] * random.astype(logits.dtype)
    return summarise(logits, noised, token)

  if count == 1:
    return part(0, 0)

  def add(i, found):
    start = jnp.minimum(i * tile, size - tile)  # the last one overlaps
    return merge(found, part(start, i * tile))

  return jax.lax.fori_loop(1, count, add, part(0, 0))


def gumbel(seeds: jax.Array, size: int) -> jax.Array:
  """The noise of all tokens: seeds [T, 2] uint32 -> [T, size] float32."""
  token = jnp.arange(size, dtype=jnp.int32)
  return noise.gumbel(seeds[:, None], token[None])


def project(hidden: jax.Array, columns: jax.Array) -> jax.Array:
  """[T, D] @ [D, C], accumulated in float32 or wider, exact for float32."""
  narrow = columns.astype(hidden.dtype)
  exact = None if hidden.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
  return jnp.matmul(
    hidden,
    narrow,
    precision=exact,
    preferred_element_type=precision.accumulator(hidden.dtype),
  )


def summarise(
  logits: jax.Array, noised: jax.Array, token: jax.Array
) -> Partial:
  """Of columns [T, C] with ids token [C]; noised may be logits itself."""
  first = jnp.max(logits, -1)
  place = _place(logits, first)
  column = jnp.arange(token.size, dtype=jnp.int32)[None]
  rest = jnp.where(column == place[:, None], -jnp.inf, logits)
  shifted = logits - _finite(first)[:, None]
  mass = jnp.exp(shifted)
  best, chosen, logit = first, place, first
  if noised is not logits:
    best = jnp.max(noised, -1)
    chosen = _place(noised, best)
    logit = jnp.take_along_axis(logits, chosen[:, None], -1)[:, 0]
  return Partial(
    first=first,
    first_token=token[place],
    runner_up=jnp.max(rest, -1),
    total=jnp.sum(mass, -1),
    moment=jnp.sum(jnp.where(mass > 0, mass * shifted, 0), -1),
    best=best,
    token=token[chosen],
    logit=logit,
  )


def _place(x: jax.Array, peak: jax.Array) -> jax.Array:
  """The lowest column of x [T, C] that holds its row's peak [T]; 0 for NaN,
  which equals nothing: a token of every vocabulary, padded or not.

  XLA's argmax is several times slower than two plain reductions on CPUs.
  """
  size = x.shape[-1]
  column = jnp.arange(size, dtype=jnp.int32)[None]
  found = jnp.min(jnp.where(x == peak[:, None], column, size), -1)
  return jnp.where(found < size, found, 0)


def merge(a: Partial, b: Partial) -> Partial:
  """Of all columns of a and of b, whose ids are higher."""
  first = jnp.maximum(a.first, b.first)
  total, moment = 0.0, 0.0
  for part in (a, b):
    fall = jnp.where(part.total > 0, part.first - _finite(first), 0)
    scale = jnp.where(part.total > 0, jnp.exp(fall), 0)
    total += scale * part.total
    moment += scale * (part.moment + fall * part.total)
  ahead = b.first > a.first
  beats = b.best > a.best
  lower = jnp.minimum(a.first, b.first)
  return Partial(
    first=first,
    first_token=jnp.where(ahead, b.first_token, a.first_token),
    runner_up=jnp.maximum(jnp.maximum(a.runner_up, b.runner_up), lower),
    total=total,
    moment=moment,
    best=jnp.where(beats, b.best, a.best),
    token=jnp.where(beats, b.token, a.token),
    logit=jnp.where(beats, b.logit, a.logit),
  )


def finish(x: Partial) -> Stats:
  """The statistics of the whole vocabulary."""
  log_total = jnp.log(x.total)
  return Stats(
    token=x.token.astype(jnp.int32),
    logit=x.logit,
    logsumexp=x.first + log_total,
    # rounding may leave a sure position below zero
    entropy=jnp.maximum(log_total - x.moment / x.total, 0),
    second=jnp.where(x.token == x.first_token, x.runner_up, x.first),
  )


def _finite(x: jax.Array) -> jax.Array:
  """0 for -inf, where nothing is left of a tile."""
  return jnp.where(x == -np.inf, 0, x)
