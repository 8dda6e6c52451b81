"""Consistency losses: limits, exact solutions, TrigFlow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research import flow_maps
from giantsteps.research.flow_maps import clocks, closed_forms

KINDS = {"linear": flow_maps.linear(), "trig": flow_maps.trigonometric()}
STD = 0.5  # of noise and data
ANGLES = np.array([0.1, 0.7, 1.2, 1.5])


def exact(I):
  return closed_forms.gaussian(
    I, [0.0], [[STD**2]], [0.3], [[0.2**2]]
  )  # data of another width and mean than the noise


def network(theta, s, t, x):
  s, t = s[:, None], t[:, None]
  return jnp.tanh(x * theta[0] + s * theta[1] + t * theta[2]) + theta[3] * s


class ConsistencyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    key = jax.random.key(0)
    self.x0, self.x1 = jax.random.normal(key, (2, 6, 1))
    self.s = jnp.linspace(0, 0.9, 6)
    self.theta = jnp.array([0.7, -0.4, 0.3, 0.2])

  @parameterized.parameters(*KINDS)
  def test_exact_map_solves_distillation(self, kind):
    I = KINDS[kind]
    flow = exact(I)
    teacher = lambda s, t, x: flow.velocity(s, x)
    pair = (self.x0, self.x1, self.s)
    loss = flow_maps.consistency_distillation_loss(
      flow.average_velocity, *pair, I, teacher=teacher
    )
    np.testing.assert_allclose(loss, 0, atol=1e-9)  # (3e-5)^2
    # a teacher that makes exact steps, and the Euler step's error in u - s
    u = self.s + 0.05
    step = functools.partial(
      flow_maps.discrete_consistency_loss, flow.average_velocity
    )
    loss = step(*pair, u, I, teacher=flow.average_velocity)
    np.testing.assert_allclose(loss, 0, atol=1e-9)
    loss = step(*pair, u, I, u + 0.01, teacher=flow.average_velocity)  # CTM
    np.testing.assert_allclose(loss, 0, atol=1e-9)
    errors = [
      step(*pair, self.s + d, I, teacher=teacher).max() for d in (0.04, 0.02)
    ]
    # |.|^2 of a second-order error; the largest row need not be the same
    np.testing.assert_allclose(jnp.log2(errors[0] / errors[1]), 4, atol=0.5)

  @parameterized.parameters(*KINDS)
  def test_training_is_the_limit_of_small_steps(self, kind):
    I, d = KINDS[kind], 1e-4
    with jax.enable_x64(True):
      theta, x0, x1, s = (
        jnp.asarray(v, jnp.float64)
        for v in (self.theta, self.x0, self.x1, self.s)
      )

      def continuous(theta):
        v = functools.partial(network, theta)
        return flow_maps.consistency_training_loss(v, x0, x1, s, I).sum()

      def discrete(theta):
        v = functools.partial(network, theta)
        loss = flow_maps.discrete_consistency_loss(v, x0, x1, s, s + d, I)
        return (loss / (d * (1 - s))).sum()

      wanted, got = (jax.grad(f)(theta) for f in (continuous, discrete))
    np.testing.assert_allclose(got, wanted, rtol=5e-3, atol=1e-3)

  def test_continuous_losses_are_those_at_time_one(self):
    v = functools.partial(network, self.theta)
    pair, I = (self.x0, self.x1, self.s), KINDS["trig"]
    at_one = (*pair, jnp.ones(6), I)
    np.testing.assert_array_equal(
      flow_maps.consistency_training_loss(v, *pair, I),
      flow_maps.mean_flow_loss(v, *at_one),
    )
    np.testing.assert_array_equal(
      flow_maps.consistency_distillation_loss(v, *pair, I, teacher=v),
      flow_maps.eulerian_loss(v, *at_one),
    )

  def test_target_is_frozen(self):
    v = functools.partial(network, self.theta)
    pair, I = (self.x0, self.x1, self.s, self.s + 0.05), KINDS["linear"]

    def loss(theta, **options):
      student = functools.partial(network, theta)
      return flow_maps.discrete_consistency_loss(
        student, *pair, I, **options
      ).sum()

    np.testing.assert_allclose(
      jax.grad(loss)(self.theta),
      jax.grad(functools.partial(loss, target=v))(self.theta),
      rtol=1e-6,
    )


class ScmTest(parameterized.TestCase):
  def exact_network(self, x, theta):
    """F of the exact consistency function: f = cos x - sin sigma_d F."""
    flow = exact(KINDS["trig"])
    x, cos, sin = STD * x, jnp.cos(theta)[:, None], jnp.sin(theta)[:, None]
    data = flow.flow_map(clocks.time_of_angle(theta), 1.0, x)
    return (cos * x - data) / (sin * STD)

  def teacher(self, x, theta):
    flow = exact(KINDS["trig"])
    v = lambda s, t, x: flow.velocity(t, x)
    return clocks.to_trig_flow(v, STD)(x, theta)

  def test_exact_consistency_function(self):
    with jax.enable_x64(True):
      x0, x1 = jax.random.normal(jax.random.key(1), (2, 4, 1), jnp.float64)
      loss = jax.jit(
        lambda angle: flow_maps.scm_loss(
          self.exact_network, x0, x1, angle, sigma_d=STD, teacher=self.teacher
        )
      )(jnp.asarray(ANGLES))
    np.testing.assert_allclose(loss, 0, atol=1e-18)

  @parameterized.parameters(True, False)
  def test_tangent_is_the_derivative_along_the_path(self, distill):
    # g = cos df/dangle by differences; |F - sg(F + g / (|g| + c))|^2
    network = lambda x, a: jnp.sin(3 * x) * jnp.cos(a)[:, None] + x**2
    with jax.enable_x64(True):
      x0, x1 = jax.random.normal(jax.random.key(1), (2, 4, 1), jnp.float64)
      angle = jnp.asarray(ANGLES)
      cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
      x, slope = cos * x1 + sin * x0, cos * x0 - sin * x1
      if distill:
        slope = STD * self.teacher(x / STD, angle)

      def f(x, angle):
        out = network(x / STD, angle)
        return jnp.cos(angle)[:, None] * x - jnp.sin(angle)[:, None] * STD * out

      d = 1e-5
      rate = f(x + d * slope, angle + d) - f(x - d * slope, angle - d)
      g = jnp.abs(cos * rate / (2 * d))[:, 0]
      loss = flow_maps.scm_loss(
        network,
        x0,
        x1,
        angle,
        sigma_d=STD,
        teacher=self.teacher if distill else None,
        constant=0.2,
      )
      wanted = (g / (g + 0.2)) ** 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-7)

  def test_warmup(self):
    # r = 0 leaves -cos^2 (sigma_d F - dx/dangle)
    x0, x1 = jnp.ones((1, 1)), jnp.zeros((1, 1))
    loss = flow_maps.scm_loss(
      lambda x, a: 0 * x,
      x0,
      x1,
      jnp.array([jnp.pi / 3]),
      sigma_d=1.0,
      warmup=0.0,
    )
    g = 0.5**3  # cos^2 cos
    np.testing.assert_allclose(loss, [(g / (g + 0.1)) ** 2], rtol=1e-5)

  def test_errors(self):
    x = jnp.ones((2, 1))
    with self.assertRaisesRegex(ValueError, "sigma_d=0"):
      flow_maps.scm_loss(lambda x, a: x, x, x, jnp.ones(2), sigma_d=0)
    with self.assertRaisesRegex(ValueError, "must agree"):
      flow_maps.scm_loss(lambda x, a: x, x, x[:1], jnp.ones(2), sigma_d=1)


if __name__ == "__main__":
  absltest.main()
