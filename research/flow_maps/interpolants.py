"""Interpolants between noise and data, and the bridge to the samplers' clock.

Stochastic interpolants (arXiv:2303.08797) in the convention of flow maps
(arXiv:2505.18825): time rises from 0 (noise) to 1 (data),

    I_t = a(t) x0 + b(t) x1,   a(0) = b(1) = 1,   a(1) = b(0) = 0,

x0 is noise of standard deviation sigma_0, x1 is data. `samplers.diffusion`
counts the other way and calls the data x0; `to_sampler` is the one place
where the two clocks meet.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.samplers.diffusion import schedules

Velocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Interpolant:
  """The two weights and their derivatives; hashable, so it may be static.

  Each function takes NumPy and returns NumPy float64, or takes JAX (traced
  too) and returns JAX in the dtype it was given; any shape.

  Attributes:
    a: t in [0, 1] -> weight of the noise.
    b: t -> weight of the data.
    da: t -> da/dt.
    db: t -> db/dt.
  """

  a: Callable[[Any], Any]
  b: Callable[[Any], Any]
  da: Callable[[Any], Any]
  db: Callable[[Any], Any]

  def __call__(
    self, t: jax.Array, x0: jax.Array, x1: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """(I_t, dI_t/dt), t [] or [B], x0 (noise) and x1 (data) [B, ...]."""
    point = expand(self.a(t), x0) * x0 + expand(self.b(t), x1) * x1
    slope = expand(self.da(t), x0) * x0 + expand(self.db(t), x1) * x1
    return point, slope


def linear() -> Interpolant:
  """a = 1 - t, b = t: flow matching, rectified flow."""
  return Interpolant(_one_minus, _same, _minus_one, _one)


def trigonometric() -> Interpolant:
  """a = cos(pi t / 2), b = sin(pi t / 2): variance preserving, TrigFlow."""
  return Interpolant(_cos, _sin, _cos_rate, _sin_rate)


def endpoints(
  I: Interpolant, t: jax.Array, x: jax.Array, velocity: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(E[x0 | I_t = x], E[x1 | I_t = x]) from the velocity b_t(x).

  e0 = (b' x - b b_t) / W and e1 = (a b_t - a' x) / W, W = a b' - a' b, the
  solution of x = a e0 + b e1, b_t = a' e0 + b' e1. Finite on all of [0, 1]
  for `linear` and `trigonometric`.

  Args:
    I: the interpolant.
    t: [] or [B].
    x: [B, ...].
    velocity: [B, ...], b_t(x), the value and not the function.

  Returns:
    Two arrays [B, ...]: expected noise and expected data.
  """
  a, b, da, db = (expand(f(t), x) for f in (I.a, I.b, I.da, I.db))
  wronskian = a * db - da * b
  noise = (db * x - b * velocity) / wronskian
  return noise, (a * velocity - da * x) / wronskian


def score(
  I: Interpolant,
  t: jax.Array,
  x: jax.Array,
  velocity: jax.Array,
  sigma0: float = 1.0,
) -> jax.Array:
  """grad log p_t(x) = -E[x0 | x] / (a sigma0^2), x0 ~ N(0, sigma0^2 I).

  Singular at t = 1, where a = 0.

  Args:
    I: the interpolant.
    t: [] or [B], below 1.
    x: [B, ...].
    velocity: [B, ...], b_t(x), the value and not the function.
    sigma0: standard deviation of the noise.

  Returns:
    [B, ...].
  """
  noise, _ = endpoints(I, t, x, velocity)
  return -noise / (expand(I.a(t), x) * sigma0**2)


