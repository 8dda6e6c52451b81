"""The loop: one model in the program, exactly N calls, one compile for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import grids, schedules, solvers, tables

VP, FLOW, EDM = (
  schedules.vp_linear(),
  schedules.rectified_flow(),
  schedules.edm(),
)
STD = 0.5  # data ~ N(0, STD^2)
WEIGHT = jax.random.normal(jax.random.key(7), (6, 6)) / 6**0.5


def network(x, t):
  """A small nonlinear model with two matrix products."""
  return jnp.tanh(x @ WEIGHT + t[:, None]) @ WEIGHT.T


def denoise(x, t):
  """E[x0 | x] on the straight path."""
  t = t[:, None]
  return (1 - t) * STD**2 * x / ((1 - t) ** 2 * STD**2 + t**2)


def eight_calls():
  """Tables of all solvers at 8 calls on the VP schedule."""
  times = grids.quadratic_time(VP, num_steps=8)
  make = {
    "ddim": solvers.ddim,
    "ancestral": functools.partial(solvers.ddim, eta=1.0),
    "2m": solvers.dpm_solver_pp,
    "3m": functools.partial(solvers.dpm_solver_pp, order=3),
    "unipc": solvers.unipc,
    "adams": functools.partial(
      solvers.adams, gauge="angle", variable="t", order=3
    ),
  }
  return {k: f(VP, times, prediction="v") for k, f in make.items()}


TABLES = eight_calls()
ODE = {k: v for k, v in TABLES.items() if k != "ancestral"}
X = jax.random.normal(jax.random.key(0), (4, 6))
RUN = jax.jit(functools.partial(tables.sample, network))


@jax.jit
def gradient(x, scale, table):
  """Value and gradient of |sample|^2 in x and in a parameter."""
  return jax.value_and_grad(
    lambda x, scale: jnp.sum(
      tables.sample(lambda x, t: scale * network(x, t), x, table) ** 2
    ),
    (0, 1),
  )(x, scale)


def count_dots(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    total += equation.primitive.name == "dot_general"
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        if hasattr(inner, "jaxpr"):
          inner = inner.jaxpr
        if hasattr(inner, "eqns"):
          total += count_dots(inner)
  return total


class ProgramTest(parameterized.TestCase):
  def test_one_compile_for_all_solvers(self):
    traces = []

    def predict(x, t):
      traces.append(x.shape)
      return network(x, t)

    run = jax.jit(functools.partial(tables.sample, predict))
    results = [run(X, table) for table in ODE.values()]
    self.assertLen(traces, 1)
    for a, b in zip(results, results[1:], strict=False):
      self.assertGreater(float(jnp.abs(a - b).max()), 1e-4)

  def test_model_is_in_the_program_once(self):
    alone = jax.make_jaxpr(network)(X, jnp.ones(4))
    whole = jax.make_jaxpr(functools.partial(tables.sample, network))(
      X, TABLES["unipc"]
    )
    self.assertEqual(count_dots(alone.jaxpr), 2)
    self.assertEqual(count_dots(whole.jaxpr), 2)

  def test_number_of_calls(self):
    seen = []

    def predict(x, t):
      jax.debug.callback(lambda t: seen.append(float(t)), t[0], ordered=True)
      return network(x, t)

    run = jax.jit(functools.partial(tables.sample, predict))
    for name, table in TABLES.items():
      seen.clear()
      run(X, table, key=jax.random.key(0)).block_until_ready()
      jax.effects_barrier()
      self.assertLen(seen, table.nfe, name)
      self.assertEqual(table.nfe, 8)
      np.testing.assert_allclose(seen, table.time, rtol=1e-7)

  def test_vmap_over_tables(self):
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *ODE.values())
    many = jax.jit(jax.vmap(functools.partial(tables.sample, network, X)))
    # a batched matmul rounds otherwise: 8 steps of a few ulp
    for got, table in zip(many(stacked), ODE.values(), strict=True):
      np.testing.assert_allclose(got, RUN(X, table), rtol=1e-5, atol=1e-5)

  def test_engine_runs_requests_at_different_rows(self):
    # two requests, different solvers, the second one three calls behind
    queue = [TABLES["unipc"], TABLES["2m"]]
    rows = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *queue)
    rows = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rows)
    state = jax.vmap(lambda x: tables.init(x, 4))(X[:2])

    @jax.jit
    def serve(state, active):
      take = jax.vmap(lambda i, table: jax.tree.map(lambda a: a[i], table))
      row = take(jnp.minimum(state.row, 7), rows)
      output = network(state.x, row.time)  # one forward pass for both
      new = jax.vmap(tables.step)(state, row, output)
      keep = lambda a, b: jnp.where(
        active.reshape((2,) + (1,) * (a.ndim - 1)), a, b
      )
      return jax.tree.map(keep, new, state)

    for call in range(11):
      state = serve(state, jnp.array([call < 8, call >= 3]))
    np.testing.assert_array_equal(state.row, [8, 8])
    for i, table in enumerate(queue):
      np.testing.assert_allclose(
        state.x[i], RUN(X[i : i + 1], table)[0], rtol=1e-5, atol=1e-5
      )

  @parameterized.parameters(*ODE)
  def test_batch_independence(self, name):
    np.testing.assert_allclose(
      RUN(X, ODE[name])[:2], RUN(X[:2], ODE[name]), rtol=1e-5, atol=1e-5
    )

  @parameterized.parameters(*ODE)
  def test_float32_is_enough(self, name):
    with jax.enable_x64(True):
      wide = RUN(X.astype(jnp.float64), ODE[name])
      self.assertEqual(wide.dtype, jnp.float64)
    # 8 steps, coefficients up to 1 / alpha_T = 150 on values below 5
    np.testing.assert_allclose(RUN(X, ODE[name]), wide, rtol=0, atol=1e-4)

  def test_state_is_never_bfloat16(self):
    narrow = X.astype(jnp.bfloat16)
    out = RUN(narrow, TABLES["2m"])
    self.assertEqual(out.dtype, jnp.float32)
    np.testing.assert_array_equal(
      out, RUN(narrow.astype(jnp.float32), TABLES["2m"])
    )

  @parameterized.parameters(*ODE)
  def test_gradient(self, name):
    (value, grads), table = gradient(X, 1.0, ODE[name]), ODE[name]
    for g in jax.tree.leaves(grads):
      self.assertTrue(jnp.isfinite(g).all())
    h = 1e-2
    up, down = (gradient(X, 1.0 + e, table)[0] for e in (h, -h))
    # central difference in float32: eps |loss| / h and h^2
    np.testing.assert_allclose(grads[1], (up - down) / (2 * h), rtol=2e-2)
    self.assertTrue(jnp.isfinite(value))

  def test_trajectory(self):
    x, path = jax.jit(
      functools.partial(tables.sample, network, return_trajectory=True)
    )(X, TABLES["unipc"])
    self.assertEqual(path.shape, (9, 4, 6))
    np.testing.assert_array_equal(path[0], X)
    np.testing.assert_array_equal(path[-1], x)
    np.testing.assert_allclose(x, RUN(X, TABLES["unipc"]), rtol=1e-6)


class NoiseTest(parameterized.TestCase):
  def test_noise_is_refused_never_dropped(self):
    with self.assertRaisesRegex(ValueError, "key= or noise="):
      tables.sample(network, X, TABLES["ancestral"])
    self.assertTrue(jnp.isnan(RUN(X, TABLES["ancestral"])).all())  # traced

  def test_key_or_noise(self):
    table, key = TABLES["ancestral"], jax.random.key(3)
    keys = jax.random.split(key, 8)
    noise = jax.vmap(lambda k: jax.random.normal(k, X.shape))(keys)
    a, b = RUN(X, table, key=key), RUN(X, table, noise=noise)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    self.assertGreater(float(jnp.abs(a - RUN(X, table, noise=-noise)).max()), 1)
    with self.assertRaisesRegex(ValueError, "not both"):
      tables.sample(network, X, table, key=key, noise=noise)
    with self.assertRaisesRegex(ValueError, r"\(7, 4, 6\) is not \(8, 4, 6\)"):
      tables.sample(network, X, table, noise=noise[:7])

  def test_eta_zero_is_the_ode_bit_for_bit(self):
    times = grids.quadratic_time(VP, num_steps=8)
    table = solvers.ddim(VP, times, prediction="v", eta=0.0)
    np.testing.assert_array_equal(
      RUN(X, table, key=jax.random.key(1)),
      RUN(X, TABLES["ddim"], key=jax.random.key(2)),
    )
    for a, b in zip(table[:7], TABLES["ddim"], strict=False):
      np.testing.assert_array_equal(a, b)

  def test_ancestral_samples_have_the_right_variance(self):
    # Gaussian data, 64 calls: law of the sample in closed form, N(0, STD^2)
    # up to the discretisation error of order 1/64.
    table = solvers.ddim(FLOW, np.linspace(1, 0, 65), prediction="x0", eta=1.0)
    x = jax.random.normal(jax.random.key(0), (20_000, 1))
    out = jax.jit(functools.partial(tables.sample, denoise))(
      x, table, key=jax.random.key(1)
    )
    # standard error of a variance: STD^2 sqrt(2 / n) = .0025; 4 of them
    # plus .02 for the steps
    np.testing.assert_allclose(jnp.var(out), STD**2, atol=0.03)


class ResizeTest(absltest.TestCase):
  def test_more_and_fewer_columns_are_the_same_run(self):
    for name, width in (("ddim", 1), ("2m", 2), ("3m", 3), ("unipc", 7)):
      table = tables.resize(ODE[name], width)
      self.assertEqual(table.history.shape, (8, width))
      np.testing.assert_allclose(
        RUN(X, table), RUN(X, ODE[name]), rtol=1e-5, atol=1e-6
      )

  def test_columns_in_use_stay(self):
    with self.assertRaisesRegex(ValueError, "corrector uses 4 columns"):
      tables.resize(TABLES["unipc"], 3)
    with self.assertRaisesRegex(ValueError, "num_targets=0"):
      tables.resize(TABLES["ddim"], 0)


class StackTest(parameterized.TestCase):
  """One table per sample: other solvers, lengths and widths in one batch."""

  def tables(self):
    make = [
      (solvers.ddim, 3),
      (solvers.unipc, 8),
      (functools.partial(solvers.adams, order=4), 5),
      (functools.partial(solvers.ddim, eta=1.0), 7),
    ]
    return [
      solver(VP, grids.uniform_time(VP, num_steps=n), prediction="v")
      for solver, n in make
    ]

  def test_each_sample_runs_its_own_table(self):
    runs = self.tables()
    stacked = tables.stack(runs)
    self.assertEqual(stacked.history.shape, (4, 8, 5))
    self.assertEqual(stacked.nfe, 8)
    noise = jax.random.normal(jax.random.key(0), (8, 4, 6))
    out = RUN(X, stacked, noise=noise)
    for i, table in enumerate(runs):
      one = slice(i, i + 1)
      alone = RUN(X[one], table, noise=noise[: table.nfe, one])
      np.testing.assert_allclose(out[one], alone, rtol=1e-5, atol=2e-5)

  def test_padding_changes_nothing(self):
    table = TABLES["unipc"]
    np.testing.assert_array_equal(
      RUN(X, tables.pad(table, 11)), RUN(X, tables.pad(table, 9))
    )
    with self.assertRaisesRegex(ValueError, "8 rows does not fit in nfe=7"):
      tables.pad(table, 7)

  def test_batch_size(self):
    with self.assertRaisesRegex(ValueError, r"4 tables for x_T \(3, 6\)"):
      tables.sample(network, X[:3], tables.stack(self.tables()))


class HookTest(parameterized.TestCase):
  def test_threshold(self):
    # |x0| of row 0: 0 .. 10, quantile .85 is 8.5; row 1 is within the floor
    x0 = jnp.stack([jnp.arange(-5.0, 6.0) + 5, jnp.linspace(-0.5, 0.5, 11)])
    out = tables.threshold(x0, 0.85, 1.0, jnp.inf)
    np.testing.assert_allclose(out[0], np.minimum(np.arange(11) / 8.5, 1))
    np.testing.assert_allclose(out[1], x0[1])
    out = tables.threshold(x0, 0.85, 1.0, 2.0)
    np.testing.assert_allclose(out[0], np.minimum(np.arange(11) / 2, 1))
    np.testing.assert_array_equal(tables.threshold(x0, 0.0, 1.0, 2.0), x0)

  @parameterized.parameters(
    solvers.ddim, solvers.dpm_solver_pp, solvers.unipc, solvers.sa_solver
  )
  def test_thresholded_runs_stay_in_the_box(self, solver):
    times = np.append(grids.uniform_time(VP, num_steps=6), 0.0)
    table = solver(VP, times, prediction="v", threshold=0.9)
    far = lambda x, t: network(x, t) * 10
    out = jax.jit(functools.partial(tables.sample, far))(
      X, table, key=jax.random.key(0)
    )
    self.assertLessEqual(float(jnp.abs(out).max()), 1 + 1e-6)

  def test_threshold_in_a_stack_is_per_sample(self):
    times = grids.uniform_time(VP, num_steps=5)
    runs = [
      solvers.dpm_solver_pp(VP, times[: n + 1], prediction="v", threshold=0.8)
      for n in (5, 3, 4, 5)
    ]
    out = RUN(X, tables.stack(runs))
    for i, table in enumerate(runs):
      alone = RUN(X[i : i + 1], table)
      np.testing.assert_allclose(out[i : i + 1], alone, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(
    (0.0, "threshold=0.0"),
    (1.5, "threshold=1.5"),
    ((0.9, -1.0), r"\(0.9, -1.0\)"),
    ((0.9, 1.0, 2.0, 3.0), "cap"),
  )
  def test_bad_threshold(self, value, message):
    with self.assertRaisesRegex(ValueError, message):
      solvers.ddim(VP, np.array([0.5, 0.1]), prediction="v", threshold=value)

  @parameterized.parameters(
    solvers.ddim,
    solvers.dpm_solver_pp,
    solvers.dpm_solver,
    solvers.unipc,
    functools.partial(solvers.dpm_solver_pp, method="singlestep"),
    solvers.deis,
    functools.partial(solvers.adams, gauge="flow"),
    functools.partial(solvers.sa_solver, tau=0.0),
  )
  def test_denoise_to_zero(self, solver):
    # one more call whose x0 is the sample
    times = grids.uniform_time(VP, num_steps=6)
    plain = solver(VP, times, prediction="x0")
    table = solver(VP, times, prediction="x0", denoise_to_zero=True)
    self.assertEqual(table.nfe, plain.nfe + 1)
    before = RUN(X, plain)
    exact = network(before, jnp.full(4, times[-1]))
    np.testing.assert_allclose(RUN(X, table), exact, rtol=1e-5, atol=1e-5)
    with self.assertRaisesRegex(ValueError, "sigma = 0, already"):
      times = np.append(times, 0.0)
      solver(VP, times, prediction="x0", denoise_to_zero=True)

  def test_report(self):
    seen = []
    run = jax.jit(
      functools.partial(
        tables.sample, network, report=seen.append, report_every=3
      )
    )
    out = run(X, TABLES["unipc"])
    jax.effects_barrier()
    self.assertEqual(seen, [3, 6])
    np.testing.assert_allclose(out, RUN(X, TABLES["unipc"]), rtol=1e-6)


class EndsTest(parameterized.TestCase):
  @parameterized.parameters(
    (VP, 1.0, "eps"), (FLOW, 1.0, "flow"), (EDM, 80.0, "x0")
  )
  def test_float32_has_no_nan_at_the_ends(self, schedule, start, prediction):
    times = np.append(np.geomspace(start, 1e-4, 7), 0.0)
    run = jax.jit(functools.partial(tables.sample, lambda x, t: 0.1 * x))
    make = [
      solvers.ddim,
      solvers.dpm_solver_pp,
      functools.partial(solvers.dpm_solver_pp, order=3, final="none"),
      solvers.unipc,
      functools.partial(solvers.adams, gauge="flow"),
      functools.partial(solvers.adams, gauge="angle", variable="phi"),
    ]
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
      for solver in make:
        out = run(X * start, solver(schedule, times, prediction=prediction))
        self.assertTrue(jnp.isfinite(out).all())

  @parameterized.parameters(
    (solvers.ddim, 1.0), (solvers.dpm_solver_pp, 2.0), (solvers.adams, 3.0)
  )
  def test_exact_gaussian_map(self, solver, order):
    # data ~ N(0, STD^2): x(t) proportional to its standard deviation; here
    # from pure noise to pure data, both singular in lambda
    errors = []
    run = jax.jit(functools.partial(tables.sample, denoise))
    with jax.enable_x64(True):
      x = jnp.linspace(-3, 3, 8)[:, None]
      for num in (32, 64):
        # cosine nodes: lambda steps stay bounded towards both ends
        times = (1 + np.cos(np.linspace(0, np.pi, num + 1))) / 2
        out = run(x, solver(FLOW, times, prediction="x0"))
        errors.append(float(jnp.abs(out - STD * x).max()))
    self.assertGreater(np.log2(errors[0] / errors[1]), order - 0.3)


class ExampleTest(absltest.TestCase):
  def test_rational(self):
    # Times .9, .5, .1 make both log-SNR steps ln 9, so all is rational:
    # x(.5) = 37/65, D = 21.2/65, x(.1) = .2 x(.5) + .8 D = 609/1625.
    table = solvers.dpm_solver_pp(
      FLOW, np.array([0.9, 0.5, 0.1]), prediction="x0", order=2, final="none"
    )
    out = tables.sample(denoise, jnp.array([[1.0]]), table)
    np.testing.assert_allclose(out, [[609 / 1625]], rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
