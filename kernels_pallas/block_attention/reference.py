"""Attention up to a limit, written plainly."""

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import precision


def block_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  limits: jax.Array,
  layer: jax.Array | None = None,
) -> jax.Array:
  """`block_attention`; forms scores [B, H, T, S]."""
  if layer is not None:
    take = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    k, v = take(k), take(v)
  batch, length, heads, _ = q.shape
  groups = k.shape[2]
  # Queries of a group are rows of one matrix: two batch axes, as XLA's CPU
  # code wants them.
  rows = jnp.moveaxis(q, 1, 2).reshape(batch, groups, -1, q.shape[3])
  keys, values = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
  wide = precision.accumulator(q.dtype)
  scores = jnp.einsum(
    "bgtk,bgsk->bgts", rows, keys, preferred_element_type=wide
  )
  scores = scores * (q.shape[-1] ** -0.5)
  seen = jnp.arange(k.shape[1])[None, None] < limits[..., None]
  seen = jnp.tile(seen, (1, heads // groups, 1))[:, None]
  scores = jnp.where(seen, scores, jnp.finfo(wide).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("bgts,bgsk->bgtk", weights, values)
  return jnp.moveaxis(out.reshape(batch, heads, length, -1), 2, 1)
