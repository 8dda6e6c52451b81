"""Singlestep and Runge-Kutta tables: layout of the calls, exactness, errors."""

import functools

import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import grids, schedules, solvers

VP, FLOW = schedules.vp_linear(), schedules.rectified_flow()
TIMES = np.array([0.95, 0.8, 0.55, 0.5, 0.3, 0.1, 0.02])
TABLEAUS = (
  "euler",
  "heun",
  "midpoint",
  "ralston",
  "heun3",
  "kutta3",
  "ralston3",
  "houwen3",
  "ssp3",
  "rk4",
)


class LayoutTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 1, [1]),
    (5, 1, [1, 1, 1, 1, 1]),
    (6, 2, [2, 2, 2]),
    (7, 2, [2, 2, 2, 1]),
    (3, 3, [2, 1]),
    (9, 3, [3, 3, 2, 1]),
    (10, 3, [3, 3, 3, 1]),
    (11, 3, [3, 3, 3, 2]),
  )
  def test_fast_orders(self, nfe, order, orders):
    self.assertEqual(solvers.fast_orders(nfe, order), orders)

  @parameterized.product(nfe=(4, 5, 6, 7, 8, 9), order=(1, 2, 3))
  def test_an_int_makes_exactly_as_many_calls(self, nfe, order):
    for start, end in ((1.0, 0.0), (0.9, 0.1), (1.0, 0.1), (0.9, 0.0)):
      times = np.linspace(start, end, nfe + 1)
      table = solvers.dpm_solver_pp(
        FLOW, times, prediction="v", order=order, method="singlestep"
      )
      np.testing.assert_allclose(table.time, times[:-1], rtol=1e-12)
      for leaf in table[:7]:
        self.assertTrue(np.isfinite(leaf).all())

  @parameterized.parameters("log_snr", "uniform_time", "quadratic_time")
  def test_inner_nodes(self, inner):
    table = solvers.dpm_solver_pp(
      VP,
      TIMES[[0, 2, 5]],
      prediction="v",
      order=[3, 2],
      method="singlestep",
      inner=inner,
    )
    grid = functools.partial(getattr(grids, inner), VP)
    first = grid(num_steps=3, t_start=0.95, t_end=0.55)[:-1]
    second = grid(num_steps=2, t_start=0.55, t_end=0.1)[:-1]
    np.testing.assert_allclose(table.time, [*first, *second], rtol=1e-12)

  def test_commits_only_between_steps(self):
    table = solvers.dpm_solver_pp(
      VP, TIMES, prediction="v", order=3, method="singlestep"
    )
    starts = [1, 0, 0, 1, 0, 1]  # orders 3, 2, 1
    np.testing.assert_array_equal(table.anchor[:, 1], starts)
    np.testing.assert_array_equal(table.anchor.sum(1), 1)

  @parameterized.product(
    make=(solvers.dpm_solver_pp, solvers.dpm_solver),
    order=(1, 2, 3),
    variant=("midpoint", "taylor"),
  )
  def test_constant_target_is_exact_at_every_call(self, make, order, variant):
    # m constant: x = S (x_a / S_a + m (mu - mu_a)) at all stages
    table = make(
      VP,
      TIMES,
      prediction="x0",
      order=order,
      method="singlestep",
      variant=variant,
    )
    data = make is solvers.dpm_solver_pp
    alpha, sigma = VP.alpha_sigma(TIMES)
    s, mu = (sigma, alpha / sigma) if data else (alpha, sigma / alpha)
    start = np.maximum.accumulate(np.where(table.anchor[:, 1], np.arange(6), 0))
    end = np.arange(1, 7)
    np.testing.assert_allclose(table.advance, s[end] / s[start], rtol=1e-12)
    np.testing.assert_allclose(
      table.history.sum(1), s[end] * (mu[end] - mu[start]), rtol=1e-12
    )

  @parameterized.product(
    tableau=TABLEAUS, gauge=("data", "noise", "flow", "angle")
  )
  def test_runge_kutta_sums(self, tableau, gauge):
    table = solvers.runge_kutta(
      VP, TIMES[[0, 6]], prediction="v", tableau=tableau, gauge=gauge
    )
    alpha, sigma = VP.alpha_sigma(np.append(table.time, TIMES[-1]))
    s, mu = {
      "data": (sigma, alpha / sigma),
      "noise": (alpha, sigma / alpha),
      "flow": (alpha + sigma, sigma / (alpha + sigma)),
      "angle": (np.hypot(alpha, sigma), np.arctan2(sigma, alpha)),
    }[gauge]
    # each stage lands where its weights say, c = sum of the row
    np.testing.assert_allclose(table.advance, s[1:] / s[0], rtol=1e-11)
    np.testing.assert_allclose(
      table.history.sum(1), s[1:] * (mu[1:] - mu[0]), rtol=1e-10
    )

  def test_flow_heun_is_heun(self):
    table = solvers.runge_kutta(
      FLOW, np.array([0.8, 0.6]), prediction="flow", gauge="flow"
    )
    np.testing.assert_allclose(table.time, [0.8, 0.6], rtol=1e-12)
    np.testing.assert_allclose(
      table.history[:, :2], [[-0.2, 0], [-0.1, -0.1]], atol=1e-14
    )

  def test_last_step_to_data_is_one_call(self):
    times = np.append(TIMES, 0.0)
    for make in (solvers.edm_heun, solvers.edm_midpoint):
      self.assertEqual(make(VP, times, prediction="v").nfe, 2 * 7 - 1)
      self.assertEqual(make(VP, TIMES, prediction="v").nfe, 2 * 6)

  @parameterized.parameters(
    (dict(order=[2, 2]), "6 numbers"),
    (dict(order=[4] * 6), "1, 2 or 3"),
    (dict(order=[1] * 6, inner="karras"), "'karras'"),
    (dict(order=5), "order 1, 2 or 3: 6, 5"),
    (dict(method="single"), "'single'"),
  )
  def test_bad_settings(self, settings, message):
    make = functools.partial(
      solvers.dpm_solver_pp, VP, TIMES, prediction="v", method="singlestep"
    )
    with self.assertRaisesRegex(ValueError, message):
      make(**settings)

  def test_bad_ends(self):
    make = functools.partial(
      solvers.dpm_solver_pp, FLOW, prediction="v", method="singlestep"
    )
    with self.assertRaisesRegex(ValueError, "step 0 of order 2.*infinite"):
      make(np.array([1.0, 0.5, 0.1]), order=[2, 1])
    with self.assertRaisesRegex(ValueError, "step 1 of order 3.*infinite"):
      make(np.array([0.9, 0.5, 0.0]), order=[2, 3])
    for other in (
      functools.partial(solvers.dpm_solver, method="singlestep"),
      solvers.deis,
      solvers.edm_heun,
      solvers.edm_midpoint,
    ):
      with self.assertRaisesRegex(ValueError, "cannot start where alpha = 0"):
        other(FLOW, np.array([1.0, 0.5, 0.1]), prediction="v")

  @parameterized.parameters(
    (solvers.deis, dict(method="exact"), "'exact'"),
    (solvers.deis, dict(warm_up="none"), "'none'"),
    (solvers.deis, dict(method="rk", tableau="rk9"), "'rk9'"),
    (solvers.runge_kutta, dict(gauge="v"), "'v'"),
    (solvers.edm_heun, dict(churn=-1.0), "churn=-1.0"),
    (solvers.edm_midpoint, dict(ancestral_eta=-1.0), "ancestral_eta=-1.0"),
    (solvers.unipc, dict(gauge="noise", threshold=0.9), "gauge='data'"),
    (solvers.adams, dict(threshold=0.9), "gauge='data'"),
  )
  def test_bad_arguments(self, make, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      make(VP, TIMES, prediction="v", **settings)


if __name__ == "__main__":
  absltest.main()
