"""Attention that flow maps differentiate, for every platform."""

import jax

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.jvp_attention import reference


def jvp_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(K)) v, every query sees every key.

  Forward mode, reverse mode and reverse over forward work, and none of them
  holds scores [B, H, T, S] of more than 256 MB (`reference.LIMIT`; at least
  those of 128 queries). 4 B T S H K FLOPs; streamed scores are computed once
  more in reverse mode.

  Args:
    q: [B, T, H, K].
    k: [B, S, H, K].
    v: [B, S, H, K].
    implementation: "xla" or None, which is the same.

  Returns:
    [B, T, H, K] in q.dtype; softmax in float32 or wider.

  Raises:
    ValueError: if the shapes do not fit, or for an implementation that the
      call does not have.
  """
  fits = q.ndim == 4 and k.shape == v.shape == (
    *q.shape[:1],
    *k.shape[1:2],
    *q.shape[2:],
  )
  if not fits:
    raise ValueError(
      f"q {q.shape}, k {k.shape}, v {v.shape}: want [B, T, H, K] and twice "
      "[B, S, H, K]"
    )
  return dispatch.call(
    q, k, v, xla=reference.attention, implementation=implementation
  )
