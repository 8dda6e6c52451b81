"""Attention that flow maps differentiate, for every platform."""

import functools

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.jvp_attention import reference, tpu

# Shorter rows are left to XLA, whose scores are small.
_SHORTEST = 1_024


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
    implementation: "xla", "pallas_tpu" (bfloat16 and float32), or None: on
      TPUs the kernels for bfloat16 and 1,024 keys or more, unless the
      partitioner is to divide the program, else XLA. The kernels compute
      values and tangents; what reverse mode adds is XLA's. They cannot be
      vmapped once they are differentiated.

  Returns:
    [B, T, H, K] in q.dtype; softmax in float32 or wider.

  Raises:
    ValueError: if the shapes do not fit, or for an implementation that the
      call does not have.
  """
  fits = q.ndim == k.ndim == 4
  fits = fits and k.shape == v.shape == (q.shape[0], k.shape[1], *q.shape[2:])
  if not fits:
    raise ValueError(
      f"q {q.shape}, k {k.shape}, v {v.shape}: want [B, T, H, K] and twice "
      "[B, S, H, K]"
    )
  pays = q.dtype == "bfloat16" and k.shape[1] >= _SHORTEST
  pays &= not dispatch.divided()
  if not (tpu.fits(q, k) and (implementation or pays)):
    return dispatch.call(
      q, k, v, xla=reference.attention, implementation=implementation
    )
  return _with_kernel(implementation, q, k, v)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_kernel(implementation, q, k, v):
  return dispatch.call(
    q,
    k,
    v,
    xla=reference.attention,
    pallas_tpu=tpu.attention,
    implementation=implementation,
  )


@_with_kernel.defjvp
def _(implementation, operands, tangents):
  out = _with_kernel(implementation, *operands)
  return out, _tangent(implementation, (*operands, out), tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _tangent(implementation, residuals, tangents):
  """The derivative along `tangents` of attention at (q, k, v, its output).

  Linear in the tangents, with the gradient of the reference as its transpose.
  """

  def push(residuals, tangent):
    return dispatch.call(
      *residuals,
      *split(tangent),
      xla=_tangent_by_xla,
      pallas_tpu=tpu.tangent,
      implementation=implementation,
    )

  def pull(residuals, cotangent):
    back = jax.vjp(reference.attention, *residuals[:3])[1]
    return jnp.concatenate(back(cotangent), 1)

  # One linear argument: of several, JAX wants all or none to be unknown, and
  # inside jax.checkpoint tangents that are zero are known.
  q, k, *_ = residuals
  ends = [q.shape[1], q.shape[1] + k.shape[1]]
  split = lambda x: jnp.split(x, ends, axis=1)
  return jax.custom_derivatives.linear_call(
    push, pull, residuals, jnp.concatenate(tangents, 1)
  )


@_tangent.defjvp
def _(implementation, operands, tangents):
  """The second derivative is XLA's, by way of q, k and v: the output given
  moves as they make it move."""
  (residuals, first), (moved, second) = operands, tangents

  def once(q, k, v):
    return _tangent_by_xla(q, k, v, None, *first)

  along = jax.jvp(once, residuals[:3], moved[:3])[1]
  out = _tangent(implementation, residuals, first)
  return out, along + _tangent(implementation, residuals, second)


def _tangent_by_xla(q, k, v, out, dq, dk, dv):
  del out
  return jax.jvp(reference.attention, (q, k, v), (dq, dk, dv))[1]
