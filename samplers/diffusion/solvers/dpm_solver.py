"""DPM-Solver (arXiv:2206.00927) and DPM-Solver++ (arXiv:2211.01095)."""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from giantsteps.samplers.diffusion import grids
from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers import exponential, stages
from giantsteps.samplers.diffusion.solvers.exponential import Point
from giantsteps.samplers.diffusion.tables import Table

INNER = {
  "log_snr": grids.log_snr,
  "uniform_time": grids.uniform_time,
  "quadratic_time": grids.quadratic_time,
}


def dpm_solver_pp(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  order: int | Sequence[int] = 2,
  method: str = "multistep",
  variant: str = "midpoint",
  final: str = "ramp",
  warm_up: str | None = None,
  inner: str = "log_snr",
  eta: ArrayLike = 0.0,
  ancestral_eta: float = 0.0,
  denoise_to_zero: bool = False,
  threshold: float | tuple[float, ...] | None = None,
  published: bool = False,
) -> Table:
  """DPM-Solver++: x0 a polynomial in lambda; ODE, or SDE with noise eta.

  Multistep (1), (2M), (3M): with h = lambda_b - lambda_a, r_0 h and r_1 h the
  two steps before, D_10 = (m_0 - m_1) / r_0, D_11 = (m_1 - m_2) / r_1, D_2 =
  (D_10 - D_11) / (r_0 + r_1), D_1 = D_10 + r_0 D_2, J_k of
  `exponential.moments` at g = (1 + eta) h:

      x_b = (sigma_b / sigma_a) e^(-eta h) x_a + alpha_b J_0 m_0
        (2M) + alpha_b (J_0 / 2 or J_1) D_10
        (3M) + alpha_b (J_1 D_1 + kappa J_2 D_2)
        + sigma_b sqrt(1 - e^(-2 eta h)) xi

  Differs from the paper: kappa = 1, which makes (3M) third order. Public code
  has kappa = 1/2, second order (`published=True`).
  Singlestep (1), (2S), (3S): the model is called inside the step, at r_1 h
  and r_2 h, instead of remembering.

  Args:
    schedule: alpha, sigma and the model's clock.
    times: [N + 1] float64, falling, from noise to data. Singlestep with a
      list of orders: the outer nodes only, one more than orders; with an int:
      all nodes, those inside the steps of `fast_orders` included.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      or "score".
    order: 1, 2 or 3 targets per step, or the order of every singlestep.
    method: "multistep" or "singlestep".
    variant: "midpoint" (the paper's default) or "taylor" (exact first
      moment), of the two-target steps, also in the warm-up of order 3, and of
      the last stage of singlesteps.
    final: of multistep: "ramp" (orders .., 2, 1 at the end; the default
      because the last step in lambda is often by far the longest), "none",
      "ddim_last" or "full". Where sigma ends at 0 the last step is order 1 in
      any case; "full" refuses that. Public code ramps if N < 10 only.
    warm_up: of multistep, the first order - 1 steps: "lower" as published,
      "corrected" (redone with the next target, at no call, which order 3
      needs to be third order), None for "corrected" at order 3 unless
      published or stochastic.
    inner: grid that places the nodes inside the steps of a list: "log_snr",
      "uniform_time" or "quadratic_time".
    eta: 0 the ODE, 1 the reverse SDE; a number or [steps] >= 0. Singlestep:
      a number, orders 1 and 2; the two noises of a step are independent, as
      in k-diffusion, which makes it weak order 1 (multistep 2: weak order 2).
    ancestral_eta: of singlestep: each step is deterministic to a lower sigma
      and comes back up by fresh noise, in [0, 1] (k-diffusion's "2S a").
    denoise_to_zero: return x0 of one more call at the last node.
    threshold: quantile of dynamic thresholding of x0, or (quantile, floor[,
      cap]), see `tables.threshold`.
    published: kappa = 1/2.

  Returns:
    A table of one row per model call: N; for a list of orders their sum; one
    more with denoise_to_zero.

  Raises:
    ValueError: unknown settings, times that do not fall, a prediction that
      says nothing at one of the nodes.
  """
  table = _solver(
    schedule,
    times,
    gauge="data",
    prediction=prediction,
    order=order,
    method=method,
    variant=variant,
    final=final,
    warm_up=warm_up,
    inner=inner,
    eta=eta,
    ancestral_eta=ancestral_eta,
    published=published,
  )
  return exponential.with_ends(
    table,
    exponential.nodes(schedule, times),
    prediction=prediction,
    denoise_to_zero=denoise_to_zero,
    threshold=threshold,
  )


