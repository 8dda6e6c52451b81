"""Which noise goes with which data: the pairs of the diagonal loss.

Independent pairs are the default everywhere. Here: weights that tilt them
(W-CFM), a reordering of the batch (OT-CFM, exact or Sinkhorn), and pairs made
by a model (reflow, phased, annealed). Every loss takes the pairs as x0, x1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.scipy import special

from giantsteps.research.flow_maps.interpolants import Interpolant, expand


def weights(
  x0: jax.Array,
  x1: jax.Array,
  eps: float | jax.Array,
  cost: str = "squared_distance",
) -> jax.Array:
  """exp(-c(x0, x1) / eps) over its batch mean: W-CFM (arXiv:2507.22270).

  Multiply the loss of each pair by it. The pairs stay independent; the
  coupling becomes exp(-c / eps) rho_0 rho_1, an entropic plan whose end points
  are *not* rho_0 and rho_1 (the bias of the method). In log space, since at
  many dimensions every raw weight underflows. eps = inf is plain flow
  matching exactly. Look at `effective_sample_size`: under a tenth, eps is too
  small.

  Args:
    x0: [B, ...] noise.
    x1: [B, ...] data.
    eps: > 0, in the unit of the cost; a parameter to sweep.
    cost: "squared_distance", |x0 - x1|^2, or "distance", |x0 - x1|, both
      summed over coordinates.

  Returns:
    [B] float32 (or wider), mean 1.

  Raises:
    ValueError: shapes that do not fit, an unknown cost, eps <= 0.
  """
  if x0.shape != x1.shape:
    raise ValueError(f"x0 {x0.shape} and x1 {x1.shape} must agree")
  if not isinstance(eps, jax.Array) and not eps > 0:
    raise ValueError(f"eps={eps} must be positive")
  wide = jnp.promote_types(x1.dtype, jnp.float32)
  gap = x0.astype(wide) - x1.astype(wide)
  c = jnp.sum(gap**2, axis=range(1, gap.ndim))
  match cost:
    case "squared_distance":
      pass
    case "distance":
      c = jnp.sqrt(c)
    case _:
      raise ValueError(
        f"unknown cost {cost!r}: 'squared_distance' or 'distance'"
      )
  log = -c / eps
  w = jnp.exp(log - log.max())
  return w / w.mean()


def effective_sample_size(w: jax.Array) -> jax.Array:
  """(sum w)^2 / sum w^2, from 1 to B."""
  return jnp.sum(w) ** 2 / jnp.sum(w**2)


def optimal_transport(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
  """The pairing of a batch with the least sum of |x0 - x1|^2 (OT-CFM).

  (arXiv:2302.00482.) On the host, for the input pipeline: O(B^3), B up to
  about 1000. Pair x0 with x1[p], and with labels[p]. Where shards of a batch
  call it, each couples its own rows.

  Args:
    x0: [B, ...] noise.
    x1: [B, ...] data.

  Returns:
    p [B] int64, a permutation: row i of x0 goes with row p[i] of x1.

  Raises:
    ValueError: shapes that do not fit.
  """
  x0, x1 = np.asarray(x0, np.float64), np.asarray(x1, np.float64)
  if x0.shape != x1.shape:
    raise ValueError(f"x0 {x0.shape} and x1 {x1.shape} must agree")
  return scipy.optimize.linear_sum_assignment(_costs(x0, x1))[1]


def sinkhorn(
  x0: jax.Array,
  x1: jax.Array,
  eps: float | jax.Array,
  *,
  num_iterations: int = 200,
) -> jax.Array:
  """The entropic plan between two batches, in the log domain.

  P = exp(f_i + g_j - |x0_i - x1_j|^2 / reg), reg = eps times the mean cost,
  with rows and columns of sum 1/B; f and g by alternating updates from 0
  (Cuturi, arXiv:1306.0895).

  Args:
    x0: [B, ...] noise.
    x1: [B, ...] data.
    eps: > 0, relative to the mean cost; 0.05 is sharp, 1 blurred.
    num_iterations: pairs of updates; smaller eps needs more.

  Returns:
    [B, B] float32 (or wider). The columns are exact, the rows as far as it
    has converged. `draw` takes partners from it.

  Raises:
    ValueError: shapes that do not fit, eps <= 0.
  """
  if x0.shape != x1.shape:
    raise ValueError(f"x0 {x0.shape} and x1 {x1.shape} must agree")
  if not isinstance(eps, jax.Array) and not eps > 0:
    raise ValueError(f"eps={eps} must be positive")
  wide = jnp.promote_types(x1.dtype, jnp.float32)
  cost = _costs(x0.astype(wide), x1.astype(wide))
  kernel = -cost / (eps * cost.mean())
  log = -jnp.log(jnp.asarray(len(x0), wide))  # of each marginal

  def update(_, potentials):
    _, g = potentials
    f = log - special.logsumexp(kernel + g[None, :], axis=1)
    return f, log - special.logsumexp(kernel + f[:, None], axis=0)

  zero = jnp.zeros(len(x0), wide)
  f, g = jax.lax.fori_loop(0, num_iterations, update, (zero, zero))
  return jnp.exp(kernel + f[:, None] + g[None, :])


def draw(plan: jax.Array, key: jax.Array) -> jax.Array:
  """A partner for each row of a plan: [B, B] -> [B] int, j with P_ij / P_i.

  Not a permutation; over many draws the data appear as often as the columns
  say.
  """
  return jax.random.categorical(key, jnp.log(plan), axis=1)


def reflow(
  transport: Callable[[jax.Array], jax.Array],
  key: jax.Array,
  shape: tuple[int, ...],
  sigma_0: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Pairs (z, X_{0,1}(z)) of a model (rectified flow, arXiv:2209.03003).

  Flow matching on them has straight paths as its fixed point. Noise is stored
  as the key: the same key gives the same z.

  Args:
    transport: X_{0,1}, by an accurate solver or a flow map.
    key: PRNG key.
    shape: (B, ...).
    sigma_0: standard deviation of the noise.

  Returns:
    x0 and x1, [B, ...] float32.
  """
  x0 = sigma_0 * jax.random.normal(key, shape)
  return x0, transport(x0)


