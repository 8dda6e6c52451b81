"""Runge-Kutta in any gauge: rhoRK of DEIS, EDM's Heun, DPM2, flow Heun."""

import numpy as np

from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers import exponential, stages
from giantsteps.samplers.diffusion.solvers.exponential import Point
from giantsteps.samplers.diffusion.tables import Table

THIRD = 1 / 3
# rows of stage weights, the last row the step itself
TABLEAUS = {
  "euler": ([1.0],),
  "heun": ([1.0], [1 / 2, 1 / 2]),
  "midpoint": ([1 / 2], [0.0, 1.0]),
  "ralston": ([2 / 3], [1 / 4, 3 / 4]),
  "heun3": ([THIRD], [0.0, 2 / 3], [1 / 4, 0.0, 3 / 4]),
  "kutta3": ([1 / 2], [-1.0, 2.0], [1 / 6, 2 / 3, 1 / 6]),
  "ralston3": ([1 / 2], [0.0, 3 / 4], [2 / 9, THIRD, 4 / 9]),
  "houwen3": ([8 / 15], [1 / 4, 5 / 12], [1 / 4, 0.0, 3 / 4]),
  "ssp3": ([1.0], [1 / 4, 1 / 4], [1 / 6, 1 / 6, 2 / 3]),
  "rk4": (
    [1 / 2],
    [0.0, 1 / 2],
    [0.0, 0.0, 1.0],
    [1 / 6, THIRD, THIRD, 1 / 6],
  ),
}


def runge_kutta(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  tableau: str = "heun",
  gauge: str = "noise",
) -> Table:
  """Explicit Runge-Kutta for d(x / S) / d mu = m of the gauge.

  In the noise gauge this is rhoRK of DEIS (arXiv:2204.13902); in the flow
  gauge on `rectified_flow` the classical method on the velocity.

  Args:
    schedule: alpha, sigma and the model's clock.
    times: [N + 1] float64, falling, from noise to data.
    prediction: what the model returns, one of `predictions.KINDS`.
    tableau: "euler", "heun", "midpoint", "ralston" (order 2), "heun3",
      "kutta3", "ralston3", "houwen3" (van der Houwen), "ssp3" (order 3),
      "rk4".
    gauge: "data", "noise", "flow" or "angle".

  Returns:
    A table of one row per call: stages times N; a step that ends at sigma = 0
    (starts at alpha = 0 in the data gauge) is DDIM, with one call.

  Raises:
    ValueError: unknown settings, times that do not fall, a prediction that
      says nothing at one of the calls.
  """
  if tableau not in TABLEAUS:
    raise ValueError(
      f"unknown tableau {tableau!r}; choose from {list(TABLEAUS)}"
    )
  at = exponential.nodes(schedule, times, gauge)
  rows = TABLEAUS[tableau]
  steps = [
    _step(schedule, gauge, at.point(i), at.point(i + 1), rows)
    for i in range(at.t.size - 1)
  ]
  return stages.assemble(schedule, steps, prediction=prediction, gauge=gauge)


def edm_heun(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  churn: float = 0.0,
  churn_min: float = 0.0,
  churn_max: float = np.inf,
  churn_noise: float = 1.0,
) -> Table:
  """Heun's method in sigma / alpha with churn (arXiv:2206.00364, alg. 2).

  With rho = sigma / alpha: before a step, noise raises rho to (1 + gamma)
  rho, gamma = min(churn / N, sqrt(2) - 1) if churn_min <= rho <= churn_max.
  Differs from the paper: the first step is never churned, its sample is pure
  noise already (the published settings have churn_max below the start).

  Args:
    schedule: alpha, sigma and the model's clock; `schedules.edm` in the paper.
    times: [N + 1] float64, falling, from noise to data, alpha > 0.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      or "score".
    churn: S_churn >= 0.
    churn_min: S_min, of rho.
    churn_max: S_max, of rho.
    churn_noise: S_noise, factor of the noise.

  Returns:
    A table of 2 N rows, 2 N - 1 if the run ends at sigma = 0 (the last step is
    Euler then). With churn `tables.sample` needs a key or noise.

  Raises:
    ValueError: churn < 0, times that do not fall, alpha = 0 at the first
      node.
  """
  if not churn >= 0:
    raise ValueError(f"churn={churn} must be at least 0")
  at = exponential.nodes(schedule, times, "noise")
  num = at.t.size - 1
  steps, start = [], at.point(0)
  for i in range(num):
    end = at.point(i + 1)
    step = _step(schedule, "noise", start, end, TABLEAUS["heun"])
    rho = np.exp(-end.lam)
    if churn and i + 1 < num and churn_min <= rho <= churn_max:
      gamma = min(churn / num, np.sqrt(2) - 1)
      start = stages.point(schedule, end.lam - np.log1p(gamma))
      grow = start.alpha / end.alpha
      step[-1] = step[-1]._replace(
        advance=step[-1].advance * grow,
        weights=[w * grow for w in step[-1].weights],
        noise=start.alpha * rho * np.sqrt(gamma * (2 + gamma)) * churn_noise,
      )
    else:
      start = end
    steps.append(step)
  return stages.assemble(schedule, steps, prediction=prediction, gauge="noise")


