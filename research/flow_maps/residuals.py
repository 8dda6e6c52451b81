"""The three equations of a flow map as residuals, gradients stopped as asked.

Flow maps and self-distillation (arXiv:2505.18825). With X_{s,t}(x) = x +
h v_{s,t}(x), h = t - s, and b = the velocity on the diagonal, each of

    Lagrangian  d_t X_{s,t}(x) = b_t(X_{s,t}(x))
    Eulerian    d_s X_{s,t}(x) + J X_{s,t}(x) b_s(x) = 0
    semigroup   X_{s,t}(x) = X_{u,t}(X_{s,u}(x))

says what v_{s,t}(x) is, namely, with g = (u - s) / h,

    b_t(X_{s,t}(x)) - h d_t v_{s,t}(x)
    b_s(x) + h (d_s v_{s,t}(x) + J v_{s,t}(x) b_s(x))
    g v_{s,u}(x) + (1 - g) v_{u,t}(X_{s,u}(x)).

`residual` is v_{s,t}(x) minus that. Nothing is divided by h, so all of them
are finite, and the first two exactly 0, at s = t. Every loss of the off
diagonal is one call of it: which terms carry gradients is data (`Moving`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from giantsteps.research.flow_maps.interpolants import Velocity, expand


class Moving(NamedTuple):
  """Which terms of a residual carry gradients besides v_{s,t}(x) itself.

  False is frozen (`jax.lax.stop_gradient`), with all that leads to the term.
  """

  time: bool = False  # h d_t v (Lagrangian) or h d_s v (Eulerian)
  space: bool = False  # h (J v) b (Eulerian)
  velocity: bool = False  # b; for the semigroup the two shorter steps


def residual(
  equation: str,
  student: Velocity,
  s: jax.Array,
  t: jax.Array,
  x: jax.Array,
  moving: Moving,
  *,
  teacher: Velocity | None = None,
  u: jax.Array | None = None,
  drift: jax.Array | None = None,
) -> jax.Array:
  """v_{s,t}(x) minus what `equation` says that it is.

  Args:
    equation: "lagrangian", "eulerian" or "semigroup".
    student: velocity(s, t, x) that is trained; every derivative is its own.
    s: [B] from.
    t: [B] to; t < s is backward and allowed.
    x: [B, ...] the state at s, float32 or wider.
    moving: the terms that carry gradients.
    teacher: velocity(s, t, x), asked on the diagonal only (Lagrangian,
      Eulerian) or for the two shorter steps (semigroup); None is the student.
    u: [B] between s and t (semigroup); None is the middle.
    drift: [B, ...] b_s(x) itself (Eulerian), instead of asking the teacher.

  Returns:
    [B, ...] float32 (or wider).

  Raises:
    ValueError: an unknown equation.
  """
  student, teacher = wide(student), wide(teacher or student)
  match equation:
    case "lagrangian":
      return _lagrangian(student, teacher, s, t, x, moving)
    case "eulerian":
      if drift is None:
        drift = teacher(s, s, x)
      return _eulerian(student, drift, s, t, x, moving)
    case "semigroup":
      target = _two_steps(teacher, s, t, x, u)
      return student(s, t, x) - stop(target, not moving.velocity)
  raise ValueError(
    f"unknown equation {equation!r}: lagrangian, eulerian or semigroup"
  )


def _lagrangian(student, teacher, s, t, x, moving):
  v, slope = jax.jvp(lambda t: student(s, t, x), (t,), (jnp.ones_like(t),))
  h = expand(t - s, x)
  there = stop(x + h * v, not moving.velocity)
  b = stop(teacher(t, t, there), not moving.velocity)
  return v + h * stop(slope, not moving.time) - b


def _eulerian(student, b, s, t, x, moving):
  b = stop(b, not moving.velocity)
  at = lambda s, x: student(s, t, x)
  one = jnp.ones_like(s)
  if moving.time == moving.space:
    v, slope = jax.jvp(at, (s, x), (one, b))
    slope = stop(slope, not moving.time)
  else:  # two tangents of one primal
    v, push = jax.linearize(at, s, x)
    in_time = stop(push(one, jnp.zeros_like(x)), not moving.time)
    in_space = stop(push(jnp.zeros_like(s), b), not moving.space)
    slope = in_time + in_space
  return v - (b + expand(t - s, x) * slope)


def _two_steps(velocity, s, t, x, u):
  """The average velocity from s to t of two steps that meet at u."""
  if u is None:
    u, share = (s + t) / 2, jnp.full_like(s, 0.5)
  else:
    h = t - s
    share = jnp.where(h == 0, 0, (u - s) / jnp.where(h == 0, 1, h))
  share = expand(share, x)
  first = velocity(s, u, x)
  there = x + expand(u - s, x) * first
  return share * first + (1 - share) * velocity(u, t, there)


def wide(velocity: Velocity) -> Velocity:
  """The velocity in the dtype of x, and in no shape but that of x."""

  def call(s, t, x):
    v = velocity(s, t, x)
    if v.shape != x.shape:
      raise ValueError(
        f"velocity(s, t, x) is {v.shape}: must be {x.shape}, as x"
      )
    return v.astype(x.dtype)

  return call


def stop(x: jax.Array, frozen: bool = True) -> jax.Array:
  """x, without its gradient where `frozen`."""
  return jax.lax.stop_gradient(x) if frozen else x


def square(x: jax.Array) -> jax.Array:
  """|x|^2 of each sample, summed over coordinates: [B, ...] -> [B]."""
  return jnp.sum(x**2, axis=range(1, x.ndim))
