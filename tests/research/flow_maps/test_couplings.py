"""Couplings against quadrature, brute force and closed forms."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from giantsteps.research import flow_maps
from giantsteps.research.flow_maps import closed_forms, couplings

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "flow_maps"


class WeightsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.golden = np.load(GOLDEN / "wcfm_sq_1d_a.npz")

  def densities(self, x0, x1):
    g = self.golden
    return stats.norm.pdf(x0, 0, g["s0"]) * stats.norm.pdf(x1, g["m1"], g["s1"])

  def weigh(self, x0, x1):
    """weights(..) of float64 points of any shape."""
    with jax.enable_x64(True):
      w = couplings.weights(
        jnp.asarray(x0.reshape(-1, 1)),
        jnp.asarray(x1.reshape(-1, 1)),
        float(self.golden["eps"]),
      )
    return np.asarray(w).reshape(x0.shape)

  def test_tilted_coupling_is_golden(self):
    # a grid in place of samples: w times the density, 12 deviations wide
    grid = np.linspace(-12, 12, 1201)
    x0, x1 = np.meshgrid(grid, grid / 2 + self.golden["m1"], indexing="ij")
    mass = self.weigh(x0, x1) * self.densities(x0, x1)
    mass /= mass.sum()
    points = np.stack([x0, x1]).reshape(2, -1)
    mean = points @ mass.ravel()
    cov = np.cov(points, aweights=mass.ravel(), ddof=0)
    np.testing.assert_allclose(mean, self.golden["coupling_mean"], rtol=1e-9)
    np.testing.assert_allclose(cov, self.golden["coupling_cov"], rtol=1e-9)
    # the bias of the method: neither end is the given one
    ends = (0, self.golden["s0"]), (self.golden["m1"], self.golden["s1"])
    for i, (m, std) in enumerate(ends):
      self.assertGreater(abs(mean[i] - m), 0.1)
      self.assertLess(cov[i, i], 0.95 * std**2)

  def test_velocity_is_golden(self):
    # E_w[x1 - x0 | x_t = x], over x0 at fixed x
    g = self.golden
    inner = (g["t"] > 0) & (g["t"] < 1)
    for t, points, wanted in zip(
      g["t"][inner], g["x"][inner], g["velocity"][inner], strict=True
    ):
      x0 = np.linspace(-12, 12, 4001)[None]
      x1 = (points[:, None] - (1 - t) * x0) / t
      x0 = np.broadcast_to(x0, x1.shape)
      mass = self.weigh(x0, x1) * self.densities(x0, x1)
      got = np.sum(mass * (x1 - x0), 1) / mass.sum(1)
      np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9)

  @parameterized.parameters("squared_distance", "distance")
  def test_no_tilt_is_flow_matching(self, cost):
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 8, 3))
    w = couplings.weights(x0, x1, np.inf, cost)
    np.testing.assert_array_equal(w, 1)
    self.assertEqual(couplings.effective_sample_size(w), 8)

  def test_costs(self):
    x0 = jnp.zeros((2, 2))
    x1 = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    for cost, gap in (("distance", 4), ("squared_distance", 24)):
      w = couplings.weights(x0, x1, 10.0, cost)
      np.testing.assert_allclose(jnp.log(w[1] / w[0]), gap / 10, rtol=1e-5)
      np.testing.assert_allclose(w.mean(), 1, rtol=1e-6)

  def test_many_dimensions_do_not_underflow(self):
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 16, 3072))
    w = couplings.weights(x0, x1, 5.0)  # raw weights of e^-1200
    np.testing.assert_allclose(w.mean(), 1, rtol=1e-5)
    self.assertLess(float(couplings.effective_sample_size(w)), 1.6)

  def test_errors(self):
    x = jnp.ones((2, 3))
    with self.assertRaisesRegex(ValueError, "unknown cost 'l2'"):
      couplings.weights(x, x, 1.0, "l2")
    with self.assertRaisesRegex(ValueError, "eps=0"):
      couplings.weights(x, x, 0)
    for f in (
      lambda a, b: couplings.weights(a, b, 1.0),
      lambda a, b: couplings.optimal_transport(*map(np.asarray, (a, b))),
      lambda a, b: couplings.sinkhorn(a, b, 1.0),
    ):
      with self.assertRaisesRegex(ValueError, r"\(1, 3\)"):
        f(x, x[:1])


class TransportTest(parameterized.TestCase):
  def test_brute_force(self):
    x0, x1 = np.random.default_rng(0).normal(size=(2, 6, 2, 2))
    p = couplings.optimal_transport(x0, x1)
    cost = lambda p: np.sum((x0 - x1[list(p)]) ** 2)
    best = min(itertools.permutations(range(6)), key=cost)
    np.testing.assert_array_equal(p, best)
    self.assertLess(cost(p), cost(range(6)))

  def test_one_dimension_sorts(self):
    x0, x1 = np.random.default_rng(1).normal(size=(2, 200, 1))
    p = couplings.optimal_transport(x0, x1)
    np.testing.assert_array_equal(np.sort(p), np.arange(200))
    order = np.argsort(x0[:, 0])
    np.testing.assert_array_equal(x1[p][order, 0], np.sort(x1[:, 0]))

  def test_sinkhorn_of_two_points(self):
    # costs |i - j| = 0 or 1, mean 1/2: P_ij = (1, q) / (2 (1 + q)),
    # q = exp(-1 / (eps / 2))
    x = jnp.array([[0.0], [1.0]])
    plan = couplings.sinkhorn(x, x, 1.0)
    q = np.exp(-2.0)
    wanted = np.array([[1, q], [q, 1]]) / (2 * (1 + q))
    np.testing.assert_allclose(plan, wanted, rtol=1e-5)

  def test_sinkhorn(self):
    x0, x1 = np.random.default_rng(0).normal(size=(2, 24, 2))
    p = couplings.optimal_transport(x0, x1)
    cost = np.sum((x0[:, None] - x1[None]) ** 2, -1)
    x0, x1 = jnp.float32(x0), jnp.float32(x1)
    for eps, iterations in ((1.0, 50), (0.002, 5000)):
      plan = couplings.sinkhorn(x0, x1, eps, num_iterations=iterations)
      np.testing.assert_allclose(plan.sum(0), 1 / 24, rtol=1e-4)
      np.testing.assert_allclose(plan.sum(1), 1 / 24, rtol=0.05)
    best = cost[np.arange(24), p].mean()
    np.testing.assert_allclose(np.sum(plan * cost), best, rtol=0.05)
    with self.assertRaisesRegex(ValueError, "eps=0.0"):
      couplings.sinkhorn(x0, x1, 0.0)
    # eps = inf is the independent coupling
    plan = couplings.sinkhorn(x0, x1, np.inf)
    np.testing.assert_allclose(plan, 1 / 24**2, rtol=1e-5)

  def test_draw(self):
    plan = jnp.array([[0.5, 0.0], [0.1, 0.4]])
    draws = jax.vmap(lambda key: couplings.draw(plan, key))(
      jax.random.split(jax.random.key(0), 2000)
    )
    np.testing.assert_array_equal(draws[:, 0], 0)
    # 0.8 with standard error .009; five of them
    np.testing.assert_allclose(draws[:, 1].mean(), 0.8, atol=0.045)


class PairsTest(parameterized.TestCase):
  def test_reflow_is_straight(self):
    # on pairs of a Gaussian flow one Euler step is exact, from any time
    I = flow_maps.linear()
    flow = closed_forms.gaussian(I, [0.0], [[0.25]], [2.0], [[0.01]])
    key = jax.random.key(0)
    x0, x1 = couplings.reflow(
      lambda x: flow.flow_map(0.0, 1.0, x), key, (100, 1), 0.5
    )
    np.testing.assert_array_equal(
      x0, couplings.reflow(lambda x: x, key, (100, 1), 0.5)[1]
    )
    np.testing.assert_allclose(x1, 2 + 0.2 * x0, rtol=1e-5)
    self.assertBetween(float(x0.std()), 0.4, 0.6)

  @parameterized.parameters("linear", "trigonometric")
  def test_phases_meet_the_flow(self, kind):
    I = getattr(flow_maps, kind)()
    flow = closed_forms.gaussian(I, [0.0], [[1.0]], [2.0], [[0.25]])
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 6, 1))
    s = jnp.array([0.0, 0.25, 0.5, 0.75, 0.0, 0.1])
    e = jnp.array([0.25, 0.5, 0.75, 1.0, 1.0, 0.2])
    y0, y1 = couplings.phased(flow.flow_map, I, x0, x1, s, e)
    x_s, _ = I(s, x0, x1)
    np.testing.assert_allclose(I(s, y0, y1)[0], x_s, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      I(e, y0, y1)[0], flow.flow_map(s, e, x_s), rtol=1e-4, atol=1e-5
    )
    # the noise of a row by the paper's formula, y = x / b over n = a / b
    n = lambda t: I.a(t) / I.b(t)
    y = [
      flow.flow_map(s[1:2], t, x_s[1:2])[0, 0] / I.b(t[0])
      for t in (s[1:2], e[1:2])
    ]
    wanted = (y[1] - y[0]) / (n(e[1]) - n(s[1]))
    np.testing.assert_allclose(y0[1, 0], wanted, rtol=1e-4)

  def test_annealed(self):
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (20_000, 1))
    run = lambda share: couplings.annealed(x0, jax.random.key(1), share, 0.5)
    np.testing.assert_array_equal(run(0.0), x0)
    half = run(0.6)
    # standard errors 1 / sqrt(20000) = .007
    np.testing.assert_allclose(half.std(), 0.5, rtol=0.03)
    for share, kept in ((0.6, 0.8), (1.0, 0.0)):
      got = np.corrcoef(x0[:, 0], run(share)[:, 0])[0, 1]
      np.testing.assert_allclose(got, kept, atol=0.035)


if __name__ == "__main__":
  absltest.main()
