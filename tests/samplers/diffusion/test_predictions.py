"""Prediction conversions against the definitions of the predictions."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import predictions, schedules

SCHEDULES = {
  "vp": schedules.vp_linear(),
  "edm": schedules.edm(),
  "flow": schedules.rectified_flow(),
  "off_path": schedules.from_functions(
    lambda t: (2 - np.asarray(t), 0.5 * np.asarray(t) + 0.1),
    lambda t: (0 * np.asarray(t) - 1, 0 * np.asarray(t) + 0.5),
  ),
}


def forms(schedule, t, x0, eps):
  """x and every prediction from the data and the noise, by definition."""
  alpha, sigma = schedule.alpha_sigma(t)
  d_alpha, d_sigma = schedule.rate(t)
  v = alpha * eps - sigma * x0
  return alpha * x0 + sigma * eps, {
    "eps": eps,
    "x0": x0,
    "v": v,
    "flow": eps - x0,
    "velocity": d_alpha * x0 + d_sigma * eps,
    "score": -eps / sigma,
    "angle": v / np.hypot(alpha, sigma),
  }


class PredictionTest(parameterized.TestCase):
  @parameterized.product(
    name=tuple(SCHEDULES), source=predictions.KINDS, target=predictions.KINDS
  )
  def test_converts(self, name, source, target):
    x0, eps = np.random.default_rng(0).normal(size=(2, 40))
    schedule, t = SCHEDULES[name], np.linspace(0.05, 0.9, 40)
    x, values = forms(schedule, t, x0, eps)
    alpha_sigma, rate = schedule.alpha_sigma(t), schedule.rate(t)
    got = predictions.convert(
      values[source], x, source, target, *alpha_sigma, rate
    )
    # alpha, sigma >= .05: condition of the 2x2 system below 1e4
    np.testing.assert_allclose(got, values[target], rtol=1e-12, atol=1e-12)
    back = predictions.convert(got, x, target, source, *alpha_sigma, rate)
    np.testing.assert_allclose(back, values[source], rtol=1e-11, atol=1e-11)

  @parameterized.product(
    source=("v", "flow", "angle"), target=("v", "flow", "angle", "x0", "eps")
  )
  def test_exact_at_both_ends(self, source, target):
    x0, eps = np.random.default_rng(0).normal(size=(2, 2))
    alpha, sigma = np.array([0.0, 1.0]), np.array([1.0, 0.0])
    value = {"x0": x0, "eps": eps, "flow": eps - x0}
    value["v"] = value["angle"] = alpha * eps - sigma * x0
    got = predictions.convert(
      value[source], alpha * x0 + sigma * eps, source, target, alpha, sigma
    )
    np.testing.assert_allclose(got, value[target], rtol=4e-16)

  def test_in_jax(self):
    with jax.numpy_dtype_promotion("strict"):
      x = jnp.ones((2, 3))
      alpha, sigma = jnp.full((2, 1), 0.6), jnp.full((2, 1), 0.8)
      x0 = predictions.convert(0 * x, x, "v", "x0", alpha, sigma)
    np.testing.assert_allclose(x0, 0.6 * x, rtol=1e-6)

  def test_edm_preconditioning(self):
    # table 1 of arXiv:2206.00364 with sigma_data = .5
    seen = []

    def network(x, time):
      seen.append((x, time))
      return jnp.ones_like(x)

    x, sigma = jnp.full((2, 3, 3), 2.0), jnp.array([0.5, 80.0])
    out = predictions.edm_denoiser(network)(x, sigma)
    c_skip = 0.25 / (np.array([0.25, 6400]) + 0.25)
    c_out = 0.5 * np.array([0.5, 80]) / np.sqrt([0.5, 6400.25])
    np.testing.assert_allclose(out[:, 0, 0], c_skip * 2 + c_out, rtol=1e-6)
    np.testing.assert_allclose(
      seen[0][0][:, 0, 0], 2 / np.sqrt([0.5, 6400.25]), rtol=1e-6
    )
    np.testing.assert_allclose(seen[0][1], np.log([0.5, 80]) / 4, rtol=1e-6)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, "'epsilon'.*'eps'"):
      predictions.affine("epsilon", "x0", 0.5, 0.5)
    with self.assertRaisesRegex(ValueError, "rate"):
      predictions.affine("velocity", "x0", 0.5, 0.5)


if __name__ == "__main__":
  absltest.main()
