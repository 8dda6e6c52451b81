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
"flow" = sigma / (alpha + sigma). With one target, u does not matter, and
data, noise and flow are DDIM (x0 and eps held fixed); the angle gauge holds
the angular velocity and is Euler in phi. Everything is float64 on the host.
"""

import math
from collections.abc import Callable
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

  def model_time(self) -> np.ndarray:
    """What the model is told at every node but the last, [N]."""
    return np.asarray(self.schedule.model_time(self.t[:-1]), np.float64)


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
  gauge: str, variable: str, at: Nodes, points: np.ndarray, b: int
) -> np.ndarray:
  """S_b int_a^b ell_j(u) dmu for the targets at nodes `points`, a = b - 1.

  Gauss-Legendre, 48 points a panel, in lambda (panels of at most 4) or, where
  lambda is infinite at an end, in phi: relative error about 1e-13.

  Returns:
    [P], in the order of points [P].
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
  node = coordinate(variable, at.schedule, at.alpha, at.sigma)[points]
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
    m = np.arange(1, 40)
    tails = [np.sum(np.cumprod(sign * h / (k + 1 + m))) for k in range(num)]
    return np.array([h / (k + 1) * (1 + t) for k, t in enumerate(tails)])
  values = [sign * np.expm1(sign * h)]
  for k in range(1, num):
    values.append(-sign * (1 - k / h * values[-1]))
  return np.array(values)


def lambda_weights(
  gauge: str,
  at: Nodes,
  points: np.ndarray,
  b: int,
  *,
  two_point: str = "exact",
  kappa: float = 1.0,
) -> np.ndarray:
  """`lagrange_weights` in u = lambda by closed form, data and noise gauge.

  The weights solve sum_j w_j c_j^k = J_k for k < len(points), with
  c_j = (lambda_j - lambda_a) / h; published methods replace some J_k.

  Args:
    gauge: "data" or "noise".
    at: the nodes.
    points: [P] indices of the targets.
    b: end of the step that starts at a = b - 1.
    two_point: what stands for J_1 where P = 2: "exact" J_1, "bh1" h / 2,
      "bh2" J_0 / 2 (arXiv:2302.04867).
    kappa: factor of J_2 where P = 3.

  Returns:
    [P], in the order of points.
  """
  h = at.lam[b] - at.lam[b - 1]
  c = (at.lam[points] - at.lam[b - 1]) / h
  j = moments(h, len(points), -1 if gauge == "data" else 1)
  if len(points) == 2:
    j[1] = {"exact": j[1], "bh1": h / 2, "bh2": j[0] / 2}[two_point]
  if len(points) == 3:
    j[2] *= kappa
  weights = np.linalg.solve(np.vander(c, increasing=True).T, j)
  return weights * (at.alpha[b] if gauge == "data" else -at.sigma[b])


