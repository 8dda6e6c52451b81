"""DPM-Solver++ (arXiv:2211.01095), multistep."""

import functools

import numpy as np

from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers import exponential
from giantsteps.samplers.diffusion.tables import Table


def dpm_solver_pp(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  order: int = 2,
  variant: str = "midpoint",
  final: str = "ramp",
  published: bool = False,
) -> Table:
  """DPM-Solver++ (1), (2M), (3M): x0 a polynomial in lambda.

  With h = lambda_b - lambda_a, r_0 h and r_1 h the two steps before, D_10 =
  (m_0 - m_1) / r_0, D_11 = (m_1 - m_2) / r_1, D_2 = (D_10 - D_11) /
  (r_0 + r_1), D_1 = D_10 + r_0 D_2 and J_k of `exponential.moments`:

      x_b = (sigma_b / sigma_a) x_a + alpha_b J_0 m_0
        (2M) + alpha_b (J_0 / 2 or J_1) D_10
        (3M) + alpha_b (J_1 D_1 + kappa J_2 D_2)

  Differs from the paper: kappa = 1, which makes (3M) third order. Public code
  has kappa = 1/2, second order (`published=True`).

  Args:
    schedule: alpha, sigma and the model's clock.
    times: [N + 1] float64, falling, from noise to data.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      or "score".
    order: 1, 2 or 3 targets per step.
    variant: of the two-target step, also in the warm-up of order 3:
      "midpoint" (J_0 / 2, the paper's default) or "taylor" (J_1, exact).
    final: "ramp" (orders .., 2, 1 at the end; the default because the last
      step in lambda is often by far the longest), "none", "ddim_last" or
      "full". Where sigma ends at 0 the last step is order 1 in any case;
      "full" refuses that. Public code ramps if N < 10 only.
    published: kappa = 1/2.

  Returns:
    A table of N rows: N model calls.

  Raises:
    ValueError: unknown settings, times that do not fall, a prediction that
      says nothing at one of the nodes.
  """
  if order not in (1, 2, 3):
    raise ValueError(f"DPM-Solver++ has orders 1, 2 and 3, not {order}")
  if variant not in ("midpoint", "taylor"):
    raise ValueError(f"unknown variant {variant!r}; choose midpoint or taylor")
  at = exponential.nodes(schedule, times)
  weights = functools.partial(
    exponential.lambda_weights,
    "data",
    at,
    two_point="exact" if variant == "taylor" else "bh2",
    kappa=0.5 if published else 1.0,
  )
  return exponential.multistep(
    at,
    weights,
    prediction=prediction,
    gauge="data",
    variable="lambda",
    order=order,
    corrector=False,
    final=final,
  )
