"""What a LaCT layer keeps between decoded tokens; its size does not grow.

Keys and values of the attention window in a ring, the last inputs of the short
convolutions, and the fast weights with the chunk that is not written yet
(`fast_weight_decode.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from giantsteps.models import layers
from giantsteps.models.fast_weight_decode import DecodeState


class Cache(NamedTuple):
  """The memory of one layer, or of all with a leading axis.

  Attributes:
    keys, values: [B, S, H, K]; slot p mod S holds position p.
    inputs: [B, taps - 1, D] inputs of the short convolutions, or None.
    fast: rows are B times the fast heads; None before `prefill`.
  """

  keys: jax.Array
  values: jax.Array
  inputs: jax.Array | None = None
  fast: DecodeState | None = None


def ring(x: jax.Array, lengths: jax.Array, size: int) -> jax.Array:
  """The last `size` of lengths [B] positions of x [B, T, H, K], as a ring."""
  position = _positions(lengths - 1, size)
  index = jnp.clip(position, 0, x.shape[1] - 1)[..., None, None]
  kept = jnp.take_along_axis(x, index, 1)
  return jnp.where((position >= 0)[..., None, None], kept, 0)


def put(ring: jax.Array, x: jax.Array, position: jax.Array) -> jax.Array:
  """Ring [B, S, H, K] with x [B, 1, H, K] at position [B]."""
  row = jnp.arange(ring.shape[0])
  slot = position % ring.shape[1]
  return ring.at[row, slot].set(x[:, 0].astype(ring.dtype))


def attend(
  q: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array
) -> jax.Array:
  """`layers.attention` of one token to a ring that holds it.

  Args:
    q: [B, 1, H, K].
    keys, values: [B, S, H, K].
    position: [B] int, of the token.

  Returns:
    [B, 1, H, K] in q.dtype.
  """
  wide = layers.accumulator(q.dtype)
  scores = jnp.einsum("bqhk,bshk->bhqs", q, keys, preferred_element_type=wide)
  scores = scores * (q.shape[-1] ** -0.5)
  seen = _positions(position, keys.shape[1]) >= 0
  scores = jnp.where(seen[:, None, None], scores, jnp.finfo(wide).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  return jnp.einsum("bhqs,bshk->bqhk", weights, values)


def last(x: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
  """The `count` before lengths [B] of x [B, T, D], zeros before the first."""
  x = jnp.pad(x, ((0, 0), (count, 0), (0, 0)))
  index = lengths[:, None] + jnp.arange(count)[None]
  return jnp.take_along_axis(x, index[..., None], 1)


def _positions(newest: jax.Array, size: int) -> jax.Array:
  """Position in each slot [B, S] when `newest` [B] was put last."""
  slot = jnp.arange(size)[None]
  return newest[:, None] - (newest[:, None] - slot) % size
