"""Any-step sampling, re-noising and likelihoods against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from giantsteps.samplers.diffusion import flow_map, schedules

# N(0, SIGMA^2) to N(MEAN, STD^2) on the straight path, each coordinate
SIGMA, MEAN, STD = 0.8, 0.7, 0.3
PATH = schedules.from_functions(
  lambda t: (1 - np.asarray(t), SIGMA * np.asarray(t)),
  lambda t: (-np.ones_like(t), SIGMA * np.ones_like(t)),
)


def deviation(t):
  return jnp.sqrt((1 - t) ** 2 * SIGMA**2 + t**2 * STD**2)


def exact(s, t, x):
  """v_{s,t}(x), as published for sigma_0 = 1: no 0/0 at s = t."""
  s, t = s[:, None], t[:, None]
  sd_s, sd_t = deviation(s), deviation(t)
  slope = STD**2 * (s + t) - SIGMA**2 * (2 - s - t)
  return MEAN + (x - s * MEAN) * slope / (sd_s * (sd_s + sd_t))


def bent(s, t, x):
  """A velocity field in 2-D that turns and stretches, on the diagonal."""
  del s
  turn = jnp.stack([-x[:, 1], x[:, 0]], 1)
  return turn + jnp.sin(x) * t[:, None]


class SampleTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 4, 7)
  def test_any_number_of_steps(self, num):
    # on the exact map the result does not depend on the nodes
    x0 = np.linspace(-2, 2, 12).reshape(6, 2) * SIGMA
    times = np.linspace(0, 1, num + 1) ** 1.5
    with jax.enable_x64(True):
      x1 = flow_map.sample(exact, jnp.asarray(x0), flow_map.jumps(times))
      back = flow_map.sample(exact, x1, flow_map.jumps(times[::-1]))
    np.testing.assert_allclose(x1, MEAN + STD / SIGMA * x0, rtol=1e-12)
    np.testing.assert_allclose(back, x0, rtol=1e-11)

  def test_one_program_for_runs_of_one_length(self):
    traced = []

    def velocity(s, t, x):
      traced.append(None)
      return exact(s, t, x)

    run = jax.jit(functools.partial(flow_map.sample, velocity))
    x0 = jnp.ones((3, 2))
    for times in ([0, 1], [0, 0.1, 1], [0, 0.2, 0.6, 1]):
      x1 = run(x0, flow_map.pad(flow_map.jumps(times), 4))
      np.testing.assert_allclose(x1, MEAN + STD / SIGMA * x0, rtol=1e-5)
    self.assertLen(traced, 1)

  def test_padding_does_nothing(self):
    wild = lambda s, t, x: 1e6 * (x + 1)
    x0 = jnp.ones((3, 2))
    short = flow_map.jumps([0.0, 0.1, 0.4])
    wanted = flow_map.sample(wild, x0, short)
    got = flow_map.sample(wild, x0, flow_map.pad(short, 6))
    np.testing.assert_array_equal(got, wanted)
    with self.assertRaisesRegex(ValueError, "num_steps=1"):
      flow_map.pad(short, 1)

  def test_times_of_each_call(self):
    # records s and t in the state; the batch shape of times
    def velocity(s, t, x):
      self.assertEqual((s.shape, t.shape), ((2,), (2,)))
      return 1 / (t - s)[:, None] * jnp.stack([s, t], 1)

    x = flow_map.sample(
      velocity, jnp.zeros((2, 2)), flow_map.jumps([0, 0.25, 1])
    )
    np.testing.assert_allclose(x, [[0.25, 1.25]] * 2, rtol=1e-6)

  def test_traced_times(self):
    run = jax.jit(
      lambda x, times: flow_map.sample(exact, x, flow_map.jumps(times))
    )
    x1 = run(jnp.ones((3, 2)), jnp.array([0, 0.3, 1.0]))
    np.testing.assert_allclose(x1, MEAN + STD / SIGMA, rtol=1e-5)

  def test_state_is_float32(self):
    x0 = jnp.ones((3, 2), jnp.bfloat16)
    half = lambda s, t, x: exact(s, t, x).astype(jnp.bfloat16)
    x1 = flow_map.sample(half, x0, flow_map.jumps([0, 1]))
    self.assertEqual(x1.dtype, jnp.float32)

  def test_errors(self):
    for bad in ([0.0], [[0.0, 1.0]], 1.0):
      with self.assertRaisesRegex(ValueError, r"must be \[N \+ 1\]"):
        flow_map.jumps(np.asarray(bad))


class RenoisingTest(parameterized.TestCase):
  def test_rows(self):
    # gamma = 1: to the data and back; on the straight path keep = t
    times = np.array([0, 0.25, 0.5, 1])
    run = flow_map.renoising(times, PATH, 1.0)
    np.testing.assert_array_equal(run.start, times[:-1])
    np.testing.assert_array_equal(run.end, 1)
    np.testing.assert_allclose(run.keep, times[1:])
    np.testing.assert_allclose(run.noise, SIGMA * (1 - times[1:]))
    none = flow_map.renoising(times, PATH, 0.0)
    jax.tree.map(np.testing.assert_array_equal, none, flow_map.jumps(times))

  @parameterized.parameters(0.3, 0.9)
  def test_law_of_the_next_node(self, gamma):
    # x_r of law N(r m, (1-r)^2 sigma^2 + r^2 std^2) becomes that of the node
    times = np.array([0, 0.25, 0.5, 1])
    run = flow_map.renoising(times, PATH, gamma)
    r, node = run.end, times[1:]
    variance = lambda t: (1 - t) ** 2 * SIGMA**2 + t**2 * STD**2
    np.testing.assert_allclose(run.keep * r, node)  # the mean
    np.testing.assert_allclose(
      run.keep**2 * variance(r) + run.noise**2, variance(node)
    )
    noise = lambda t: (1 - t) / t  # jump to sqrt(1 - gamma^2) of the noise
    np.testing.assert_allclose(noise(r), np.sqrt(1 - gamma**2) * noise(node))
    self.assertEqual((run.end[-1], run.noise[-1]), (1, 0))

  @parameterized.parameters(0.5, 1.0)
  def test_distribution(self, gamma):
    num = 20_000
    key, noise = jax.random.split(jax.random.key(3))
    x0 = SIGMA * jax.random.normal(noise, (num, 1))
    run = flow_map.renoising([0, 0.3, 0.6, 1], PATH, gamma)
    x1 = jax.jit(functools.partial(flow_map.sample, exact))(x0, run, key)
    # Kolmogorov-Smirnov, fixed key; false alarms once in 1000 keys
    test = stats.kstest(np.asarray(x1[:, 0]), stats.norm(MEAN, STD).cdf)
    self.assertGreater(test.pvalue, 1e-3)
    # of the variance of a node the share (gamma sigma)^2 is fresh
    node = np.array([0.3, 0.6])
    fresh = (gamma * (1 - node) * SIGMA) ** 2
    kept = np.sqrt(1 - fresh / ((1 - node) ** 2 * SIGMA**2 + node**2 * STD**2))
    correlation = np.corrcoef(x0[:, 0], x1[:, 0])[0, 1]
    # standard error 1 / sqrt(num) = .007; five of them
    np.testing.assert_allclose(correlation, kept.prod(), atol=0.035)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, r"gamma=1\.5"):
      flow_map.renoising([0, 1], PATH, 1.5)
    with self.assertRaisesRegex(ValueError, "must rise"):
      flow_map.renoising([0, 0.5, 0.4, 1], PATH)
    with self.assertRaisesRegex(ValueError, "only the first time"):
      flow_map.renoising([0, 0, 1], PATH)
    with self.assertRaisesRegex(ValueError, "80.0"):
      flow_map.renoising([0, 1], schedules.edm())
    run = flow_map.renoising([0, 0.5, 1], PATH)
    with self.assertRaisesRegex(ValueError, "pass key="):
      flow_map.sample(exact, jnp.ones((2, 1)), run)
    traced = jax.jit(functools.partial(flow_map.sample, exact))
    self.assertTrue(np.isnan(traced(jnp.ones((2, 1)), run)).all())


class LikelihoodTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.x0 = SIGMA * jax.random.normal(jax.random.key(0), (5, 2))
    self.noise = lambda x: jnp.sum(
      jax.scipy.stats.norm.logpdf(x, 0.0, SIGMA), -1
    )

  @parameterized.parameters(1, 3)
  def test_push(self, num):
    times = np.linspace(0, 1, num + 1)
    with jax.enable_x64(True):
      x0 = self.x0.astype(jnp.float64)
      x1, log = flow_map.push_log_density(exact, x0, self.noise(x0), times)
    wanted = stats.norm.logpdf(x1, MEAN, STD).sum(-1)
    np.testing.assert_allclose(log, wanted, rtol=1e-10)

  def test_one_step_map_at_data(self):
    # any invertible map: x + s sinh, whose inverse has no formula, of data of
    # shape [B, 2, 1]; push and pull agree, and the determinant is 1-D
    velocity = lambda s, t, x: (
      0.3 * jnp.sinh(x) + 0.2 * x[:, ::-1] + 0 * s[:, None, None]
    )
    with jax.enable_x64(True):
      x0 = self.x0.astype(jnp.float64)[..., None]
      log0 = jnp.sum(jax.scipy.stats.norm.logpdf(x0, 0.0, SIGMA), (1, 2))
      x1, pushed = flow_map.push_log_density(velocity, x0, log0, [0, 1])
      c = 1 + 0.3 * jnp.cosh(x0[..., 0])
      wanted = log0 - jnp.log(c[:, 0] * c[:, 1] - 0.04)
      log, back, gap = flow_map.map_log_density(
        velocity,
        x1,
        lambda x: jnp.sum(jax.scipy.stats.norm.logpdf(x, 0.0, SIGMA), (1, 2)),
      )
    np.testing.assert_allclose(pushed, wanted, rtol=1e-12)
    np.testing.assert_allclose(back, x0, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(log, wanted, rtol=1e-9)
    np.testing.assert_allclose(gap, 0, atol=1e-12)

  def test_flow(self):
    with jax.enable_x64(True):
      x1 = self.x0.astype(jnp.float64) + MEAN
      run = jax.jit(
        lambda x: flow_map.flow_log_density(
          exact, x, self.noise, np.linspace(0, 1, 101)
        )
      )
      log = run(x1)
    wanted = stats.norm.logpdf(x1, MEAN, STD).sum(-1)
    np.testing.assert_allclose(log, wanted, rtol=1e-6)

  def test_flow_and_map_agree(self):
    # a flow that is not diagonal: its map, by fine steps, has the same density
    drift = lambda t, x: bent(t, t, x)
    with jax.enable_x64(True):
      x1 = self.x0.astype(jnp.float64)
      times = np.linspace(0, 1, 41)
      log = flow_map.flow_log_density(bent, x1, self.noise, times)
      back = lambda x: flow_map.integrate(drift, x[None], times[::-1])[0]
      x0 = jax.vmap(back)(x1)
      jacobian = jax.vmap(jax.jacfwd(back))(x1)
      wanted = self.noise(x0) + jnp.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(log, wanted, rtol=1e-6)


class IntegrateTest(absltest.TestCase):
  def test_order_four(self):
    x0 = np.array([[0.3, 0.4]])
    errors = []
    with jax.enable_x64(True):
      drift = lambda t, x: -x * t[:, None] + jnp.cos(t)[:, None]
      run = lambda n: flow_map.integrate(
        drift, jnp.asarray(x0), np.linspace(0, 1, n + 1)
      )
      fine = run(1000)
      errors = [np.abs(run(n) - fine).max() for n in (8, 16)]
      # x(1) = e^(-1/2) (x0 + int_0^1 e^(t^2/2) cos t dt)
      t, w = np.polynomial.legendre.leggauss(40)
      t = (t + 1) / 2
      integral = np.sum(w / 2 * np.exp(t**2 / 2) * np.cos(t))
    np.testing.assert_allclose(fine, np.exp(-0.5) * (x0 + integral), rtol=1e-12)
    self.assertBetween(np.log2(errors[0] / errors[1]), 3.8, 4.4)


if __name__ == "__main__":
  absltest.main()