def dpm_solver(
  schedule: Schedule,
  times: np.ndarray,
  *,
  prediction: str,
  order: int | Sequence[int] = 2,
  method: str = "multistep",
  variant: str = "midpoint",
  final: str = "ramp",
  warm_up: str | None = None,
  inner: str = "log_snr",
  eta: ArrayLike = 0.0,
  denoise_to_zero: bool = False,
  published: bool = False,
) -> Table:
  """DPM-Solver: as `dpm_solver_pp` with eps instead of x0 as the polynomial.

  alpha_b J_k^- becomes -sigma_b (1 + eta) J_k^+, sigma_b / sigma_a becomes
  alpha_b / alpha_a, the noise sigma_b sqrt(eta (e^(2 h) - 1)). It cannot
  start where alpha = 0, and the data form is the better one under guidance.

  Args:
    schedule: as in `dpm_solver_pp`, like all that is not listed here.
    times: as there.
    prediction: as there.
    order: as there.
    method: as there; the paper's own is "singlestep".
    variant: as there.
    final: as there.
    warm_up: as there.
    inner: as there.
    eta: as there.
    denoise_to_zero: as there.
    published: as there.

  Returns:
    A table of one row per model call.

  Raises:
    ValueError: as there, and alpha = 0 at the first node.
  """
  table = _solver(
    schedule,
    times,
    gauge="noise",
    prediction=prediction,
    order=order,
    method=method,
    variant=variant,
    final=final,
    warm_up=warm_up,
    inner=inner,
    eta=eta,
    ancestral_eta=0.0,
    published=published,
  )
  return exponential.with_ends(
    table,
    exponential.nodes(schedule, times),
    prediction=prediction,
    denoise_to_zero=denoise_to_zero,
  )


def fast_orders(nfe: int, order: int) -> list[int]:
  """Orders of singlesteps that make nfe calls: DPM-Solver-fast's lists.

  Order 3: 3, 3, .., then 2, 1 or 1 or 2; order 2: 2, 2, .., then 1 if nfe is
  odd (arXiv:2206.00927, section 3.4).
  """
  if nfe < 1 or order not in (1, 2, 3):
    raise ValueError(f"need nfe >= 1 and order 1, 2 or 3: {nfe}, {order}")
  full, rest = divmod(nfe, order)
  if order == 3 and rest == 0:
    return [3] * (full - 1) + [2, 1]
  return [order] * full + [rest] * (rest > 0)


def _solver(
  schedule: Schedule,
  times: np.ndarray,
  *,
  gauge: str,
  prediction: str,
  order: int | Sequence[int],
  method: str,
  variant: str,
  final: str,
  warm_up: str | None,
  inner: str,
  eta: ArrayLike,
  ancestral_eta: float,
  published: bool,
) -> Table:
  if variant not in ("midpoint", "taylor"):
    raise ValueError(f"unknown variant {variant!r}; choose midpoint or taylor")
  at = exponential.nodes(schedule, times, gauge)
  match method:
    case "singlestep":
      steps = _singlestep(
        at, gauge, order, variant, inner, np.asarray(eta), ancestral_eta
      )
      return stages.assemble(
        schedule, steps, prediction=prediction, gauge=gauge
      )
    case "multistep":
      pass
    case _:
      raise ValueError(f"unknown method {method!r}; multistep or singlestep")
  if not isinstance(order, int) or order not in (1, 2, 3):
    raise ValueError(f"DPM-Solver has orders 1, 2 and 3, not {order}")
  if ancestral_eta:
    raise ValueError("ancestral_eta is of method='singlestep'; multistep: eta")
  levels = exponential.noise_levels(eta, at.t.size - 1)
  if warm_up is None:
    third = order == 3 and not published and not levels.any()
    warm_up = "corrected" if third else "lower"
  weights = functools.partial(
    exponential.lambda_weights,
    gauge,
    at,
    two_point="exact" if variant == "taylor" else "bh2",
    kappa=0.5 if published else 1.0,
    eta=levels,
  )
  return exponential.multistep(
    at,
    weights,
    prediction=prediction,
    gauge=gauge,
    variable="lambda",
    order=order,
    corrected=exponential.corrected_steps(
      at.t.size - 1, order, corrector=False, warm_up=warm_up
    ),
    final=final,
    eta=levels,
  )


