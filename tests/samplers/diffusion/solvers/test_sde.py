"""Stochastic solvers: exact laws on Gaussian data, limits, start and end.

For data N(M, C^2) the posterior mean is linear in x, so a run is a linear
function of x_T and of its noises; its law is read off unit inputs, without
sampling error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import schedules, solvers, tables

VP = schedules.vp_linear()
M, C = 0.7, 0.5


def denoise(x, t):
  log = -(t[0] ** 2) * (20 - 0.1) / 4 - 0.1 * t[0] / 2
  alpha, variance = jnp.exp(log), -jnp.expm1(2 * log)
  return M + alpha * C**2 * (x - alpha * M) / (alpha**2 * C**2 + variance)


RUN = jax.jit(functools.partial(tables.sample, denoise))


def law(table):
  """(constant, weight of x_T, weights of the noises) of the sample."""
  n = table.nfe
  x, noise = np.zeros((n + 2, 1)), np.zeros((n, n + 2, 1))
  x[1] = 1.0
  noise[np.arange(n), np.arange(n) + 2] = 1.0
  with jax.enable_x64(True):
    out = np.asarray(RUN(jnp.asarray(x), table, noise=noise))[:, 0]
  return out[0], out[1] - out[0], out[2:] - out[0]


def errors(make, num):
  """|mean - exact|, |variance - exact| at the end, from the exact start."""
  times = VP.t_of_lambda(np.linspace(-1.5, 1.5, num + 1))
  constant, weight, noises = law(make(VP, times, prediction="x0"))
  (a, b), (s, e) = (values[[0, -1]] for values in VP.alpha_sigma(times))
  mean = constant + weight * a * M
  variance = weight**2 * (a**2 * C**2 + s**2) + np.sum(noises**2)
  return abs(mean - b * M), abs(variance - (b**2 * C**2 + e**2))


def pairs(schedule, times, **settings):
  """Singlesteps of order 2 over two intervals each."""
  return solvers.dpm_solver_pp(
    schedule,
    times[::2],
    method="singlestep",
    order=[2] * (len(times) // 2),
    **settings,
  )


def churned(schedule, times, **settings):
  return solvers.edm_heun(schedule, times[::2], **settings)


def stochastic(make, **settings):
  return functools.partial(make, **settings)


ALWAYS = (0.0, 1.0)


class WeakOrderTest(parameterized.TestCase):
  @parameterized.parameters(
    (stochastic(solvers.ddim, eta=1.0), 1),
    (stochastic(solvers.ddim, eta=0.5), 1),
    (stochastic(solvers.dpm_solver_pp, order=1, eta=1.0), 1),
    (stochastic(solvers.dpm_solver, order=1, eta=1.0), 1),
    (stochastic(solvers.dpm_solver_pp, eta=1.0, final="none"), 2),
    (
      stochastic(
        solvers.dpm_solver_pp, eta=0.5, variant="taylor", final="none"
      ),
      2,
    ),
    (stochastic(solvers.dpm_solver_pp, order=3, eta=1.0, final="none"), 2),
    (stochastic(solvers.dpm_solver, eta=1.0, final="none"), 2),
    (
      stochastic(solvers.sa_solver, order=2, interval=ALWAYS, final="none"),
      2,
    ),
    (
      stochastic(
        solvers.sa_solver,
        order=2,
        interval=ALWAYS,
        corrector=False,
        final="none",
      ),
      2,
    ),
    (stochastic(solvers.sa_solver, order=3, tau=0.5, final="none"), 2),
    (stochastic(pairs, ancestral_eta=1.0), 2),
    # the noises of the two stages are independent, as in k-diffusion
    (stochastic(pairs, eta=1.0), 1),
    (stochastic(churned, churn=1.0), 2),
  )
  def test_weak_order(self, make, order):
    (mean, coarse), (_, fine) = errors(make, 48), errors(make, 96)
    self.assertLess(mean, 1e-13)  # E[x0 | alpha M] = M: exact at any step
    self.assertGreater(np.log2(coarse / fine), order - 0.25)


class LimitTest(parameterized.TestCase):
  TIMES = np.array([0.95, 0.8, 0.55, 0.5, 0.3, 0.1, 0.02])

  @parameterized.product(
    make=(solvers.dpm_solver_pp, solvers.dpm_solver),
    settings=(
      dict(order=1),
      dict(order=2),
      dict(order=3),
      dict(order=2, method="singlestep"),
    ),
  )
  def test_eta_zero_is_the_ode_bit_for_bit(self, make, settings):
    make = functools.partial(make, VP, self.TIMES, prediction="v", **settings)
    for a, b in zip(make()[:7], make(eta=np.zeros(()))[:7], strict=True):
      np.testing.assert_array_equal(a, b)

  def test_tau_zero_is_the_exact_unipc(self):
    sa = solvers.sa_solver(VP, self.TIMES, prediction="v", tau=0.0)
    adams = solvers.adams(
      VP,
      self.TIMES,
      prediction="v",
      gauge="data",
      variable="lambda",
      order=3,
      final="ramp",
    )
    for a, b in zip(sa[:7], adams[:7], strict=True):
      np.testing.assert_allclose(a, b, atol=1e-12)

  def test_eta_one_of_order_one_is_ancestral(self):
    times = np.append(self.TIMES, 0.0)
    make = functools.partial(solvers.dpm_solver_pp, order=1)
    sde = make(VP, times, prediction="eps", eta=1.0)
    ddim = solvers.ddim(VP, times, prediction="eps", eta=1.0)
    for a, b in zip(sde[:7], ddim[:7], strict=True):
      np.testing.assert_allclose(a, b, atol=1e-12)

  def test_tau_interval(self):
    table = solvers.sa_solver(VP, self.TIMES, prediction="v")
    inside = (self.TIMES[:-1] >= 0.2) & (self.TIMES[:-1] <= 0.8)
    np.testing.assert_array_equal(table.noise > 0, inside)

  def test_corrected_noise_is_the_same_noise(self):
    # the correction may change the weights of the targets only
    table = solvers.sa_solver(VP, self.TIMES, prediction="v")
    after = np.nonzero(table.noise[:-1])[0] + 1
    np.testing.assert_array_equal(
      table.anchor[after], np.tile([0.0, 1.0], (after.size, 1))
    )

  def test_starts_from_pure_noise_and_ends_at_data(self):
    flow = schedules.rectified_flow()
    for make in (
      functools.partial(solvers.dpm_solver_pp, eta=1.0),
      functools.partial(solvers.ddim, eta=1.0),
      functools.partial(solvers.sa_solver, interval=ALWAYS),
    ):
      table = make(flow, np.array([1.0, 0.7, 0.4, 0.0]), prediction="flow")
      # e^(-h) = 0: the first sample is forgotten, 0.3 x0 + 0.7 xi; from eps -
      # x0 at x: x0 = x - (eps - x0)
      np.testing.assert_allclose(table.advance[0], 0, atol=1e-15)
      np.testing.assert_allclose(table.history[0, 0], 0.3, rtol=1e-14)
      np.testing.assert_allclose(table.noise[0], 0.7, rtol=1e-14)
      np.testing.assert_array_equal(table.noise[-1], 0)
      np.testing.assert_allclose(table.history[-1], [1, 0, 0, 0], atol=1e-14)

  def test_churn_interval(self):
    edm = schedules.edm()
    times = np.array([80.0, 40.0, 10.0, 1.0, 0.1, 0.0])
    table = solvers.edm_heun(
      edm, times, prediction="x0", churn=2.0, churn_min=0.5, churn_max=20.0
    )
    # gamma = churn / N = .4 < sqrt(2) - 1
    np.testing.assert_allclose(
      table.time[::2], [80, 40, 10 * 1.4, 1 * 1.4, 0.1], rtol=1e-12
    )
    np.testing.assert_allclose(
      table.noise[3:7:2], np.sqrt(1.4**2 - 1) * np.array([10, 1]), rtol=1e-12
    )
    self.assertEqual(table.nfe, 9)

  @parameterized.parameters(
    (dict(eta=-1.0), "eta=-1.0"),
    (dict(eta=np.ones(3)), r"eta \(3,\)"),
    (dict(ancestral_eta=1.0), "ancestral_eta is of"),
    (dict(method="singlestep", order=3, eta=1.0), "orders 1 and 2"),
    (dict(method="singlestep", ancestral_eta=2.0), "ancestral_eta=2.0"),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      solvers.dpm_solver_pp(VP, self.TIMES, prediction="v", **settings)


if __name__ == "__main__":
  absltest.main()
