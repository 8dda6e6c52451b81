"""Pairs of times: their laws, and which rows are on the diagonal."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from giantsteps.research.flow_maps import times

KEY = jax.random.key(0)
NUM = 4000


def p_value(sample, cdf):
  """Kolmogorov-Smirnov; the key is fixed, one key in 1000 would fail."""
  return stats.kstest(np.asarray(sample), cdf).pvalue


class TimesTest(parameterized.TestCase):
  def test_triangle(self):
    s, t = times.triangle(KEY, NUM, 0.75)
    same = 3 * NUM // 4
    np.testing.assert_array_equal(s[:same], t[:same])
    self.assertTrue(np.all(s[same:] < t[same:]))
    self.assertGreater(p_value(s[:same], stats.uniform.cdf), 1e-3)
    # of two uniforms the smaller is Beta(1, 2), the larger Beta(2, 1)
    self.assertGreater(p_value(s[same:], stats.beta(1, 2).cdf), 1e-3)
    self.assertGreater(p_value(t[same:], stats.beta(2, 1).cdf), 1e-3)

  @parameterized.parameters((0.0, 0), (0.25, 2), (1.0, 8))
  def test_share_of_the_diagonal(self, share, count):
    self.assertEqual(times.diagonal_count(8, share), count)
    for s, t in (
      times.triangle(KEY, 8, share),
      times.logit_normal(KEY, 8, diagonal=share),
    ):
      self.assertEqual(np.sum(s == t), count)
    with self.assertRaisesRegex(ValueError, "diagonal=1.5"):
      times.triangle(KEY, 8, 1.5)

  def test_between(self):
    s, t = times.triangle(KEY, NUM, 0.0)
    u = times.between(jax.random.key(1), s, t)
    self.assertTrue(np.all((s <= u) & (u <= t)))
    share = (u - s) / (t - s)
    self.assertGreater(p_value(share, stats.uniform.cdf), 1e-3)

  def test_logit_normal(self):
    s, t = times.logit_normal(KEY, NUM, mean=-0.4, std=1.3)
    self.assertTrue(np.all(s <= t))
    same = 3 * NUM // 4
    np.testing.assert_array_equal(s[:same], t[:same])
    # noise time is sigmoid of N(-.4, 1.3^2); s has the larger of two
    logit = lambda x: jnp.log(x) - jnp.log1p(-x)
    law = stats.norm(-0.4, 1.3)
    self.assertGreater(p_value(logit(1 - s), lambda x: law.cdf(x) ** 2), 1e-3)
    smaller = lambda x: 1 - law.sf(x) ** 2
    self.assertGreater(p_value(logit(1 - t[same:]), smaller), 1e-3)

  def test_annealed(self):
    s, t = jnp.array([0.0, 0.5, 0.5]), jnp.array([1.0, 0.6, 0.5])
    run = lambda progress: times.annealed(s, t, progress)
    np.testing.assert_array_equal(run(0.0), t)
    np.testing.assert_allclose(run(0.25), [0.75, 0.5, 0.5])
    np.testing.assert_array_equal(run(1.0), s)
    np.testing.assert_array_equal(run(7.0), s)

  def test_dyadic(self):
    s, t = times.dyadic(KEY, NUM, levels=4)
    step = np.asarray(t - s)
    np.testing.assert_array_equal(np.unique(step), [0.125, 0.25, 0.5, 1])
    np.testing.assert_array_equal(np.asarray(s) % step, 0)
    self.assertTrue(np.all((0 <= s) & (t <= 1)))
    # each level a quarter, each place of it alike: standard errors .007, .016
    counts = np.array([np.mean(step == 2.0**-k) for k in range(4)])
    np.testing.assert_allclose(counts, 0.25, atol=0.035)
    places = np.bincount(np.int32(np.asarray(s)[step == 0.25] * 4))
    np.testing.assert_allclose(places / places.sum(), 0.25, atol=0.08)

  def test_trig_flow(self):
    angle = times.trig_flow(KEY, NUM, sigma_d=0.5, mean=-1.0, std=1.4)
    self.assertTrue(np.all((0 < angle) & (angle < np.pi / 2)))
    tau = jnp.log(0.5 * jnp.tan(angle))
    self.assertGreater(p_value(tau, stats.norm(-1.0, 1.4).cdf), 1e-3)


if __name__ == "__main__":
  absltest.main()
