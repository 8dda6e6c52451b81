"""The benchmark's problems are the recorded ones, and its exact ends exact."""

import pathlib

import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.experiments.harness import mixtures

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "diffusion_samplers"


class MixtureTest(parameterized.TestCase):
  @parameterized.parameters("gmm2", "gmm8")
  def test_equals_the_recorded_mixture(self, name):
    recorded = np.load(GOLDEN / "mixtures.npz")
    mixture = getattr(mixtures, name)()
    for key, value in mixture._asdict().items():
      np.testing.assert_allclose(value, recorded[f"{name}_{key}"], rtol=1e-14)

  def test_gmm32_has_std_3(self):
    mixture = mixtures.gmm32()
    rng = np.random.RandomState(0)
    k = rng.choice(len(mixture.w), 200_000, p=mixture.w)
    noise = rng.standard_normal((k.size, 32))
    draws = mixture.mu[k] + np.sqrt(mixture.var[k]) * noise
    pooled = np.sqrt(draws.var(0).mean())
    self.assertAlmostEqual(pooled, 3.0, delta=0.02)
    self.assertAlmostEqual(mixture.std, 3.0, places=12)
    self.assertAlmostEqual(mixture.w.sum(), 1.0, places=12)

  @parameterized.parameters(
    "table_vp_linear_gmm8", "table_flow_gmm8", "vp_linear_gmm2", "edm_gmm8"
  )
  def test_exact_ends(self, name):
    # DOP853 at rtol 1e-12 by another author
    ode = np.load(GOLDEN / "exact_ode.npz")
    start, end = ode[f"{name}/alpha_sigma"]
    mixture = getattr(mixtures, name.rsplit("_", 1)[1])()
    x_T, want = ode[f"{name}/x_T"][:16], ode[f"{name}/end"][:16]
    got = mixtures.exact_end(mixture, x_T, tuple(start), tuple(end))
    np.testing.assert_allclose(got, want, atol=1e-8)

  def test_posterior_of_one_gaussian(self):
    mean, var = np.array([[0.5, -2.0]]), np.array([[0.3, 1.7]])
    one = mixtures.Mixture(np.ones(1), mean, var)
    x, alpha, sigma = np.array([[0.7, 0.1], [3.0, -4.0]]), 0.6, 0.9
    gain = alpha * var / (alpha**2 * var + sigma**2)
    x0, eps = mixtures.posterior(one, x, alpha, sigma)
    np.testing.assert_allclose(x0, mean + gain * (x - alpha * mean))
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x)


if __name__ == "__main__":
  absltest.main()
