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

"flow", "phi" and their gauges put noise and data on one scale, and mean what
they say for data of standard deviation 1. For others the unit data is
y0 = x0 / data_std on the path (data_std alpha, sigma): then a run on scaled
data is the scaled run.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from giantsteps.samplers.diffusion import predictions
from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.tables import Table

TARGETS = {"data": "x0", "noise": "eps", "flow": "flow", "angle": "angle"}
VARIABLES = ("lambda", "t", "rho", "phi", "flow")
MIN_TARGETS = 4  # columns of history, so that most tables share a program
QUADRATURE = np.polynomial.legendre.leggauss(48)


class Point(NamedTuple):
  """A point of the path."""

  t: float
  alpha: float
  sigma: float
  lam: float


class Nodes(NamedTuple):
  """The times of a run and the path of the unit data there, each [N + 1]."""

  schedule: Schedule
  t: np.ndarray
  alpha: np.ndarray  # data_std times the schedule's
  sigma: np.ndarray
  lam: np.ndarray
  phi: np.ndarray
  data_std: float = 1.0

  def model_time(self) -> np.ndarray:
    """What the model is told at every node but the last, [N]."""
    return np.asarray(self.schedule.model_time(self.t[:-1]), np.float64)

  def point(self, i: int) -> Point:
    """The i-th node."""
    values = self.t[i], self.alpha[i], self.sigma[i], self.lam[i]
    return Point(*(float(value) for value in values))


def nodes(
  schedule: Schedule,
  times: np.ndarray,
  gauge: str | None = None,
  data_std: float = 1.0,
) -> Nodes:
  """Evaluates the schedule at `times` [N + 1], N >= 1, and checks them.

  Raises:
    ValueError: times that do not fall strictly, or lie outside the schedule,
      or start at alpha = 0 if the gauge is "noise"; data_std <= 0.
  """
  if not (data_std > 0 and math.isfinite(data_std)):
    raise ValueError(f"data_std={data_std} must be positive")
  t = np.asarray(times, np.float64)
  if t.ndim != 1 or t.size < 2:
    raise ValueError(f"times must be [N + 1] with N >= 1, not {t.shape}")
  with np.errstate(invalid="ignore"):
    alpha, sigma = schedule.alpha_sigma(t)
  alpha = data_std * alpha
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
  if gauge == "noise" and alpha[0] == 0:
    raise ValueError(
      f"gauge 'noise' cannot start where alpha = 0 (t = {t[0]}); use gauge"
      " 'data', 'flow' or 'angle', or a smaller first time"
    )
  with np.errstate(divide="ignore"):
    lam = np.log(alpha) - np.log(sigma)
  return Nodes(schedule, t, alpha, sigma, lam, phi, data_std)


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


def corrected_steps(
  num_steps: int, order: int, *, corrector: bool, warm_up: str = "lower"
) -> range:
  """Steps that `multistep` corrects.

  Args:
    num_steps: N.
    order: targets of the full predictor.
    corrector: all steps.
    warm_up: without a corrector, what becomes of the first order - 1 steps,
      which have fewer targets: "lower" leaves them so, "corrected" redoes
      them. Two targets make the first step third order, so that a method of
      order 3 is.
  """
  if warm_up not in ("lower", "corrected"):
    raise ValueError(f"unknown warm_up {warm_up!r}; choose lower or corrected")
  if corrector:
    return range(num_steps)
  return range(order - 1 if warm_up == "corrected" else 0)


