"""Losses of flow matching and flow maps, one value per sample.

Squared norms are summed over coordinates, not averaged, and no weight is
applied: the caller weighs and averages over the batch. The algebra is float32
(or wider) even where the network runs in bfloat16.
"""

import jax
import jax.numpy as jnp

from giantsteps.research.flow_maps.interpolants import Interpolant, Velocity


def flow_matching_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  t: jax.Array,
  I: Interpolant,
) -> jax.Array:
  """|v_{t,t}(I_t) - dI_t/dt|^2 (arXiv:2210.02747), the diagonal of a flow map.

  Args:
    velocity: velocity(s, t, x), s and t [B], x [B, ...] -> [B, ...]; called
      once, with s = t.
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    t: [B] in [0, 1], 0 noise and 1 data.
    I: the interpolant.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: if the shapes do not fit each other.
  """
  if x0.shape != x1.shape or t.shape != x0.shape[:1]:
    raise ValueError(
      f"x0 {x0.shape} and x1 {x1.shape} must agree and t {t.shape} be [B]"
    )
  dtype = jnp.promote_types(x1.dtype, jnp.float32)
  x, slope = I(t.astype(dtype), x0.astype(dtype), x1.astype(dtype))
  residual = velocity(t, t, x).astype(dtype) - slope
  return jnp.sum(residual**2, axis=range(1, residual.ndim))
