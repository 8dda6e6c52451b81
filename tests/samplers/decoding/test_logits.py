"""Transforms of logits against published masks and sorted NumPy."""
# pyright: reportArgumentType=false

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers import decoding

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/decoding"
MASKS = np.load(GOLDEN / "logit_transforms.npz", allow_pickle=False)
NAMES = [n for n in MASKS.files if n not in ("logits", "temperature_0.7")]
RNG = np.random.default_rng(0)
LARGE = RNG.permutation(6 * 3000).reshape(6, 3000).astype(np.float32) / 2500
LARGE *= np.array([0.1, 0.5, 1, 2, 4, 8], np.float32)[:, None]


def kept(name, logits, value):
  transform = jax.jit(getattr(decoding.logits, name))
  return np.isfinite(transform(logits, value))


def softmax(x):
  p = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


class LogitsTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_published_masks(self, case):
    name, value = case.rsplit("_", 1)
    if not name.startswith("top_h"):
      got = getattr(decoding.logits, name)(MASKS["logits"], float(value))
    else:
      rule = "partial_sum" if "hf" in name else "renormalized"
      got = decoding.logits.top_h(MASKS["logits"], float(value), rule)
    np.testing.assert_array_equal(np.isfinite(got), MASKS[case])
    np.testing.assert_array_equal(
      got[MASKS[case]], MASKS["logits"][MASKS[case]]
    )

  def test_temperature(self):
    got = decoding.logits.temperature(MASKS["logits"], 0.7)
    np.testing.assert_allclose(got, MASKS["temperature_0.7"], rtol=1e-6)

  @parameterized.parameters(1, 7, 2999, 3000)
  def test_top_k_equals_the_sorted_one(self, k):
    want = np.sort(LARGE, -1)[:, -k, None]
    np.testing.assert_array_equal(kept("top_k", LARGE, k), LARGE >= want)

  @parameterized.parameters(0.01, 0.3, 0.9, 0.999)
  def test_top_p_equals_the_sorted_one(self, p):
    probability = softmax(LARGE)
    order = np.argsort(-probability, -1)
    mass = np.cumsum(np.take_along_axis(probability, order, -1), -1)
    want = np.zeros(LARGE.shape, bool)
    np.put_along_axis(
      want, order, mass - np.sort(probability, -1)[:, ::-1] < p, -1
    )
    np.testing.assert_array_equal(kept("top_p", LARGE, p), want)

  def test_min_p_equals_the_sorted_one(self):
    probability = softmax(LARGE)
    want = probability >= 0.1 * np.sort(probability, -1)[:, -1:]
    np.testing.assert_array_equal(kept("min_p", LARGE, 0.1), want)

  def test_a_value_for_each_row_and_equals(self):
    ties = np.array([[1, 2, 2, 0, 2], [3, 1, 1, 0, 0]], np.float32)
    got = kept("top_k", ties, np.array([1, 2]))
    np.testing.assert_array_equal(got, [[0, 1, 1, 0, 1], [1, 1, 1, 0, 0]])

  def test_what_was_dropped_stays_dropped(self):
    once = decoding.logits.top_k(LARGE, 5)
    got = np.isfinite(decoding.logits.top_p(once, 1.0))
    np.testing.assert_array_equal(got, np.isfinite(once))

  def test_every_transform_keeps_the_best(self):
    for name, value in (
      ("top_p", 1e-9),
      ("min_p", 1.0),
      ("typical", 1e-9),
      ("epsilon", 1.0),
      ("eta", 1.0),
      ("top_h", 0.0),
    ):
      got = kept(name, LARGE, value)
      self.assertTrue(got.any(-1).all(), name)
      if name != "typical":
        best = np.take_along_axis(got, LARGE.argmax(-1)[:, None], -1)
        self.assertTrue(best.all(), name)

  def test_annealed(self):
    for case in json.loads((GOLDEN / "ead_schedule.json").read_text()):
      got = decoding.logits.annealed(
        jnp.asarray(case["positions"]),
        case["d"],
        case["tau_max"],
        case["tau_min"],
        case["cutoff"],
      )
      np.testing.assert_allclose(got, case["tau"], rtol=2e-6)

  def test_unknown_criterion(self):
    with self.assertRaisesRegex(ValueError, "criterion='h'"):
      decoding.logits.top_h(LARGE, 0.4, "h")


if __name__ == "__main__":
  absltest.main()
