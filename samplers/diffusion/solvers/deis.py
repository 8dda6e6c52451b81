"""DEIS (arXiv:2204.13902): tAB, rhoAB, rhoRK and iPNDM; LMS is one of them."""

import functools

import numpy as np

from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers import exponential
from giantsteps.samplers.diffusion.solvers.runge_kutta import runge_kutta
from giantsteps.samplers.diffusion.tables import Table

ADAMS_BASHFORTH = (
  np.array([1.0]),
  np.array([3.0, -1.0]) / 2,
  np.array([23.0, -16.0, 5.0]) / 12,
  np.array([55.0, -59.0, 37.0, -9.0]) / 24,
)


def deis(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  variable: str = "t",
  method: str = "ab",
  order: int = 4,
  tableau: str = "heun",
  final: str = "none",
  warm_up: str = "lower",
  denoise_to_zero: bool = False,
) -> Table:
  """x_b = (alpha_b / alpha_a) x_a + alpha_b int eps d(sigma / alpha).

  | method | eps |
  |---|---|
  | "ab" | polynomial in `variable` through the last `order` values |
  | "ipndm" | classical Adams-Bashforth combination of them, held constant |
  | "rk" | Runge-Kutta in rho = sigma / alpha, stages of `tableau` |

  method "ab" in "rho" on `schedules.edm` is the linear multistep method (LMS)
  of k-diffusion; in "lambda" what diffusers calls DEIS.

  Args:
    schedule: alpha, sigma and the model's clock.
    times: [N + 1] float64, falling, from noise to data, alpha > 0. The best
      published setting is tAB with order 4 on `grids.quadratic_time`.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      or "score".
    variable: "t" (tAB), "rho" (rhoAB) or "lambda"; of method "ab".
    method: "ab", "ipndm" or "rk".
    order: values used, 1 to 4; the paper's tAB3 has order 4.
    tableau: of method "rk", see `runge_kutta`.
    final: "none", "ramp" or "ddim_last"; of "ab" and "ipndm".
    warm_up: the first order - 1 steps of "ab": "lower" (as published) or
      "corrected", see `exponential.corrected_steps`.
    denoise_to_zero: return x0 of one more call at the last node.

  Returns:
    A table of N rows, of N times the stages for "rk"; one more with
    denoise_to_zero.

  Raises:
    ValueError: unknown settings, times that do not fall, alpha = 0 at the
      first node.
  """
  at = exponential.nodes(schedule, times, "noise")
  multistep = functools.partial(
    exponential.multistep,
    at,
    prediction=prediction,
    gauge="noise",
    order=order,
    final=final,
  )
  match method:
    case "ab":
      corrected = exponential.corrected_steps(
        at.t.size - 1, order, corrector=False, warm_up=warm_up
      )
      weights = functools.partial(
        exponential.lagrange_weights, "noise", variable, at
      )
      table = multistep(weights, variable=variable, corrected=corrected)
    case "ipndm":
      rho = at.sigma / np.where(at.alpha > 0, at.alpha, np.nan)
      table = multistep(
        lambda points, b: (
          at.alpha[b] * (rho[b] - rho[b - 1]) * ADAMS_BASHFORTH[points.size - 1]
        ),
        variable="rho",
        corrected=(),
      )
    case "rk":
      table = runge_kutta(
        schedule, times, prediction=prediction, tableau=tableau
      )
    case _:
      raise ValueError(f"unknown method {method!r}; choose ab, ipndm or rk")
  return exponential.with_ends(
    table, at, prediction=prediction, denoise_to_zero=denoise_to_zero
  )
