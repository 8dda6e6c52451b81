"""Any-step sampling with a flow map, and likelihoods of what it samples.

A flow map X_{s,t}(x) = x + (t - s) v_{s,t}(x) (arXiv:2505.18825) jumps from
any time to any other, so a sampler is a list of jumps: one jump is one-step
sampling, N of them are N calls of the same network.

This file has the clock of flow maps, not of the solvers beside it: times rise
from 0 (noise, standard deviation sigma_0) to 1 (data), and the model is
`velocity(s, t, x)` with s and t [B]. A `Schedule` given to `renoising` stays
on the falling clock, t = 1 - s, as `flow_maps.to_sampler` makes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from giantsteps.samplers.diffusion.schedules import Schedule

Velocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Jumps(NamedTuple):
  """A run as data: row i is x <- keep X_{start, end}(x) + noise xi.

  float64 on the host, an argument of the program: runs of one length share
  it, and `pad` makes lengths equal.
  """

  start: Any  # [N]
  end: Any  # [N]
  keep: Any  # [N]
  noise: Any  # [N] standard deviation of the fresh noise


def jumps(times: ArrayLike) -> Jumps:
  """Jumps from node to node, no noise.

  Args:
    times: [N + 1], rising from 0 to 1 to sample; [0, 1] is one step. Any
      nodes are legal, falling ones too (data to noise). NumPy, or traced.

  Raises:
    ValueError: fewer than two times, or more than one axis.
  """
  times = times if isinstance(times, jax.Array) else np.asarray(times, float)
  if times.ndim != 1 or len(times) < 2:
    raise ValueError(f"times must be [N + 1] with N >= 1, not {times.shape}")
  one = times[1:] * 0 + 1
  return Jumps(times[:-1], times[1:], one, 0 * one)


def renoising(
  times: ArrayLike, schedule: Schedule, gamma: float = 1.0
) -> Jumps:
  """Jump further than the next node, then add the noise that is missing.

  gamma = 1 is the sampler of consistency models (arXiv:2303.01469, alg. 1):
  to the data, and back by fresh noise. gamma = 0 is `jumps`. Between them
  (CTM, arXiv:2310.02279) the jump ends at the time r with sigma_r / alpha_r =
  sqrt(1 - gamma^2) sigma / alpha of the node, and x = alpha / alpha_r x_r +
  gamma sigma xi has the law of the node. The last jump ends at the data.

  Args:
    times: [N + 1], rising, from 0 (or later) to 1; 0 once at most.
    schedule: of the path, falling clock, with t_max = 1 at the noise: the
      first thing that `flow_maps.to_sampler` returns.
    gamma: in [0, 1].

  Returns:
    Jumps of N rows; `sample` needs a key unless gamma = 0.

  Raises:
    ValueError: gamma outside [0, 1], times that do not rise within [0, 1], a
      schedule on another clock.
  """
  if not 0 <= gamma <= 1:
    raise ValueError(f"gamma={gamma} must be in [0, 1]")
  times = np.asarray(times, np.float64)
  if np.any(np.diff(times) < 0) or times[0] < 0 or times[-1] > 1:
    raise ValueError(f"times must rise within [0, 1]: {times}")
  if not np.all(times[1:] > 0):  # no time has more noise than 0
    raise ValueError(f"a jump ends at 0; only the first time may be 0: {times}")
  if (schedule.t_min, schedule.t_max) != (0.0, 1.0):
    raise ValueError(
      f"the schedule runs from {schedule.t_max} to {schedule.t_min}; it must "
      "from 1 to 0, as those of flow_maps.to_sampler do"
    )
  plain = jumps(times)
  if gamma == 0:
    return plain
  with np.errstate(divide="ignore"):
    less = -np.log1p(-(gamma**2)) / 2
    lam = schedule.lam(1 - times[1:]) + less
  end = 1 - schedule.t_of_lambda(lam)
  end = np.where(times[1:] < 1, end, 1.0)
  alpha, sigma = schedule.alpha_sigma(1 - times[1:])
  keep = alpha / schedule.alpha_sigma(1 - end)[0]
  return plain._replace(end=end, keep=keep, noise=gamma * sigma)


def pad(run: Jumps, num_steps: int) -> Jumps:
  """The same run followed by rows that do nothing, num_steps in all.

  A padding row is a jump from the last time to itself, the identity exactly;
  it calls the network.

  Raises:
    ValueError: if the run is longer.
  """
  add = num_steps - len(run.start)
  if add < 0:
    raise ValueError(
      f"a run of {len(run.start)} jumps does not fit in num_steps={num_steps}"
    )
  stay = Jumps(run.end[-1], run.end[-1], 1.0, 0.0)
  return jax.tree.map(lambda a, b: np.append(a, np.full(add, b)), run, stay)


def sample(
  velocity: Velocity,
  x0: jax.Array,
  run: Jumps,
  key: jax.Array | None = None,
) -> jax.Array:
  """Runs the jumps from x0, one call of the network each.

  Args:
    velocity: velocity(s, t, x), s and t [B], x [B, ...] -> [B, ...]; traced
      once.
    x0: [B, ...] the state at the first time: noise of standard deviation
      sigma_0, not 1, where the map was trained so.
    run: from `jumps`, `renoising` or `pad`.
    key: draws the noise; None where there is none.

  Returns:
    [B, ...] float32, or x0's dtype if wider.

  Raises:
    ValueError: the run has noise and no key is given (where it is traced, the
      result is NaN instead).
  """
  x = x0.astype(jnp.promote_types(x0.dtype, jnp.float32))
  if key is None and not isinstance(run.noise, jax.Array):
    if np.any(run.noise):
      raise ValueError("the run adds noise: pass key= to sample")
  rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype), run)
  if key is None:
    rows = rows._replace(keep=jnp.where(rows.noise == 0, rows.keep, jnp.nan))
  keys = None if key is None else jax.random.split(key, len(run.start))

  def step(x, inputs):
    row, key = inputs
    x = row.keep * _jump(velocity, row.start, row.end, x)
    if key is not None:
      x = x + row.noise * jax.random.normal(key, x.shape, x.dtype)
    return x, None

  return jax.lax.scan(step, x, (rows, keys))[0]


def integrate(
  drift: Callable[[jax.Array, Any], Any], x: Any, times: ArrayLike
) -> Any:
  """dx/dt = drift(t, x) along `times`, classical Runge-Kutta of order 4.

  Args:
    drift: drift(t, x), t [B], x a pytree of arrays [B, ...] -> the same; a
      flow map's is lambda t, x: velocity(t, t, x).
    x: the state at times[0].
    times: [N + 1], rising or falling.

  Returns:
    The state at times[-1]; 4 N calls.
  """
  first = jax.tree.leaves(x)[0]
  times = jnp.asarray(times, first.dtype)
  at = lambda t: jnp.broadcast_to(t, first.shape[:1])

  def move(x, h, k):
    return jax.tree.map(lambda x, k: x + h * k, x, k)

  def step(x, ends):
    s, t = ends
    h = t - s
    k1 = drift(at(s), x)
    k2 = drift(at(s + h / 2), move(x, h / 2, k1))
    k3 = drift(at(s + h / 2), move(x, h / 2, k2))
    k4 = drift(at(t), move(x, h, k3))
    k = jax.tree.map(
      lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4
    )
    return move(x, h, k), None

  return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


def push_log_density(
  velocity: Velocity,
  x0: jax.Array,
  log_density: jax.Array,
  times: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
  """Samples of the jumps through `times`, and their exact log-density.

  log p(X(x0)) = log p0(x0) - log|det J X(x0)|, summed over the jumps. Exact
  where the map is one-to-one, which a flow is and a network need not be. The
  determinant costs d forward passes and d^3 operations per jump: for low
  dimension.

  Args:
    velocity: velocity(s, t, x).
    x0: [B, ...] d numbers per sample.
    log_density: [B] log p0(x0), nats.
    times: [N + 1]; [0, 1] is the one-step map.

  Returns:
    x [B, ...] and log p(x) [B], nats.
  """
  times = jnp.asarray(times, x0.dtype)

  def step(carry, ends):
    x, log = carry
    y, jacobian = _with_jacobian(
      lambda x: _jump(velocity, ends[0], ends[1], x), x
    )
    return (y, log - jnp.linalg.slogdet(jacobian)[1]), None

  return jax.lax.scan(step, (x0, log_density), (times[:-1], times[1:]))[0]


def map_log_density(
  velocity: Velocity,
  x1: jax.Array,
  log_density: Callable[[jax.Array], jax.Array],
  *,
  num_iterations: int = 20,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """log-density of the one-step map X_{0,1} at given data.

  Finds x0 with X_{0,1}(x0) = x1 by Newton's method from X_{1,0}(x1), then as
  `push_log_density`. For low dimension.

  Args:
    velocity: velocity(s, t, x), also at t < s.
    x1: [B, ...] data.
    log_density: of the noise, [B, ...] -> [B], nats.
    num_iterations: of Newton's method; each costs d + 1 forward passes.

  Returns:
    log p(x1) [B] in nats, x0 [B, ...], and |X_{0,1}(x0) - x1| [B], which tells
    rows where the map was not inverted.
  """
  forward = lambda x: _jump(velocity, 0.0, 1.0, x)

  def newton(_, x):
    y, jacobian = _with_jacobian(forward, x)
    gap = (y - x1).reshape(len(x), -1, 1)
    return x - jnp.linalg.solve(jacobian, gap).reshape(x.shape)

  x0 = jax.lax.fori_loop(
    0, num_iterations, newton, _jump(velocity, 1.0, 0.0, x1)
  )
  y, jacobian = _with_jacobian(forward, x0)
  log = log_density(x0) - jnp.linalg.slogdet(jacobian)[1]
  gap = jnp.linalg.norm((y - x1).reshape(len(x1), -1), axis=-1)
  return log, x0, gap


def flow_log_density(
  velocity: Velocity,
  x1: jax.Array,
  log_density: Callable[[jax.Array], jax.Array],
  times: ArrayLike,
) -> jax.Array:
  """log-density of the flow of the diagonal, dx/dt = v_{t,t}(x), at data.

  d log p / dt = -tr J v_{t,t} (arXiv:1806.07366) with the exact trace, d
  forward passes, by `integrate`.

  Args:
    velocity: velocity(s, t, x), asked at s = t.
    x1: [B, ...] data, the state at times[-1].
    log_density: of the state at times[0], [B, ...] -> [B], nats.
    times: [N + 1], rising from 0 to 1.

  Returns:
    [B] log p(x1), nats; 4 N (d + 1) forward passes.
  """

  def drift(t, state):
    x, _ = state
    v, jacobian = _with_jacobian(lambda x: velocity(t, t, x), x)
    return v, jnp.trace(jacobian, axis1=1, axis2=2)

  start = (x1, jnp.zeros(x1.shape[:1], x1.dtype))
  x0, change = integrate(drift, start, jnp.asarray(times)[::-1])
  return log_density(x0) + change  # minus the integral of the trace upward


def _jump(velocity, s, t, x):
  s, t = (jnp.asarray(v, x.dtype) for v in (s, t))
  at = lambda v: jnp.broadcast_to(v, x.shape[:1])
  return x + (t - s) * velocity(at(s), at(t), x).astype(x.dtype)


def _with_jacobian(f, x):
  """f(x) [B, ...] and its Jacobian [B, d, d]; f keeps samples apart."""
  size = int(np.prod(x.shape[1:]))
  y, push = jax.linearize(f, x)
  basis = jnp.eye(size, dtype=x.dtype)[:, None]
  basis = jnp.broadcast_to(basis, (size, len(x), size))
  columns = jax.vmap(push)(basis.reshape(size, *x.shape))  # [d, B, ...]
  return y, jnp.moveaxis(columns.reshape(size, len(x), size), 0, -1)
