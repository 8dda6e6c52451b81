"""Losses of flow matching and flow maps, one value per sample.

Flow maps and self-distillation (arXiv:2505.18825). Squared norms are summed
over coordinates, not averaged, and no weight is applied: the caller weighs and
averages over the batch. The algebra is float32 (or wider) even where the
network runs in bfloat16.

All of them take `velocity(s, t, x)`, s and t [B], x [B, ...] -> [B, ...], a
closure over the parameters, and are native to the batch: no vmap of the
network. `teacher=None` is the student itself (self-distillation), an EMA of it
or another network is a closure over other parameters; for the Lagrangian and
Eulerian losses a plain velocity field `lambda s, t, x: b(t, x)` will do
(distillation, arXiv:2406.07507). `stop_gradient` says what is frozen on the
teacher's side, for any teacher:

| | Lagrangian | Eulerian | progressive |
|---|---|---|---|
| "full" | b and the point X it is asked at | J X b | the two shorter steps |
| "convex" | | b, not J X | |
| "none" | nothing | nothing | nothing |

"full" is what the paper calls "convex" for the Lagrangian loss. Frozen terms
cost no backward pass. Dropout must be off in every off-diagonal loss.
"""

import jax
import jax.numpy as jnp

from giantsteps.research.flow_maps import residuals
from giantsteps.research.flow_maps.interpolants import (
  Interpolant,
  Velocity,
  expand,
)
from giantsteps.research.flow_maps.residuals import Moving, square, stop, wide


