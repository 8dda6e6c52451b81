"""Points without end: the generator, the laws, the stream of batches."""

import numpy as np
import pytest

from giantsteps.experiments.harness import config, data, mixtures, points


def test_splitmix64_is_the_published_generator():
  # the first outputs of the reference implementation for this seed
  expected = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
  ]
  got = points.splitmix64(1234567, np.arange(5))
  assert got.tolist() == expected


def test_checkerboard_fills_eight_squares_evenly():
  x = points.checkerboard(np.arange(16_000))
  assert x.shape == (16_000, 2) and x.dtype == np.float32
  assert x.min() >= -1 and x.max() <= 1
  square = np.minimum(np.floor((x.astype(float) + 1) * 2), 3).astype(int)
  count = np.zeros((4, 4), int)
  np.add.at(count, (square[:, 0], square[:, 1]), 1)
  filled = np.add.outer(np.arange(4), np.arange(4)) % 2 == 0
  # float32 may round a point on to an edge: fewer than one in a million
  assert count[~filled].sum() <= 1
  # chi-squared with 7 degrees of freedom exceeds 29.9 with probability 1e-4
  assert ((count[filled] - 2000) ** 2 / 2000).sum() < 29.9
  # within a square uniform: mean 1/4, variance 1/48 of its side 1/2
  inside = (x + 1) % 0.5
  np.testing.assert_allclose(inside.mean(0), 0.25, atol=5 * 0.144 / 126)
  np.testing.assert_allclose(inside.var(0), 1 / 48, rtol=0.05)
  np.testing.assert_allclose(x.std(), points.CHECKERBOARD_STD, rtol=0.02)


@pytest.mark.parametrize("mixture", [mixtures.two_modes(), mixtures.gmm2()])
def test_mixtures_have_their_moments(mixture):
  n = 20_000
  x = points.mixture(mixture, np.arange(n)).astype(float)
  assert x.shape == (n, mixture.mu.shape[1])
  mean = mixture.w @ mixture.mu
  second = mixture.w @ (mixture.var + mixture.mu**2)
  spread = np.sqrt(second - mean**2)
  np.testing.assert_array_less(np.abs(x.mean(0) - mean), 5 * spread / n**0.5)
  np.testing.assert_allclose((x**2).mean(0), second, rtol=0.05)
  # every component has its share
  near = np.argmin(((x[:, None] - mixture.mu) ** 2 / mixture.var).sum(-1), 1)
  share = np.bincount(near, minlength=len(mixture.w)) / n
  np.testing.assert_allclose(share, mixture.w, atol=0.02)


def test_rows_are_a_function_of_their_index():
  rows = np.array([5, 2**50, 17])
  got = points.checkerboard(rows)
  for i, row in enumerate(rows):
    np.testing.assert_array_equal(got[i], points.checkerboard(row[None])[0])


@pytest.mark.parametrize("source", ["checkerboard", "mixture:1", "mixture:2"])
def test_batches_go_on_and_differ_by_seed_and_split(source):
  dataset = data.load(config.Data(source))
  assert dataset.kind == "points"
  read = lambda size, seed, step, own=slice(None): data.batch(
    dataset.train, size, seed, step, own
  )["point"]
  whole = read(12, 0, 0)
  assert list(whole.shape[1:]) == dataset.description["shape"]
  parts = np.concatenate([read(4, 0, step) for step in range(3)])
  np.testing.assert_array_equal(parts, whole)
  np.testing.assert_array_equal(read(12, 0, 0, np.arange(3, 6)), whole[3:6])
  others = [read(12, 1, 0), read(12, 2**31 - 1, 0), read(12, 0, 2**40)]
  others.append(dataset.held_out.read(np.arange(12))["point"])
  for other in others:
    assert not np.isin(other, whole).any()


@pytest.mark.parametrize("source", ["mixture", "mixture:3", "checkerboard:2"])
def test_unknown_points(source):
  with pytest.raises(config.InputError, match=source):
    data.load(config.Data(source))
