"""SA-Solver, multistep predictor and corrector for the SDE (2309.05019)."""

import functools

import numpy as np

from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers import exponential
from giantsteps.samplers.diffusion.tables import Table


def sa_solver(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  order: int = 3,
  corrector: bool = True,
  tau: float = 1.0,
  interval: tuple[float, float] | None = None,
  final: str = "ramp",
  denoise_to_zero: bool = False,
  threshold: float | tuple[float, ...] | None = None,
) -> Table:
  """Stochastic Adams in the data form (arXiv:2309.05019, section 5).

  With eta = tau(t)^2, constant over a step, g = (1 + eta) h and b_j from the
  Lagrange polynomial in lambda through the targets (moments J_k(g)):

      x_b = (sigma_b / sigma_a) e^(-eta h) x_a + alpha_b sum_j b_j m_j
            + sigma_b sqrt(1 - e^(-2 eta h)) xi

  The corrector redoes the step with the new target and the same xi; it costs
  no call. tau = 0 is the ODE, tau = 1 the reverse SDE.

  Args:
    schedule: alpha, sigma and the model's clock.
    times: [N + 1] float64, falling, from noise to data.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      or "score".
    order: targets of the predictor, 1 to 4; the corrector uses one more.
    corrector: False for the predictor alone.
    tau: noise inside the interval, >= 0.
    interval: (low, high) in the schedule's t where steps (by their start) are
      stochastic; (.2, .8) t_max if None, as published.
    final: "ramp", "none" or "ddim_last".
    denoise_to_zero: return x0 of one more call at the last node.
    threshold: quantile of dynamic thresholding of x0, or (quantile, floor[,
      cap]), see `tables.threshold`.

  Returns:
    A table of N rows, N + 1 with denoise_to_zero: as many model calls.

  Raises:
    ValueError: unknown settings, times that do not fall, a prediction that
      says nothing at one of the nodes.
  """
  at = exponential.nodes(schedule, times)
  low, high = interval or (0.2 * schedule.t_max, 0.8 * schedule.t_max)
  inside = (low <= at.t[:-1]) & (at.t[:-1] <= high)
  eta = exponential.noise_levels(np.where(inside, tau**2, 0.0), at.t.size - 1)
  table = exponential.multistep(
    at,
    functools.partial(exponential.lambda_weights, "data", at, eta=eta),
    prediction=prediction,
    gauge="data",
    variable="lambda",
    order=order,
    corrected=range(at.t.size if corrector else 0),
    final=final,
    eta=eta,
  )
  return exponential.with_ends(
    table,
    at,
    prediction=prediction,
    denoise_to_zero=denoise_to_zero,
    threshold=threshold,
  )
