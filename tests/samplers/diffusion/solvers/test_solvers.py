"""Solvers against exact ODE ends, and their orders of convergence.

The models are Gaussian mixtures with closed-form posterior means (see
tests/golden/diffusion_samplers/README.md); their clocks are formulas in JAX
that share nothing with the schedules of the library.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import grids, schedules, solvers, tables

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "diffusion_samplers"


def posterior(name, x, alpha, sigma):
  """(E[x0 | x], E[eps | x]) for x [B, D] and scalar alpha, sigma."""
  values = np.load(GOLDEN / "mixtures.npz")
  w, mu, var = (jnp.asarray(values[f"{name}_{k}"]) for k in ("w", "mu", "var"))
  total = (alpha**2 * var + sigma**2)[None]  # [1, K, D]
  d = x[:, None] - alpha * mu[None]
  log_r = -jnp.sum(d**2 / total + jnp.log(2 * jnp.pi * total), -1) / 2
  r = jax.nn.softmax(jnp.log(w)[None] + log_r, -1)[:, :, None]
  x0 = jnp.sum(r * (mu[None] + alpha * var[None] * d / total), 1)
  return x0, jnp.sum(r * sigma * d / total, 1)


def vp_linear(t):
  log = -(t**2) * (20 - 0.1) / 4 - 0.1 * t / 2
  return jnp.exp(log), jnp.sqrt(-jnp.expm1(2 * log))


def straight(t):
  return 1 - t, t


def model(name, clock, prediction="eps"):
  """predict(x, t [B]) of the mixture in the form asked for."""

  def predict(x, t):
    alpha, sigma = clock(t[0])
    x0, eps = posterior(name, x, alpha, sigma)
    return {
      "eps": eps,
      "x0": x0,
      "v": alpha * eps - sigma * x0,
      "flow": eps - x0,
    }[prediction]

  return predict


VP = schedules.vp_linear()


@functools.lru_cache(None)
def runner(name, clock, prediction):
  """One jitted sampler for all tables of a model."""
  predict = model(name, clock, prediction)
  return jax.jit(
    functools.partial(tables.sample, predict, return_trajectory=True)
  )


def outer(order, make):
  """A singlestep solver of that order at every outer node."""

  def table(schedule, times, **settings):
    orders = [order] * (len(times) - 1)
    return make(schedule, times, method="singlestep", order=orders, **settings)

  return table


class OrderTest(parameterized.TestCase):
  """Errors at the end of the exact ODE, lambda uniform on [-1.5, 1.5]."""

  STEPS = (48, 96, 192)

  def slope(self, make, calls_per_step=1):
    """(order, error at 96 calls)."""
    ode = np.load(GOLDEN / "exact_ode.npz")
    errors = []
    for num in self.STEPS:
      nodes = np.linspace(-1.5, 1.5, num // calls_per_step + 1)
      table = make(VP, VP.t_of_lambda(nodes), prediction="eps")
      self.assertEqual(table.nfe, num)
      with jax.enable_x64(True):
        x, _ = runner("gmm2", vp_linear, "eps")(
          jnp.asarray(ode["order_test_gmm2/x_T"]), tables.resize(table, 5)
        )
      difference = np.asarray(x) - ode["order_test_gmm2/end"]
      errors.append(np.sqrt(np.mean(difference**2)))
    return np.polyfit(np.log(self.STEPS), -np.log(errors), 1)[0], errors[1]

  def test_ddim_is_first_order(self):
    slope, error = self.slope(solvers.ddim)
    self.assertBetween(slope, 0.85, 1.15)
    self.assertBetween(error, 5.6e-3, 5.8e-3)  # 5.72e-3 by another author

  @parameterized.product(
    make=(solvers.dpm_solver_pp, solvers.dpm_solver),
    variant=("midpoint", "taylor"),
  )
  def test_dpm_solver_2m_is_second_order(self, make, variant):
    make = functools.partial(make, order=2, variant=variant, final="none")
    self.assertBetween(self.slope(make)[0], 1.85, 2.15)

  @parameterized.parameters(solvers.dpm_solver_pp, solvers.dpm_solver)
  def test_dpm_solver_3m_is_third_order(self, make):
    # the first step is redone with the second target, which the default does
    slope, _ = self.slope(functools.partial(make, order=3, final="none"))
    self.assertBetween(slope, 2.85, 3.3)

  def test_published_third_order_is_second(self):
    # With the ordinary warm-up the first, order-1 step dominates both; spec,
    # section 6: errors at 96 steps 1.35e-5 and 1.65e-5. With a corrected one
    # kappa = 1/2 remains of second order.
    make = functools.partial(solvers.dpm_solver_pp, order=3, final="none")
    lower, error = self.slope(functools.partial(make, warm_up="lower"))
    self.assertBetween(lower, 1.9, 2.5)
    self.assertBetween(error, 1.3e-5, 1.4e-5)
    published, error = self.slope(functools.partial(make, published=True))
    self.assertBetween(error, 1.6e-5, 1.7e-5)
    make = functools.partial(make, published=True, warm_up="corrected")
    self.assertLess(self.slope(make)[0], 2.4)

  @parameterized.product(
    make=(solvers.dpm_solver_pp, solvers.dpm_solver),
    order=(2, 3),
    variant=("midpoint", "taylor"),
  )
  def test_singlestep(self, make, order, variant):
    make = outer(order, functools.partial(make, variant=variant))
    self.assertGreater(self.slope(make, order)[0], order - 0.15)

  @parameterized.parameters(
    ("euler", "noise", 1),
    ("heun", "noise", 2),
    ("midpoint", "flow", 2),
    ("ralston", "angle", 2),
    ("heun3", "noise", 3),
    ("kutta3", "flow", 3),
    ("ralston3", "noise", 3),
    ("houwen3", "data", 3),
    ("ssp3", "noise", 3),
    ("rk4", "noise", 4),
    ("rk4", "data", 4),
    ("rk4", "flow", 4),
    ("rk4", "angle", 4),
  )
  def test_runge_kutta(self, tableau, gauge, order):
    make = functools.partial(solvers.runge_kutta, tableau=tableau, gauge=gauge)
    stages = 4 if tableau == "rk4" else order
    self.assertGreater(self.slope(make, stages)[0], order - 0.25)

  @parameterized.parameters(solvers.edm_heun, solvers.edm_midpoint)
  def test_edm(self, make):
    self.assertBetween(self.slope(make, 2)[0], 1.85, 2.15)

  @parameterized.parameters(
    (dict(order=2), 1.85),
    (dict(order=3, warm_up="corrected"), 2.85),
    (dict(order=3, variable="rho", warm_up="corrected"), 2.85),
    (dict(order=4), 1.95),  # the published warm-up holds it back
    (dict(method="ipndm"), 1.85),
  )
  def test_deis(self, settings, least):
    make = functools.partial(solvers.deis, **settings)
    self.assertGreater(self.slope(make)[0], least)

  @parameterized.parameters(
    (1, "bh1", 1.85),
    (1, "bh2", 1.85),
    (2, "bh2", 2.85),
    (2, "vary_coeff", 2.85),
    (3, "bh2", 3.4),
  )
  def test_unipc_is_one_order_higher(self, order, variant, least):
    make = functools.partial(
      solvers.unipc, order=order, variant=variant, final="none"
    )
    self.assertGreater(self.slope(make)[0], least)

  @parameterized.product(
    (
      dict(gauge="data", variable="lambda"),
      dict(gauge="noise", variable="rho"),
      dict(gauge="flow", variable="flow"),
      dict(gauge="angle", variable="phi"),
      dict(gauge="angle", variable="t"),
    ),
    (
      dict(order=2, corrector=False, warm_up="lower"),
      dict(order=3, corrector=False, warm_up="corrected"),
      dict(order=2, corrector=True, warm_up="lower"),
    ),
  )
  def test_adams(self, gauge, variable, order, corrector, warm_up):
    make = functools.partial(
      solvers.adams,
      gauge=gauge,
      variable=variable,
      order=order,
      corrector=corrector,
      warm_up=warm_up,
      final="none",
    )
    least = order + corrector - 0.25
    self.assertGreater(self.slope(make)[0], least)

  def test_frontier(self):
    # 10 calls on the flow path, gmm8: median error 2.0e-3 where the best of
    # the public solvers has 6.5e-3 (samplers specification, section 10).
    ode = np.load(GOLDEN / "exact_ode.npz")
    flow = schedules.rectified_flow(shift=0.5)
    times = grids.uniform_time(flow, num_steps=10)
    table = solvers.adams(flow, times, prediction="flow", variable="flow")
    with jax.enable_x64(True):
      x, _ = runner("gmm8", straight, "flow")(
        jnp.asarray(ode["table_flow_gmm8/x_T"]), table
      )
    error = np.asarray(x) - ode["table_flow_gmm8/end"]
    median = np.median(np.sqrt(np.mean(error**2, 1)))
    self.assertBetween(median, 1.9e-3, 2.1e-3)


if __name__ == "__main__":
  absltest.main()
