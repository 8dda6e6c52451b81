"""Random numbers as a pure function of (seed, stream, index), many at once.

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators") as a counter: number n of a key is mix(key + (n + 1) GAMMA), so
row i needs none of the rows before it, and a whole batch is one NumPy
expression. The bits are the same on every machine and in every NumPy.
"""

import numpy as np
from numpy.typing import ArrayLike

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(state: np.ndarray) -> np.ndarray:
  """The output function of SplitMix64, uint64 -> uint64."""
  z = state
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))


def uniform(
  seed: int, stream: int, indices: ArrayLike, count: int
) -> np.ndarray:
  """`count` numbers for each index, uniform in (0, 1), never its ends.

  Args:
    seed: >= 0.
    stream: >= 0; streams of one seed share no numbers.
    indices: [B] integers >= 0; indices times count < 2^63.
    count: numbers per row; other counts give other numbers.

  Returns:
    [B, count] float64.

  Raises:
    ValueError: for indices that are negative or no integers.
  """
  indices = np.asarray(indices)
  if indices.ndim != 1 or indices.dtype.kind not in "iu":
    raise ValueError(
      f"indices {indices.shape} {indices.dtype}: not [B] of integers"
    )
  if indices.size and indices.min() < 0:
    raise ValueError(f"index {indices.min()} is negative")
  key = np.random.SeedSequence([seed, stream, count])
  key = key.generate_state(1, np.uint64)[0]
  row = indices.astype(np.uint64)[:, None] * np.uint64(count)
  number = row + np.arange(1, count + 1, dtype=np.uint64)[None]
  # 52 bits: the middle of each of 2^52 intervals is exact in float64.
  bits = splitmix64(key + number * GAMMA) >> np.uint64(12)
  return (bits.astype(np.float64) + 0.5) * 2.0**-52