def flow_matching_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  t: jax.Array,
  I: Interpolant,
) -> jax.Array:
  """|v_{t,t}(I_t) - dI_t/dt|^2 (arXiv:2210.02747), the diagonal of a flow map.

  Three forward passes' worth of FLOPs with its gradient (3 F).

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
  t, _, x, slope = start(x0, x1, t, t, I)
  return square(wide(velocity)(t, t, x) - slope)


def lagrangian_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  I: Interpolant,
  *,
  teacher: Velocity | None = None,
  stop_gradient: str = "full",
) -> jax.Array:
  """|d_t X_{s,t}(x) - b_t(X_{s,t}(x))|^2 at x = I_s: LSD, with a teacher LMD.

  d_t X = v + h d_t v by one jvp in t, whose primal is also the teacher's
  input. 7 F with the gradient, 9 F with stop_gradient="none".

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1], the time of I_s.
    t: [B], the time to go to.
    I: the interpolant.
    teacher: asked on the diagonal, teacher(t, t, x); None is the student.
    stop_gradient: "full" or "none".

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit, an unknown stop_gradient.
  """
  s, t, x, _ = start(x0, x1, s, t, I)
  moving = _choose(
    stop_gradient, full=Moving(time=True), none=Moving(time=True, velocity=True)
  )
  return square(
    residuals.residual("lagrangian", velocity, s, t, x, moving, teacher=teacher)
  )


def eulerian_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  I: Interpolant,
  *,
  teacher: Velocity | None = None,
  stop_gradient: str = "full",
) -> jax.Array:
  """|d_s X_{s,t}(x) + J X_{s,t}(x) b_s(x)|^2 at x = I_s: ESD, or EMD.

  With the gradient 8 F ("full": two tangents of one primal), 7 F ("convex")
  or 9 F ("none").

  Differs from the paper: J is the student's (frozen under "full") even where
  the teacher is another network, so that a teacher may be a velocity field
  that knows no second time. For self-distillation it is the same.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1], the time of I_s.
    t: [B], the time to go to.
    I: the interpolant.
    teacher: asked on the diagonal, teacher(s, s, x); None is the student.
    stop_gradient: "full", "convex" or "none".

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit, an unknown stop_gradient.
  """
  s, t, x, _ = start(x0, x1, s, t, I)
  moving = _choose(
    stop_gradient,
    full=Moving(time=True),
    convex=Moving(time=True, space=True),
    none=Moving(time=True, space=True, velocity=True),
  )
  return square(
    residuals.residual("eulerian", velocity, s, t, x, moving, teacher=teacher)
  )


def progressive_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  I: Interpolant,
  u: jax.Array | None = None,
  *,
  teacher: Velocity | None = None,
  stop_gradient: str = "full",
) -> jax.Array:
  """|v_{s,t} - g v_{s,u} - (1 - g) v_{u,t}(X_{s,u})|^2 at x = I_s: PSD, PFMM.

  g = (u - s) / (t - s). The residual of X_{s,t} = X_{u,t} o X_{s,u} divided by
  t - s, so that short steps weigh as much as long ones. No jvp; 5 F with the
  gradient.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1], the time of I_s.
    t: [B], the time to go to.
    I: the interpolant.
    u: [B] between s and t (PSD-U); None is the middle (PSD-M).
    teacher: takes the two shorter steps; None is the student.
    stop_gradient: "full" or "none".

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit, an unknown stop_gradient.
  """
  s, t, x, _ = start(x0, x1, s, t, I)
  if u is not None:
    u = _like(u, s, "u")
  moving = _choose(stop_gradient, full=Moving(), none=Moving(velocity=True))
  return square(
    residuals.residual(
      "semigroup", velocity, s, t, x, moving, teacher=teacher, u=u
    )
  )


def shortcut_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  I: Interpolant,
  *,
  teacher: Velocity,
  clip: float | None = 4.0,
) -> jax.Array:
  """Shortcut models (arXiv:2410.12557): two halves of an EMA, both clipped.

  `progressive_loss` with u in the middle; what the paper's code adds is that
  the state in the middle and the target are clipped. 5 F with the gradient.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] start of a dyadic step (`times.dyadic`).
    t: [B] its end.
    I: the interpolant; `linear` in the paper.
    teacher: usually the EMA of the student.
    clip: bound of |middle| and |target|, in units of latents with standard
      deviation near 1: it hides errors where data are larger. None for none.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit.
  """
  s, t, x, _ = start(x0, x1, s, t, I)
  bound = lambda y: y if clip is None else jnp.clip(y, -clip, clip)
  u = (s + t) / 2
  first = wide(teacher)(s, u, x)
  middle = bound(x + expand(u - s, x) * first)
  second = wide(teacher)(u, t, middle)
  target = stop(bound((first + second) / 2))
  return square(wide(velocity)(s, t, x) - target)


def discrete_lagrangian_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  I: Interpolant,
  delta: float | jax.Array,
  *,
  teacher: Velocity | None = None,
  stop_gradient: str = "full",
) -> jax.Array:
  """|(X_{s,t}(x) - y - delta b(y)) / delta|^2, y = X_{s,t-delta}(x).

  The Lagrangian loss by a finite difference, for networks without a jvp rule.
  The value tends to it as delta -> 0; the gradient only under "convex" and
  "none". Under "full" v_{s,t} alone moves, its gradient grows like 1/delta and
  its direction is that of `frozen_lagrangian_loss`.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1], the time of I_s.
    t: [B], the time to go to; t - delta must be a time the networks know.
    I: the interpolant.
    delta: the step, [] or [B], not 0. In float32 its rounding error is about
      1e-7 |x| / delta: not below 1e-3.
    teacher: moves y on, b(y) = teacher(u, u, y) at u = t - delta; None is the
      student.
    stop_gradient: "full" (y and b(y) frozen: 5 F), "convex" (b(y) only: 7 F)
      or "none" (9 F).

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit, an unknown stop_gradient.
  """
  s, t, x, _ = start(x0, x1, s, t, I)
  delta = jnp.broadcast_to(jnp.asarray(delta, x.dtype), t.shape)
  before, velocity_moves = _choose(
    stop_gradient, full=(False, False), convex=(True, False), none=(True, True)
  )
  u = t - delta
  v = wide(velocity)(s, t, x)
  short = stop(wide(velocity)(s, u, x), not before)
  y = stop(x + expand(u - s, x) * short, not velocity_moves)
  b = wide(teacher or velocity)(u, u, y)
  b = stop(b, not velocity_moves)
  # h v - (h - delta) short, over delta
  change = v + expand((u - s) / delta, x) * (v - short)
  return square(change - b)


def frozen_lagrangian_loss(
  velocity: Velocity,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  I: Interpolant,
  *,
  teacher: Velocity | None = None,
) -> jax.Array:
  """Experimental, of no paper: v_{s,t} <- sg[b_t(X_{s,t}) - h d_t v_{s,t}].

  The Lagrangian residual with its tangent frozen too, as MeanFlow freezes the
  Eulerian one: no gradient passes through the jvp. 5 F instead of 7 F, the
  same value as `lagrangian_loss`, another gradient. Whether it trains as well
  is not known.

  Args:
    velocity: the student, velocity(s, t, x).
    x0: [B, ...] noise, standard deviation sigma_0.
    x1: [B, ...] data.
    s: [B] in [0, 1], the time of I_s.
    t: [B], the time to go to.
    I: the interpolant.
    teacher: asked on the diagonal, teacher(t, t, x); None is the student.

  Returns:
    [B] float32 (or wider), summed over coordinates, unweighted.

  Raises:
    ValueError: shapes that do not fit.
  """
  s, t, x, _ = start(x0, x1, s, t, I)
  return square(
    residuals.residual(
      "lagrangian", velocity, s, t, x, Moving(), teacher=teacher
    )
  )


def start(
  x0: jax.Array, x1: jax.Array, s: jax.Array, t: jax.Array, I: Interpolant
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """(s, t, I_s, dI_s/ds) in float32 or wider, after a look at the shapes."""
  s, t = jnp.asarray(s), jnp.asarray(t)
  if x0.shape != x1.shape or s.shape != x0.shape[:1]:
    raise ValueError(
      f"x0 {x0.shape} and x1 {x1.shape} must agree and times {s.shape} be [B]"
    )
  dtype = jnp.promote_types(x1.dtype, jnp.float32)
  s = s.astype(dtype)
  x, slope = I(s, x0.astype(dtype), x1.astype(dtype))
  return s, _like(t, s, "t"), x, slope


def _like(t: jax.Array, s: jax.Array, name: str) -> jax.Array:
  if t.shape != s.shape:
    raise ValueError(f"{name} {t.shape} must be [B] like s {s.shape}")
  return t.astype(s.dtype)


def _choose(stop_gradient: str, **known):
  if stop_gradient not in known:
    raise ValueError(
      f"unknown stop_gradient {stop_gradient!r}: {' or '.join(known)}"
    )
  return known[stop_gradient]
