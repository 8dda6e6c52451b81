"""UniPC, a predictor and corrector of the same order (arXiv:2302.04867)."""

import functools
from collections.abc import Collection

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
  uncorrected: Collection[int] = (),
  denoise_to_zero: bool = False,
  threshold: float | tuple[float, ...] | None = None,
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
    variant: "bh2" or "bh1"; "vary_coeff" solves for a single w too, w = J_1 /
      c. Differs from the public code, which for p > 1 pairs the new target
      with the wrong row of the inverse matrix and is first order there.
    gauge: "data" or "noise" (-sigma_b J_k^+ for alpha_b J_k^-).
    final: "ramp" (orders .., 2, 1 at the end, as published), "none",
      "ddim_last" or "full" (refused where sigma ends at 0).
    uncorrected: steps left to the predictor; under strong guidance the first.
    denoise_to_zero: return x0 of one more call at the last node.
    threshold: quantile of dynamic thresholding of x0, or (quantile, floor[,
      cap]), see `tables.threshold`; gauge "data".

  Returns:
    A table of N rows, N + 1 with denoise_to_zero: as many model calls. The last step is not corrected.

  Raises:
    ValueError: unknown settings, times that do not fall, a prediction that
      says nothing at one of the nodes.
  """
  rules = {"bh1": "bh1", "bh2": "bh2", "vary_coeff": "exact"}
  if variant not in rules:
    raise ValueError(f"unknown variant {variant!r}; choose from {list(rules)}")
  if gauge not in ("data", "noise"):
    raise ValueError(f"gauge {gauge!r} of UniPC must be 'data' or 'noise'")
  if threshold is not None and gauge != "data":
    raise ValueError("threshold clips x0 and needs gauge='data'")
  at = exponential.nodes(schedule, times, gauge)
  weights = functools.partial(
    exponential.lambda_weights, gauge, at, two_point=rules[variant]
  )
  table = exponential.multistep(
    at,
    weights,
    prediction=prediction,
    gauge=gauge,
    variable="lambda",
    order=order,
    corrected=set(range(at.t.size)) - set(uncorrected),
    final=final,
  )
  return exponential.with_ends(
    table,
    at,
    prediction=prediction,
    denoise_to_zero=denoise_to_zero,
    threshold=threshold,
  )
