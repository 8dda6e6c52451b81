"""Attention of blocks of queries over a ragged cache, for every platform."""

import functools

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.block_attention import reference, tpu

# Shorter caches were not compared with XLA's by the compiler's estimates.
_SHORTEST = 1_024


def block_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  limits: jax.Array,
  layer: jax.Array | None = None,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Query t of row b attends to the cache's slots 0 .. limits[b, t] - 1.

  With one limit for a row that is bidirectional attention over its length; a
  limit per block is block-causal; position + 1 is causal. Scale 1/sqrt(K),
  softmax in float32 or wider; 4 B T S H K FLOPs where all is computed.

  Args:
    q: [B, T, H, K].
    k: [B, S, G, K], H a multiple of G (grouped queries), or with `layer`
      [L, B, S, G, K].
    v: like k.
    limits: [B, T] int32; a query with limit 0 returns something finite.
    layer: [] int, which of L is meant: the kernel reads it where it lies,
      whereas a slice would be copied first.
    implementation: "xla", "pallas_tpu" (bfloat16 and float32), or None: on
      TPUs the kernel for bfloat16 and 1,024 slots or more, else XLA. Its
      derivatives are those of the reference, which computes everything again.

  Returns:
    [B, T, H, K] in q.dtype.

  Raises:
    ValueError: if the shapes do not fit, or for an implementation that the
      call does not have.
  """
  shape = k.shape if layer is None else k.shape[1:]
  if (
    k.shape != v.shape
    or len(shape) != 4
    or q.shape[0] != shape[0]
    or q.shape[3] != shape[3]
    or q.shape[2] % shape[2]
    or limits.shape != q.shape[:2]
  ):
    raise ValueError(
      f"q {q.shape}, k {k.shape}, v {v.shape}, limits {limits.shape}: want "
      "[B, T, H, K], twice [B, S, G, K] with G a divisor of H, and [B, T]; "
      "with a layer k and v have an axis L in front"
    )
  exists = tpu.fits(q, k)
  pays = q.dtype == "bfloat16" and shape[1] >= _SHORTEST
  pays &= not dispatch.divided()
  if not (exists and (implementation or pays)):
    return dispatch.call(
      q,
      k,
      v,
      limits,
      layer,
      xla=reference.block_attention,
      implementation=implementation,
    )
  return _with_kernel(implementation, q, k, v, limits, layer)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_kernel(implementation, q, k, v, limits, layer):
  return dispatch.call(
    q,
    k,
    v,
    limits,
    layer,
    xla=reference.block_attention,
    pallas_tpu=_on_tpu,
    implementation=implementation,
  )


def _on_tpu(q, k, v, limits, layer):
  if layer is None:
    return tpu.attention(q, k[None], v[None], limits, jnp.int32(0))
  return tpu.attention(q, k, v, limits, layer)


@_with_kernel.defjvp
def _(implementation, operands, tangents):
  @jax.checkpoint
  def push(operands, tangents, limits, layer):
    attend = lambda q, k, v: reference.block_attention(q, k, v, limits, layer)
    return jax.jvp(attend, operands, tangents)[1]

  out = _with_kernel(implementation, *operands)
  return out, push(operands[:3], tangents[:3], *operands[3:])
