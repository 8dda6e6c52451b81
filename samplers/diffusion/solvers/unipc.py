"""UniPC, a predictor and corrector of the same order (arXiv:2302.04867)."""

import functools

import numpy as np

from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers import exponential
from giantsteps.samplers.diffusion.tables import Table


def unipc(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  order: int = 3,
  variant: str = "bh2",
  gauge: str = "data",
  final: str = "ramp",
) -> Table:
  """UniP-p predicts, UniC-p corrects with the target of the predicted point.

  In the step a -> b with c_m = (lambda_m - lambda_a) / h, D_m = m_m - m_0 and
  J_k of `exponential.moments`, data form:

      x_b = (sigma_b / sigma_a) x_a + alpha_b J_0 m_0 + alpha_b sum_m w_m D_m

  with sum_m w_m c_m^k = J_k, k = 1 .. number of m. The predictor uses p - 1
  old targets, the corrector also the new one (c = 1), which the next step
  needs anyway: no extra call. A single m has w = B / (2 c) instead, B = h
  (bh1) or J_0 (bh2); larger systems do not depend on B.

  Args:
    schedule: alpha, sigma and the model's clock.
    times: [N + 1] float64, falling, from noise to data.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      or "score".
    order: p, 1 to 4; the method's global order is p + 1. The paper advises 2
      for guided and 3 for unguided models.
    variant: "bh2" or "bh1".
    gauge: "data" or "noise" (-sigma_b J_k^+ for alpha_b J_k^-).
    final: "ramp" (orders .., 2, 1 at the end, as published), "none",
      "ddim_last" or "full" (refused where sigma ends at 0).

  Returns:
    A table of N rows: N model calls. The last step is not corrected.

  Raises:
    ValueError: unknown settings, times that do not fall, a prediction that
      says nothing at one of the nodes.
  """
  if variant not in ("bh1", "bh2"):
    raise ValueError(f"unknown variant {variant!r}; choose bh1 or bh2")
  if gauge not in ("data", "noise"):
    raise ValueError(f"gauge {gauge!r} of UniPC must be 'data' or 'noise'")
  at = exponential.nodes(schedule, times)
  return exponential.multistep(
    at,
    functools.partial(exponential.lambda_weights, gauge, at, two_point=variant),
    prediction=prediction,
    gauge=gauge,
    variable="lambda",
    order=order,
    corrector=True,
    final=final,
  )
