"""Losses against an independent transcription and closed forms."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research import flow_maps

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "flow_maps"
KINDS = {"linear": flow_maps.linear(), "trig": flow_maps.trigonometric()}


def student(theta, s, t, x):
  """The imperfect student of the golden file, 12 parameters."""
  s, t = s[:, None], t[:, None]
  a, b1, b2, c = jnp.split(theta, (4, 6, 8))
  linear = x @ a.reshape(2, 2).T + s * b1[None] + t * b2[None]
  return linear + (t - s) * (jnp.tanh(x) @ c.reshape(2, 2).T)


class FlowMatchingTest(parameterized.TestCase):
  @parameterized.parameters("losses_linear_a", "losses_trig")
  def test_golden(self, name):
    with jax.enable_x64(True):
      golden = {
        k: v if k == "kind" else jnp.asarray(v)
        for k, v in np.load(GOLDEN / f"{name}.npz").items()
      }

      def loss(theta):
        each = flow_maps.flow_matching_loss(
          functools.partial(student, theta),
          golden["x0"],
          golden["x1"],
          golden["t"],
          KINDS[str(golden["kind"])],
        )
        return each.mean(), each

      grad, each = jax.jit(jax.grad(loss, has_aux=True))(golden["theta"])
    self.assertEqual(each.shape, (16,))
    np.testing.assert_allclose(each, golden["loss_diag"], rtol=1e-8)
    np.testing.assert_allclose(grad, golden["grad_diag"], rtol=1e-8)

  def test_minimum_is_the_conditional_velocity(self):
    # 1-D, x0 ~ N(0, 1), x1 ~ N(0, r^2), linear: the optimal velocity is
    # k x with k = (t r^2 - (1 - t)) / ((1 - t)^2 + t^2 r^2), and the loss
    # there var(x1 - x0) - k^2 var(x_t) = r^2 / ((1 - t)^2 + t^2 r^2).
    r, t, num = 0.5, 0.3, 200_000
    x0, x1 = jax.random.normal(jax.random.key(0), (2, num, 1))
    variance = (1 - t) ** 2 + t**2 * r**2
    best = (t * r**2 - (1 - t)) / variance

    def loss(k):
      return flow_maps.flow_matching_loss(
        lambda s, t, x: k * x,
        x0,
        r * x1,
        jnp.full(num, t),
        flow_maps.linear(),
      ).mean()

    value, slope = jax.jit(jax.value_and_grad(loss))(jnp.float32(best))
    # a mean of squares of Gaussians: relative standard error sqrt(2 / num)
    # = .003; five of them. The slope's terms are of order 1, error .005.
    np.testing.assert_allclose(value, r**2 / variance, rtol=0.016)
    np.testing.assert_allclose(slope, 0, atol=0.02)

  def test_float32_under_bfloat16_data(self):
    x = jnp.ones((3, 4, 2), jnp.bfloat16)
    loss = flow_maps.flow_matching_loss(
      lambda s, t, x: (0 * x).astype(jnp.bfloat16),
      -x,
      x,
      jnp.full(3, 0.5, jnp.bfloat16),
      flow_maps.linear(),
    )
    self.assertEqual(loss.dtype, jnp.float32)
    np.testing.assert_array_equal(loss, np.full(3, 8 * 4.0))  # summed

  def test_shapes(self):
    x, t = jnp.ones((3, 2)), jnp.ones(3)
    for arguments in ((x, x[:2], t), (x, x, t[:2]), (x, x, t[0])):
      with self.assertRaisesRegex(ValueError, "must agree"):
        flow_maps.flow_matching_loss(
          lambda s, t, x: x, *arguments, flow_maps.linear()
        )


if __name__ == "__main__":
  absltest.main()
