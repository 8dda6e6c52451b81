"""Distances between samples against golden values and closed forms."""

import pathlib
import sys
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from sklearn import datasets

from giantsteps.experiments.harness import evaluation

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "flow_maps"
RNG = np.random.default_rng(0)


class GoldenTest(parameterized.TestCase):
  def test_metrics_5d(self):
    with np.load(GOLDEN / "metrics_5d_a.npz") as archive:
      data = dict(archive)
    x, y, y_eq, proj = (data[k] for k in ("x", "y", "y_eq", "proj"))
    width = float(data["rbf_bandwidth"])
    for got, key in (
      (evaluation.frechet_distance(x, y), "frechet"),
      (evaluation.sliced_wasserstein(x, y_eq, proj, 1), "sw1"),
      (evaluation.sliced_wasserstein(x, y_eq, proj, 2), "sw2"),
      (evaluation.mmd2(x, y, "rbf", width), "mmd2_rbf_unbiased"),
      (evaluation.mmd2(x, y, "poly3"), "poly3_mmd2_unbiased"),
    ):
      np.testing.assert_allclose(got, data[key], rtol=1e-6, err_msg=key)


class InvariantTest(parameterized.TestCase):
  def test_a_set_against_itself(self):
    x = RNG.normal(size=(40, 3, 2))
    directions = np.eye(6)
    # The trace of the root has the error sqrt(eps) where a covariance is flat.
    self.assertAlmostEqual(evaluation.frechet_distance(x, x), 0, places=10)
    self.assertEqual(evaluation.sliced_wasserstein(x, x[::-1], directions), 0)
    np.testing.assert_array_equal(evaluation.nearest_distance(x, x[::-1]), 0)

  def test_translation(self):
    x, shift = RNG.normal(size=(40, 4)), np.array([3.0, 0, 4, 0])
    fd = evaluation.frechet_distance(x, x + shift)
    self.assertAlmostEqual(fd, 25, places=9)
    for order in (1, 2):
      sw = evaluation.sliced_wasserstein(x, x + shift, shift[None] / 5, order)
      self.assertAlmostEqual(sw, 5, places=12)

  def test_frechet_of_commuting_covariances(self):
    # diag(a), diag(b): sum (sqrt a - sqrt b)^2; exact moments by construction.
    x = np.concatenate([np.eye(3), -np.eye(3)])
    y = x * np.array([1.0, 2, 5])
    # each column of x has variance 2 / 5
    want = 0.4 * (0 + 1 + 16)
    self.assertAlmostEqual(evaluation.frechet_distance(x, y), want, places=10)

  def test_frechet_with_fewer_rows_than_features(self):
    x, y = RNG.normal(size=(5, 30)), RNG.normal(size=(4, 30))
    self.assertTrue(np.isfinite(evaluation.frechet_distance(x, y)))
    # rank-deficient: the root has an error of about sqrt(1e-16) per dimension
    self.assertLess(abs(evaluation.frechet_distance(x, x)), 1e-5)

  def test_mmd_is_unbiased(self):
    # Mean over 400 draws of two equal laws: 0 within 5 standard errors
    # (false alarm 6e-7); the biased form would be off by 2 (1 - E k) / n.
    draws = []
    for _ in range(400):
      x, y = RNG.normal(size=(2, 10, 3))
      draws.append(evaluation.mmd2(x, y, "rbf", 1.0))
    error = np.std(draws) / 20
    self.assertLess(abs(np.mean(draws)), 5 * error)
    self.assertLess(5 * error, 2 * (1 - 5**-1.5) / 10)

  def test_nearest_distance(self):
    x, y = np.array([[0.0, 0], [10, 0]]), np.array([[3.0, 4], [6, 0], [10, 1]])
    np.testing.assert_allclose(evaluation.nearest_distance(x, y), [5, 1])

  def test_nearest_distance_of_near_copies(self):
    y = 100 + RNG.normal(size=(50, 8))
    near = evaluation.nearest_distance(y + 1e-9, y)
    np.testing.assert_allclose(near, 1e-9 * np.sqrt(8), rtol=1e-4)

  def test_fitted_gaussian(self):
    reference = RNG.normal(size=(30, 2, 2)) @ np.array([[1.0, 2], [0, 1]]) + 3
    draws = evaluation.fitted_gaussian(reference, 200_000, seed=0)
    self.assertEqual(draws.shape, (200_000, 2, 2))
    flat = reference.reshape(30, 4)
    # 5 standard errors of a mean and of a covariance (variances below 10)
    error = 5 * 10 / np.sqrt(200_000)
    np.testing.assert_allclose(
      draws.reshape(-1, 4).mean(0), flat.mean(0), atol=error
    )
    np.testing.assert_allclose(
      np.cov(draws.reshape(-1, 4).T), np.cov(flat.T), atol=2 * error
    )
    again = evaluation.fitted_gaussian(reference, 5, seed=1)
    np.testing.assert_array_equal(
      again, evaluation.fitted_gaussian(reference, 5, seed=1)
    )

  def test_bad_input(self):
    x = np.zeros((4, 3))
    cases = (
      (lambda: evaluation.frechet_distance(x, np.zeros((4, 2))), r"\(4, 2\)"),
      (lambda: evaluation.frechet_distance(x, x[:1]), r"\(1, 3\)"),
      (lambda: evaluation.sliced_wasserstein(x, x[:3], np.eye(3)), "4 and 3"),
      (lambda: evaluation.sliced_wasserstein(x, x, np.eye(2)), r"\(2, 2\)"),
      (lambda: evaluation.mmd2(x, x, "rbf"), "bandwidth=None"),
      (lambda: evaluation.mmd2(x, x, "rbf", -1.0), "bandwidth=-1.0"),
      (lambda: evaluation.mmd2(x, x, "cubic"), "kernel='cubic'"),  # pyright: ignore
    )
    for call, message in cases:
      with self.assertRaisesRegex(ValueError, message):
        call()


class DigitsFeaturesTest(absltest.TestCase):
  def halves(self):
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels / 8 - 1).reshape(-1, 8, 8, 1).astype(np.float32)
    half = lambda rows: {"image": images[rows], "label": labels[rows]}
    return half(slice(0, None, 2)), half(slice(1, None, 2))

  def test_separates_what_pixels_do_not(self):
    train, held_out = self.halves()
    features, record = evaluation.digits_features(train, held_out)
    self.assertGreater(record["held_out_accuracy"], 0.94)
    self.assertEqual((record["n_train"], record["n_held_out"]), (899, 898))
    self.assertLen(record["weights_sha256"], 64)
    real, other = features(train["image"]), features(held_out["image"])
    self.assertEqual(other.shape, (898, 64))
    self.assertGreaterEqual(other.min(), 0)
    # Against the half it is fitted to, in features and in raw pixels.
    gaussian = evaluation.fitted_gaussian(train["image"], 898, seed=0)
    fd = evaluation.frechet_distance
    self.assertLess(2 * fd(other, real), fd(features(gaussian), real))
    pixels = train["image"]  # the trap: there it beats held-out images
    self.assertLess(fd(gaussian, pixels), fd(held_out["image"], pixels))

  def test_without_scikit_learn(self):
    with mock.patch.dict(sys.modules, {"sklearn": None}):
      with self.assertRaisesRegex(ModuleNotFoundError, r"\.\[demo\]"):
        evaluation.digits_features({}, {})


if __name__ == "__main__":
  absltest.main()
