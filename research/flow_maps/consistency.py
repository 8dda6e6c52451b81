"""Consistency models: the flow map with its second time fixed at the data.

Continuous time is the Eulerian equation at t = 1 (`mean_flow`, `losses`),
discrete time the semigroup with a first step that the data or a teacher takes.
sCM has its own network and clock (TrigFlow).
"""

import jax
import jax.numpy as jnp

from giantsteps.research.flow_maps.interpolants import (
  Interpolant,
  Velocity,
  expand,
)
from giantsteps.research.flow_maps.losses import eulerian_loss, start
from giantsteps.research.flow_maps.mean_flow import mean_flow_loss, normalized
from giantsteps.research.flow_maps.residuals import square, stop, wide
from giantsteps.samplers.diffusion.guidance import Predict


def consistency_training_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  I: Interpolant,
) -> jax.Array:
  """Continuous-time consistency training: `mean_flow_loss` at t = 1.

  In v_{s,1}, so it is the loss in X_{s,1} = x + (1 - s) v_{s,1}
  (arXiv:2303.01469, section 5) with its gradient divided by 1 - s.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1].
    I: the interpolant.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.
  """
  return mean_flow_loss(velocity, x0, x1, s, jnp.ones_like(s), I)


def consistency_distillation_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  I: Interpolant,
  *,
  teacher: Velocity,
  stop_gradient: str = "full",
) -> jax.Array:
  """Continuous-time consistency distillation: `eulerian_loss` at t = 1.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1].
    I: the interpolant.
    teacher: asked on the diagonal, teacher(s, s, x).
    stop_gradient: as in `eulerian_loss`.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.
  """
  one = jnp.ones_like(s)
  return eulerian_loss(
    velocity, x0, x1, s, one, I, teacher=teacher, stop_gradient=stop_gradient
  )


def discrete_consistency_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  u: jax.Array,
  I: Interpolant,
  t: jax.Array | None = None,
  *,
  teacher: Velocity | None = None,
  target: Velocity | None = None,
) -> jax.Array:
  """|X_{s,t}(x_s) - sg X_{u,t}(x_u)|^2, s < u < t, at x_s = I_s.

  Consistency training (arXiv:2303.01469) where x_u = I_u of the same pair,
  distillation where a teacher steps from x_s to x_u; with t below 1 the
  two-time loss of CTM (arXiv:2310.02279). It shrinks like (u - s)^2; divided
  by (u - s)(t - s), its gradient tends to that of `mean_flow_loss`. 4 F with
  the gradient, and the teacher's.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1].
    u: [B] the later time.
    I: the interpolant.
    t: [B] the time to go to; None is 1, data.
    teacher: its average velocity from s to u, teacher(s, u, x): a velocity
      field of one time makes an Euler step. None is training.
    target: the map from u to t; None is the student.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit.
  """
  s, u, x, _ = start(x0, x1, s, u, I)
  if t is not None and t.shape != s.shape:
    raise ValueError(f"t {t.shape} must be [B] like s {s.shape}")
  t = jnp.ones_like(s) if t is None else t.astype(s.dtype)
  if teacher is None:
    later, _ = I(u, x0.astype(x.dtype), x1.astype(x.dtype))
  else:
    later = x + expand(u - s, x) * wide(teacher)(s, u, x)
  jump = lambda v, s, x: x + expand(t - s, x) * wide(v)(s, t, x)
  goal = stop(jump(target or velocity, u, later))
  return square(jump(velocity, s, x) - goal)


def scm_loss(
  network: Predict,
  x0: jax.Array,
  x1: jax.Array,
  angle: jax.Array,
  *,
  sigma_d: float,
  teacher: Predict | None = None,
  warmup: float | jax.Array = 1.0,
  constant: float = 0.1,
) -> jax.Array:
  """sCM (arXiv:2410.11081, eq. 8): |F - sg[F + g / (|g| + c)]|^2.

  x = cos(angle) x1 + sin(angle) x0, f = cos x - sin sigma_d F(x / sigma_d),
  g = cos(angle) df/d angle with its second half warmed up:

      g = -cos^2 (sigma_d F - dx) - r (cos sin x + sigma_d cos sin dF),

  dx = cos x0 - sin x1 (training) or sigma_d times the teacher's output
  (distillation), dF the derivative of F along it, from a jvp whose tangents
  carry the factor cos sin so that they stay bounded in bfloat16. Its weight
  is e^{-w} / D, w of `weights.log_weight`; F itself is not multiplied by
  sigma_d here, as in the paper. 4 F with the gradient.

  Args:
    network: F(x / sigma_d, angle), x [B, ...], angle [B] -> [B, ...].
    x0: [B, ...] noise of standard deviation sigma_d.
    x1: [B, ...] data of standard deviation sigma_d.
    angle: [B] in (0, pi/2), pi/2 noise (`clocks.angle`, `times.trig_flow`).
    sigma_d: of the data, > 0.
    teacher: a trained velocity in the same form as network.
    warmup: r, from 0 to 1 over the first 10,000 steps.
    constant: c.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted: at most 1.

  Raises:
    ValueError: shapes that do not fit, sigma_d not positive.
  """
  if not sigma_d > 0:
    raise ValueError(f"sigma_d={sigma_d} must be positive")
  angle, _, x, slope = start(x0, x1, angle, angle, _TRIG_FLOW)
  cos, sin = expand(jnp.cos(angle), x), expand(jnp.sin(angle), x)
  if teacher is not None:
    slope = sigma_d * stop(teacher(x / sigma_d, angle).astype(x.dtype))
  out, rate = jax.jvp(
    lambda x, angle: network(x, angle).astype(x.dtype),
    (x / sigma_d, angle),
    (cos * sin * slope / sigma_d, jnp.cos(angle) * jnp.sin(angle)),
  )
  g = -(cos**2) * (sigma_d * out - slope)
  g = g - warmup * (cos * sin * x + sigma_d * rate)
  return square(out - stop(out + normalized(g, constant)))


# noise sin, data cos; the angle rises toward noise
_TRIG_FLOW = Interpolant(
  lambda angle: jnp.sin(angle),
  lambda angle: jnp.cos(angle),
  lambda angle: jnp.cos(angle),
  lambda angle: -jnp.sin(angle),
)
