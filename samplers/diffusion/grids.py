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

from giantsteps.samplers.diffusion.schedules import Schedule

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
