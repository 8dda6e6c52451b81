"""Points without end: their moments and the stream of batches."""

import numpy as np
import pytest

from giantsteps.experiments.harness import config, data, mixtures, points


@pytest.mark.parametrize("mixture", [mixtures.two_modes(), mixtures.gmm2()])
def test_mixtures_have_their_moments(mixture):
  n = 20_000
  x = points.mixture(mixture, 0, np.arange(n)).astype(float)
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


@pytest.mark.parametrize("source", ["checkerboard", "mixture:1", "mixture:2"])
def test_batches_go_on_and_differ_by_seed_and_split(source):
  dataset = data.load(config.Data(source))
  assert dataset.kind == "points"
  read = lambda size, seed, step, own=None: data.batch(
    dataset.train, size, seed, step, *([] if own is None else [own])
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
