"""Bidirectional softmax attention in jax.numpy: all scores at once, or those
of some queries after the other where they would be large."""

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.precision import accumulator

# Bytes of scores that may exist at once, and the fewest queries of a block.
LIMIT, FEWEST = 2**28, 128


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  limit: int = LIMIT,
  fewest: int = FEWEST,
) -> jax.Array:
  """The specification of `jvp_attention`, and its body on CPUs and GPUs.

  Streamed over queries, a block's softmax is whole: nothing is rescaled. Each
  block is rematerialised, so that every derivative, of either mode and of any
  order, keeps what it is given and no scores.

  Args:
    q, k, v: as there.
    limit: bytes of scores, float32 or wider.
    fewest: queries of a block, at least; 128 make scores twice as large as q
      at 64 channels.

  Returns:
    [B, T, H, K] in q.dtype.
  """
  rows, length, heads, width = q.shape
  # Rows and heads stay axes of their own: the partitioner divides them.
  q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))  # [B, H, T, K]
  size = block_size(rows * heads, length, k.shape[2], q.dtype, limit, fewest)
  if size == length:
    return jnp.moveaxis(_attend(q, k, v), 2, 1)
  count = -(-length // size)
  padded = jnp.pad(q, ((0, 0), (0, 0), (0, count * size - length), (0, 0)))
  blocks = padded.reshape(rows, heads, count, size, width)
  attend = jax.checkpoint(lambda q: _attend(q, k, v), prevent_cse=False)
  out = jax.lax.map(attend, jnp.moveaxis(blocks, 2, 0))
  out = jnp.moveaxis(out, 0, 2).reshape(rows, heads, count * size, width)
  return jnp.moveaxis(out[:, :, :length], 2, 1)


def block_size(
  heads: int,
  length: int,
  num_keys: int,
  dtype: jax.typing.DTypeLike,
  limit: int = LIMIT,
  fewest: int = FEWEST,
) -> int:
  """Queries whose scores exist at once: all, or the T/n next to the limit.

  Args:
    heads: of all rows together.
    length: queries T of a row.
    num_keys: keys of a row.
    dtype: of the queries.
    limit, fewest: as of `attention`.
  """
  each = heads * num_keys * accumulator(dtype).itemsize
  most = max(limit // max(each, 1), fewest)
  if most >= length:
    return length
  return -(-length // -(-length // most))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """q [B, H, T, K], k and v [B, H, S, K] -> [B, H, T, K] in q.dtype."""
  wide = accumulator(q.dtype)
  scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=wide)
  weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
  return jnp.einsum("bhts,bhsk->bhtk", weights.astype(v.dtype), v)
