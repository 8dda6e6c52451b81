"""Interpolants, and the bridge between the two clocks."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research import flow_maps
from giantsteps.samplers.diffusion import grids, schedules, solvers, tables

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "flow_maps"
KINDS = {"linear": flow_maps.linear(), "trig": flow_maps.trigonometric()}
MEAN, STD = 0.7, 0.3  # data of the closed forms below


def weights(kind, t):
  """a, b, da, db by definition."""
  if kind == "linear":
    return 1 - t, t, -1.0 + 0 * t, 1.0 + 0 * t
  c, s = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
  return c, s, -np.pi / 2 * s, np.pi / 2 * c


def gaussian_velocity(kind, sigma_0):
  """velocity(s, t, x) of N(0, sigma_0^2) to N(MEAN, STD^2), on the diagonal.

  b_t(x) = m' + c' / (2 c) (x - m), m = b MEAN, c = a^2 sigma_0^2 + b^2 STD^2.
  """

  def velocity(s, t, x):
    del s
    t = t[:, None]
    if kind == "linear":
      a, b, da, db = 1 - t, t, -1.0, 1.0
    else:
      a, b = jnp.cos(jnp.pi * t / 2), jnp.sin(jnp.pi * t / 2)
      da, db = -jnp.pi / 2 * b, jnp.pi / 2 * a
    c = a**2 * sigma_0**2 + b**2 * STD**2
    half = a * da * sigma_0**2 + b * db * STD**2
    return db * MEAN + half / c * (x - b * MEAN)

  return velocity


class InterpolantTest(parameterized.TestCase):
  @parameterized.parameters(*KINDS)
  def test_weights(self, kind):
    I, t = KINDS[kind], np.linspace(0, 1, 11)
    for f, exact in zip((I.a, I.b, I.da, I.db), weights(kind, t), strict=True):
      self.assertEqual(f(t).dtype, np.float64)
      np.testing.assert_allclose(f(t), exact, atol=4e-16)
      np.testing.assert_allclose(
        jax.jit(f)(t.astype(np.float32)), exact, atol=4e-7
      )
    for f, slope in ((I.a, I.da), (I.b, I.db)):
      got = jax.vmap(jax.grad(f))(jnp.float32(t))
      np.testing.assert_allclose(got, slope(t), atol=1e-6)
    ends = np.array([0.0, 1.0])
    np.testing.assert_array_equal(I.a(ends), [1, 0])
    np.testing.assert_array_equal(I.b(ends), [0, 1])

  def test_is_static(self):
    self.assertEqual(hash(flow_maps.linear()), hash(flow_maps.linear()))
    self.assertEqual(flow_maps.trigonometric(), flow_maps.trigonometric())
    self.assertNotEqual(flow_maps.linear(), flow_maps.trigonometric())

  @parameterized.parameters(
    "gauss_1d_linear",
    "gauss_2d_noncommuting_linear",
    "gauss_5d_full_trig",
    "mix_1d_asym_trig",
    "mix_2d_linear",
  )
  def test_endpoints_are_golden(self, name):
    golden = np.load(GOLDEN / f"{name}.npz")
    with jax.enable_x64(True):
      x0, x1 = flow_maps.endpoints(
        KINDS[str(golden["kind"])],
        *(jnp.asarray(golden[k]) for k in ("s", "x", "b_s")),
      )
    np.testing.assert_allclose(x0, golden["Ex0_s"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x1, golden["Ex1_s"], rtol=1e-9, atol=1e-9)

  @parameterized.parameters(
    "mix_1d_sym_linear",
    "mix_1d_asym_trig",
    "mix_2d_linear",
    "mix_2d_asym_linear",
  )
  def test_score_is_golden(self, name):
    golden = np.load(GOLDEN / f"{name}.npz")
    before = golden["s"] < 1  # singular at 1
    with jax.enable_x64(True):
      s, x, b = (jnp.asarray(golden[k][before]) for k in ("s", "x", "b_s"))
      kind = KINDS[str(golden["kind"])]
      got = flow_maps.score(kind, s, x, b, float(golden["sig0"]))
    wanted = golden["score_s"][before]
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9)

  @parameterized.parameters(*KINDS)
  def test_endpoints_invert_the_interpolant(self, kind):
    x0, x1 = np.random.default_rng(0).normal(size=(2, 5, 3, 2))
    t = jnp.linspace(0, 1, 5)  # both ends included
    with jax.enable_x64(True):
      t, x0, x1 = (jnp.asarray(v, jnp.float64) for v in (t, x0, x1))
      x, slope = KINDS[kind](t, x0, x1)
      noise, data = flow_maps.endpoints(KINDS[kind], t, x, slope)
    np.testing.assert_allclose(noise, x0, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(data, x1, rtol=1e-12, atol=1e-14)


SCHEDULES = {
  "vp_linear": schedules.vp_linear(),
  "vp_cosine": schedules.vp_cosine(),
  "edm": schedules.edm(),
  "shifted": schedules.rectified_flow(3.0),
  "discrete": schedules.discrete(np.linspace(1e-4, 0.02, 1000)),
}


class FromScheduleTest(parameterized.TestCase):
  @parameterized.parameters(*SCHEDULES)
  def test_weights(self, name):
    schedule = SCHEDULES[name]
    sigma_0 = 80.0 if name == "edm" else 0.5
    I = flow_maps.from_schedule(schedule, sigma_0)
    s = np.random.default_rng(0).uniform(0, 1, 500)
    s = np.float64(np.float32(s))  # the same time for both
    t = schedule.t_max * (1 - s)
    alpha, sigma = schedule.alpha_sigma(t)
    d_alpha, d_sigma = schedule.rate(t)
    wanted = {
      "a": sigma / sigma_0,
      "b": alpha,
      "da": -schedule.t_max * d_sigma / sigma_0,
      "db": -schedule.t_max * d_alpha,
    }
    # the kinks of `discrete` are between the nodes of the table
    kinked = name == "discrete"
    for key, value in wanted.items():
      f = getattr(I, key)
      np.testing.assert_allclose(f(s), value, rtol=1e-12)  # NumPy: exact
      with jax.enable_x64(True):
        got = jax.jit(f)(jnp.asarray(s))
      scale = np.abs(value).max()
      rate = key in ("da", "db")
      tolerance = (0.02 if rate else 1e-6) if kinked else 1e-6
      np.testing.assert_allclose(got, value, rtol=0, atol=tolerance * scale)
      got = jax.jit(f)(jnp.float32(s))
      self.assertEqual(got.dtype, jnp.float32)
      tolerance = max(tolerance, 1e-4 if rate else 1e-6)
      np.testing.assert_allclose(got, value, rtol=0, atol=tolerance * scale)
    ends = jnp.array([0.0, 1.0])
    wanted = np.stack(schedule.alpha_sigma(schedule.t_max * (1 - ends)), 1)
    np.testing.assert_allclose(I.b(ends), wanted[:, 0], rtol=1e-6)
    np.testing.assert_allclose(
      I.a(ends) * sigma_0, wanted[:, 1], rtol=1e-6, atol=1e-9
    )
    for f in (I.a, I.b, I.da, I.db):
      self.assertTrue(np.isfinite(jax.jit(f)(ends)).all())

  @parameterized.parameters(*SCHEDULES)
  def test_conversions_round_trip(self, name):
    # a' e0 + b' e1 = b_t, and back, for t in (0, 1)
    I = flow_maps.from_schedule(SCHEDULES[name])
    x0, x1 = np.random.default_rng(0).normal(size=(2, 9, 2))
    with jax.enable_x64(True):
      t = jnp.linspace(0.01, 0.99, 9)
      x, slope = I(t, jnp.asarray(x0), jnp.asarray(x1))
      noise, data = flow_maps.endpoints(I, t, x, slope)
    np.testing.assert_allclose(noise, x0, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(data, x1, rtol=1e-6, atol=1e-6)

  def test_straight_path_is_linear(self):
    I, L = flow_maps.from_schedule(schedules.rectified_flow()), KINDS["linear"]
    s = jnp.linspace(0, 1, 101)
    for key in ("a", "b", "da", "db"):
      got, wanted = getattr(I, key)(s), getattr(L, key)(s)
      np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-7)

  def test_there_and_back(self):
    # to_sampler of it is the schedule again, on the clock t / t_max
    I = flow_maps.from_schedule(SCHEDULES["vp_linear"], 0.5)
    schedule, _ = flow_maps.to_sampler(I, lambda s, t, x: x, 0.5)
    t = np.linspace(0.01, 1, 20)
    for got, wanted in zip(
      (*schedule.alpha_sigma(t), *schedule.rate(t)),
      (*SCHEDULES["vp_linear"].alpha_sigma(t), *SCHEDULES["vp_linear"].rate(t)),
      strict=True,
    ):
      np.testing.assert_allclose(got, wanted, rtol=1e-9)

  def test_bad_sigma(self):
    with self.assertRaisesRegex(ValueError, "sigma_0=0"):
      flow_maps.from_schedule(SCHEDULES["edm"], 0)


class TwoClocksTest(parameterized.TestCase):
  @parameterized.product(kind=tuple(KINDS), sigma_0=(1.0, 0.5))
  def test_schedule(self, kind, sigma_0):
    schedule, _ = flow_maps.to_sampler(KINDS[kind], lambda s, t, x: x, sigma_0)
    t = np.linspace(0, 1, 21)
    a, b, da, db = weights(kind, 1 - t)
    alpha, sigma = schedule.alpha_sigma(t)
    np.testing.assert_allclose(alpha, b, atol=1e-15)
    np.testing.assert_allclose(sigma, sigma_0 * a, atol=1e-15)
    np.testing.assert_allclose(schedule.rate(t)[0], -db, atol=1e-15)
    np.testing.assert_allclose(schedule.rate(t)[1], -sigma_0 * da, atol=1e-15)
    self.assertEqual((schedule.t_min, schedule.t_max), (0.0, 1.0))
    back = schedule.t_of_lambda(schedule.lam(t))
    np.testing.assert_allclose(back, t, atol=1e-15)
    np.testing.assert_array_equal(schedule.model_time(t), t)

  def test_the_model_is_turned_round(self):
    _, predict = flow_maps.to_sampler(
      flow_maps.linear(), lambda s, t, x: 100 * s[:, None] + 10 * t[:, None] + x
    )
    out = predict(jnp.ones((1, 1)), jnp.array([0.25]))
    np.testing.assert_allclose(out, -(75 + 7.5 + 1))

  @parameterized.parameters(1.0, 0.5)
  def test_euler_upward_is_ddim_downward(self, sigma_0):
    # on the linear path, for any velocity and any nodes
    velocity = lambda s, t, x: jnp.sin(3 * x) + s[:, None] * t[:, None]
    schedule, predict = flow_maps.to_sampler(
      flow_maps.linear(), velocity, sigma_0
    )
    times = np.array([1.0, 0.9, 0.55, 0.3, 0.29, 0.0])
    with jax.enable_x64(True):
      x = jnp.linspace(-2, 2, 10).reshape(5, 2)
      table = solvers.ddim(schedule, times, prediction="velocity")
      got = tables.sample(predict, x, table)
      for t, s in zip(1 - times, 1 - times[1:], strict=False):
        at = jnp.full(5, t)
        x = x + (s - t) * velocity(at, at, x)
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)

  @parameterized.product(kind=tuple(KINDS), sigma_0=(1.0, 0.5))
  def test_both_clocks_converge_to_the_exact_gaussian_map(self, kind, sigma_0):
    velocity = gaussian_velocity(kind, sigma_0)
    schedule, predict = flow_maps.to_sampler(KINDS[kind], velocity, sigma_0)
    down = jax.jit(functools.partial(tables.sample, predict))

    @functools.partial(jax.jit, static_argnums=1)
    def up(x, num):
      def step(i, x):
        at = jnp.full(x.shape[:1], i / num)
        return x + velocity(at, at, x) / num

      return jax.lax.fori_loop(0, num, step, x)

    errors = {"euler": [], "ddim": [], "adams": []}
    with jax.enable_x64(True):
      x = sigma_0 * jnp.linspace(-2, 2, 6)[:, None]
      exact = MEAN + STD / sigma_0 * x
      for num in (64, 128):
        times = grids.uniform_time(schedule, num_steps=num)
        results = {
          "euler": up(x, num),
          "ddim": down(x, solvers.ddim(schedule, times, prediction="velocity")),
          "adams": down(
            x, solvers.adams(schedule, times, prediction="velocity")
          ),
        }
        for name, out in results.items():
          errors[name].append(float(jnp.abs(out - exact).max()))
    self.assertLess(errors["euler"][1], 0.05)
    # orders 1, 1 and 3; the last step of adams, uncorrected, still shows
    for name, least in (("euler", 0.8), ("ddim", 0.8), ("adams", 2.5)):
      slope = np.log2(errors[name][0] / errors[name][1])
      self.assertGreater(slope, least, (name, errors))
    self.assertLess(errors["adams"][1], 1e-4)

  def test_bad_sigma(self):
    with self.assertRaisesRegex(ValueError, "sigma_0=0.0"):
      flow_maps.to_sampler(flow_maps.linear(), lambda s, t, x: x, 0.0)


if __name__ == "__main__":
  absltest.main()
