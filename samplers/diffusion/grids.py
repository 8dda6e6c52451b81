"""Time nodes: float64 [num_steps + 1], falling from noise to data.

Every grid runs from `t_start` to `t_end` exactly. Where the log-SNR of an end
is infinite (t = 1 of a flow, sigma = 0), a grid that is spaced in log-SNR or
in sigma keeps that end as its first or last node and spaces the others up to
a finite stand-in: the schedule's own t_min or t_max if the log-SNR is finite
there, else sigma / alpha = .002 and 80, the range of EDM. For `karras` on
`edm()` with t_end=0 this is the published grid with 0 appended.
"""

import math

import numpy as np

from giantsteps.samplers.diffusion.schedules import Schedule, vp_linear

RHO_MIN, RHO_MAX = 0.002, 80.0  # sigma / alpha, arXiv:2206.00364 table 1


def uniform_time(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
) -> np.ndarray:
  """Nodes uniform in the schedule's t.

  Args:
    schedule: gives the default ends.
    num_steps: N >= 1.
    t_start: first node; schedule.t_max if None.
    t_end: last node; schedule.t_min if None.

  Returns:
    [N + 1] float64.

  Raises:
    ValueError: num_steps < 1, or ends that do not fall.
  """
  return _power(schedule, num_steps, t_start, t_end, 1)


def quadratic_time(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
) -> np.ndarray:
  """Nodes uniform in sqrt(t): denser near the data; as `uniform_time`."""
  return _power(schedule, num_steps, t_start, t_end, 2)


def power_time(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
  power: float,
) -> np.ndarray:
  """Nodes uniform in t^(1 / power), power > 0; as `uniform_time`."""
  if not power > 0:
    raise ValueError(f"power={power} must be positive")
  return _power(schedule, num_steps, t_start, t_end, power)


def log_snr(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
) -> np.ndarray:
  """Nodes uniform in lambda = log(alpha / sigma); as `uniform_time`."""
  return _spaced(schedule, num_steps, t_start, t_end, _uniform)


def karras(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
  power: float = 7.0,
) -> np.ndarray:
  """Nodes uniform in (sigma / alpha)^(1 / power) (arXiv:2206.00364, eq. 5).

  As `uniform_time`, with the exponent rho of the paper as `power`.
  """

  def space(first, last, num):
    # a ramp of rho^(1/p) = exp(-lam / p), back to lam
    ramp = np.linspace(np.exp(-first / power), np.exp(-last / power), num)
    return -power * np.log(ramp)

  return _spaced(schedule, num_steps, t_start, t_end, space)


def polyexponential(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
  power: float = 1.0,
) -> np.ndarray:
  """log sigma/alpha = r^power (log max - log min) + log min, r from 1 to 0.

  As `uniform_time`. power = 1 is `exponential`, and `log_snr`; above 1 spends
  more steps near the data.
  """

  def space(first, last, num):
    return last - np.linspace(1, 0, num) ** power * (last - first)

  return _spaced(schedule, num_steps, t_start, t_end, space)


def exponential(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
) -> np.ndarray:
  """Nodes uniform in log(sigma / alpha): `log_snr` by its other name."""
  return log_snr(schedule, num_steps=num_steps, t_start=t_start, t_end=t_end)


def beta(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
  a: float = 0.6,
  b: float = 0.6,
) -> np.ndarray:
  """Quantiles of Beta(a, b) spread over sigma/alpha (arXiv:2407.12173).

  As `uniform_time`: sigma / alpha = min + q (max - min), q the quantiles of
  levels 1, .., 0 in equal steps.
  """

  def space(first, last, num):
    low, high = np.exp(-last), np.exp(-first)
    q = beta_quantile(np.linspace(1, 0, num), a, b)
    return -np.log(low + q * (high - low))

  return _spaced(schedule, num_steps, t_start, t_end, space)


def vp(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
  beta_min: float = 0.1,
  beta_max: float = 20.0,
) -> np.ndarray:
  """Nodes uniform in the time of `schedules.vp_linear`, on any schedule.

  As `uniform_time`. On `edm` between VP's own ends this is the grid that
  k-diffusion calls "vp".
  """
  clock = vp_linear(beta_min, beta_max)

  def space(first, last, num):
    start, end = clock.t_of_lambda(np.array([first, last]))
    return clock.lam(np.linspace(start, end, num))

  return _spaced(schedule, num_steps, t_start, t_end, space)