def edm_midpoint(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  ancestral_eta: float = 0.0,
) -> Table:
  """k-diffusion's "DPM2": a call at the middle in log rho carries the step.

  x_b = (alpha_b / alpha_a) x_a + alpha_b (rho_b - rho_a) eps(sqrt(rho_a
  rho_b)), the midpoint reached by an Euler step; Karras et al. call this the
  midpoint method (arXiv:2206.00364, alg. 3).

  Args:
    schedule: alpha, sigma and the model's clock.
    times: [N + 1] float64, falling, from noise to data, alpha > 0.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      or "score".
    ancestral_eta: in [0, 1]: go to a lower sigma, come back up by noise.

  Returns:
    A table of 2 N rows, 2 N - 1 if the run ends at sigma = 0.

  Raises:
    ValueError: ancestral_eta outside [0, 1], times that do not fall, alpha =
      0 at the first node.
  """
  if not 0 <= ancestral_eta <= 1:
    raise ValueError(f"ancestral_eta={ancestral_eta} must be in [0, 1]")
  at = exponential.nodes(schedule, times, "noise")
  steps = []
  for i in range(at.t.size - 1):
    a = at.point(i)
    b, noise = stages.descent(a, at.point(i + 1), ancestral_eta)
    if not np.isfinite(b.lam):
      step = [stages.ddim(a, b, "noise")]
    else:
      mid = stages.point(schedule, (a.lam + b.lam) / 2)
      step = [
        stages.ddim(a, mid, "noise"),
        stages.ddim(a, b, "noise")._replace(t=mid.t),
      ]
      step[1] = step[1]._replace(weights=[0.0, *step[1].weights])
    step[-1] = step[-1]._replace(noise=noise)
    steps.append(step)
  return stages.assemble(schedule, steps, prediction=prediction, gauge="noise")


def _step(
  schedule: Schedule, gauge: str, a: Point, b: Point, rows: tuple
) -> list[stages.Stage]:
  """One Runge-Kutta step; stages lie where mu has gone the fraction c."""
  first, last = (_measure(gauge, point) for point in (a, b))
  if b.sigma == 0 or not np.isfinite(last - first):
    return [stages.ddim(a, b, gauge)]
  fractions = [float(np.sum(row)) for row in rows]
  points = [
    b if c == 1 else _at_measure(schedule, gauge, first + c * (last - first))
    for c in fractions
  ]
  start = exponential.scale(gauge, a.alpha, a.sigma)
  result = []
  for time, end, row in zip(
    [a.t, *(p.t for p in points)], points, rows, strict=False
  ):
    s = exponential.scale(gauge, end.alpha, end.sigma)
    weights = [s * (last - first) * w for w in row]
    result.append(stages.Stage(time, s / start, weights))
  return result


def _measure(gauge: str, point: Point) -> float:
  """mu of the gauge."""
  alpha, sigma = np.float64(point.alpha), np.float64(point.sigma)
  with np.errstate(divide="ignore"):
    match gauge:
      case "data":
        return alpha / sigma
      case "noise":
        return sigma / alpha
      case "flow":
        return sigma / (alpha + sigma)
      case "angle":
        return np.arctan2(sigma, alpha)
  raise ValueError(
    f"unknown gauge {gauge!r}; choose from {list(exponential.TARGETS)}"
  )


def _at_measure(schedule: Schedule, gauge: str, mu: float) -> Point:
  """The point of the path with that mu."""
  match gauge:
    case "data":
      lam = np.log(mu)
    case "noise":
      lam = -np.log(mu)
    case "flow":
      lam = np.log1p(-mu) - np.log(mu)
    case _:
      lam = -np.log(np.tan(mu))
  return stages.point(schedule, lam)
