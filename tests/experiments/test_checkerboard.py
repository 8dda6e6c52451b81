"""The checkerboard's points and metrics against counting and closed forms."""

import numpy as np
import pytest

from giantsteps.experiments.harness import by_index, checkerboard


def test_splitmix64_equals_the_published_vectors():
  # seed 1234567 of the authors' C code, as printed by Rosetta Code
  want = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
  ]
  state = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * by_index.GAMMA
  assert by_index.splitmix64(state).tolist() == want


def test_uniform_is_pure_in_the_index():
  rows = by_index.uniform(3, 1, np.arange(100), 4)
  some = np.array([99, 0, 17, 17])
  np.testing.assert_array_equal(by_index.uniform(3, 1, some, 4), rows[some])
  assert not np.isin(by_index.uniform(4, 1, np.arange(100), 4), rows).any()
  assert not np.isin(by_index.uniform(3, 2, np.arange(100), 4), rows).any()
  assert len(np.unique(rows)) == rows.size


def test_uniform_is_uniform_and_uncorrelated():
  u = by_index.uniform(0, 0, np.arange(100_000), 3)
  assert 0 < u.min() and u.max() < 1
  # 5 standard errors of a mean, a variance, a correlation (false alarm 6e-7)
  n = len(u)
  np.testing.assert_allclose(u.mean(0), 0.5, atol=5 / np.sqrt(12 * n))
  np.testing.assert_allclose(u.var(0), 1 / 12, atol=5 / np.sqrt(180 * n))
  all_pairs = np.corrcoef(np.concatenate([u[1:], u[:-1]], 1).T) - np.eye(6)
  assert np.abs(all_pairs).max() < 5 / np.sqrt(n)


def test_uniform_refuses():
  for bad in (np.array([-1]), np.array([0.5]), np.zeros((2, 2), int)):
    with pytest.raises(ValueError, match="indices|negative"):
      by_index.uniform(0, 0, bad, 2)


def test_points_are_by_index_and_on_filled_squares():
  points = checkerboard.sample(5, np.arange(50_000))
  assert points.dtype == np.float32 and points.shape == (50_000, 2)
  some = np.array([7, 0, 49_999])
  np.testing.assert_array_equal(checkerboard.sample(5, some), points[some])
  # counted square by square, without the module's arithmetic
  edges = [-1, -0.5, 0, 0.5, 1]
  total = 0
  for i in range(4):
    for j in range(4):
      inside = np.all(
        (points >= [edges[i], edges[j]])
        & (points < [edges[i + 1], edges[j + 1]]),
        axis=1,
      )
      share = inside.mean()
      if (i + j) % 2:
        assert share == 0
      else:  # 5 standard errors
        assert abs(share - 1 / 8) < 5 * np.sqrt(7 / 64 / len(points))
      total += inside.sum()
  assert total == len(points)


def test_points_are_uniform_within_squares():
  points = checkerboard.sample(1, np.arange(100_000))
  within = (points + 1) * 2 % 1
  for axis in range(2):
    sorted_ = np.sort(within[:, axis].astype(np.float64))
    ks = np.abs(sorted_ - (np.arange(len(sorted_)) + 0.5) / len(sorted_)).max()
    assert ks < 2.6 / np.sqrt(len(sorted_))  # false alarm 3e-6


def test_on_support():
  points = np.array(
    [[-0.9, -0.9], [-0.4, -0.9], [0.1, 0.1], [-1.1, -0.9], [0.7, 0.9], [1, 1]]
  )
  want = [True, False, True, False, True, False]
  np.testing.assert_array_equal(checkerboard.on_support(points), want)


def centres(filled):
  """The middles of the cells, of the filled squares or of all."""
  middle = (np.arange(16) + 0.5) / 8 - 1
  x, y = np.meshgrid(middle, middle, indexing="ij")
  keep = (np.arange(16)[:, None] // 4 + np.arange(16) // 4) % 2 == 0
  keep = keep if filled else np.ones_like(keep)
  return np.stack([x[keep], y[keep]], -1)


def test_histogram_kl_of_known_histograms():
  kl = checkerboard.histogram_kl
  # one point in each filled cell: q = p up to the epsilon
  assert abs(kl(centres(True))) < 2e-7
  # one in every cell: q = p / 2
  np.testing.assert_allclose(kl(centres(False)), np.log(2), atol=3e-7)
  # half of the points out of the plane: q = p / 2 again
  far = np.concatenate([centres(True), np.full((128, 2), 9.0)])
  np.testing.assert_allclose(kl(far), np.log(2), atol=3e-7)
  # half of the filled cells empty, the others twice as full
  half = centres(True)[:64]
  want = 0.5 * np.log(1 / 2) + 0.5 * np.log(1 / 128 / 1e-9)
  np.testing.assert_allclose(kl(half), want, atol=1e-6)


def test_metrics_of_real_points_and_of_a_shift():
  n = 5_000
  real = checkerboard.metrics(checkerboard.sample(9, np.arange(n)))
  assert real["on_support"] == 1
  # 2 N KL is chi-squared with 127 degrees of freedom: within 6 sigma
  for key in ("kl", "kl_floor"):
    assert abs(2 * n * real[key] - 127) < 6 * np.sqrt(254)
  # A shift by v moves every projection by v.direction; the directions are
  # evenly spaced, so the mean square is |v|^2 / 2.
  moved = checkerboard.sample(0, np.arange(n)) + np.array([3.0, 4.0])
  got = checkerboard.metrics(moved)
  np.testing.assert_allclose(got["swd"], 5 / np.sqrt(2), rtol=1e-6)
  assert got["on_support"] == 0 and got["count"] == n


def test_metrics_refuse():
  for bad, message in (
    (np.zeros((3, 3)), r"\(3, 3\)"),
    (np.zeros((0, 2)), "N >= 1"),
    (np.array([[0, np.nan], [0, 0]]), "1 of 2 points"),
  ):
    with pytest.raises(ValueError, match=message):
      checkerboard.metrics(bad)