def flow_time(
  schedule: Schedule,
  *,
  num_steps: int,
  t_start: float | None = None,
  t_end: float | None = None,
  scale: float = 1.0,
  power: float = 1.0,
) -> np.ndarray:
  """Nodes uniform in u^(1 / power), u = sigma / (scale alpha + sigma).

  As `uniform_time`, but infinite log-SNR needs no stand-in: u is 1 and 0
  there. On any schedule these are the nodes a flow would take with shift
  `scale`, which suits data of about that standard deviation.

  Args:
    schedule: gives the default ends.
    num_steps: N >= 1.
    t_start: first node; schedule.t_max if None.
    t_end: last node; schedule.t_min if None.
    scale: sigma / alpha at which u = 1/2, > 0.
    power: above 1 spends more steps near the data, > 0.
  """
  if not (0 < scale < math.inf and 0 < power < math.inf):
    raise ValueError(
      f"scale={scale} and power={power} must be positive and finite"
    )
  start, end = _ends(schedule, num_steps, t_start, t_end)
  alpha, sigma = schedule.alpha_sigma(np.array([start, end]))
  first, last = (sigma / (scale * alpha + sigma)) ** (1 / power)
  u = np.linspace(first, last, num_steps + 1) ** power
  with np.errstate(divide="ignore"):
    lam = np.log1p(-u) - np.log(u) - math.log(scale)
  return _pinned(schedule.t_of_lambda(lam), start, end)


def transfer(
  times: np.ndarray, source: Schedule, target: Schedule
) -> np.ndarray:
  """The nodes of `target` with the log-SNR that `times` have in `source`."""
  return target.t_of_lambda(source.lam(times))


def shift(times: np.ndarray, by: float) -> np.ndarray:
  """s t / (1 + (s - 1) t): nodes of the straight path, moved (SD3).

  Args:
    times: [N + 1] in [0, 1] on `rectified_flow()`.
    by: s > 0; above 1 spends more steps near the noise.
  """
  if by <= 0:
    raise ValueError(f"shift must be positive: {by}")
  return by * times / (1 + (by - 1) * times)


