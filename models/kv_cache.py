"""Keys and values of all layers, a slot per position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
  """Slot p holds position p, rotated; rows are of different length.

  Attributes:
    keys, values: [L, B, S, G, K].
  """

  keys: jax.Array
  values: jax.Array


def put(
  cache: Cache, layer: jax.Array, positions: jax.Array, k: jax.Array, v
) -> Cache:
  """Writes k, v [B, T, G, K] of one layer; positions [B, T] outside are lost.

  In place where the cache is carried through a loop.
  """
  slots = cache.keys.shape[2]
  row = jnp.arange(positions.shape[0])[:, None]
  place = jnp.where(positions < 0, slots, positions)  # below 0 counts from S

  def write(old, x):
    new = x.astype(old.dtype)
    return old.at[layer, row, place].set(new, mode="drop")

  return Cache(write(cache.keys, k), write(cache.values, v))