def multistep(
  at: Nodes,
  weights: Callable[[np.ndarray, int], np.ndarray],
  *,
  prediction: str,
  gauge: str,
  variable: str,
  order: int,
  corrector: bool,
  final: str,
) -> Table:
  """Assembles the table of a multistep solver.

  Step i goes from node i to i + 1 and uses the targets at i, i - 1, ..; with
  a corrector, row i first redoes step i - 1 with its own target added. The
  last step is never corrected (that would cost a call). Where u is infinite
  at an end of a step, or S_b = 0, nothing but DDIM is defined, and it is used.

  Args:
    at: from `nodes`.
    weights: (points, b) -> weights of the targets at nodes `points` [P] in
      the step b - 1 -> b, S_b included.
    prediction: what the model returns, one of `predictions.KINDS`.
    gauge: key of `TARGETS`.
    variable: u, one of `VARIABLES`.
    order: targets per step, 1 to 4.
    corrector: redo each step but the last with one more target.
    final: as in `step_orders`.

  Returns:
    A table of N rows, K = max(4, order + corrector).

  Raises:
    ValueError: unknown or unusable settings, with the reason.
  """
  if order not in (1, 2, 3, 4):
    raise ValueError(f"order must be 1, 2, 3 or 4, not {order}")
  num = at.t.size - 1
  orders = step_orders(num, order, final)
  s = scale(gauge, at.alpha, at.sigma)
  target = targets(at, prediction, gauge)
  finite = np.isfinite(coordinate(variable, at.schedule, at.alpha, at.sigma))
  usable = finite[:-1] & finite[1:] & (s[1:] > 0)  # [N], of the steps
  if final == "full" and orders[-1] > 1 and not usable[-1]:
    raise ValueError(
      f"final='full' is undefined for gauge {gauge!r} in {variable!r} where"
      f" the run ends at alpha={at.alpha[-1]}, sigma={at.sigma[-1]}; use"
      " gauge 'flow' or 'angle' with 'flow', 'phi' or 't', or final='ramp'"
    )
  width = max(MIN_TARGETS, order + corrector)
  anchor, advance = np.tile([0.0, 1.0], (num, 1)), np.empty(num)
  correct, history = np.zeros((2, num, width))
  for i in range(num):
    if usable[i]:
      points = _points(finite, i, orders[i])
      advance[i] = s[i + 1] / s[i]
      history[i, i - points] = weights(points, i + 1)
    else:
      advance[i], history[i, 0] = _ddim_step(at, gauge, i)
    if corrector and i > 0 and usable[i - 1]:
      points = _points(finite, i, orders[i - 1] + 1)
      anchor[i] = s[i] / s[i - 1], 0.0
      correct[i, i - points] = weights(points, i)
  time, noise = at.model_time(), np.zeros(num)
  return Table(time, target, anchor, correct, advance, history, noise)


def _points(finite: np.ndarray, newest: int, num: int) -> np.ndarray:
  """newest, newest - 1, ..; a node at u = infinity has no weight."""
  points = np.arange(newest, newest - num, -1)
  return points[finite[points]]


def _ddim_step(at: Nodes, gauge: str, a: int) -> tuple[float, float]:
  """(weight of x_a, weight of m_a) that keep x0 and eps, in any gauge."""
  alpha, sigma = at.alpha, at.sigma
  d0, d1 = predictions.combination(TARGETS[gauge], alpha[a], sigma[a])
  determinant = alpha[a] * d1 - sigma[a] * d0
  return (
    (alpha[a + 1] * d1 - sigma[a + 1] * d0) / determinant,
    (alpha[a] * sigma[a + 1] - sigma[a] * alpha[a + 1]) / determinant,
  )


def targets(at: Nodes, prediction: str, gauge: str) -> np.ndarray:
  """Rows (z, out) with m = z x + out output at all nodes but the last, [N, 2].

  Raises:
    ValueError: where the prediction does not determine the gauge's target.
  """
  alpha, sigma = at.alpha[:-1], at.sigma[:-1]
  rate = at.schedule.rate(at.t[:-1]) if prediction == "velocity" else None
  with np.errstate(divide="ignore", invalid="ignore"):
    target = np.stack(
      predictions.affine(prediction, TARGETS[gauge], alpha, sigma, rate), -1
    )
  if gauge == "noise" and alpha[0] == 0:
    raise ValueError(
      f"gauge 'noise' cannot start where alpha = 0 (t = {at.t[0]}); use gauge"
      " 'data', 'flow' or 'angle', or a smaller first time"
    )
  bad = ~np.isfinite(target).all(-1)
  if bad.any():
    i = int(np.argmax(bad))
    raise ValueError(
      f"prediction {prediction!r} does not determine {TARGETS[gauge]!r} at"
      f" t = {at.t[i]} (alpha = {alpha[i]}, sigma = {sigma[i]}); start at a"
      " smaller time, or use a model that predicts 'v' or 'flow'"
    )
  return target
