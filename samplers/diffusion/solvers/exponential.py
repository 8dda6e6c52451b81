"""The builder that all multistep solvers share: gauge x variable x order.

With a gauge (scale S, measure mu, target m) the probability-flow ODE is solved
exactly by x_b = S_b [x_a / S_a + int m dmu]; a solver replaces m by the
polynomial through its last values in some variable u.

| gauge | S | mu | m | exponential form of |
|---|---|---|---|---|
| data | sigma | alpha / sigma | x0 | DPM-Solver++ (arXiv:2211.01095) |
| noise | alpha | sigma / alpha | eps | DEIS (2204.13902), DPM-Solver |
| flow | alpha + sigma | sigma / (alpha + sigma) | eps - x0 | Adams on a flow |
| angle | hypot | phi = atan2(sigma, alpha) | v / hypot | |

u is "lambda" = log(alpha / sigma), "t", "rho" = sigma / alpha, "phi", or
"flow" = sigma / (alpha + sigma). One target is not a polynomial but DDIM, in
every gauge: x0 and eps held fixed. Everything here is float64 on the host.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from giantsteps.samplers.diffusion import predictions
from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.tables import Table

TARGETS = {"data": "x0", "noise": "eps", "flow": "flow", "angle": "angle"}
VARIABLES = ("lambda", "t", "rho", "phi", "flow")
MIN_TARGETS = 4  # columns of history, so that most tables share a program
QUADRATURE = np.polynomial.legendre.leggauss(48)


class Nodes(NamedTuple):
  """The times of a run and what the schedule says there, each [N + 1]."""

  schedule: Schedule
  t: np.ndarray
  alpha: np.ndarray
  sigma: np.ndarray
  lam: np.ndarray
  phi: np.ndarray


def nodes(schedule: Schedule, times: np.ndarray) -> Nodes:
  """Evaluates the schedule at `times` [N + 1], N >= 1, and checks them.

  Raises:
    ValueError: times that do not fall strictly, or lie outside the schedule.
  """
  t = np.asarray(times, np.float64)
  if t.ndim != 1 or t.size < 2:
    raise ValueError(f"times must be [N + 1] with N >= 1, not {t.shape}")
  with np.errstate(invalid="ignore"):
    alpha, sigma = schedule.alpha_sigma(t)
  inside = (alpha >= 0) & (sigma >= 0) & (alpha + sigma > 0)
  inside &= np.isfinite(t)
  if not inside.all():
    raise ValueError(
      f"time {t[~inside][0]} is outside the schedule, which spans"
      f" {schedule.t_max} to {schedule.t_min}"
    )
  phi = np.arctan2(sigma, alpha)
  stuck = np.nonzero((np.diff(t) >= 0) | (np.diff(phi) >= 0))[0]
  if stuck.size:
    i = int(stuck[0])
    raise ValueError(
      f"times must fall strictly from noise to data: times[{i}] = {t[i]} is"
      f" followed by {t[i + 1]}; drop duplicates, or sort descending"
    )
  with np.errstate(divide="ignore"):
    lam = np.log(alpha) - np.log(sigma)
  return Nodes(schedule, t, alpha, sigma, lam, phi)


def step_orders(num_steps: int, order: int, final: str) -> np.ndarray:
  """Number of targets used by each step: warm-up, order, and the final rule.

  Args:
    num_steps: N.
    order: targets in use once there are as many.
    final: "none" and "full" keep the order, "ddim_last" makes the last step
      order 1, "ramp" makes the last steps order .., 3, 2, 1.
  """
  step = np.arange(num_steps)
  orders = np.minimum(step + 1, order)
  match final:
    case "none" | "full":
      pass
    case "ddim_last":
      orders[-1] = 1
    case "ramp":
      orders = np.minimum(orders, num_steps - step)
    case _:
      raise ValueError(
        f"unknown final {final!r}; choose none, ddim_last, ramp or full"
      )
  return orders


def scale(gauge: str, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
  """S of the gauge."""
  match gauge:
    case "data":
      return sigma
    case "noise":
      return alpha
    case "flow":
      return alpha + sigma
    case "angle":
      return np.hypot(alpha, sigma)
  raise ValueError(f"unknown gauge {gauge!r}; choose from {list(TARGETS)}")


def coordinate(
  variable: str, schedule: Schedule, alpha: np.ndarray, sigma: np.ndarray
) -> np.ndarray:
  """u of the variable; infinite where it is. Any common factor cancels."""
  with np.errstate(divide="ignore"):
    lam = np.log(alpha) - np.log(sigma)
    match variable:
      case "lambda":
        return lam
      case "t":
        return schedule.t_of_lambda(lam)
      case "rho":
        return sigma / alpha
      case "phi":
        return np.arctan2(sigma, alpha)
      case "flow":
        return sigma / (alpha + sigma)
  raise ValueError(f"unknown variable {variable!r}; choose from {VARIABLES}")


def lagrange_weights(
  gauge: str, variable: str, at: Nodes, points: Sequence[int], b: int
) -> np.ndarray:
  """S_b int_a^b ell_j(u) dmu for the targets at nodes `points`, a = b - 1.

  Gauss-Legendre, 48 points a panel, in lambda (panels of at most 4) or, where
  lambda is infinite at an end, in phi: relative error about 1e-13.

  Returns:
    [len(points)], in the order of points.
  """
  base, weight = QUADRATURE
  first, last = at.lam[b - 1], at.lam[b]
  finite = bool(np.isfinite(first) and np.isfinite(last))
  if not finite:
    first, last = at.phi[b - 1], at.phi[b]
  edges = np.linspace(first, last, 1 + max(2, math.ceil((last - first) / 4)))
  half = np.diff(edges)[:, None] / 2
  s = (edges[:-1, None] + half * (1 + base)).ravel()
  ds = (half * weight).ravel()
  if finite:  # cos, sin of phi, and d phi = -cos sin d lambda
    cos, sin = (1 + np.exp(-2 * s)) ** -0.5, (1 + np.exp(2 * s)) ** -0.5
    ds = -cos * sin * ds
  else:
    cos, sin = np.cos(s), np.sin(s)
  match gauge:  # d mu / d phi
    case "data":
      density = -(sin**-2)
    case "noise":
      density = cos**-2
    case "flow":
      density = (cos + sin) ** -2
    case _:
      density = np.ones_like(cos)
  u = coordinate(variable, at.schedule, cos, sin)
  node = coordinate(variable, at.schedule, at.alpha, at.sigma)[list(points)]
  mass = scale(gauge, at.alpha, at.sigma)[b] * density * ds
  weights = [
    np.sum(mass * np.prod([(u - v) / (w - v) for v in np.delete(node, j)], 0))
    for j, w in enumerate(node)
  ]
  return np.array(weights)


def moments(h: float, num: int, sign: int) -> np.ndarray:
  """J_k = int_0^h e^(sign (h - s)) (s / h)^k ds for k < num.

  The recurrence J_k = -sign (1 - (k / h) J_(k-1)) cancels for small h, where
  the series h sum_m (sign h)^m k! / (k + m + 1)! is used.
  """
  if h < 2:
    m = np.arange(40)
    return np.array(
      [
        h
        * np.sum(
          (sign * h) ** m
          * [math.factorial(k) / math.factorial(k + i + 1) for i in range(40)]
        )
        for k in range(num)
      ]
    )
  values = [sign * np.expm1(sign * h)]
  for k in range(1, num):
    values.append(-sign * (1 - k / h * values[-1]))
  return np.array(values)
