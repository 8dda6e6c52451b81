"""Eulerian losses with a frozen tangent: MeanFlow and what grew from it.

The target of v_{s,t} is d + h D v, D v the derivative of v_{s,t}(x) in (s, x)
along (1, d), with everything frozen but v_{s,t} itself. MeanFlow
(arXiv:2505.13447) writes it in noise time tau = 1 - s, r = 1 - t and u = -v
(`clocks`).
"""

import jax
import jax.numpy as jnp

from giantsteps.research.flow_maps import residuals
from giantsteps.research.flow_maps.interpolants import (
  Interpolant,
  Velocity,
  expand,
)
from giantsteps.research.flow_maps.losses import start
from giantsteps.research.flow_maps.residuals import Moving, square, stop, wide


def mean_flow_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  I: Interpolant,
  tangent: str | jax.Array = "data",
  *,
  teacher: Velocity | None = None,
) -> jax.Array:
  """|v_{s,t} - sg[d + h (d_s v + J v d)]|^2 at x = I_s (arXiv:2505.13447).

  With d = dI_s/ds the loss does not fall to 0 (the variance of dI_s given I_s
  remains), but the expected target is right, since D v is linear in d and
  frozen. At s = t it is `flow_matching_loss`. 4 F with the gradient, 5 F with
  tangent="model".

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1], the time of I_s.
    t: [B], the time to go to.
    I: the interpolant.
    tangent: d: "data" is dI_s/ds, "model" the teacher's v_{s,s}(x), or an
      array [B, ...] (a guided velocity, `guidance.fold`).
    teacher: for tangent="model"; None is the student.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit, an unknown tangent.
  """
  s, t, x, slope = start(x0, x1, s, t, I)
  drift = _drift(tangent, slope, x)
  return square(
    residuals.residual(
      "eulerian", velocity, s, t, x, Moving(), teacher=teacher, drift=drift
    )
  )


def improved_mean_flow_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  I: Interpolant,
  target: str | jax.Array = "data",
  *,
  head: Velocity | None = None,
) -> jax.Array:
  """|V - dI_s/ds|^2, V = v_{s,t} - h sg[d_s v + J v b] (arXiv:2512.02012).

  A regression: its target does not depend on the network, and the tangent b =
  the predicted velocity at (s, s) has less variance than dI_s. A head of its
  own for b is trained beside it by `flow_matching_loss(head, ..)`. 5 F with
  the gradient.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1], the time of I_s.
    t: [B], the time to go to.
    I: the interpolant.
    target: "data" is dI_s/ds; or an array [B, ...] (`guidance.fold`).
    head: predicts b as head(s, s, x), frozen here; None is the student.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit, an unknown target.
  """
  s, t, x, slope = start(x0, x1, s, t, I)
  if isinstance(target, str) and target != "data":
    raise ValueError(f"unknown target {target!r}: 'data' or an array")
  goal = _drift(target, slope, x)
  b = stop(wide(head or velocity)(s, s, x))
  v, rate = jax.jvp(
    lambda s, x: wide(velocity)(s, t, x),
    (s, x),
    (jnp.ones_like(s), b),
  )
  return square(v - expand(t - s, x) * stop(rate) - goal)


def align_your_flow_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  I: Interpolant,
  *,
  teacher: Velocity,
  warmup: float | jax.Array = 1.0,
  constant: float = 0.1,
) -> jax.Array:
  """Eulerian distillation with a normalised tangent (arXiv:2506.14603).

  With b = the teacher's velocity, autoguided or not, the Eulerian residual is
  g = b - v + r h (d_s v + J v b), and the loss |v - sg[v + g / (|g| + c)]|^2,
  |g| over the coordinates of a sample: its value is |g|^2 / (|g| + c)^2 < 1
  and says little; log `eulerian_loss`. 5 F with the gradient, one F of them
  the teacher's.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1], the time of I_s.
    t: [B], the time to go to.
    I: the interpolant.
    teacher: asked on the diagonal, teacher(s, s, x).
    warmup: r, from 0 to 1 over the first steps (10,000 in the paper).
    constant: c.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit.
  """
  s, t, x, _ = start(x0, x1, s, t, I)
  b = stop(wide(teacher)(s, s, x))
  v, rate = jax.jvp(
    lambda s, x: wide(velocity)(s, t, x),
    (s, x),
    (jnp.ones_like(s), b),
  )
  g = b - v + warmup * expand(t - s, x) * rate
  return square(v - stop(v + normalized(g, constant)))


def normalized(g: jax.Array, constant: float = 0.1) -> jax.Array:
  """g / (|g| + c), |g| the norm of each sample (sCM, arXiv:2410.11081).

  Some public code divides |g| by the root of the number of coordinates; that
  is this, with c times that root, times that root.
  """
  return g / (expand(jnp.sqrt(square(g)), g) + constant)


def _drift(
  tangent: str | jax.Array, slope: jax.Array, x: jax.Array
) -> jax.Array | None:
  if isinstance(tangent, str):
    match tangent:
      case "data":
        return slope
      case "model":
        return None
    raise ValueError(f"unknown tangent {tangent!r}: 'data', 'model' or array")
  if tangent.shape != x.shape:
    raise ValueError(f"tangent {tangent.shape} must be like x {x.shape}")
  return tangent.astype(x.dtype)