def _singlestep(
  at: exponential.Nodes,
  gauge: str,
  order: int | Sequence[int],
  variant: str,
  inner: str,
  eta: np.ndarray,
  ancestral_eta: float,
) -> list[list[stages.Stage]]:
  """Stages of every outer step."""
  exponential.noise_levels(eta, at.t.size - 1)
  if eta.ndim or (eta > 0 and ancestral_eta > 0):
    raise ValueError("singlestep takes one number eta, or ancestral_eta")
  if not 0 <= ancestral_eta <= 1:
    raise ValueError(f"ancestral_eta={ancestral_eta} must be in [0, 1]")
  orders, outer, ratios = _layout(at, order, inner)
  if eta > 0 and max(orders) > 2:
    raise ValueError(f"singlestep with eta={eta}: orders 1 and 2, not 3")
  steps = []
  for i, inside in enumerate(ratios):
    a, b = at.point(outer[i]), at.point(outer[i + 1])
    end, noise = stages.descent(a, b, ancestral_eta)
    step = _step(at.schedule, gauge, a, end, inside, variant, float(eta))
    if noise:
      step[-1] = step[-1]._replace(noise=noise)
    steps.append(step)
  return steps


def _layout(
  at: exponential.Nodes, order: int | Sequence[int], inner: str
) -> tuple[list[int], np.ndarray, list[np.ndarray]]:
  """Orders, indices of the outer nodes, and (lambda - lambda_a) / h inside."""
  finite = np.isfinite(at.lam)
  num = at.t.size - 1
  if isinstance(order, int):
    orders = fast_orders(num, order)
    if not finite[0] and orders[0] > 1:
      orders[:1] = [1, orders[0] - 1]
    if not finite[-1] and orders[-1] > 1:
      orders[-1:] = [orders[-1] - 1, 1]
    outer = np.cumsum([0, *orders])
    inside = [at.lam[a + 1 : b] for a, b in zip(outer, outer[1:], strict=False)]
  else:
    orders, outer = list(order), np.arange(num + 1)
    if len(orders) != num or not set(orders) <= {1, 2, 3}:
      raise ValueError(
        f"orders {orders} must be {num} numbers 1, 2 or 3: times are the"
        f" {num + 1} outer nodes"
      )
    if inner not in INNER:
      raise ValueError(f"unknown inner {inner!r}; choose from {list(INNER)}")
    grid = functools.partial(INNER[inner], at.schedule)
    inside = [
      at.schedule.lam(
        grid(num_steps=k, t_start=at.t[i], t_end=at.t[i + 1])[1:-1]
      )
      if k > 1
      else np.empty(0)
      for i, k in enumerate(orders)
    ]
  lam = at.lam[outer]
  for i, k in enumerate(orders):
    if k > 1 and not np.isfinite(lam[i : i + 2]).all():
      raise ValueError(
        f"step {i} of order {k} from t = {at.t[outer[i]]} to"
        f" {at.t[outer[i + 1]]} has infinite log-SNR at an end; make it order 1"
      )
  ratios = [
    (values - lam[i]) / (lam[i + 1] - lam[i]) if values.size else values
    for i, values in enumerate(inside)
  ]
  return orders, outer, ratios


def _step(
  schedule: Schedule,
  gauge: str,
  a: Point,
  b: Point,
  ratios: np.ndarray,
  variant: str,
  eta: float,
) -> list[stages.Stage]:
  """One singlestep of order len(ratios) + 1 from a to b."""
  if not np.isfinite(b.lam - a.lam):
    advance, weight, noise = exponential.ddim_step(gauge, a, b, eta)
    return [stages.Stage(a.t, advance, [weight], noise)]
  h = b.lam - a.lam
  points = [stages.point(schedule, a.lam + r * h) for r in ratios]
  result = []
  for i, end in enumerate([*points, b]):
    part, factor = end.lam - a.lam, -(1 + eta) * end.sigma
    if gauge == "data":
      part, factor = (1 + eta) * part, end.alpha
    j = exponential.moments(part, 3, -1 if gauge == "data" else 1)
    weights = factor * _stage_weights(j, ratios, i, variant)
    advance, noise = exponential.decay(gauge, a, end, eta)
    start = a.t if i == 0 else points[i - 1].t
    result.append(stages.Stage(start, advance, weights, noise))
  return result


def _stage_weights(
  j: np.ndarray, ratios: np.ndarray, i: int, variant: str
) -> np.ndarray:
  """Weights of m_0 .. m_i in the i-th stage, from the moments J of its end."""
  if i == 0:
    return j[:1]
  r1, last = ratios[0], i == len(ratios)
  if i == 1:
    first = j[0] / 2 if last and variant == "midpoint" else j[1]
    slope = first / r1 * (1.0 if last else ratios[1])
    return np.array([j[0] - slope, slope])
  r2 = ratios[1]
  if variant == "midpoint":
    return np.array([j[0] - j[1] / r2, 0.0, j[1] / r2])
  first = (j[1] * r2 - j[2]) / (r2 - r1) / r1
  second = (j[2] - j[1] * r1) / (r2 - r1) / r2
  return np.array([j[0] - first - second, first, second])
