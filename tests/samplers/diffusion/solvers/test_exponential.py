"""What must hold exactly for every gauge, variable and order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import grids, schedules, solvers, tables
from giantsteps.samplers.diffusion.solvers import exponential

VP, FLOW, EDM = (
  schedules.vp_linear(),
  schedules.rectified_flow(),
  schedules.edm(),
)
GAUGES = ("data", "noise", "flow", "angle")
VARIABLES = ("lambda", "t", "rho", "phi", "flow")
TIMES = {  # uneven, inside the schedule
  VP: np.array([0.95, 0.8, 0.55, 0.5, 0.3, 0.1, 0.02]),
  FLOW: np.array([0.97, 0.8, 0.55, 0.5, 0.3, 0.1, 0.02]),
  EDM: np.array([60.0, 20.0, 7.0, 3.0, 0.5, 0.1, 0.02]),
}


def scale_and_measure(gauge, alpha, sigma):
  """S and mu of the gauges, by definition."""
  return {
    "data": (sigma, alpha / sigma),
    "noise": (alpha, sigma / alpha),
    "flow": (alpha + sigma, sigma / (alpha + sigma)),
    "angle": (np.hypot(alpha, sigma), np.arctan2(sigma, alpha)),
  }[gauge]


def assert_tables_equal(a, b, atol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=atol)


class IdentityTest(parameterized.TestCase):
  @parameterized.product(
    gauge=("data", "noise", "flow"), variable=VARIABLES, schedule=tuple(TIMES)
  )
  def test_order_one_is_ddim(self, gauge, variable, schedule):
    # the maps (x, output) -> x must agree, whatever is stored as target
    def maps(table):
      advance = table.advance + table.history[:, 0] * table.target[:, 0]
      return np.stack([advance, table.history[:, 0] * table.target[:, 1]])

    adams = solvers.adams(
      schedule,
      TIMES[schedule],
      prediction="v",
      gauge=gauge,
      variable=variable,
      order=1,
      corrector=False,
    )
    ddim = solvers.ddim(schedule, TIMES[schedule], prediction="v")
    # atol scales with sigma / alpha, up to 60 for EDM
    np.testing.assert_allclose(maps(adams), maps(ddim), rtol=1e-12, atol=1e-12)

  @parameterized.product(
    gauge=GAUGES, variable=VARIABLES, order=(1, 2, 3, 4), schedule=tuple(TIMES)
  )
  def test_constant_target_is_integrated_exactly(
    self, gauge, variable, order, schedule
  ):
    times = TIMES[schedule]
    table = solvers.adams(
      schedule,
      times,
      prediction="v",
      gauge=gauge,
      variable=variable,
      order=order,
    )
    s, mu = scale_and_measure(gauge, *schedule.alpha_sigma(times))
    np.testing.assert_allclose(table.advance, s[1:] / s[:-1], rtol=1e-12)
    exact = s[1:] * np.diff(mu)
    np.testing.assert_allclose(table.history.sum(1), exact, rtol=1e-11)
    np.testing.assert_allclose(
      table.corrector[1:].sum(1), exact[:-1], rtol=1e-11
    )
    np.testing.assert_allclose(
      table.anchor[1:], np.stack([s[1:-1] / s[:-2], 0 * s[2:]], 1), rtol=1e-12
    )
    np.testing.assert_array_equal(table.anchor[0], [0, 1])
    np.testing.assert_array_equal(table.corrector[0], 0)

  @parameterized.product(
    pair=(("noise", "rho"), ("flow", "flow"), ("angle", "phi")),
    order=(2, 3, 4),
    schedule=tuple(TIMES),
  )
  def test_polynomials_are_integrated_exactly(self, pair, order, schedule):
    # where u = mu, int u^k dmu = (mu_b^(k+1) - mu_a^(k+1)) / (k + 1)
    times = TIMES[schedule]
    table = solvers.adams(
      schedule,
      times,
      prediction="v",
      gauge=pair[0],
      variable=pair[1],
      order=order,
    )
    s, mu = scale_and_measure(pair[0], *schedule.alpha_sigma(times))
    for i in range(len(times) - 1):
      old = np.maximum(i - np.arange(table.history.shape[1]), 0)
      for k in range(min(i + 1, order)):
        step = s[i + 1] * (mu[i + 1] ** (k + 1) - mu[i] ** (k + 1)) / (k + 1)
        np.testing.assert_allclose(
          table.history[i] @ mu[old] ** k, step, rtol=1e-10
        )
      for k in range(min(i, order) + 1 if i else 0):
        step = s[i] * (mu[i] ** (k + 1) - mu[i - 1] ** (k + 1)) / (k + 1)
        np.testing.assert_allclose(
          table.corrector[i] @ mu[old] ** k, step, rtol=1e-10
        )

  @parameterized.parameters(
    (1, [1]),
    (2, [3 / 2, -1 / 2]),
    (3, [23 / 12, -16 / 12, 5 / 12]),
    (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
  )
  def test_uniform_flow_steps_are_adams_bashforth(self, order, textbook):
    times = np.linspace(1, 0, 9)  # both ends, nothing special about them
    table = solvers.adams(
      FLOW, times, prediction="flow", order=order, corrector=False
    )
    np.testing.assert_allclose(
      table.history[order - 1 :, :order],
      np.tile(-np.array(textbook) / 8, (9 - order, 1)),
      rtol=1e-12,
    )
    np.testing.assert_allclose(table.advance, 1, rtol=1e-15)

  def test_corrector_is_adams_moulton(self):
    table = solvers.adams(
      FLOW, np.linspace(1, 0, 9), prediction="flow", order=2
    )
    np.testing.assert_allclose(
      table.corrector[2:, :3] * -8,
      np.tile([5 / 12, 8 / 12, -1 / 12], (6, 1)),
      rtol=1e-12,
    )

  @parameterized.parameters((VP, 1e-12), (FLOW, 1e-12), (EDM, 1e-10))
  def test_closed_forms_equal_quadrature(self, schedule, atol):
    times = TIMES[schedule]
    settings: dict[str, Any] = dict(prediction="v", final="none")
    adams = functools.partial(
      solvers.adams, schedule, times, variable="lambda", **settings
    )
    for order, published in ((2, True), (3, False)):
      dpm = solvers.dpm_solver_pp(
        schedule,
        times,
        order=order,
        warm_up="lower",
        variant="taylor",
        published=published,  # touches order 3 only
        **settings,
      )
      exact = adams(gauge="data", order=order, corrector=False)
      assert_tables_equal(dpm, exact, atol)
    for gauge in ("data", "noise"):
      uni = solvers.unipc(
        schedule, times, gauge=gauge, prediction="v", final="none"
      )
      exact = adams(gauge=gauge, order=3)
      # from the third row on no simplified two-point rule is involved
      np.testing.assert_allclose(uni.history[2:], exact.history[2:], atol=atol)
      np.testing.assert_allclose(
        uni.corrector[2:], exact.corrector[2:], atol=atol
      )

  def test_unipc_predictor_of_order_two_is_2m(self):
    uni = solvers.unipc(VP, TIMES[VP], prediction="eps", order=2)
    dpm = solvers.dpm_solver_pp(VP, TIMES[VP], prediction="eps")
    np.testing.assert_allclose(uni.history, dpm.history, atol=1e-14)

  def test_bh_matters_for_two_points_only(self):
    bh1, bh2 = (
      solvers.unipc(VP, TIMES[VP], prediction="eps", variant=variant)
      for variant in ("bh1", "bh2")
    )
    same = (bh1.history == bh2.history).all(1)
    np.testing.assert_array_equal(same, [1, 0, 1, 1, 0, 1])
    same = (bh1.corrector == bh2.corrector).all(1)
    np.testing.assert_array_equal(same, [1, 0, 1, 1, 1, 1])

  @parameterized.product(sign=(-1, 1), h=(1e-4, 0.3, 1.99, 2.01, 8.0))
  def test_moments(self, sign, h):
    node, weight = np.polynomial.legendre.leggauss(60)
    r = (node + 1) / 2
    for k, got in enumerate(exponential.moments(h, 5, sign)):
      exact = h * np.sum(weight / 2 * np.exp(sign * h * (1 - r)) * r**k)
      np.testing.assert_allclose(got, exact, rtol=1e-12)

  @parameterized.product(gauge=GAUGES, variable=("lambda", "phi"))
  def test_gauge_covariance(self, gauge, variable):
    # (alpha, sigma) and x times c(t) > 0 is the same problem
    factor = lambda t: 1 + np.asarray(t) ** 2
    scaled = schedules.from_functions(
      lambda t: (factor(t) * (1 - np.asarray(t)), factor(t) * np.asarray(t)),
      FLOW.rate,
    )
    times = TIMES[FLOW]
    make = functools.partial(
      solvers.adams,
      prediction="eps",  # not changed by c
      gauge=gauge,
      variable=variable,
      order=3,
    )
    a, b = make(FLOW, times), make(scaled, times)
    c = factor(times)
    # x0, eps, eps - x0 and v / hypot do not scale, x does
    target = np.stack([1 / c[:-1], np.ones(6)], 1)
    np.testing.assert_allclose(b.target, a.target * target, atol=1e-11)
    np.testing.assert_allclose(b.advance, a.advance * c[1:] / c[:-1])
    np.testing.assert_allclose(
      b.history, a.history * c[1:, None], rtol=1e-9, atol=1e-13
    )
    np.testing.assert_allclose(
      b.corrector, a.corrector * c[:-1, None], rtol=1e-9, atol=1e-13
    )

  @parameterized.product(
    solver=(
      solvers.ddim,
      solvers.dpm_solver_pp,
      solvers.unipc,
      functools.partial(solvers.adams, gauge="angle", variable="phi"),
    ),
    prediction=("eps", "x0", "flow", "velocity", "score"),
  )
  def test_form_of_the_prediction_does_not_matter(self, solver, prediction):
    # a nonlinear "model" given as v; every other form of it by the 2x2 system
    times = TIMES[VP]
    alpha, sigma = VP.alpha_sigma(times[:-1])
    d_alpha, d_sigma = VP.rate(times[:-1])
    weights = {
      "eps": (0 * alpha, 1 + 0 * alpha),
      "x0": (1 + 0 * alpha, 0 * alpha),
      "flow": (-1 + 0 * alpha, 1 + 0 * alpha),
      "velocity": (d_alpha, d_sigma),
      "score": (0 * alpha, -1 / sigma),
    }[prediction]
    with jax.enable_x64(True):
      a, s, c0, c1 = (jnp.asarray(v) for v in (alpha, sigma, *weights))

      def as_v(x, t):
        return jnp.sin(3 * x) + t[:, None]

      def other(x, t):
        i = jnp.argmin(jnp.abs(jnp.asarray(times[:-1]) - t[0]))
        v = as_v(x, t)
        x0, eps = a[i] * x - s[i] * v, s[i] * x + a[i] * v
        return c0[i] * x0 + c1[i] * eps

      x = jnp.linspace(-2, 2, 12).reshape(6, 2)
      want = tables.sample(as_v, x, solver(VP, times, prediction="v"))
      got = tables.sample(other, x, solver(VP, times, prediction=prediction))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


class DdimTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.3, 1.0)
  def test_equation_16(self, eta):
    times = TIMES[VP]
    table = solvers.ddim(VP, times, prediction="eps", eta=eta)
    alpha, sigma = VP.alpha_sigma(times)
    ratio = (alpha[:-1] / alpha[1:]) ** 2
    v = eta * (sigma[1:] / sigma[:-1]) * np.sqrt(1 - ratio)
    np.testing.assert_allclose(table.noise, v, rtol=1e-11)
    # x_s = alpha_s x0 + sqrt(sigma_s^2 - v^2) eps, x0 = (x - sigma eps)/alpha
    x0, eps = 0.7, -1.3
    x = alpha[:-1] * x0 + sigma[:-1] * eps
    m = table.target[:, 0] * x + table.target[:, 1] * eps
    got = table.advance * x + table.history[:, 0] * m
    want = alpha[1:] * x0 + np.sqrt(sigma[1:] ** 2 - v**2) * eps
    np.testing.assert_allclose(got, want, rtol=1e-11)

  @parameterized.product(schedule=tuple(TIMES), eta=(0.5, 1.0))
  def test_variance_of_the_path(self, schedule, eta):
    # with x0 known, x stays N(alpha x0, sigma^2) on every schedule
    times = np.append(TIMES[schedule], 0.0)
    table = solvers.ddim(schedule, times, prediction="x0", eta=eta)
    _, sigma = schedule.alpha_sigma(times)
    np.testing.assert_allclose(
      (table.advance * sigma[:-1]) ** 2 + table.noise**2,
      sigma[1:] ** 2,
      atol=1e-12,
    )

  def test_eta_out_of_range(self):
    with self.assertRaisesRegex(ValueError, "eta=1.5"):
      solvers.ddim(VP, TIMES[VP], prediction="eps", eta=1.5)


class RuleTest(parameterized.TestCase):
  @parameterized.parameters(
    ("none", [1, 2, 3, 3, 3, 3]),
    ("full", [1, 2, 3, 3, 3, 3]),
    ("ddim_last", [1, 2, 3, 3, 3, 1]),
    ("ramp", [1, 2, 3, 3, 2, 1]),
  )
  def test_final(self, final, orders):
    for solver in (solvers.dpm_solver_pp, solvers.unipc, solvers.adams):
      table = solver(VP, TIMES[VP], prediction="eps", order=3, final=final)
      np.testing.assert_array_equal((table.history != 0).sum(1), orders)
      if solver is not solvers.dpm_solver_pp:  # the step before, one more
        corrected = [0, *(p + 1 for p in orders[:-1])]
        np.testing.assert_array_equal((table.corrector != 0).sum(1), corrected)

  def test_defaults_share_a_shape(self):
    times = grids.uniform_time(VP, num_steps=10)
    shapes = {
      jax.tree.map(np.shape, make(VP, times, prediction="eps"))
      for make in (
        solvers.ddim,
        solvers.dpm_solver_pp,
        functools.partial(solvers.dpm_solver_pp, order=3),
        solvers.unipc,
        solvers.adams,
        functools.partial(solvers.adams, order=4, corrector=False),
      )
    }
    self.assertLen(shapes, 1)
    self.assertEqual(shapes.pop().history, (10, 4))

  def test_singular_ends_have_finite_tables(self):
    for schedule, start in ((VP, 1.0), (FLOW, 1.0), (EDM, 80.0)):
      times = np.append(np.geomspace(start, 1e-3, 6), 0.0)
      for make in (
        solvers.ddim,
        solvers.dpm_solver_pp,
        functools.partial(solvers.dpm_solver_pp, order=3, final="none"),
        solvers.unipc,
        functools.partial(solvers.unipc, variant="bh1", final="none"),
        *(
          functools.partial(solvers.adams, gauge=g, variable=v, final="none")
          for g in ("data", "flow", "angle")
          for v in VARIABLES
        ),
      ):
        table = make(schedule, times, prediction="v")
        for leaf in jax.tree.leaves(table):
          self.assertTrue(np.isfinite(leaf).all(), (schedule, make, table))

  def test_last_step_to_zero_noise_is_the_data_prediction(self):
    times = np.array([0.9, 0.5, 0.2, 0.0])
    for make in (solvers.ddim, solvers.dpm_solver_pp, solvers.unipc):
      table = make(FLOW, times, prediction="x0")
      np.testing.assert_allclose(table.advance[-1], 0, atol=0)
      np.testing.assert_allclose(table.history[-1], [1, 0, 0, 0], atol=1e-15)

  def test_first_step_from_pure_noise(self):
    # x_b = (sigma_b / sigma_a) x_a + alpha_b x0 where alpha_a = 0
    times = np.array([1.0, 0.7, 0.4])
    for make in (solvers.ddim, solvers.dpm_solver_pp, solvers.unipc):
      table = make(FLOW, times, prediction="flow")
      np.testing.assert_allclose(table.advance[0], 0.7, rtol=1e-15)
      np.testing.assert_allclose(table.history[0], [0.3, 0, 0, 0], atol=1e-15)

  @parameterized.parameters(
    ([0.5, 0.5, 0.1], r"times\[0\] = 0.5 is followed by 0.5"),
    ([0.1, 0.5], "fall strictly"),
    ([1.2, 0.5], "time 1.2 is outside the schedule, which spans 1.0 to 0.0"),
    ([0.5, float("nan")], "nan"),
    ([0.5], r"\(1,\)"),
    ([[0.5, 0.2]], r"\(1, 2\)"),
  )
  def test_bad_times(self, times, message):
    for make in (
      solvers.ddim,
      solvers.dpm_solver_pp,
      solvers.unipc,
      solvers.adams,
    ):
      with self.assertRaisesRegex(ValueError, message):
        make(FLOW, np.array(times), prediction="flow")

  @parameterized.parameters(
    (solvers.ddim, dict(prediction="eps"), "'eps' does not determine 'x0'"),
    (solvers.ddim, dict(prediction="noise"), "'noise'"),
    (solvers.dpm_solver_pp, dict(order=4), "not 4"),
    (solvers.dpm_solver_pp, dict(variant="heun"), "'heun'"),
    (solvers.dpm_solver_pp, dict(final="last"), "'last'"),
    (solvers.dpm_solver_pp, dict(final="full"), "final='full'.*sigma=0.0"),
    (solvers.unipc, dict(variant="vary"), "'vary'"),
    (solvers.unipc, dict(gauge="flow"), "'flow'"),
    (solvers.unipc, dict(gauge="noise"), "alpha = 0"),
    (solvers.unipc, dict(order=0), "not 0"),
    (solvers.adams, dict(gauge="v"), "'v'"),
    (solvers.adams, dict(variable="sigma"), "'sigma'"),
  )
  def test_bad_settings(self, make, settings, message):
    settings = {"prediction": "flow", **settings}
    with self.assertRaisesRegex(ValueError, message):
      make(FLOW, np.array([1.0, 0.5, 0.0]), **settings)


if __name__ == "__main__":
  absltest.main()
