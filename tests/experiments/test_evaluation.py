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


class CoverageTest(parameterized.TestCase):
  @parameterized.parameters(1, 5)
  def test_equals_the_definition_row_by_row(self, k):
    x, y = RNG.normal(size=(300, 2)), 0.7 * RNG.normal(size=(290, 2)) + 0.5

    def share(points, support):
      total = 0
      for p in points:
        for i, s in enumerate(support):
          others = np.delete(support, i, 0)
          radius = np.sort(np.sqrt(((others - s) ** 2).sum(1)))[k - 1]
          if np.sqrt(((p - s) ** 2).sum()) <= radius:
            total += 1
            break
      return total / len(points)

    precision, recall = evaluation.precision_recall(x, y, k)
    self.assertAlmostEqual(precision, share(y, x), places=12)
    self.assertAlmostEqual(recall, share(x, y), places=12)

  def test_extremes(self):
    x = RNG.normal(size=(40, 3, 2))
    self.assertEqual(evaluation.precision_recall(x, x), (1, 1))
    self.assertEqual(evaluation.precision_recall(x, x + 100), (0, 0))
    # one mode of two: all of it is real, half of the real is covered
    two = np.concatenate([x, x + 100])
    same = np.concatenate([x, x])
    self.assertEqual(evaluation.precision_recall(two, same), (1, 0.5))

  def test_entropy(self):
    entropy = evaluation.histogram_entropy
    self.assertAlmostEqual(entropy(np.arange(30) % 10, 10), np.log(10))
    self.assertEqual(entropy(np.full(7, 3), 10), 0)
    self.assertAlmostEqual(
      entropy(np.array([0, 0, 0, 2]), 3),
      -0.75 * np.log(0.75) - 0.25 * np.log(0.25),
    )

  def test_nearest_distance_across_blocks(self):
    x, y = RNG.normal(size=(600, 3)), RNG.normal(size=(50, 3))
    want = [np.linalg.norm(row - y, axis=1).min() for row in x]
    np.testing.assert_allclose(evaluation.nearest_distance(x, y), want)

  def test_record_tells_copies_from_new_rows(self):
    train, held_out, new = RNG.normal(size=(3, 300, 2, 2))
    net = {"features": "identity4", "weights_sha256": "none: identity"}
    flat = lambda x: x.reshape(len(x), -1)
    measure = lambda made: evaluation.record(train, held_out, made, flat, net)
    copies, fresh, shifted = map(measure, (train, new, new + 2))
    self.assertEqual(copies["generated"]["nearest_train"], 0)
    self.assertGreater(copies["nearest_train_held_out"], 0.1)
    ratio = fresh["generated"]["nearest_train"]
    ratio /= fresh["nearest_train_held_out"]
    self.assertBetween(ratio, 0.7, 1.4)
    # copies are the floor itself
    for key in ("fd_identity4", "precision", "swd_pixel"):
      self.assertEqual(copies["generated"][key], copies["floor"][key])
    # four coordinates shifted by 2
    gain = shifted["generated"]["fd_pixel"] - fresh["generated"]["fd_pixel"]
    gap = 4 * 4 + 4 * (flat(new).mean(0) - flat(held_out).mean(0)).sum()
    self.assertAlmostEqual(gain, gap, places=8)
    self.assertEqual((fresh["n_ref"], fresh["n_gen"]), (300, 300))
    self.assertEqual(fresh["feature_net"], net)
    unequal = evaluation.record(train, held_out, new[:50], flat, net)
    self.assertEqual((unequal["n_ref"], unequal["n_gen"]), (50, 50))

  def test_bad_input(self):
    x = np.zeros((4, 3))
    cases = (
      (lambda: evaluation.precision_recall(x, x), "at least 6 rows"),
      (lambda: evaluation.precision_recall(x, x, 0), "k=0"),
      (lambda: evaluation.histogram_entropy(np.array([3]), 3), "3 to 3"),
      (lambda: evaluation.histogram_entropy(np.array([0.5]), 3), "float64"),
      (
        lambda: evaluation.record(x, x, x, lambda a: a, {"features": "n"}),
        "weights_sha256",
      ),
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
