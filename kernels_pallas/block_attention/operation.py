"""Attention of blocks of queries over a ragged cache, for every platform."""

import jax

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.block_attention import reference, tpu


def block_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  limits: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Query t of row b attends to the cache's slots 0 .. limits[b, t] - 1.

  With one limit for a row that is bidirectional attention over its length; a
  limit per block is block-causal; position + 1 is causal. Scale 1/sqrt(K),
  softmax in float32 or wider; 4 B T S H K FLOPs where all is computed.

  Args:
    q: [B, T, H, K].
    k: [B, S, G, K], H a multiple of G (grouped queries).
    v: [B, S, G, K].
    limits: [B, T] int32; a query with limit 0 returns something finite.
    implementation: "xla" or None.

  Returns:
    [B, T, H, K] in q.dtype.

  Raises:
    ValueError: if the shapes do not fit.
  """
  if (
    k.shape != v.shape
    or q.shape[0] != k.shape[0]
    or q.shape[3] != k.shape[3]
    or q.shape[2] % k.shape[2]
    or limits.shape != q.shape[:2]
  ):
    raise ValueError(
      f"q {q.shape}, k {k.shape}, v {v.shape}, limits {limits.shape}: want "
      "[B, T, H, K], twice [B, S, G, K] with G a divisor of H, and [B, T]"
    )
  return dispatch.call(
    q,
    k,
    v,
    limits,
    xla=reference.block_attention,
    pallas_tpu=tpu.attention if tpu.fits(q, k) else None,
    implementation=implementation,
  )
