"""Adams-type multistep solvers in any gauge and variable, with a corrector.

The family that DPM-Solver++, DEIS, iPNDM-like and classical Adams-Bashforth
methods are members of; see `exponential` for the gauges and variables.
"""

import functools

import numpy as np

from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers import exponential
from giantsteps.samplers.diffusion.tables import Table


def adams(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  gauge: str = "flow",
  variable: str = "flow",
  order: int = 2,
  corrector: bool = True,
  final: str = "full",
  warm_up: str = "lower",
  data_std: float = 1.0,
  denoise_to_zero: bool = False,
  threshold: float | tuple[float, ...] | None = None,
) -> Table:
  """x_b = (S_b / S_a) x_a + S_b sum_j w_j m_j, w_j = int ell_j(u) dmu.

  Members: gauge "noise" with "t" or "rho" is DEIS tAB / rhoAB
  (arXiv:2204.13902), with "lambda" DPM-Solver multistep with exact
  coefficients; gauge "data" with "lambda" exact DPM-Solver++; gauge "flow"
  with "flow" classical Adams-Bashforth on the velocity.

  Args:
    schedule: alpha, sigma and the model's clock.
    times: [N + 1] float64, falling, from noise to data.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      (of the schedule, d x / d t) or "score".
    gauge: "data", "noise", "flow" or "angle": what is held exactly. "flow"
      and "angle" are finite at alpha = 0 and at sigma = 0.
    variable: "lambda", "t", "rho", "phi" or "flow": in what the target is a
      polynomial.
    order: targets per predictor step, 1 to 4; warm-up uses as many as there
      are.
    corrector: redo each step with the next target added, at no extra call:
      global order is one higher, and the warm-up no longer limits it.
    final: "full" (the order is kept to the end, an error where that is
      undefined), "none" (kept where defined), "ramp" (.., 3, 2, 1) or
      "ddim_last".
    warm_up: without corrector, the first order - 1 steps: "lower" or
      "corrected", see `exponential.corrected_steps`.
    data_std: standard deviation of the data, the unit in which "flow", "phi"
      and their gauges weigh data against noise.
    denoise_to_zero: return x0 of one more call at the last node.
    threshold: quantile of dynamic thresholding of x0, or (quantile, floor[,
      cap]), see `tables.threshold`; gauge "data".

  Returns:
    A table of N rows, N + 1 with denoise_to_zero: as many model calls.

  Raises:
    ValueError: unknown settings, times that do not fall, a prediction that
      says nothing at one of the nodes.
  """
  if threshold is not None and (gauge != "data" or data_std != 1):
    raise ValueError("threshold clips x0: it needs gauge='data', data_std=1")
  at = exponential.nodes(schedule, times, gauge, data_std)
  table = exponential.multistep(
    at,
    functools.partial(exponential.lagrange_weights, gauge, variable, at),
    prediction=prediction,
    gauge=gauge,
    variable=variable,
    order=order,
    corrected=exponential.corrected_steps(
      at.t.size - 1, order, corrector=corrector, warm_up=warm_up
    ),
    final=final,
  )
  return exponential.with_ends(
    table,
    at,
    prediction=prediction,
    denoise_to_zero=denoise_to_zero,
    threshold=threshold,
  )
