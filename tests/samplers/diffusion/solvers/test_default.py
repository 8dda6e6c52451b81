"""The default solver against the best public solver of every column."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.experiments.harness import mixtures
from giantsteps.samplers.diffusion import (
  betas,
  grids,
  predictions,
  schedules,
  solvers,
  tables,
)

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "diffusion_samplers"
VP, FLOW = schedules.vp_linear(), schedules.rectified_flow()

# calls: lowest median of about 40 configurations of diffusers 0.42.1 and the
# authors' code on the same noise, and how far below it we must be
PUBLIC = {
  "vp_linear": {5: 4.9e-2, 8: 1.2e-2, 10: 7.6e-3, 15: 3.1e-3, 20: 1.2e-3},
  "flow": {5: 3.3e-2, 8: 1.1e-2, 10: 6.5e-3, 15: 1.4e-3, 20: 4.2e-4},
}
MARGIN = {5: 1.0, 8: 2.0, 10: 2.0, 15: 2.0, 20: 1.5}


def run(mixture, path, x_T, table):
  """Executes a table whose model is told phi ("vp") or t ("flow")."""

  def predict(x, t):
    t = t[0]
    point = (jnp.cos(t), jnp.sin(t)) if path == "vp" else (1 - t, t)
    x0, eps = mixtures.posterior(mixture, x, *point)
    return eps - x0

  with jax.enable_x64(True):
    sample = jax.jit(lambda x, table: tables.sample(predict, x, table))
    return np.asarray(sample(jnp.asarray(x_T), table))


def told_phi(schedule):
  return dataclasses.replace(schedule, model_time=schedule.phi)


def median_error(x, exact):
  return np.median(np.sqrt(np.mean((x - exact) ** 2, -1)))


class DefaultTest(parameterized.TestCase):
  @parameterized.product(name=tuple(PUBLIC), nfe=tuple(MARGIN))
  def test_below_the_best_public_solver(self, name, nfe):
    ode, mixture = np.load(GOLDEN / "exact_ode.npz"), mixtures.gmm8()
    x_T, end = (ode[f"table_{name}_gmm8/{k}"] for k in ("x_T", "end"))
    schedule = told_phi(VP) if name == "vp_linear" else FLOW
    table = solvers.default(schedule, nfe, mixture.std, prediction="flow")
    self.assertEqual(table.nfe, nfe)
    x = run(mixture, "vp" if name == "vp_linear" else "flow", x_T, table)
    limit = PUBLIC[name][nfe] / MARGIN[nfe]
    self.assertLess(median_error(x, end), limit)

  @parameterized.parameters(0.1, 3.0)
  def test_scaled_data_gives_scaled_samples(self, scale):
    # x0 -> s x0 at fixed sigma is the same problem at s times the noise:
    # along EDM, start at s t_max and end at s t_min
    mixture = mixtures.gmm2()
    scaled = mixture._replace(mu=scale * mixture.mu, var=scale**2 * mixture.var)
    x_T = 10.0 * np.random.RandomState(0).standard_normal((8, 2))
    samples = []
    for by, data in ((1.0, mixture), (scale, scaled)):
      edm = told_phi(schedules.edm(0.01 * by, 10.0 * by))
      table = solvers.default(edm, 9, data.std, prediction="flow")

      def predict(x, phi, data=data):
        x0, eps = mixtures.posterior(data, x, 1.0, jnp.tan(phi[0]))
        return eps - x0

      with jax.enable_x64(True):
        x = jax.jit(lambda x, t: tables.sample(predict, x, t))(by * x_T, table)
      samples.append(np.asarray(x) / by)
    np.testing.assert_allclose(samples[1], samples[0], rtol=1e-9, atol=1e-10)

  def test_fourth_order(self):
    # three targets and a corrector, which also lifts the warm-up
    mixture = mixtures.gmm2()
    x_T = np.random.RandomState(1).standard_normal((16, 2))
    exact = mixtures.exact_end(mixture, x_T, (0.0, 1.0), (1.0, 0.0), 3000)
    steps, errors = (40, 80, 160), []
    for nfe in steps:
      table = solvers.default(FLOW, nfe, mixture.std, prediction="flow")
      x = run(mixture, "flow", x_T, table)
      errors.append(np.sqrt(np.mean((x - exact) ** 2)))
    slope = np.polyfit(np.log(steps), -np.log(errors), 1)[0]
    self.assertGreater(slope, 3.3)

  @parameterized.product(
    schedule=(
      VP,
      FLOW,
      schedules.edm(),
      schedules.vp_cosine(t_max=1.0),
      schedules.discrete(betas.zero_terminal_snr(betas.linear())),
    ),
    nfe=(1, 2, 6, 7, 30),
  )
  def test_ends_and_calls(self, schedule, nfe):
    t_end = schedule.t_max / 50
    table = solvers.default(schedule, nfe, t_end=t_end, prediction="v")
    self.assertEqual(table.nfe, nfe)
    for leaf in jax.tree.leaves(table):
      self.assertTrue(np.isfinite(leaf).all())
    self.assertEqual(table.time[0], schedule.model_time(schedule.t_max))
    times = grids.flow_time(
      schedule, num_steps=nfe, t_end=t_end, scale=1.4, power=1.5
    )
    np.testing.assert_allclose(schedule.model_time(times[:-1]), table.time)
    self.assertEqual(times[-1], t_end)

  @parameterized.parameters(
    (dict(nfe=0), "num_steps=0"),
    (dict(nfe=5, data_std=0.0), "scale=0.0"),
    (dict(nfe=5, data_std=-1.0), "-1"),
    (dict(nfe=5, t_end=2.0), "t_end=2.0"),
    (dict(nfe=5, data_std=np.inf), "finite"),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      solvers.default(VP, prediction="eps", **settings)

  def test_an_eps_model_starts_below_alpha_0(self):
    with self.assertRaisesRegex(ValueError, "smaller time"):
      solvers.default(FLOW, 6, prediction="eps")
    table = solvers.default(FLOW, 6, prediction="eps", t_start=0.99)
    self.assertEqual(table.time[0], 0.99)


class DataStdTest(parameterized.TestCase):
  @parameterized.parameters("eps", "x0", "v", "flow", "velocity", "score")
  def test_affine_is_that_of_the_scaled_data(self, target):
    # x = alpha x0 + sigma eps = (s alpha) (x0 / s) + sigma eps
    s, alpha, sigma, rate = 2.5, 0.6, 0.9, (-1.1, 0.7)
    x0, eps = 0.3, -1.2
    x = alpha * x0 + sigma * eps
    c = {
      "eps": (0.0, 1.0),
      "x0": (1.0, 0.0),
      "v": (-sigma, s * alpha),
      "flow": (-1.0, 1.0),
      "velocity": (s * rate[0], rate[1]),
      "score": (0.0, -1 / sigma),
    }[target]
    z, out = predictions.affine("flow", target, alpha, sigma, rate, s)
    got = z * x + out * (eps - x0)
    np.testing.assert_allclose(got, c[0] * x0 / s + c[1] * eps, rtol=1e-12)

  @parameterized.product(gauge=("data", "noise", "flow"), std=(0.3, 1.0, 4.0))
  def test_first_order_is_independent_of_it(self, gauge, std):
    # DDIM; the angle gauge is Euler in phi, which data_std defines
    times = grids.quadratic_time(VP, num_steps=4)
    table = solvers.adams(
      VP,
      times,
      prediction="v",
      gauge=gauge,
      order=1,
      corrector=False,
      final="none",
      data_std=std,
    )
    x = np.random.RandomState(2).standard_normal((5, 3))
    ddim = solvers.ddim(VP, times, prediction="v")
    model = lambda x, t: jnp.sin(3 * x + t[:, None])
    with jax.enable_x64(True):
      got, want = (
        tables.sample(model, jnp.asarray(x), run) for run in (table, ddim)
      )
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)

  def test_flow_time_is_the_shifted_grid(self):
    for shift in (0.5, 1.0, 3.0):
      np.testing.assert_allclose(
        grids.flow_time(FLOW, num_steps=7, scale=shift),
        grids.shift(grids.uniform_time(FLOW, num_steps=7), shift),
        rtol=1e-12,
        atol=1e-15,
      )


if __name__ == "__main__":
  absltest.main()
