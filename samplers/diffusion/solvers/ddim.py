"""DDIM, the order-1 member of every family (arXiv:2010.02502)."""

import numpy as np

from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers import exponential
from giantsteps.samplers.diffusion.tables import Table


def ddim(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  eta: float = 0.0,
  denoise_to_zero: bool = False,
  threshold: float | tuple[float, ...] | None = None,
) -> Table:
  """x_s = alpha_s x0 + sqrt(sigma_s^2 - v^2) eps + v xi.

  v = eta sigma_s sqrt(1 - rho_s^2 / rho_t^2) with rho = sigma / alpha; on a
  variance-preserving schedule this is the paper's eq. 16,
  v = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2).
  Differs from the paper: written in rho, so that eta = 1 is the ancestral
  step (and SDE-DPM-Solver++(1)) on every schedule.

  Args:
    schedule: alpha, sigma and the model's clock.
    times: [N + 1] float64, falling, from noise to data.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      or "score".
    eta: 0 deterministic, 1 ancestral; in [0, 1].
    denoise_to_zero: return x0 of one more call at the last node.
    threshold: quantile of dynamic thresholding of x0, or (quantile, floor[,
      cap]), see `tables.threshold`.

  Returns:
    A table of N rows, N + 1 with denoise_to_zero: as many model calls. Order 1. With eta > 0 `tables.sample`
    needs a key or noise.

  Raises:
    ValueError: eta outside [0, 1], times that do not fall, a prediction that
      says nothing at one of the nodes.
  """
  if not 0 <= eta <= 1:
    raise ValueError(f"eta={eta} must be in [0, 1]")
  at = exponential.nodes(schedule, times)
  keep = at.sigma[1:] / at.sigma[:-1]
  keep *= np.sqrt(1 + eta**2 * np.expm1(-2 * np.diff(at.lam)))
  num, zeros = keep.size, np.zeros((keep.size, exponential.MIN_TARGETS))
  history = zeros.copy()
  history[:, 0] = at.alpha[1:] - keep * at.alpha[:-1]
  table = Table(
    time=at.model_time(),
    target=exponential.targets(schedule, at.t[:-1], prediction, "data"),
    anchor=np.tile([0.0, 1.0], (num, 1)),
    corrector=zeros,
    advance=keep,
    history=history,
    noise=eta * at.sigma[1:] * np.sqrt(-np.expm1(-2 * np.diff(at.lam))),
  )
  return exponential.with_ends(
    table,
    at,
    prediction=prediction,
    denoise_to_zero=denoise_to_zero,
    threshold=threshold,
  )