def phased(
  transport: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  I: Interpolant,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  e: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Virtual pairs whose path meets the flow at both ends of a phase.

  Phased Rectified Diffusion (arXiv:2410.07303): from x_s = I_s(x0, x1) the
  teacher solves to the end e of the phase; the pair (y0, y1) returned has
  I_s(y0, y1) = x_s and I_e(y0, y1) = x_e, and any loss may use it at times in
  [s, e]. y0 is the constant noise prediction of the segment, (x_e / b_e -
  x_s / b_s) / (n_e - n_s) with n = a / b, here without dividing by b.

  Args:
    transport: X_{s,e}(x) = transport(s, e, x), times [B].
    I: the interpolant.
    x0: [B, ...] noise.
    x1: [B, ...] data.
    s: [B] start of each row's phase.
    e: [B] its end, > s.

  Returns:
    y0, y1 [B, ...].
  """
  x_s, _ = I(s, x0, x1)
  x_e = transport(s, e, x_s)
  a_s, b_s, a_e, b_e = (expand(f(v), x_s) for v in (s, e) for f in (I.a, I.b))
  determinant = a_s * b_e - a_e * b_s
  y0 = (b_e * x_s - b_s * x_e) / determinant
  return y0, (a_s * x_e - a_e * x_s) / determinant


def annealed(
  x0: jax.Array, key: jax.Array, share: float | jax.Array, sigma_0: float = 1.0
) -> jax.Array:
  """sqrt(1 - share^2) x0 + share z', z' fresh: annealing reflow, SlimFlow.

  (arXiv:2407.12718.) share = 1 forgets the pairing (flow matching on the
  teacher's samples), 0 is reflow; it falls linearly over training. A
  transform of the data (a flip) must be one of the noise, too.

  Args:
    x0: [B, ...] the noise of the pairs.
    key: PRNG key.
    share: in [0, 1], [] or [B].
    sigma_0: standard deviation of the noise.

  Returns:
    [B, ...] noise to pair with x1.
  """
  share = expand(jnp.asarray(share, x0.dtype), x0)
  fresh = sigma_0 * jax.random.normal(key, x0.shape, x0.dtype)
  return jnp.sqrt(1 - share**2) * x0 + share * fresh


def _costs(x0, x1):
  """|x0_i - x1_j|^2, [B, B], clipped at 0 where rounding goes below."""
  x0, x1 = x0.reshape(len(x0), -1), x1.reshape(len(x1), -1)
  squares = (x0**2).sum(1)[:, None] + (x1**2).sum(1)[None]
  return (squares - 2 * x0 @ x1.T).clip(0)