def integers(
  num_steps: int,
  *,
  spacing: str = "linspace",
  num_train: int = 1000,
  offset: int = 0,
  t_end: float | None = None,
) -> np.ndarray:
  """The integer grids of diffusers on the clock of `schedules.discrete`.

  | spacing | noise levels i |
  |---|---|
  | linspace | round(linspace(0, T - 1, N + 1)), without 0 |
  | leading | k floor(T / (N + 1)), k = 1 .. N, + offset |
  | trailing | round(T - k T / N) - 1, k = 0 .. N - 1 |
  | ddim_linspace | round(linspace(0, T - 1, N)) |
  | ddim_leading | k floor(T / N), k = 0 .. N - 1, + offset |

  Args:
    num_steps: N >= 1.
    spacing: a row of the table, the last two are those of DDIM.
    num_train: T, noise levels of the model.
    offset: `steps_offset`, for the leading rows.
    t_end: last node; level 0 if None ("sigma_min"), 0.0 for data ("zero").

  Returns:
    [N + 1] float64, (i + 1) / T from noise to data, then t_end.

  Raises:
    ValueError: unknown spacing, or nodes that do not fall (too many steps).
  """
  n, total = num_steps, num_train
  if n < 1:
    raise ValueError(f"num_steps={n}: at least 1 step is needed")
  match spacing:
    case "linspace":
      levels = np.round(np.linspace(0, total - 1, n + 1))[::-1][:-1]
    case "leading":
      levels = (np.arange(1, n + 1) * (total // (n + 1)))[::-1] + offset
    case "trailing":
      levels = np.round(np.arange(total, 0, -total / n))[:n] - 1
    case "ddim_linspace":
      levels = np.round(np.linspace(0, total - 1, n))[::-1]
    case "ddim_leading":
      levels = (np.arange(n) * (total // n))[::-1] + offset
    case _:
      raise ValueError(
        f"unknown spacing {spacing!r}; choose linspace, leading, trailing,"
        " ddim_linspace or ddim_leading"
      )
  end = 1 / total if t_end is None else float(t_end)
  times = np.append((levels + 1) / total, end)
  if not (np.diff(times) < 0).all():
    raise ValueError(
      f"{spacing} grid of {n} of {total} levels to t_end={end} does not fall;"
      " use fewer steps, or t_end=0.0"
    )
  return times


def beta_quantile(level: np.ndarray, a: float, b: float) -> np.ndarray:
  """x with P(Beta(a, b) <= x) = level in [0, 1], float64, by bisection."""

  def integral(x, a, b):  # x^a / a 2F1(a, 1 - b; a + 1; x), x <= 1/2
    n = np.arange(1, 64)
    ratio = (n - b) / n  # of successive (1 - b)_n / n!
    terms = np.cumprod(ratio) * a / (a + n) * x[..., None] ** n
    return x**a / a * (1 + terms.sum(-1))

  total = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
  low, high = np.zeros_like(level), np.ones_like(level)
  for _ in range(128):  # relative precision near 0 too
    x = (low + high) / 2
    lower = integral(np.minimum(x, 0.5), a, b)
    upper = total - integral(np.minimum(1 - x, 0.5), b, a)
    below = np.where(x <= 0.5, lower, upper) < level * total
    low, high = np.where(below, x, low), np.where(below, high, x)
  return np.where(level <= 0, 0.0, np.where(level >= 1, 1.0, high))


def _uniform(first: float, last: float, num: int) -> np.ndarray:
  return np.linspace(first, last, num)


def _ends(
  schedule: Schedule,
  num_steps: int,
  t_start: float | None,
  t_end: float | None,
) -> tuple[float, float]:
  start = schedule.t_max if t_start is None else float(t_start)
  end = schedule.t_min if t_end is None else float(t_end)
  if num_steps < 1:
    raise ValueError(f"num_steps={num_steps}: at least 1 step is needed")
  if not (math.isfinite(start) and 0 <= end < start):
    raise ValueError(
      f"time must fall from t_start={start} to t_end={end}, 0 <= t_end <"
      f" t_start; this schedule spans {schedule.t_max} to {schedule.t_min}"
    )
  with np.errstate(invalid="ignore"):
    alpha, sigma = schedule.alpha_sigma(start)
  if not (alpha >= 0 and sigma > 0):
    raise ValueError(
      f"t_start={start} is outside the schedule, which starts at"
      f" {schedule.t_max}"
    )
  return start, end


def _power(schedule, num_steps, t_start, t_end, power) -> np.ndarray:
  start, end = _ends(schedule, num_steps, t_start, t_end)
  ramp = np.linspace(start ** (1 / power), end ** (1 / power), num_steps + 1)
  return _pinned(ramp**power, start, end)


def _spaced(schedule, num_steps, t_start, t_end, space) -> np.ndarray:
  """Nodes at lambda = space(first, last, num), infinite ends set apart."""
  start, end = _ends(schedule, num_steps, t_start, t_end)
  first, last = float(schedule.lam(start)), float(schedule.lam(end))
  head, tail = not math.isfinite(first), not math.isfinite(last)
  if head:
    first = float(schedule.lam(schedule.t_max))
    first = first if math.isfinite(first) else -math.log(RHO_MAX)
  if tail:
    last = float(schedule.lam(schedule.t_min))
    last = last if math.isfinite(last) else -math.log(RHO_MIN)
  if not first < last:
    raise ValueError(
      f"no room between t_start={start} and t_end={end}: log-SNR {first:.3g}"
      f" to {last:.3g}; move the finite end, or use uniform_time"
    )
  num = num_steps + 1 - head - tail  # nodes that log-SNR places
  inner = space(first, last, num)
  if num == 1 and head and tail:
    inner = space(first, last, 3)[1:2]
  nodes = schedule.t_of_lambda(inner)
  return _pinned(
    np.concatenate([[start] * head, nodes, [end] * tail]), start, end
  )


def _pinned(nodes: np.ndarray, start: float, end: float) -> np.ndarray:
  nodes[0], nodes[-1] = start, end
  return nodes
