"""Noise schedules x_t = alpha(t) x0 + sigma(t) eps, float64 on the host.

Time falls from `t_max` (noise) to `t_min` (data). alpha and sigma are computed
from primitives that never subtract nearly equal numbers (no 1 - alpha^2), so
they are exact to a few ulp at both ends, alpha = 0 and sigma = 0 included.
The probability-flow ODE depends on a schedule only through sigma / alpha:
what differs between the rows below is the clock, not the solver.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def _identity(t: ArrayLike) -> np.ndarray:
  return np.asarray(t, np.float64)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """alpha, sigma and the clock of a diffusion or flow model.

  All functions take float64 NumPy arrays (or numbers) of any shape and return
  float64 of that shape; none of them is traced.

  Attributes:
    alpha_sigma: t -> (alpha, sigma), both >= 0, not both 0.
    rate: t -> (d alpha / dt, d sigma / dt); may be infinite where sigma = 0.
    t_of_lambda: lam -> t, the inverse of `lam`; takes +inf where the schedule
      reaches sigma = 0 and -inf where it reaches alpha = 0.
    t_min: where sampling ends unless a grid is told otherwise. alpha_sigma is
      defined, and exact, from 0 on.
    t_max: where sampling starts (noise).
    model_time: t -> what the network is told.
  """

  alpha_sigma: Callable[[ArrayLike], tuple[np.ndarray, np.ndarray]]
  rate: Callable[[ArrayLike], tuple[np.ndarray, np.ndarray]]
  t_of_lambda: Callable[[ArrayLike], np.ndarray]
  t_min: float
  t_max: float
  model_time: Callable[[ArrayLike], np.ndarray] = _identity

  def lam(self, t: ArrayLike) -> np.ndarray:
    """Half log-SNR log(alpha / sigma); -inf at alpha = 0, inf at sigma = 0."""
    alpha, sigma = self.alpha_sigma(t)
    with np.errstate(divide="ignore"):
      return np.log(alpha) - np.log(sigma)

  def phi(self, t: ArrayLike) -> np.ndarray:
    """Angle atan2(sigma, alpha) in [0, pi/2], finite at both ends."""
    alpha, sigma = self.alpha_sigma(t)
    return np.arctan2(sigma, alpha)


def vp_linear(
  beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3
) -> Schedule:
  """Variance-preserving SDE with linear beta (arXiv:2011.13456), t in [0, 1].

  log alpha = L(t) = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2,
  sigma = sqrt(1 - alpha^2) = sqrt(-expm1(2 L)).

  Args:
    beta_min: beta(0) > 0.
    beta_max: beta(1) > beta_min.
    t_min: end of sampling; 1e-3 suits up to about 15 calls, 1e-4 more.
  """
  if not 0 < beta_min < beta_max:
    raise ValueError(f"need 0 < beta_min < beta_max: {beta_min}, {beta_max}")
  slope = beta_max - beta_min

  def log_alpha(t):
    t = np.asarray(t, np.float64)
    return -(slope * t / 4 + beta_min / 2) * t

  def alpha_sigma(t):
    log = log_alpha(t)
    return np.exp(log), np.sqrt(np.abs(np.expm1(2 * log)))

  def rate(t):
    alpha, sigma = alpha_sigma(t)
    log_rate = -(slope * np.asarray(t, np.float64) + beta_min) / 2
    with np.errstate(divide="ignore"):
      return alpha * log_rate, -(alpha**2) * log_rate / sigma

  def t_of_lambda(lam):
    c = 2 * slope * np.logaddexp(0.0, -2 * np.asarray(lam, np.float64))
    return c / ((np.sqrt(beta_min**2 + c) + beta_min) * slope)

  return Schedule(alpha_sigma, rate, t_of_lambda, t_min, 1.0)


def vp_cosine(
  s: float = 0.008,
  t_max: float = 0.9946,
  t_min: float = 1e-3,
  *,
  normalize: bool = True,
) -> Schedule:
  """Cosine schedule (arXiv:2102.09672), alpha = cos(theta(t)) / cos(theta(0)).

  theta(t) = pi/2 (t + s) / (1 + s), t in [0, 1]. With theta_0 = theta(0),
  sigma = sqrt(sin(theta - theta_0) sin(theta + theta_0)) / cos(theta_0).

  Args:
    s: offset of the paper.
    t_max: start of sampling; .9946 (lambda = -4.78) by convention, since
      lambda falls to -inf at t = 1.
    t_min: end of sampling.
    normalize: False leaves out the constant cos(theta_0), as some public code
      does; then sigma(0) = sin(theta_0) > 0.
  """
  speed = np.pi / 2 / (1 + s)  # of theta
  offset = speed * s if normalize else 0.0  # theta at which sigma = 0
  shift = 0.0 if normalize else speed * s  # theta - offset at t = 0
  norm = np.sin(speed) if normalize else 1.0  # = cos(offset)

  def alpha_sigma(t):
    t = np.asarray(t, np.float64)
    delta = speed * t + shift  # theta - offset, without cancellation
    alpha = np.sin(speed * (1 - t)) / norm  # cos(theta), exactly 0 at t = 1
    return alpha, np.sqrt(np.sin(delta) * np.sin(delta + 2 * offset)) / norm

  def rate(t):
    alpha, sigma = alpha_sigma(t)
    alpha_slope = (
      -speed * np.cos(speed * (1 - np.asarray(t, np.float64))) / norm
    )
    with np.errstate(divide="ignore"):
      return alpha_slope, -alpha * alpha_slope / sigma

  def t_of_lambda(lam):
    lam = np.asarray(lam, np.float64)
    square = np.exp(-np.logaddexp(0.0, 2 * lam))  # sigma^2
    cos = norm * np.exp(-np.logaddexp(0.0, -2 * lam) / 2)
    sin = np.sqrt(np.sin(offset) ** 2 + norm**2 * square)
    # sin(delta) = sin(theta) cos(offset) - cos(theta) sin(offset), as
    # (sin^2(theta) - sin^2(offset)) / sin(theta + offset)
    total = sin * np.cos(offset) + cos * np.sin(offset)
    sin_delta = np.divide(
      norm**2 * square, total, out=np.zeros_like(total), where=total > 0
    )
    cos_delta = cos * np.cos(offset) + sin * np.sin(offset)
    return (np.arctan2(sin_delta, cos_delta) - shift) / speed

  return Schedule(alpha_sigma, rate, t_of_lambda, t_min, t_max)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
  """Variance exploding in EDM's clock (arXiv:2206.00364): alpha = 1, sigma = t.

  Args:
    sigma_min: end of sampling, t_min; sigma(0) = 0 is the very end.
    sigma_max: start of sampling, t_max.
  """

  def alpha_sigma(t):
    t = np.asarray(t, np.float64)
    return np.ones_like(t), t

  def rate(t):
    t = np.asarray(t, np.float64)
    return np.zeros_like(t), np.ones_like(t)

  def t_of_lambda(lam):
    return np.exp(-np.asarray(lam, np.float64))

  return Schedule(alpha_sigma, rate, t_of_lambda, sigma_min, sigma_max)


def rectified_flow(shift: float = 1.0) -> Schedule:
  """Straight path alpha = 1 - u, sigma = u with u = s t / (1 + (s - 1) t).

  Rectified flow (arXiv:2209.03003); the shift s of SD3 (arXiv:2403.03206) is
  sigma / alpha times s, lambda minus log s, exactly. The network is told u,
  the time it was trained on; t in [0, 1] is the clock of the grids.

  Args:
    shift: s > 0; above 1 spends more steps near the noise.
  """
  if shift <= 0:
    raise ValueError(f"shift must be positive: {shift}")

  def alpha_sigma(t):
    t = np.asarray(t, np.float64)
    scale = 1 + (shift - 1) * t
    return (1 - t) / scale, shift * t / scale

  def rate(t):
    slope = shift / (1 + (shift - 1) * np.asarray(t, np.float64)) ** 2
    return -slope, slope

  def t_of_lambda(lam):
    lam = np.asarray(lam, np.float64)
    return np.exp(-np.logaddexp(0.0, lam + np.log(shift)))

  def model_time(t):
    return alpha_sigma(t)[1]

  return Schedule(alpha_sigma, rate, t_of_lambda, 0.0, 1.0, model_time)


def dynamic_shift(
  num_tokens: int,
  *,
  base_tokens: int = 256,
  max_tokens: int = 4096,
  base_shift: float = 0.5,
  max_shift: float = 1.15,
) -> float:
  """The shift s = e^mu of FLUX, mu linear in the tokens of the image.

  mu = base_shift at base_tokens and max_shift at max_tokens; give it to
  `rectified_flow`.
  """
  slope = (max_shift - base_shift) / (max_tokens - base_tokens)
  return float(np.exp(base_shift + (num_tokens - base_tokens) * slope))


def discrete(
  betas: ArrayLike,
  *,
  clock: str = "dpm_solver",
  lambda_min: float = -np.inf,
) -> Schedule:
  """A model of N noise levels (DDPM, arXiv:2006.11239), made continuous.

  log alpha = L with L_i = sum_(j <= i) log(1 - beta_j) / 2 at t_i =
  (i + 1) / N, linear in t between the t_i (DPM-Solver, arXiv:2206.00927,
  appendix D.1), and 0 at t = 0. Where the last alpha is 0 (zero terminal
  SNR), alpha instead of L is linear in the last interval.
  Differs from the paper: below t_0 = 1 / N the line is drawn to (0, 0), so
  that t = 0 is data exactly; extended from t_0 and t_1, L would become
  positive.

  Args:
    betas: [N] in (0, 1), the last one may be 1; see `betas`.
    clock: what the model is told: "dpm_solver", 1000 (t - 1 / N), or
      "diffusers", the integer i nearest to N t - 1.
    lambda_min: t_max is the last t_i with lambda at least that; -5.1 is the
      custom for `betas.squared_cosine`.

  Raises:
    ValueError: betas of another shape or range, an unknown clock, nothing
      above lambda_min.
  """
  betas = np.asarray(betas, np.float64)
  if betas.ndim != 1 or betas.size < 2:
    raise ValueError(f"betas must be [N] with N >= 2, not {betas.shape}")
  if not ((betas > 0).all() and (betas[:-1] < 1).all() and betas[-1] <= 1):
    raise ValueError(f"betas must be in (0, 1): {betas.min()} {betas.max()}")
  if clock not in ("dpm_solver", "diffusers"):
    raise ValueError(f"unknown clock {clock!r}; choose dpm_solver or diffusers")
  num = betas.size
  with np.errstate(divide="ignore"):
    log = np.append(0.0, np.cumsum(np.log1p(-betas)) / 2)  # [N + 1]
  grid = np.arange(num + 1) / num
  # alpha at the node before a last alpha of 0; the last interval is linear
  edge = np.exp(log[-2]) if np.isinf(log[-1]) else None
  nodes = num if edge is not None else num + 1

  def log_alpha(t):
    t = np.asarray(t, np.float64)
    inner = np.interp(t, grid[:nodes], log[:nodes], left=np.nan, right=np.nan)
    if edge is None:
      return inner
    with np.errstate(divide="ignore", invalid="ignore"):
      last = np.log(num * (1 - t)) + log[-2]
    return np.where(t > grid[-2], last, inner)

  def alpha_sigma(t):
    log = log_alpha(t)
    return np.exp(log), np.sqrt(np.abs(np.expm1(2 * log)))

  def rate(t):
    t = np.asarray(t, np.float64)
    alpha, sigma = alpha_sigma(t)
    i = np.clip(np.searchsorted(grid, t, side="right") - 1, 0, num - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
      slope = alpha * num * (log[i + 1] - log[i])
      if edge is not None:
        slope = np.where(i == num - 1, -num * edge, slope)
      return slope, -alpha * slope / sigma

  def t_of_lambda(lam):
    lam = np.asarray(lam, np.float64)
    level = -np.logaddexp(0.0, -2 * lam) / 2  # log alpha
    inner = np.interp(-level, -log[:nodes], grid[:nodes])
    if edge is None:
      return inner
    return np.where(level < log[-2], 1 - np.exp(level - log[-2]) / num, inner)

  def model_time(t):
    t = np.asarray(t, np.float64)
    if clock == "dpm_solver":
      return 1000 * (t - 1 / num)
    return np.clip(np.round(num * t - 1), 0, num - 1)

  lam = log[1:] - np.log(-np.expm1(2 * log[1:])) / 2
  above = np.nonzero(lam >= lambda_min)[0]
  if not above.size:
    raise ValueError(f"lambda_min={lambda_min}: betas reach {lam[0]:.3g} only")
  t_max = float(grid[above[-1] + 1])
  return Schedule(alpha_sigma, rate, t_of_lambda, 1 / num, t_max, model_time)


def on_clock(model: Schedule, clock: Schedule) -> Schedule:
  """The path of `model` in the time of `clock`: any model on any schedule.

  At time t the state is that of the model's own path where its log-SNR is
  lambda_clock(t). The probability-flow ODE (and the SDE) along `clock` is
  this one up to the factor hypot(alpha, sigma) between the two states, and no
  solver can tell them apart; so grids, the variable "t" and the end points
  are those of `clock`, and the model sees inputs and times it was trained on.
  Start from alpha x0 + sigma eps of the returned schedule.

  Args:
    model: the schedule the model was trained on.
    clock: the schedule to sample along.
  """

  def own(t):
    return model.t_of_lambda(clock.lam(t))

  def rate(t):
    def lambda_rate(schedule, t):
      alpha, sigma = schedule.alpha_sigma(t)
      d_alpha, d_sigma = schedule.rate(t)
      return d_alpha / alpha - d_sigma / sigma

    with np.errstate(divide="ignore", invalid="ignore"):
      speed = lambda_rate(clock, t) / lambda_rate(model, own(t))
    d_alpha, d_sigma = model.rate(own(t))
    return d_alpha * speed, d_sigma * speed

  return Schedule(
    alpha_sigma=lambda t: model.alpha_sigma(own(t)),
    rate=rate,
    t_of_lambda=clock.t_of_lambda,
    t_min=clock.t_min,
    t_max=clock.t_max,
    model_time=lambda t: model.model_time(own(t)),
  )


def from_functions(
  alpha_sigma: Callable[[ArrayLike], tuple[np.ndarray, np.ndarray]],
  rate: Callable[[ArrayLike], tuple[np.ndarray, np.ndarray]],
  t_min: float = 0.0,
  t_max: float = 1.0,
) -> Schedule:
  """A schedule of any alpha falling and sigma rising in t; lambda by bisection.

  Args:
    alpha_sigma: t -> (alpha, sigma), float64 NumPy in and out, defined on
      [t_min, t_max], exact zeros at the ends where there are zeros.
    rate: their derivatives in t.
    t_min: data end.
    t_max: noise end.

  Returns:
    A Schedule; `t_of_lambda` halves [t_min, t_max] until it is one ulp wide
    and clips what lies beyond.
  """

  def t_of_lambda(lam):
    lam = np.asarray(lam, np.float64)
    low, high = np.full_like(lam, t_min), np.full_like(lam, t_max)
    while True:  # at most 1075 halvings, 53 for t above t_max / 2
      mid = (low + high) / 2
      if np.all((mid <= low) | (mid >= high)):
        break
      noisier = schedule.lam(mid) < lam
      low, high = np.where(noisier, low, mid), np.where(noisier, mid, high)
    return np.where(lam == np.inf, t_min, np.where(lam == -np.inf, t_max, high))

  schedule = Schedule(alpha_sigma, rate, t_of_lambda, t_min, t_max)
  return schedule
