"""The checkerboard: points in the plane whose law is known cell by cell.

[-1, 1]^2 in 4 x 4 squares, 8 of them filled: those where the column and the
row, counted from (-1, -1), have an even sum. The density is 1/2 there and 0
elsewhere. A histogram of 16 x 16 cells is aligned with the squares, so the
probability of a cell is exactly 1/128 or 0.
"""

import numpy as np
from numpy.typing import ArrayLike

from giantsteps.experiments.harness import by_index, evaluation

SQUARES = 4
CELLS = 16
STD = 1 / np.sqrt(3)  # of both coordinates, which are uniform in [-1, 1]
EPSILON = 1e-9  # added to the measured probability of a cell
NUM_DIRECTIONS = 64
# Evenly spaced angles, none of them along an axis.
_ANGLES = np.pi * (np.arange(NUM_DIRECTIONS) + 0.5) / NUM_DIRECTIONS
DIRECTIONS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1)  # [64, 2]
_STREAM = 0x636B  # of by_index


def sample(seed: int, indices: ArrayLike) -> np.ndarray:
  """Points `indices` of the endless list of independent draws of `seed`.

  Args:
    seed: >= 0.
    indices: [B] integers >= 0.

  Returns:
    [B, 2] float32; a float32 that rounds up to the end of its square is moved
    to the number before it, so that every point is on the support.
  """
  column, inside, pick = by_index.uniform(seed, _STREAM, indices, 3).T
  column = SQUARES * column
  square = np.floor(SQUARES // 2 * pick)  # of the two filled ones above it
  row = 2 * square + np.floor(column) % 2 + inside
  cell = np.stack([np.floor(column), np.floor(row)], -1)
  points = np.stack([column, row], -1) * (2 / SQUARES) - 1
  end = np.nextafter(((cell + 1) * (2 / SQUARES) - 1).astype(np.float32), -2.0)
  return np.minimum(points.astype(np.float32), end.astype(np.float32))


def cell_probabilities() -> np.ndarray:
  """[16, 16] float64, exact: 1/128 in filled squares; axis 0 is the column."""
  square = np.arange(CELLS) * SQUARES // CELLS
  filled = (square[:, None] + square[None]) % 2 == 0
  return filled / filled.sum()


def on_support(points: np.ndarray) -> np.ndarray:
  """[B, 2] -> [B] bool: whether a point lies in a filled square."""
  square = np.floor((_points(points) + 1) * (SQUARES / 2))
  inside = np.all((square >= 0) & (square < SQUARES), -1)
  return inside & (square.sum(-1) % 2 == 0)


def histogram_kl(points: np.ndarray, epsilon: float = EPSILON) -> float:
  """KL(exact || measured) in nats over the cells: sum p log(p / (q + epsilon)).

  q is the share of all points, those outside of [-1, 1]^2 included, that fall
  into a cell; an empty cell costs log(1 / epsilon) / 128. Perfect samples have
  about 127 / (2 N), the bias of a histogram: compare equal counts only.

  Args:
    points: [N, 2].
    epsilon: for empty cells.
  """
  points = _points(points)
  edges = np.linspace(-1, 1, CELLS + 1)
  count = np.histogram2d(*points.T, bins=(edges, edges))[0]
  p, q = cell_probabilities(), count / len(points)
  filled = p > 0
  return float(np.sum(p[filled] * np.log(p[filled] / (q[filled] + epsilon))))


def metrics(points: np.ndarray, seed: int = 0) -> dict[str, float]:
  """What the table of a method needs, with the floor of real points beside it.

  Args:
    points: [N, 2] generated.
    seed: of the N real points that the sliced distance compares with, and of N
      other real points for the floor.

  Returns:
    kl, on_support, swd (order 2, 64 fixed directions), and kl_floor and
    swd_floor of real points in place of generated ones.

  Raises:
    ValueError: for other shapes or points that are not finite.
  """
  points = _points(points)
  n = len(points)
  real, other = np.split(sample(seed, np.arange(2 * n)), 2)
  swd = lambda x: evaluation.sliced_wasserstein(x, real, DIRECTIONS, 2)
  return {
    "kl": histogram_kl(points),
    "on_support": float(on_support(points).mean()),
    "swd": swd(points),
    "kl_floor": histogram_kl(other),
    "swd_floor": swd(other),
    "count": n,
  }


def _points(points: np.ndarray) -> np.ndarray:
  points = np.asarray(points, np.float64)
  if points.ndim != 2 or points.shape[1] != 2 or not len(points):
    raise ValueError(f"points {points.shape}: not [N, 2] with N >= 1")
  if not np.isfinite(points).all():
    bad = int(np.sum(~np.isfinite(points).all(-1)))
    raise ValueError(f"{bad} of {len(points)} points are not finite")
  return points
