"""Is it the right flow, or only the right distribution?

Distances between samples cannot tell a flow map from another map with the same
image: exchange two modes and they stay as they were. Where the flow is known
(`flow_maps.closed_forms`) the error of the map itself can be measured, and the
density of what one step makes.

Clock of flow maps: 0 noise, 1 data; the model is `velocity(s, t, x)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from giantsteps.samplers.diffusion import flow_map

Map = Callable[[jax.Array], jax.Array]
LogDensity = Callable[[jax.Array], jax.Array]


def transport_error(
  velocity: flow_map.Velocity, exact: Map, x0: jax.Array, times: ArrayLike
) -> dict[str, float]:
  """E |X_model(x0) - X_true(x0)|^2, summed over coordinates.

  Args:
    velocity: velocity(s, t, x).
    exact: the true map from times[0] to times[-1], [B, ...] -> [B, ...].
    x0: [B, ...] draws at times[0], B >= 2.
    times: [N + 1]; [0, 1] is one step.

  Returns:
    error and its standard_error over draws; no_model, E |x0 - X_true|^2, the
    error of a map that does nothing.
  """
  x0 = jnp.asarray(x0)
  got = flow_map.sample(velocity, x0, flow_map.jumps(times))
  want = np.asarray(exact(x0), np.float64)
  square = lambda x: np.sum(
    (np.asarray(x, np.float64) - want).reshape(len(want), -1) ** 2, -1
  )
  each = square(got)
  return {
    "error": float(each.mean()),
    "standard_error": float(each.std(ddof=1) / np.sqrt(len(each))),
    "no_model": float(square(x0).mean()),
  }


def one_step_divergences(
  velocity: flow_map.Velocity,
  noise: LogDensity,
  data: LogDensity,
  x0: jax.Array,
  x1: jax.Array,
  *,
  tolerance: float = 1e-3,
) -> dict[str, float]:
  """Divergences of the law of X_{0,1}(x0) from the data's, both ways, in nats.

  log det J gives the density of the one-step map exactly where it is
  one-to-one (`flow_map.push_log_density`, `map_log_density`). For low
  dimension.

  Args:
    velocity: velocity(s, t, x), also at t < s.
    noise: exact log-density at time 0, [B, ...] -> [B].
    data: likewise at time 1.
    x0: [B, ...] draws of the noise.
    x1: [M, ...] draws of the data.
    tolerance: a row counts as inverted if X(x0) is this near to x1.

  Returns:
    reverse_kl, E log p_model - log p_data over X(x0); forward_kl, E log p_data
    - log p_model over the x1 that were inverted; log_likelihood, E log p_model
    there; inverted, their share: below 1 the last two are not divergences, as
    data the map does not reach has no density.
  """
  made, log_made = flow_map.push_log_density(
    velocity, x0, noise(x0), np.array([0.0, 1.0])
  )
  log_x1, _, gap = flow_map.map_log_density(velocity, x1, noise)
  reverse = np.asarray(log_made - data(made), np.float64)
  found = np.asarray((gap <= tolerance) & jnp.isfinite(log_x1))
  mean = lambda v: float(np.asarray(v, np.float64)[found].mean())
  nothing = not found.any()
  return {
    "reverse_kl": float(reverse.mean()),
    "forward_kl": float("nan") if nothing else mean(data(x1) - log_x1),
    "log_likelihood": float("nan") if nothing else mean(log_x1),
    "inverted": float(found.mean()),
  }
