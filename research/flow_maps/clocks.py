"""The clocks and signs of other papers, and ours (0 noise, 1 data).

| paper | time | network |
|---|---|---|
| MeanFlow (arXiv:2505.13447) | tau = 1 - s from, r = 1 - t to | u(x, r, tau) = -v |
| EDM (arXiv:2206.00364) | sigma = sigma_0 a / b | D(x / b, sigma) = E[x1 given x] |
| TrigFlow (arXiv:2410.11081) | angle = pi/2 (1 - t) | sigma_d F(x / sigma_d, angle) = dx / d angle |
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.research.flow_maps.interpolants import (
  Interpolant,
  Velocity,
  expand,
)

AverageVelocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def to_mean_flow(velocity: Velocity) -> AverageVelocity:
  """u(x, r, tau) = -v_{1-tau, 1-r}(x): r <= tau, noise at tau = 1.

  Then x_r = x - (tau - r) u(x, r, tau) is X_{1-tau, 1-r}(x).
  """
  return lambda x, r, tau: -velocity(1 - tau, 1 - r, x)


def from_mean_flow(u: AverageVelocity) -> Velocity:
  """v_{s,t}(x) = -u(x, 1 - t, 1 - s), the inverse of `to_mean_flow`."""
  return lambda s, t, x: -u(x, 1 - t, 1 - s)


def noise_level(I: Interpolant, t: jax.Array, sigma_0: float = 1.0):
  """EDM's sigma = sigma_0 a / b of time t, any shape; inf at t = 0."""
  return sigma_0 * I.a(t) / I.b(t)


def time_of_noise_level(
  I: Interpolant, sigma: jax.Array, sigma_0: float = 1.0
) -> jax.Array:
  """t with sigma_0 a(t) / b(t) = sigma, by bisection: exact to rounding.

  Args:
    I: the interpolant; a / b falls.
    sigma: >= 0, any shape; inf is t = 0.
    sigma_0: standard deviation of the noise.

  Returns:
    t in [0, 1], like sigma (no gradient).
  """
  sigma = jax.lax.stop_gradient(jnp.asarray(sigma))
  # both finite where sigma is 0 or inf
  data, noise = 1 / (1 + sigma), 1 / (1 + 1 / sigma)

  def halve(_, ends):
    low, high = ends
    mid = (low + high) / 2
    early = sigma_0 * I.a(mid) * data > I.b(mid) * noise
    return jnp.where(early, mid, low), jnp.where(early, high, mid)

  ends = (jnp.zeros_like(sigma), jnp.ones_like(sigma))
  low, high = jax.lax.fori_loop(
    0, jnp.finfo(sigma.dtype).nmant + 8, halve, ends
  )
  # the ends themselves, not next to them
  return jnp.where(sigma == 0, 1, jnp.where(jnp.isinf(sigma), 0, high))


def to_edm(I: Interpolant, velocity: Velocity, sigma_0: float = 1.0) -> Denoise:
  """D(y, sigma) = E[x1 | x1 + sigma eps = y], sigma [B], from the diagonal."""

  def denoise(y, sigma):
    t = time_of_noise_level(I, sigma, sigma_0)
    a, b, da = (expand(f(t), y) for f in (I.a, I.b, I.da))
    wronskian = a * expand(I.db(t), y) - da * b
    return (a * velocity(t, t, b * y) - da * b * y) / wronskian

  return denoise


def from_edm(
  I: Interpolant, denoise: Denoise, sigma_0: float = 1.0
) -> Velocity:
  """b_t(x) = (a' x + W D(x / b, sigma)) / a, a teacher for 0 < t < 1.

  W = a b' - a' b. Both ends are singular (sigma = inf and a = 0): draw t
  inside, as EDM does by sigma_min and sigma_max.
  """

  def velocity(s, t, x):
    del s
    a, b, da = (expand(f(t), x) for f in (I.a, I.b, I.da))
    wronskian = a * expand(I.db(t), x) - da * b
    data = denoise(x / b, noise_level(I, t, sigma_0))
    return (da * x + wronskian * data) / a

  return velocity


def angle(t: jax.Array) -> jax.Array:
  """TrigFlow's angle pi/2 (1 - t), pi/2 noise. `time_of_angle` inverts."""
  return np.pi / 2 * (1 - t)


def time_of_angle(theta: jax.Array) -> jax.Array:
  """t = 1 - theta / (pi/2)."""
  return 1 - theta / (np.pi / 2)


def to_trig_flow(velocity: Velocity, sigma_d: float) -> Denoise:
  """F(y, angle) = -2 / (pi sigma_d) v_{t,t}(sigma_d y), the diagonal.

  For a velocity of the trigonometric interpolant with sigma_0 = sigma_d.
  """

  def network(y, theta):
    t = time_of_angle(theta)
    return -2 / (np.pi * sigma_d) * velocity(t, t, sigma_d * y)

  return network


def from_trig_flow(network: Denoise, sigma_d: float) -> Velocity:
  """b_t(x) = -pi/2 sigma_d F(x / sigma_d, angle), inverse of `to_trig_flow`."""

  def velocity(s, t, x):
    del s
    return -np.pi / 2 * sigma_d * network(x / sigma_d, angle(t))

  return velocity
