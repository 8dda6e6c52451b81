"""Draws of a mixture, without end: row i is a function of i alone."""

import numpy as np

from giantsteps.experiments.harness import by_index
from giantsteps.experiments.harness.mixtures import Mixture

_STREAM = 0x6D78  # of by_index


def mixture(mix: Mixture, seed: int, rows: np.ndarray) -> np.ndarray:
  """Draws of a mixture of one or two dimensions.

  Args:
    mix: the mixture, D = 1 or 2.
    seed: >= 0.
    rows: [B] int64 >= 0.

  Returns:
    [B, D] float32, equal on every machine up to the rounding of log and cos.
  """
  u = by_index.uniform(seed, _STREAM, rows, 3)
  last = len(mix.w) - 1  # where rounding leaves the sum of w below u
  k = np.minimum(np.searchsorted(np.cumsum(mix.w), u[:, 0], "right"), last)
  radius, angle = np.sqrt(-2 * np.log1p(-u[:, 1])), 2 * np.pi * u[:, 2]
  normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
  noise = np.sqrt(mix.var[k]) * normal[:, : mix.mu.shape[1]]
  return (mix.mu[k] + noise).astype(np.float32)