def scale(gauge: str, alpha: Any, sigma: Any) -> Any:
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
  variable: str, at: Nodes, alpha: np.ndarray, sigma: np.ndarray
) -> np.ndarray:
  """u at a point of the path `at` is on; infinite where it is.

  Any common factor of alpha and sigma cancels.
  """
  with np.errstate(divide="ignore"):
    lam = np.log(alpha) - np.log(sigma)
    match variable:
      case "lambda":
        return lam
      case "t":
        return at.schedule.t_of_lambda(lam - math.log(at.data_std))
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
  u = coordinate(variable, at, cos, sin)
  node = coordinate(variable, at, at.alpha, at.sigma)[points]
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
  eta: np.ndarray | None = None,
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
    eta: [N] noise of the steps: J_k(h) becomes J_k((1 + eta) h) in the data
      gauge, (1 + eta) J_k(h) in the noise gauge.

  Returns:
    [P], in the order of points.
  """
  h = at.lam[b] - at.lam[b - 1]
  c = (at.lam[points] - at.lam[b - 1]) / h
  gain = 1.0 if eta is None else 1.0 + eta[b - 1]
  if gauge == "data":
    h, factor = gain * h, at.alpha[b]
  else:
    factor = -gain * at.sigma[b]
  j = moments(h, len(points), -1 if gauge == "data" else 1)
  if len(points) == 2:
    j[1] = {"exact": j[1], "bh1": h / 2, "bh2": j[0] / 2}[two_point]
  if len(points) == 3:
    j[2] *= kappa
  return factor * np.linalg.solve(np.vander(c, increasing=True).T, j)


def multistep(
  at: Nodes,
  weights: Callable[[np.ndarray, int], np.ndarray],
  *,
  prediction: str,
  gauge: str,
  variable: str,
  order: int,
  corrected: Collection[int],
  final: str,
  eta: np.ndarray | None = None,
) -> Table:
  """Assembles the table of a multistep solver.

  Step i goes from node i to i + 1 and uses the targets at i, i - 1, ..; if
  step i - 1 is to be corrected, row i first redoes it with its own target
  added. The last step never is (that would cost a call). Where u is infinite
  at an end of a step, or S_b = 0, nothing but DDIM is defined, and it is used.
  A corrected stochastic step keeps its noise: base = z + sum (new weights -
  old weights) m.

  Args:
    at: from `nodes`.
    weights: (points, b) -> weights of the targets at nodes `points` [P] in
      the step b - 1 -> b, S_b included.
    prediction: what the model returns, one of `predictions.KINDS`.
    gauge: key of `TARGETS`.
    variable: u, one of `VARIABLES`.
    order: targets per step, 1 to 4.
    corrected: steps to redo with one more target: a range, a set, see
      `corrected_steps`.
    final: as in `step_orders`.
    eta: [N] >= 0, noise of the steps in the data or noise gauge.

  Returns:
    A table of N rows, K = 4, or 5 for order 4 with corrected steps.

  Raises:
    ValueError: unknown or unusable settings, with the reason.
  """
  if order not in (1, 2, 3, 4):
    raise ValueError(f"order must be 1, 2, 3 or 4, not {order}")
  num = at.t.size - 1
  orders = step_orders(num, order, final)
  s = scale(gauge, at.alpha, at.sigma)
  eta = np.zeros(num) if eta is None else eta
  target = targets(at.schedule, at.t[:-1], prediction, gauge, at.data_std)
  finite = np.isfinite(coordinate(variable, at, at.alpha, at.sigma))
  usable = finite[:-1] & finite[1:] & (s[1:] > 0)  # [N], of the steps
  if final == "full" and orders[-1] > 1 and not usable[-1]:
    raise ValueError(
      f"final='full' is undefined for gauge {gauge!r} in {variable!r} where"
      f" the run ends at alpha={at.alpha[-1]}, sigma={at.sigma[-1]}; use"
      " gauge 'flow' or 'angle' with 'flow', 'phi' or 't', or final='ramp'"
    )
  width = max(MIN_TARGETS, order + (len(corrected) > 0))
  anchor, advance = np.tile([0.0, 1.0], (num, 1)), np.empty(num)
  correct, history = np.zeros((2, num, width))
  noise = np.zeros(num)
  for i in range(num):
    if usable[i]:
      points = _points(finite, i, orders[i])
      history[i, i - points] = weights(points, i + 1)
      advance[i], noise[i] = decay(gauge, at.point(i), at.point(i + 1), eta[i])
    else:
      advance[i], history[i, 0], noise[i] = ddim_step(
        gauge, at.point(i), at.point(i + 1), eta[i]
      )
    if i > 0 and usable[i - 1] and i - 1 in corrected:
      points = _points(finite, i, orders[i - 1] + 1)
      correct[i, i - points] = weights(points, i)
      if noise[i - 1]:
        correct[i, 1:] -= history[i - 1, :-1]
      else:
        anchor[i] = s[i] / s[i - 1], 0.0
  return Table(
    at.model_time(), target, anchor, correct, advance, history, noise
  )


def _points(finite: np.ndarray, newest: int, num: int) -> np.ndarray:
  """newest, newest - 1, ..; a node at u = infinity has no weight."""
  points = np.arange(newest, newest - num, -1)
  return points[finite[points]]


def decay(gauge: str, a: Point, b: Point, eta: float) -> tuple[float, float]:
  """(weight of x_a, standard deviation of the noise) of the step a -> b."""
  ratio = scale(gauge, b.alpha, b.sigma) / scale(gauge, a.alpha, a.sigma)
  if eta == 0:
    return ratio, 0.0
  h = b.lam - a.lam
  if gauge == "data":
    spread = np.sqrt(-np.expm1(-2 * eta * h))
    return ratio * np.exp(-eta * h), b.sigma * spread
  return ratio, b.sigma * np.sqrt(eta * np.expm1(2 * h))


def ddim_step(
  gauge: str, a: Point, b: Point, eta: float
) -> tuple[float, float, float]:
  """Weights of x_a and m_a that keep x0 (and eps, if eta = 0); the noise."""
  if eta > 0:
    h = b.lam - a.lam
    keep = b.sigma / a.sigma * np.exp(-eta * h)
    gain = b.alpha - keep * a.alpha
    z, out = predictions.affine(TARGETS[gauge], "x0", a.alpha, a.sigma)
    noise = b.sigma * np.sqrt(-np.expm1(-2 * eta * h))
    return keep + gain * z, gain * out, noise
  d0, d1 = predictions.combination(TARGETS[gauge], a.alpha, a.sigma)
  determinant = a.alpha * d1 - a.sigma * d0
  return (
    (b.alpha * d1 - b.sigma * d0) / determinant,
    (a.alpha * b.sigma - a.sigma * b.alpha) / determinant,
    0.0,
  )


def targets(
  schedule: Schedule,
  t: np.ndarray,
  prediction: str,
  gauge: str,
  data_std: float = 1.0,
) -> np.ndarray:
  """Rows (z, out) with m = z x + out output at times t [N], -> [N, 2].

  m is that of x0 / data_std.

  Raises:
    ValueError: where the prediction does not determine the gauge's target.
  """
  alpha, sigma = schedule.alpha_sigma(t)
  with np.errstate(divide="ignore", invalid="ignore"):
    rate = schedule.rate(t) if prediction == "velocity" else None
    target = predictions.affine(
      prediction, TARGETS[gauge], alpha, sigma, rate, data_std
    )
  target = np.stack(target, -1)
  bad = ~np.isfinite(target).all(-1)
  if bad.any():
    i = int(np.argmax(bad))
    raise ValueError(
      f"prediction {prediction!r} does not determine {TARGETS[gauge]!r} at"
      f" t = {t[i]} (alpha = {alpha[i]}, sigma = {sigma[i]}); start at a"
      " smaller time, or use a model that predicts 'v' or 'flow'"
    )
  return target


def noise_levels(eta: ArrayLike, num_steps: int) -> np.ndarray:
  """eta of every step, [N].

  Raises:
    ValueError: negative or not finite, or of another length.
  """
  levels = np.asarray(eta, np.float64)
  if levels.shape not in ((), (num_steps,)):
    raise ValueError(f"eta {levels.shape} must be a number or [{num_steps}]")
  if not (np.isfinite(levels).all() and (levels >= 0).all()):
    raise ValueError(f"eta={eta} must be at least 0")
  return np.broadcast_to(levels, num_steps)


def with_ends(
  table: Table,
  at: Nodes,
  *,
  prediction: str,
  denoise_to_zero: bool = False,
  threshold: float | tuple[float, ...] | None = None,
) -> Table:
  """Adds what may follow any solver: a last denoising call, thresholding.

  Args:
    table: a run along `at`.
    at: its nodes.
    prediction: what the model returns.
    denoise_to_zero: one more call, at the last node, whose x0 is the sample.
    threshold: quantile of `tables.threshold`, or (quantile, floor) or
      (quantile, floor, cap); floor 1 and no cap otherwise. The targets of the
      table must be x0.

  Raises:
    ValueError: sigma = 0 at the last node already; a quantile outside (0, 1].
  """
  if denoise_to_zero:
    if at.sigma[-1] == 0:
      raise ValueError(
        f"denoise_to_zero: the run ends at t = {at.t[-1]}, where sigma = 0,"
        " already; end it earlier, or leave the option out"
      )
    last = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape[1:])), table)
    t = at.t[-1:]
    last.history[0, 0] = 1.0
    last = last._replace(
      time=np.asarray(at.schedule.model_time(t), np.float64),
      target=targets(at.schedule, t, prediction, "data"),
      anchor=np.array([[0.0, 1.0]]),
    )
    table = jax.tree.map(lambda *leaves: np.concatenate(leaves), table, last)
  if threshold is None:
    return table
  values = np.atleast_1d(np.asarray(threshold, np.float64))
  limits = np.append(values, (1.0, np.inf)[values.size - 1 :])
  if limits.shape != (3,) or not 0 < limits[0] <= 1 or limits[1] <= 0:
    raise ValueError(
      f"threshold={threshold}: a quantile in (0, 1], or (quantile, floor > 0)"
      " or (quantile, floor, cap)"
    )
  return table._replace(threshold=np.tile(limits, (table.nfe, 1)))
