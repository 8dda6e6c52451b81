"""Flows with known answers: Gaussian to Gaussian, Gaussian to mixture.

Velocities and densities are exact; so is the flow map between Gaussians, and
in one dimension the map to a mixture (quantile transport). With independent
x0 and x1 the path I_t = a x0 + b x1 has a Gaussian (mixture) law at every t,
and b_t(x) = E[dI_t | I_t = x] follows from the conditional means
(arXiv:2303.08797). Constants are float64 on the host; what is computed has
the dtype of x.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special, stats
from numpy.typing import ArrayLike

from giantsteps.research.flow_maps.interpolants import Interpolant

Time = jax.Array | float
NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
  """N(m0, S0) to N(m1, S1); made by `gaussian`.

  S0 = M M', S1 = M diag(D) M' (generalised eigenproblem, so S0 and S1 need
  not commute), and c_t = a^2 + b^2 D is the variance in the coordinates
  M^-1 x.

  Attributes:
    I: the interpolant.
    m0, m1: [d] means of noise and data.
    M: [d, d].
    inverse: [d, d] M^-1.
    D: [d] >= 0.
  """

  I: Interpolant
  m0: np.ndarray
  m1: np.ndarray
  M: np.ndarray
  inverse: np.ndarray
  D: np.ndarray

  def velocity(self, t: Time, x: jax.Array) -> jax.Array:
    """b_t(x) = m_t' + M diag(c_t' / (2 c_t)) M^-1 (x - m_t).

    Args:
      t: [] or [B].
      x: [B, d].

    Returns:
      [B, d]. At t = 1 with singular S1 it is not finite.
    """
    I, t = self.I, self._times(t, x)
    half = I.a(t) * I.da(t) + I.b(t) * I.db(t) * self._row(self.D, x)
    drift = I.da(t) * self._row(self.m0, x) + I.db(t) * self._row(self.m1, x)
    return drift + self._scale(
      half / self._variance(t, x), x - self._mean(t, x)
    )

  def flow_map(self, s: Time, t: Time, x: jax.Array) -> jax.Array:
    """X_{s,t}(x) = m_t + M diag(sqrt(c_t / c_s)) M^-1 (x - m_s)."""
    s, t = self._times(s, x), self._times(t, x)
    ratio = jnp.sqrt(self._variance(t, x) / self._variance(s, x))
    return self._mean(t, x) + self._scale(ratio, x - self._mean(s, x))

  def average_velocity(self, s: Time, t: Time, x: jax.Array) -> jax.Array:
    """v_{s,t}(x) = (X_{s,t}(x) - x) / (t - s), without 0/0: a perfect network.

    The quotients of a and b are the means of their derivatives over [s, t],
    by 16 Gauss-Legendre nodes: exact to rounding for smooth paths.
    """
    I, s, t = self.I, self._times(s, x), self._times(t, x)
    inner = s + (t - s) * self._row((NODES + 1) / 2, x)  # [B, 16]
    slope_a, slope_b = (
      jnp.sum(f(inner) * self._row(WEIGHTS / 2, x), -1, keepdims=True)
      for f in (I.da, I.db)
    )
    c_s, c_t = self._variance(s, x), self._variance(t, x)
    slope_c = slope_a * (I.a(s) + I.a(t))
    slope_c = slope_c + slope_b * (I.b(s) + I.b(t)) * self._row(self.D, x)
    # of sqrt(c_t / c_s)
    slope = slope_c / (jnp.sqrt(c_s) * (jnp.sqrt(c_s) + jnp.sqrt(c_t)))
    drift = slope_a * self._row(self.m0, x) + slope_b * self._row(self.m1, x)
    return drift + self._scale(slope, x - self._mean(s, x))

  def jacobian(self, s: jax.Array, t: jax.Array) -> jax.Array:
    """J X_{s,t} = M diag(sqrt(c_t / c_s)) M^-1: s, t [B] -> [B, d, d]."""
    c_s, c_t = (self._variance(v[:, None], v) for v in (s, t))
    ratio = jnp.sqrt(c_t / c_s)[:, None]
    rows = self._row(self.M, s) * ratio
    return jnp.matmul(rows, self.inverse.astype(s.dtype))

  def log_density(self, t: Time, x: jax.Array) -> jax.Array:
    """log of the density of I_t at x [B, d], in nats: [B]."""
    t = self._times(t, x)
    z = (x - self._mean(t, x)) @ self.inverse.T.astype(x.dtype)
    c = self._variance(t, x)
    each = z**2 / c + jnp.log(2 * jnp.pi * c)
    volume = float(np.linalg.slogdet(self.M)[1])
    return -jnp.sum(each, -1) / 2 - volume

  def _times(self, t, x):
    """[] or [B] to [1, 1] or [B, 1]."""
    return jnp.asarray(t, x.dtype).reshape(-1, 1)

  def _row(self, m, x):
    return m.astype(x.dtype)[None]

  def _mean(self, t, x):
    return self.I.a(t) * self._row(self.m0, x) + self.I.b(t) * self._row(
      self.m1, x
    )

  def _variance(self, t, x):
    return self.I.a(t) ** 2 + self.I.b(t) ** 2 * self._row(self.D, x)

  def _scale(self, diagonal, x):
    """M diag M^-1 x for each row."""
    z = diagonal * (x @ self.inverse.T.astype(x.dtype))
    return z @ self.M.T.astype(x.dtype)


def gaussian(
  I: Interpolant, m0: ArrayLike, S0: ArrayLike, m1: ArrayLike, S1: ArrayLike
) -> Gaussian:
  """The flow between independent N(m0, S0) and N(m1, S1).

  Args:
    I: the interpolant.
    m0: [d] mean of the noise.
    S0: [d, d] its covariance, positive definite.
    m1: [d] mean of the data.
    S1: [d, d] its covariance, positive semidefinite.

  Raises:
    ValueError: shapes that do not fit, a covariance that is not one.
  """
  m0, S0, m1, S1 = (np.asarray(v, np.float64) for v in (m0, S0, m1, S1))
  if m0.ndim != 1 or m1.shape != m0.shape:
    raise ValueError(f"means must be [d]: m0 {m0.shape}, m1 {m1.shape}")
  for name, S in (("S0", S0), ("S1", S1)):
    if S.shape != m0.shape * 2 or not np.allclose(S, S.T):
      raise ValueError(f"{name} must be symmetric [d, d]: {S}")
  if np.linalg.eigvalsh(S0)[0] <= 0:
    raise ValueError(f"S0 must be positive definite: {S0}")
  lower = np.linalg.cholesky(S0)
  half = np.linalg.solve(lower, S1)
  D, Q = np.linalg.eigh(np.linalg.solve(lower, half.T))
  if D[0] < -1e-12 * abs(D[-1]):
    raise ValueError(f"S1 must be positive semidefinite: {S1}")
  inverse = Q.T @ np.linalg.inv(lower)
  return Gaussian(I, m0, m1, lower @ Q, inverse, np.maximum(D, 0))


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """N(0, sigma0^2 I) to sum_k w_k N(mu_k, s_k^2 I); made by `mixture`.

  Attributes:
    I: the interpolant.
    sigma0: standard deviation of the noise.
    weights: [K], sum 1.
    means: [K, d].
    stds: [K].
  """

  I: Interpolant
  sigma0: float
  weights: np.ndarray
  means: np.ndarray
  stds: np.ndarray

  def velocity(self, t: Time, x: jax.Array) -> jax.Array:
    """b_t(x), the posterior mean of the components' velocities.

    sum_k r_k(x) [b' mu_k + (a a' sigma0^2 + b b' s_k^2) / c_k (x - b mu_k)],
    c_k = a^2 sigma0^2 + b^2 s_k^2.

    Args:
      t: [] or [B].
      x: [B, d].

    Returns:
      [B, d].
    """
    I, t = self.I, jnp.asarray(t, x.dtype).reshape(-1, 1)
    noise, data = self.sigma0**2, self._row(self.stds**2, x)
    log, off, c = self._components(t, x)
    posterior = jax.nn.softmax(log, -1)  # [B, K]
    gain = (I.a(t) * I.da(t) * noise + I.b(t) * I.db(t) * data) / c
    drift = I.db(t)[..., None] * self.means.astype(x.dtype)[None]
    each = drift + gain[..., None] * off  # [B, K, d]
    return jnp.sum(posterior[..., None] * each, 1)

  def log_density(self, t: Time, x: jax.Array) -> jax.Array:
    """log of the density of I_t at x [B, d], in nats: [B]."""
    t = jnp.asarray(t, x.dtype).reshape(-1, 1)
    return special.logsumexp(self._components(t, x)[0], -1)

  def flow_map(self, s: Time, t: Time, x: jax.Array) -> jax.Array:
    """X_{s,t}(x) = F_t^-1(F_s(x)), one dimension only.

    F_t is the distribution function of I_t. Solved in log F - log(1 - F), so
    that both tails keep their digits: bisection to the last bit of a float,
    then one Newton step, which is also what derivatives are taken of (first
    derivatives are exact).

    Args:
      s: [] or [B].
      t: [] or [B].
      x: [B, 1].

    Returns:
      [B, 1].

    Raises:
      ValueError: if d > 1, where no formula exists: integrate `velocity`, by
        `samplers.diffusion.flow_map.integrate`.
    """
    if x.shape[1:] != (1,):
      raise ValueError(
        f"x {x.shape}: the map is known for [B, 1] only; integrate `velocity`"
      )
    s, t = (jnp.asarray(v, x.dtype).reshape(-1, 1) for v in (s, t))
    goal = self._logit(s, x)
    frozen = jax.lax.stop_gradient((t, goal))
    y = jax.lax.stop_gradient(self._bisect(*frozen, x.dtype))
    slope = jax.lax.stop_gradient(
      jax.jvp(lambda y: self._logit(frozen[0], y), (y,), (jnp.ones_like(y),))[1]
    )
    return y - (self._logit(t, y) - goal) / slope

  def _row(self, v, x):
    return v.astype(x.dtype)[None]

  def _components(self, t, x):
    """log w_k N(x; ..) [B, K], x - b mu_k [B, K, d], c_k [B, K]."""
    a, b = self.I.a(t), self.I.b(t)
    c = a**2 * self.sigma0**2 + b**2 * self._row(self.stds**2, x)
    off = x[:, None] - b[..., None] * self.means.astype(x.dtype)[None]
    square = jnp.sum(off**2, -1) / c
    log = self._row(np.log(self.weights), x) - square / 2
    return log - x.shape[-1] / 2 * jnp.log(2 * jnp.pi * c), off, c

  def _logit(self, t, x):
    """log F_t(x) - log(1 - F_t(x)), x [B, 1]."""
    _, off, c = self._components(t, x)
    z = off[..., 0] / jnp.sqrt(c)
    tails = stats.norm.logcdf(jnp.stack([z, -z]))
    weighted = tails + np.log(self.weights).astype(x.dtype)[None, None]
    below, above = special.logsumexp(weighted, -1)
    return (below - above)[:, None]

  def _bisect(self, t, goal, dtype):
    """y [B, 1] with logit F_t(y) = goal."""
    reach = 40 * max(self.sigma0, self.stds.max()) + np.abs(self.means).max()
    high = jnp.full(goal.shape, reach, dtype)

    def halve(_, ends):
      low, high = ends
      mid = (low + high) / 2
      right = self._logit(t, mid) < goal
      return jnp.where(right, mid, low), jnp.where(right, high, mid)

    count = jnp.finfo(dtype).nmant + 8
    low, high = jax.lax.fori_loop(0, count, halve, (-high, high))
    return (low + high) / 2


def mixture(
  I: Interpolant,
  sigma0: float,
  weights: ArrayLike,
  means: ArrayLike,
  stds: ArrayLike,
) -> Mixture:
  """The flow from N(0, sigma0^2 I) to a mixture of isotropic Gaussians.

  Args:
    I: the interpolant.
    sigma0: standard deviation of the noise, > 0.
    weights: [K] > 0, sum 1.
    means: [K, d].
    stds: [K] > 0.

  Raises:
    ValueError: shapes that do not fit, weights that are no distribution.
  """
  w, mu, std = (np.asarray(v, np.float64) for v in (weights, means, stds))
  if w.ndim != 1 or mu.ndim != 2 or len(mu) != len(w) or std.shape != w.shape:
    raise ValueError(
      "weights [K], means [K, d], stds [K] do not fit: "
      f"{w.shape}, {mu.shape}, {std.shape}"
    )
  if not (w > 0).all() or abs(w.sum() - 1) > 1e-9:
    raise ValueError(f"weights must be positive with sum 1: {w}")
  if not (std > 0).all() or not sigma0 > 0:
    raise ValueError(f"need sigma0={sigma0} > 0 and stds > 0: {std}")
  return Mixture(I, float(sigma0), w, mu, std)
