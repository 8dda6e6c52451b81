"""Discrete noise levels beta_i, i = 0 .. N - 1, float64 [N] on the host.

alpha_bar_i = prod_(j <= i) (1 - beta_j); `schedules.discrete` makes a schedule
of them. Made in float64: in float32 the first 1 - alpha_bar are off by 2e-4.
"""

import numpy as np


def linear(
  num: int = 1000, first: float = 1e-4, last: float = 0.02
) -> np.ndarray:
  """Equally spaced betas (DDPM, arXiv:2006.11239)."""
  return np.linspace(first, last, num)


def scaled_linear(
  num: int = 1000, first: float = 0.00085, last: float = 0.012
) -> np.ndarray:
  """Equally spaced in sqrt(beta) (Stable Diffusion, arXiv:2112.10752)."""
  return np.linspace(first**0.5, last**0.5, num) ** 2


def squared_cosine(
  num: int = 1000, s: float = 0.008, cap: float = 0.999
) -> np.ndarray:
  """1 - abar((i + 1) / N) / abar(i / N) <= cap (arXiv:2102.09672).

  abar(u) = cos^2(pi/2 (u + s) / (1 + s)). The last half log-SNR is about
  -9.9: give `schedules.discrete` a lambda_min of -5.1 to start below it.
  """
  speed = np.pi / 2 / (1 + s)
  theta = speed * (np.arange(num) / num + s)
  step = speed / num  # 1 - cos^2(b) / cos^2(a), without the subtraction
  beta = np.sin(step) * np.sin(2 * theta + step) / np.cos(theta) ** 2
  return np.minimum(beta, cap)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(alpha_bar) to end at 0 (arXiv:2305.08891, alg. 1).

  r = sqrt(alpha_bar) becomes (r - r_T) r_0 / (r_0 - r_T); the first level is
  kept, the last beta is exactly 1. The model must predict v or flow.

  Args:
    betas: [N] float64 in (0, 1), N >= 2.

  Returns:
    [N] float64.
  """
  r = np.exp(np.cumsum(np.log1p(-np.asarray(betas, np.float64))) / 2)
  r = (r - r[-1]) * r[0] / (r[0] - r[-1])
  ratio = r[1:] / r[:-1]
  return np.append(betas[0], (1 - ratio) * (1 + ratio))
