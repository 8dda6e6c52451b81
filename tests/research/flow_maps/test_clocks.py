"""Clocks and signs: round trips, and each paper's own formulas."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research import flow_maps
from giantsteps.research.flow_maps import clocks, closed_forms

KINDS = {"linear": flow_maps.linear(), "trig": flow_maps.trigonometric()}
SIGMA, MEAN, STD = 0.5, 0.7, 0.3


def flow(I):
  return closed_forms.gaussian(I, [0.0], [[SIGMA**2]], [MEAN], [[STD**2]])


class ClocksTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.t = jnp.linspace(0.05, 0.95, 7)
    self.x = jnp.linspace(-1, 1, 7)[:, None]

  def test_mean_flow(self):
    # z_r = z_tau - (tau - r) u, noise at tau = 1, is X_{1-tau, 1-r}
    exact = flow(KINDS["linear"])
    u = clocks.to_mean_flow(exact.average_velocity)
    tau, r = jnp.full(7, 0.9), jnp.full(7, 0.2)
    z = self.x - (tau - r)[:, None] * u(self.x, r, tau)
    wanted = exact.flow_map(1 - tau, 1 - r, self.x)
    np.testing.assert_allclose(z, wanted, rtol=1e-5)
    back = clocks.from_mean_flow(u)
    np.testing.assert_allclose(
      back(self.t, self.t**2, self.x),
      exact.average_velocity(self.t, self.t**2, self.x),
      rtol=1e-4,
      atol=1e-6,
    )

  @parameterized.parameters(*KINDS)
  def test_noise_level(self, kind):
    I = KINDS[kind]
    sigma = clocks.noise_level(I, self.t, SIGMA)
    slope = {
      "linear": (1 - self.t) / self.t,
      "trig": 1 / jnp.tan(jnp.pi / 2 * self.t),
    }[kind]
    np.testing.assert_allclose(sigma, SIGMA * slope, rtol=1e-5)
    back = jax.jit(lambda s: clocks.time_of_noise_level(I, s, SIGMA))(sigma)
    np.testing.assert_allclose(back, self.t, rtol=1e-6)
    ends = jnp.array([0.0, jnp.inf])
    np.testing.assert_array_equal(
      clocks.time_of_noise_level(I, ends, SIGMA), [1, 0]
    )
    with jax.enable_x64(True):
      sigma = jnp.logspace(-3, 2, 20, dtype=jnp.float64)
      t = clocks.time_of_noise_level(I, sigma, SIGMA)
      again = clocks.noise_level(I, t, SIGMA)
    np.testing.assert_allclose(again, sigma, rtol=1e-11)

  @parameterized.parameters(*KINDS)
  def test_edm(self, kind):
    # D(y; sigma) = E[x1 | x1 + sigma eps = y] of Gaussian data
    I, sigma = KINDS[kind], jnp.linspace(0.1, 3, 7)
    exact = flow(I)
    v = lambda s, t, x: exact.velocity(t, x)
    denoise = clocks.to_edm(I, v, SIGMA)
    gain = STD**2 / (STD**2 + sigma**2)
    wanted = MEAN + gain[:, None] * (self.x - MEAN)
    np.testing.assert_allclose(denoise(self.x, sigma), wanted, rtol=1e-4)
    back = clocks.from_edm(I, denoise, SIGMA)
    np.testing.assert_allclose(
      back(self.t, self.t, self.x), exact.velocity(self.t, self.x), rtol=1e-3
    )

  def test_trig_flow(self):
    # sigma_d F = dx/dangle of x = cos x1 + sin x0; F at the best is
    # (cos E[x0 | x] - sin E[x1 | x]) / sigma_d
    I = KINDS["trig"]
    exact = flow(I)
    v = lambda s, t, x: exact.velocity(t, x)
    theta = clocks.angle(self.t)
    np.testing.assert_allclose(clocks.time_of_angle(theta), self.t, rtol=1e-6)
    np.testing.assert_allclose(clocks.angle(jnp.zeros(1)), np.pi / 2)
    cos, sin = jnp.cos(theta)[:, None], jnp.sin(theta)[:, None]
    variance = cos**2 * STD**2 + sin**2 * SIGMA**2
    off = (self.x - cos * MEAN) / variance
    noise, data = sin * SIGMA**2 * off, MEAN + cos * STD**2 * off
    network = clocks.to_trig_flow(v, SIGMA)
    np.testing.assert_allclose(
      network(self.x / SIGMA, theta),
      (cos * noise - sin * data) / SIGMA,
      rtol=1e-4,
      atol=1e-5,
    )
    back = clocks.from_trig_flow(network, SIGMA)
    np.testing.assert_allclose(
      back(self.t, self.t, self.x),
      exact.velocity(self.t, self.x),
      rtol=1e-4,
      atol=1e-5,
    )


if __name__ == "__main__":
  absltest.main()
