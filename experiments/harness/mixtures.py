"""Mixtures of Gaussians: problems whose denoiser and exact ODE are known."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # np.ndarray or jax.Array


class Mixture(NamedTuple):
  """p(x0) = sum_k w_k N(mu_k, diag(var_k)), float64."""

  w: np.ndarray  # [K]
  mu: np.ndarray  # [K, D]
  var: np.ndarray  # [K, D]

  @property
  def std(self) -> float:
    """Standard deviation of a coordinate, pooled over all of them."""
    second = self.w @ (self.var + self.mu**2) - (self.w @ self.mu) ** 2
    return float(np.sqrt(second.mean()))


def two_modes() -> Mixture:
  """Two components on a line, unequal in weight and width."""
  w, mu, var = np.array([0.4, 0.6]), [[-1.0], [1.0]], [[0.04], [0.09]]
  return Mixture(w, np.array(mu), np.array(var))


def gmm2() -> Mixture:
  """Three components in the plane, std 1.05."""
  mu = [[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]]
  var = [[0.04, 0.09], [0.10, 0.02], [0.05, 0.05]]
  return Mixture(np.array([0.5, 0.3, 0.2]), np.array(mu), np.array(var))


def gmm8() -> Mixture:
  """Four components in 8 dimensions, std 0.85."""
  k, d = np.arange(4)[:, None], np.arange(8)
  mu = 1.2 * np.cos(1 + 2 * k + 0.7 * d)
  var = 0.02 + 0.05 * (1 + np.sin(k + 1.3 * d))
  return Mixture(np.array([0.4, 0.3, 0.2, 0.1]), mu, var)


def gmm32() -> Mixture:
  """Six components in 32 dimensions, std 3."""
  k, d = np.arange(6)[:, None], np.arange(32)
  w = np.array([0.3, 0.25, 0.15, 0.12, 0.1, 0.08])
  mu = np.cos(2 + 1.7 * k + 0.9 * d + 0.3 * k * d)
  var = 0.01 + 0.1 * (1 + np.sin(2 * k + 0.8 * d)) ** 2
  scale = 3.0 / Mixture(w, mu, var).std
  return Mixture(w, scale * mu, scale**2 * var)


def posterior(
  mixture: Mixture, x: Array, alpha: Any, sigma: Any
) -> tuple[Array, Array]:
  """(E[x0 | x], E[eps | x]) for x = alpha x0 + sigma eps.

  Args:
    mixture: the data.
    x: [B, D]; NumPy is computed in NumPy, float64, anything else in JAX.
    alpha: scalar >= 0.
    sigma: scalar >= 0, not 0 together with alpha.
  """
  xp = np if isinstance(x, np.ndarray) else jnp
  w, mu, var = (xp.asarray(leaf, x.dtype)[None] for leaf in mixture)
  total = alpha**2 * var + sigma**2  # [1, K, D]
  d = x[:, None] - alpha * mu
  log_r = xp.log(w) - xp.sum(d**2 / total + xp.log(total), -1) / 2  # [B, K]
  r = xp.exp(log_r - log_r.max(-1, keepdims=True))
  r = (r / r.sum(-1, keepdims=True))[..., None]
  x0 = xp.sum(r * (mu + alpha * var * d / total), 1)
  return x0, xp.sum(r * sigma * d / total, 1)


def exact_end(
  mixture: Mixture,
  x: np.ndarray,
  start: tuple[float, float],
  end: tuple[float, float],
  num_steps: int = 600,
) -> np.ndarray:
  """The probability-flow ODE from `start` to `end`, solved in float64.

  Classical Runge-Kutta on y = x / hypot(s alpha, sigma), dy / dphi =
  (s alpha eps - sigma x0 / s) / hypot, phi = atan2(sigma, s alpha), s the
  data's standard deviation: smooth at both ends. It shares nothing with the
  solvers that are measured against it; 600 steps leave at most 2e-8.

  Args:
    mixture: the data.
    x: [B, D] float64, the state at `start`.
    start: (alpha, sigma), nearer to noise.
    end: (alpha, sigma).
    num_steps: of four evaluations each.
  """
  s = mixture.std
  first, last = (np.arctan2(sigma, s * alpha) for alpha, sigma in (start, end))
  radius = lambda point: np.hypot(s * point[0], point[1])
  with jax.enable_x64(True):
    y = _integrate(
      mixture, jnp.asarray(x) / radius(start), s, first, last, num_steps
    )
  return np.asarray(y) * radius(end)


@functools.partial(jax.jit, static_argnames="num_steps")
def _integrate(mixture, y, s, first, last, num_steps):
  h = (last - first) / num_steps

  def slope(y, phi):
    alpha, sigma = jnp.cos(phi), jnp.sin(phi)
    x0, eps = posterior(mixture, y, alpha / s, sigma)
    return alpha * eps - sigma * x0 / s

  def step(i, y):
    phi = first + h * i
    k1 = slope(y, phi)
    k2 = slope(y + h / 2 * k1, phi + h / 2)
    k3 = slope(y + h / 2 * k2, phi + h / 2)
    k4 = slope(y + h * k3, phi + h)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

  return jax.lax.fori_loop(0, num_steps, step, y)
