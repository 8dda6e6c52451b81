"""Every schedule x prediction x solver, from the very start to the very end.

One program in float32 runs all of them: tables are padded to one shape and
stacked, a run per sample.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import (
  betas,
  grids,
  guidance,
  schedules,
  solvers,
  tables,
)

SCHEDULES = {
  "vp_linear": schedules.vp_linear(),
  "vp_cosine": schedules.vp_cosine(),
  "vp_cosine_to_1": schedules.vp_cosine(t_max=1.0),
  "edm": schedules.edm(),
  "flow": schedules.rectified_flow(),
  "flow_3": schedules.rectified_flow(3.0),
  "discrete": schedules.discrete(betas.linear()),
  "zero_snr": schedules.discrete(betas.zero_terminal_snr(betas.linear())),
  "squared_cosine": schedules.discrete(betas.squared_cosine()),
  "flow_on_vp": schedules.on_clock(
    schedules.rectified_flow(), schedules.vp_linear()
  ),
}
PREDICTIONS = ("eps", "x0", "v", "flow", "velocity", "score")
P = functools.partial
SOLVERS = {
  "ddim": solvers.ddim,
  "ancestral": P(solvers.ddim, eta=1.0),
  "2m": solvers.dpm_solver_pp,
  "3m": P(solvers.dpm_solver_pp, order=3, final="none"),
  "2m_sde": P(solvers.dpm_solver_pp, eta=1.0, final="none"),
  "3s": P(solvers.dpm_solver_pp, order=3, method="singlestep"),
  "2s_ancestral": P(
    solvers.dpm_solver_pp, order=2, method="singlestep", ancestral_eta=1.0
  ),
  "unipc": solvers.unipc,
  "unipc_bh1": P(solvers.unipc, order=2, variant="bh1", final="none"),
  "sa": solvers.sa_solver,
  "adams_data": P(solvers.adams, gauge="data", variable="lambda", final="none"),
  "adams_flow": P(solvers.adams, order=3),
  "adams_angle": P(solvers.adams, gauge="angle", variable="phi", order=4),
  "default": lambda schedule, times, prediction: solvers.default(
    schedule, len(times) - 1, t_end=times[-1], prediction=prediction
  ),
  "flow_heun": P(solvers.runge_kutta, gauge="flow"),
  "noise_2m": P(solvers.dpm_solver, final="none"),
  "noise_3s": P(solvers.dpm_solver, order=3, method="singlestep"),
  "tab4": solvers.deis,
  "rho_rk4": P(solvers.deis, method="rk", tableau="rk4"),
  "ipndm": P(solvers.deis, method="ipndm"),
  "edm_heun": P(solvers.edm_heun, churn=3.0),
  "edm_midpoint": P(solvers.edm_midpoint, ancestral_eta=1.0),
}
NOISE_GAUGE = tuple(SOLVERS)[list(SOLVERS).index("noise_2m") :]
ROWS = 24


@jax.jit
def run(x, table, noise):
  def loss(x):
    predict = lambda x, t: 0.5 * jnp.tanh(x)
    out = tables.sample(predict, x, table, noise=noise)
    return jnp.sum(out), out

  return jax.grad(loss, has_aux=True)(x)


class EndsTest(parameterized.TestCase):
  @parameterized.product(name=tuple(SCHEDULES), end=("t_min", "zero"))
  def test_no_nan_in_float32(self, name, end):
    schedule = SCHEDULES[name]
    stop = None if end == "t_min" else 0.0
    times = grids.uniform_time(schedule, num_steps=6, t_end=stop)
    singular = schedule.alpha_sigma(times[0])[0] == 0
    runs, refused = [], set()
    for key, make in SOLVERS.items():
      for prediction in PREDICTIONS:
        try:
          table = make(schedule, times, prediction=prediction)
        except ValueError:
          refused.add((key, prediction))
          continue
        runs.append(tables.pad(tables.resize(table, 5), ROWS))
    # refused with a reason, only where alpha = 0: nothing but v, flow, x0 and
    # velocity says what x0 is, and the noise gauge cannot start there
    expected = set()
    if singular:
      expected = {
        (key, p)
        for key in SOLVERS
        for p in PREDICTIONS
        if key in NOISE_GAUGE or p in ("eps", "score")
      }
    self.assertEqual(refused, expected)
    count = len(SOLVERS) * len(PREDICTIONS)
    runs += [runs[0]] * (count - len(runs))
    scale = float(schedule.alpha_sigma(times[0])[1])
    x = scale * jax.random.normal(jax.random.key(0), (count, 3))
    noise = jax.random.normal(jax.random.key(1), (ROWS, count, 3))
    slope, out = run(x, tables.stack(runs), noise)
    self.assertEqual(out.dtype, jnp.float32)
    self.assertTrue(np.isfinite(out).all())
    self.assertTrue(np.isfinite(slope).all())

  def test_one_program_for_everything(self):
    traces = []

    def network(x, t, condition):
      traces.append(x.shape)
      return 0.5 * jnp.tanh(x + condition)

    @jax.jit
    def guided(x, table, scale, noise):
      predict = guidance.classifier_free(network, 1.0 + 0 * x, 0.0, scale)
      return tables.sample(predict, x, table, noise=noise)

    x = jax.random.normal(jax.random.key(0), (2, 3))
    shapes, runs = set(), 0
    for name in ("vp_linear", "edm", "flow_3", "discrete"):
      schedule = SCHEDULES[name]
      times = grids.uniform_time(schedule, num_steps=6)
      for prediction in PREDICTIONS:
        for make in SOLVERS.values():
          try:
            table = make(schedule, times, prediction=prediction)
          except ValueError:
            continue
          noise = None
          if table.noise.any():
            noise = jax.random.normal(jax.random.key(1), (table.nfe, *x.shape))
          shapes.add((table.nfe, noise is None))
          for scale in (1.0, 7.5):
            guided(x, tables.resize(table, 5), jnp.float32(scale), noise)
            runs += 1
    self.assertLen(traces, len(shapes))
    self.assertLess(len(shapes), 8)
    self.assertGreater(runs, 900)


if __name__ == "__main__":
  absltest.main()
