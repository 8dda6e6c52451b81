"""Guidance folded into the velocity."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from giantsteps.research import flow_maps
from giantsteps.research.flow_maps import guidance


class FoldTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.d, self.c, self.u = jax.random.normal(jax.random.key(0), (3, 4, 2))
    self.s = jnp.array([0.0, 0.2, 0.6, 1.0])

  def test_scale(self):
    # where d is the conditional velocity: null + omega / (1 - kappa) (..) is
    # the fixed point of c <- omega d + (1 - omega - kappa) u + kappa c
    omega, kappa = 0.8, 0.6
    scale = omega / (1 - kappa)
    fixed = self.u + scale * (self.d - self.u)
    got = guidance.fold(self.d, fixed, self.u, self.s, omega=omega, kappa=kappa)
    np.testing.assert_allclose(got, fixed, rtol=1e-5, atol=1e-6)

  def test_interval_and_dropped_labels(self):
    got = guidance.fold(
      self.d,
      self.c,
      self.u,
      self.s,
      interval=(0.2, 0.6),
      dropped=jnp.array([False, True, False, False]),
    )
    np.testing.assert_array_equal(
      got[np.array([0, 1, 3])], self.d[np.array([0, 1, 3])]
    )
    wanted = self.d - 0.5 * self.u + 0.5 * self.c
    np.testing.assert_allclose(got[2], wanted[2], rtol=1e-6)
    with self.assertRaisesRegex(ValueError, "low, high"):
      guidance.fold(self.d, self.c, self.u, self.s, interval=(1.0, 0.0))

  def test_no_gradient(self):
    total = lambda c: guidance.fold(self.d, c, self.u, self.s).sum()
    np.testing.assert_array_equal(jax.grad(total)(self.c), 0)


class TeacherTest(absltest.TestCase):
  def test_classifier_free(self):
    seen = []

    def model(s, t, x, label):
      seen.append(x.shape)
      return x * label[:, None] + (s + t)[:, None]

    label = jnp.array([1.0, 2.0, 3.0])
    teacher = guidance.velocity(
      model, label, jnp.zeros(()), 3.0, interval=(0.0, 0.5)
    )
    x, t = jnp.ones((3, 2)), jnp.array([0.1, 0.4, 0.9])
    got = teacher(jnp.full(3, jnp.nan), t, x)  # the first time is not read
    wanted = jnp.array([3.0, 6.0, 3.0]) + 2 * t  # scale 1 outside
    np.testing.assert_allclose(got, jnp.stack([wanted] * 2, 1), rtol=1e-6)
    self.assertEqual(seen, [(6, 2)])  # one doubled batch

  def test_autoguided(self):
    good = lambda s, t, x: 2 * x + (s - t)[:, None]
    bad = lambda s, t, x: x
    x, t = jnp.ones((3, 2)), jnp.array([0.1, 0.4, 0.9])
    got = guidance.autoguided(good, bad, 2.5)(0 * t, t, x)
    np.testing.assert_allclose(got, 3.5 * x)
    each = guidance.autoguided(good, bad, jnp.array([1.0, 0.0, 2.0]))
    np.testing.assert_allclose(each(t, t, x)[:, 0], [2, 1, 3])

  def test_as_a_teacher(self):
    # the student that is the guided field on the diagonal has no diagonal
    # term left: at s = t the loss is |v - guided|^2
    teacher = guidance.autoguided(lambda s, t, x: 2 * x, lambda s, t, x: x, 3.0)
    x, t = jnp.ones((3, 2)), jnp.array([0.1, 0.4, 0.9])
    loss = flow_maps.lagrangian_loss(
      lambda s, t, x: 4 * x, x, x, t, t, flow_maps.linear(), teacher=teacher
    )
    np.testing.assert_array_equal(loss, 0)
    loss = flow_maps.lagrangian_loss(
      lambda s, t, x: 5 * x, x, x, t, t, flow_maps.linear(), teacher=teacher
    )
    np.testing.assert_array_equal(loss, 2)


if __name__ == "__main__":
  absltest.main()
