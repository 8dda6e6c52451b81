"""Which chunk of which document a token belongs to, in rows that hold many.

A document is a run of equal segment ids, wherever it begins and ends; its
chunks count from its first token and its last 1..C tokens are only read, as if
it were alone (`fast_weights.py`). Shapes stay static because the documents of
a row never write more chunks than one document of the whole row would:
sum_j (ceil(l_j / C) - 1) <= ceil(L / C) - 1. So the written chunks are gathered
into that many places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from giantsteps.models import fast_weight_update as update
from giantsteps.models.fast_weight_update import State, Step, Tokens


class Places(NamedTuple):
  """Where the chunks of a row's documents are, K = ceil(L / C) - 1.

  Attributes:
    index: [N, K, C] int32, the tokens of each written chunk.
    write: [N, K] bool, False for places that are not needed or hold padding.
    reset: [N, K] bool, the first chunk of its document.
    source: [N, L] int32, where a token's output is: below L in the reads of
      the first weights, at L + k C + i token i read after write k.
    restart: [N] bool, the last document has written nothing.
  """

  index: jax.Array
  write: jax.Array
  reset: jax.Array
  source: jax.Array
  restart: jax.Array


def bounds(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """First position of each token's document and the one after its last.

  Args:
    segment_ids: [N, L] int.

  Returns:
    start, end: [N, L] int32.
  """
  length = segment_ids.shape[1]
  position = jnp.arange(length, dtype=jnp.int32)[None]
  ends = segment_ids[:, 1:] != segment_ids[:, :-1]
  edge = jnp.ones_like(segment_ids[:, :1], bool)
  starts = jnp.concatenate([edge, ends], 1)
  ends = jnp.concatenate([ends, edge], 1)
  start = jax.lax.cummax(jnp.where(starts, position, 0), axis=1)
  end = jnp.where(ends, position + 1, length)
  return start, jax.lax.cummin(end, axis=1, reverse=True)


def places(segment_ids: jax.Array, valid: jax.Array, chunk: int) -> Places:
  """Lays the documents out in chunks.

  A chunk is written if a valid token of its document comes after it.

  Args:
    segment_ids: [N, L] int.
    valid: [N, L] bool, False for padding.
    chunk: tokens C of one write.
  """
  length = segment_ids.shape[1]
  num_places = -(-length // chunk) - 1
  start, end = bounds(segment_ids)
  position = jnp.arange(length, dtype=jnp.int32)[None]
  own = position - start
  seen = jnp.cumsum(valid, 1, dtype=jnp.int32)
  seen = jnp.pad(seen, ((0, 0), (1, 0)))  # valid tokens before a position
  before = lambda where: jnp.take_along_axis(seen, where, 1)
  chunk_end = jnp.minimum(start + (own // chunk + 1) * chunk, end)
  written = before(end) > before(chunk_end)
  first = written & (own % chunk == 0)
  count = jnp.cumsum(first, 1, dtype=jnp.int32)  # writes up to a token's own

  nonzero = lambda x: jnp.nonzero(x, size=num_places, fill_value=length)[0]
  begin = jax.vmap(nonzero)(first).astype(jnp.int32)  # [N, K], rising
  used = begin < length
  begin = jnp.minimum(begin, length - 1)
  stop = jnp.minimum(begin + chunk, length)
  index = begin[..., None] + jnp.arange(chunk, dtype=jnp.int32)[None, None]
  source = length + (count - written - 1) * chunk + own % chunk
  last = jnp.max(jnp.where(valid, position, 0), 1, keepdims=True)
  last_start = jnp.take_along_axis(start, last, 1)
  earlier = jnp.take_along_axis(count - first, last_start, 1)
  return Places(
    index=index,
    write=used & (before(stop) > before(begin)),
    reset=used & (jnp.take_along_axis(start, begin, 1) == begin),
    source=jnp.where(own < chunk, position, source),
    restart=(count[:, -1:] == earlier)[:, 0],
  )


def steps(where: Places, q: jax.Array, tokens: Tokens) -> Step:
  """The written chunks, each followed by the read of the next one.

  Args:
    where: of K chunks.
    q: [N, L, d].
    tokens: leaves [N, L, ...].

  Returns:
    Leaves [K, N, ...]. After the last chunk of a document the next tokens are
    those of another: nobody takes their outputs.
  """

  def take(x, index):  # [N, L, ...] -> [K, N, C, ...]
    rows = index.reshape(index.shape[0], -1, 1)
    out = jnp.take_along_axis(x, rows, axis=1, mode="clip")
    return jnp.moveaxis(out.reshape(*index.shape, x.shape[-1]), 1, 0)

  chunk = where.index.shape[2]
  return Step(
    tokens=jax.tree.map(lambda x: take(x, where.index), tokens),
    after=take(q, where.index + chunk),
    write=where.write.T,
    reset=where.reset.T,
  )


def collect(where: Places, first: jax.Array, after: jax.Array) -> jax.Array:
  """Puts outputs back: reads of the first weights [N, L, d] and those after
  the writes [K, N, C, d] -> [N, L, d]."""
  rows, _, size = first.shape
  after = jnp.moveaxis(after, 0, 1).reshape(rows, -1, size)
  both = jnp.concatenate([first, after], 1)
  source = where.source[..., None]
  return jnp.take_along_axis(both, source, axis=1, mode="clip")


def bidirectional(
  state: State,
  q: jax.Array,
  tokens: Tokens,
  segment_ids: jax.Array,
  valid: jax.Array,
  num_documents: int,
  norms: update.Weights,
  rule: update.Rule,
  remat: bool,
) -> tuple[jax.Array, State]:
  """Every document is written in one step, then read: one turn per document.

  Costs num_documents times the work of one write and read of all tokens.

  Args:
    state: before the first write of each document.
    q: [N, L, d].
    tokens: leaves [N, L, ...], rates 0 where not valid.
    segment_ids: [N, L] int.
    valid: [N, L] bool.
    num_documents: at least as many as there are in any row.
    norms, rule: as in `fast_weight_update.scan`.
    remat: whether to recompute the inside of a turn.

  Returns:
    Outputs [N, L, d] and the state of the last document with valid tokens.
  """
  start, _ = bounds(segment_ids)
  position = jnp.arange(q.shape[1], dtype=start.dtype)[None]
  number = jnp.cumsum(start == position, 1) - 1  # of each token's document
  last = jnp.max(jnp.where(valid, number, -1), 1)

  def write(index):
    chosen = (number == index) & valid
    mask = lambda x: jnp.where(chosen[..., None], x, 0)
    one = tokens._replace(
      rates=jax.tree.map(mask, tokens.rates), valid=chosen[..., None]
    )
    step = Step(tokens=one, after=q, write=jnp.any(chosen, 1))
    new, (_, out) = update.run(state, step, norms, rule)
    assert out is not None
    return new, mask(out)

  write = jax.checkpoint(write, prevent_cse=False) if remat else write

  def turn(carry, index):
    out, kept = carry
    new, read = write(index)
    return (out + read, update.select(index == last, new, kept)), None

  carry = (jnp.zeros_like(q), state)
  (out, state), _ = jax.lax.scan(turn, carry, jnp.arange(num_documents))
  return out, state
