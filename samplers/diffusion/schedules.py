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
