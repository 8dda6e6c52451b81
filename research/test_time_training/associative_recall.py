"""Associative recall: what a key meant earlier in the row.

A row is key, value, key, value, ...: keys are drawn with replacement and every
row has its own random value for each key. The value of a key that was seen
before can be known, that of a new one cannot, so the best possible loss falls
along the row as (1 - 1/K)^j log K, and how far a model stays above it tells how
much its memory lost.
"""

import numpy as np


def rows(
  indices: np.ndarray, length: int, num_keys: int, held_out: bool = False
) -> dict[str, np.ndarray]:
  """Rows by index: the same index is the same row, on every machine.

  Args:
    indices: [B] int.
    length: L, even.
    num_keys: K keys, tokens 0 .. K-1; their values are tokens K .. 2K-1.
    held_out: rows that the other split does not have.

  Returns:
    tokens [B, L] int32, and weights [B, L] float32: 1 at the values, 0 at the
    keys, which nobody can foresee.

  Raises:
    ValueError: for an odd length or less than one key.
  """
  if length % 2 or num_keys < 1:
    raise ValueError(
      f"length={length}, num_keys={num_keys}: must be even, and above 0"
    )
  pairs = length // 2
  tokens = np.empty((len(indices), pairs, 2), np.int32)
  for row, index in zip(tokens, indices, strict=True):
    seed = np.random.SeedSequence([int(held_out), int(index)])
    drawn = np.random.PCG64(seed).random_raw(num_keys + pairs) % num_keys
    value, key = drawn[:num_keys], drawn[num_keys:]
    row[:, 0], row[:, 1] = key, num_keys + value[key]
  weights = np.zeros((len(indices), length), np.float32)
  weights[:, 1::2] = 1
  return {"tokens": tokens.reshape(len(indices), length), "weights": weights}


def best_nats(num_pairs: int, num_keys: int) -> np.ndarray:
  """Expected loss of perfect memory at each value of a row: [pairs] float64."""
  unseen = (1 - 1 / num_keys) ** np.arange(num_pairs)
  return unseen * np.log(num_keys)
