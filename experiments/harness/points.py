"""Points of low dimension, without end: row i is a function of i alone.

Every row has four words of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014),
seed 0, whose state after n steps is n gamma: any row is at hand at once and
equal on every machine (the normal ones up to the rounding of log and cos).
"""

import numpy as np

from giantsteps.experiments.harness.mixtures import Mixture

NUM_ROWS = 2**61  # of four words, in a stream of 2^64
CHECKERBOARD_STD = 1 / np.sqrt(3)  # both coordinates are uniform in [-1, 1]
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(seed: int, index: np.ndarray) -> np.ndarray:
  """Output number `index` (from 0) of the generator seeded so, uint64."""
  with np.errstate(over="ignore"):  # modulo 2^64
    z = np.uint64(seed) + (index.astype(np.uint64) + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))


def checkerboard(rows: np.ndarray) -> np.ndarray:
  """Uniform on 8 of the 4 x 4 squares of [-1, 1]^2.

  Square (i, j), x = -1 + (i + [0, 1)) / 2 and y so with j, is filled where
  i + j is even.

  Args:
    rows: [B] int64 in [0, NUM_ROWS).

  Returns:
    [B, 2] float32.
  """
  u = _uniforms(rows)
  i, k = np.floor(4 * u[:, 0]), np.floor(2 * u[:, 1])
  j = 2 * k + i % 2
  square = np.stack([i, j], 1)
  return (-1 + (square + u[:, 2:]) / 2).astype(np.float32)


def mixture(mix: Mixture, rows: np.ndarray) -> np.ndarray:
  """Draws of a mixture of one or two dimensions.

  Args:
    mix: the mixture, D = 1 or 2.
    rows: [B] int64 in [0, NUM_ROWS).

  Returns:
    [B, D] float32.
  """
  u = _uniforms(rows)
  last = len(mix.w) - 1  # where rounding leaves the sum of w below u
  k = np.minimum(np.searchsorted(np.cumsum(mix.w), u[:, 0], "right"), last)
  radius, angle = np.sqrt(-2 * np.log1p(-u[:, 1])), 2 * np.pi * u[:, 2]
  normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
  noise = np.sqrt(mix.var[k]) * normal[:, : mix.mu.shape[1]]
  return (mix.mu[k] + noise).astype(np.float32)


def _uniforms(rows: np.ndarray) -> np.ndarray:
  """[B, 4] float64 in [0, 1), 53 bits each."""
  words = np.asarray(rows, np.int64)[:, None] * 4 + np.arange(4)
  bits = splitmix64(0, words)
  return (bits >> np.uint64(11)) * 2.0**-53