def from_schedule(
  schedule: schedules.Schedule, sigma_0: float = 1.0, num_nodes: int = 4096
) -> Interpolant:
  """Any path of `samplers.diffusion` as an interpolant.

  a(s) = sigma(t) / sigma_0 and b(s) = alpha(t) at t = t_max (1 - s), with x0 of
  standard deviation sigma_0. a(0) and b(0) are what the schedule has at its
  noisy end: 1 and 0 only nearly for variance-preserving ones, and for `edm`
  sigma_0 = sigma_max makes a(0) = 1, b = 1.

  NumPy times are answered by the schedule itself. Schedules are not traced, so
  JAX times read a table: cubic Hermite in sqrt(1 - s), in which the usual
  sigma ~ sqrt(t) is smooth. Values are within 1e-6 of the largest one, slopes
  within 1e-4 in float32; at the kinks of `discrete` slopes are within 2e-2. At
  s = 1 exactly, where some slopes are infinite, the traced slope is that of a
  point 1e-8 of the clock before.

  Args:
    schedule: its alpha_sigma must be defined from t = 0 on.
    sigma_0: standard deviation of the noise x0, > 0.
    num_nodes: of the table.

  Raises:
    ValueError: sigma_0 not positive.
  """
  if not sigma_0 > 0:
    raise ValueError(f"sigma_0={sigma_0} must be positive")
  scale = np.array([1.0, 1 / sigma_0])  # of alpha, sigma

  def exact(t):
    return np.stack(schedule.alpha_sigma(t), -1) * scale

  def exact_rate(t):  # in s
    return np.stack(schedule.rate(t), -1) * scale * -schedule.t_max

  def falling(s):
    return schedule.t_max * (1 - np.asarray(s, np.float64))

  root = np.linspace(0, 1, num_nodes + 1)
  value = exact(schedule.t_max * root**2)
  inside = np.maximum(root, 1e-10)  # the limit at 0
  slope = exact_rate(schedule.t_max * inside**2) * (-2 * inside[:, None])

  def weight(column):
    def of(s):
      if not isinstance(s, jax.Array):
        return exact(falling(s))[..., column]
      return _hermite(value[:, column], slope[:, column], jnp.sqrt(1 - s))[0]

    def rate(s):
      if not isinstance(s, jax.Array):
        return exact_rate(falling(s))[..., column]
      u = jnp.maximum(jnp.sqrt(1 - s), 1e-4)
      return _hermite(value[:, column], slope[:, column], u)[1] / (-2 * u)

    return of, rate

  (b, db), (a, da) = weight(0), weight(1)
  return Interpolant(a, b, da, db)


def _hermite(value, slope, u):
  """The cubic spline of nodes uniform in [0, 1], and its slope, at u."""
  num = len(value) - 1
  i = jnp.clip(jnp.floor(u * num), 0, num - 1).astype(jnp.int32)
  r = u * num - i
  at = lambda v, i: jnp.asarray(v, u.dtype)[i]
  m0, m1 = at(slope, i) / num, at(slope, i + 1) / num
  rise = at(np.diff(value), i)
  c2, c3 = 3 * rise - 2 * m0 - m1, m0 + m1 - 2 * rise
  # exact at the nodes, so at both ends
  y = at(value, i) * (1 + 2 * r) * (1 - r) ** 2
  y = y + at(value, i + 1) * r**2 * (3 - 2 * r)
  y = y + r * (1 - r) * (m0 * (1 - r) - m1 * r)
  return y, num * (m0 + r * (2 * c2 + r * 3 * c3))


def to_sampler(
  interpolant: Interpolant, velocity: Velocity, sigma_0: float = 1.0
) -> tuple[schedules.Schedule, Callable[[jax.Array, jax.Array], jax.Array]]:
  """The diagonal of a flow map as a model for `samplers.diffusion`.

  With the samplers' falling time t = 1 - s: alpha(t) = b(1 - t), sigma(t) =
  sigma_0 a(1 - t), and the model is -velocity(1 - t, 1 - t, x), the velocity
  d x / d t. Give the solvers `prediction="velocity"`, and x_T = sigma_0 times
  unit noise. (Only on the linear path with sigma_0 = 1 is that "flow".)

  Args:
    interpolant: a, b and their derivatives.
    velocity: velocity(s, t, x), s and t [B] rising, x [B, ...] -> [B, ...].
    sigma_0: standard deviation of the noise x0 the model was trained with.

  Returns:
    (schedule, predict) with t from t_max = 1 (noise) to t_min = 0 (data).
  """
  if not sigma_0 > 0:
    raise ValueError(f"sigma_0={sigma_0} must be positive")

  def alpha_sigma(t):
    s = 1 - np.asarray(t, np.float64)
    return interpolant.b(s), sigma_0 * interpolant.a(s)

  def rate(t):
    s = 1 - np.asarray(t, np.float64)
    return -interpolant.db(s), -sigma_0 * interpolant.da(s)

  def predict(x, t):
    return -velocity(1 - t, 1 - t, x)

  return schedules.from_functions(alpha_sigma, rate), predict


def expand(t: jax.Array, x: jax.Array) -> jax.Array:
  """t [] or [B] with axes of 1 behind, to broadcast against x [B, ...]."""
  t = jnp.asarray(t)
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def _same(t):
  return t


def _one_minus(t):
  return 1 - t


def _one(t):
  return 0 * t + 1


def _minus_one(t):
  return 0 * t - 1


def _sin(t):
  angle = np.pi / 2 * t
  if isinstance(angle, np.ndarray | np.generic | float):
    return np.sin(angle)
  return jnp.sin(angle)


def _cos(t):
  return _sin(1 - t)  # exactly 0 at t = 1


def _sin_rate(t):
  return np.pi / 2 * _cos(t)


def _cos_rate(t):
  return -np.pi / 2 * _sin(t)
