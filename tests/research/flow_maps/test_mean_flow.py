"""Frozen tangents: MeanFlow, its improvement, Align Your Flow."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research import flow_maps
from giantsteps.research.flow_maps import mean_flow

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "flow_maps"


def student(theta, s, t, x):
  """The student of the golden losses."""
  s, t = s[:, None], t[:, None]
  a, b1, b2, c = jnp.split(theta, (4, 6, 8))
  linear = x @ a.reshape(2, 2).T + s * b1[None] + t * b2[None]
  return linear + (t - s) * (jnp.tanh(x) @ c.reshape(2, 2).T)


def load() -> Any:
  golden = np.load(GOLDEN / "losses_linear_a.npz")
  return {k: jnp.asarray(golden[k]) for k in golden if k != "kind"}


class MeanFlowTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    with jax.enable_x64(True):
      self.golden = load()
      self.theta = self.golden["theta"]
      self.v = functools.partial(student, self.theta)
      self.pair: Any = tuple(self.golden[k] for k in ("x0", "x1", "s", "t"))
      self.I = flow_maps.linear()

  def test_tangent_as_an_array(self):
    x0, x1, _, _ = self.pair
    with jax.enable_x64(True):
      data = flow_maps.mean_flow_loss(
        self.v, *self.pair, I=self.I, tangent=x1 - x0
      )
    np.testing.assert_allclose(
      data, self.golden["loss_meanflow_data"], rtol=1e-8
    )

  def test_diagonal_is_flow_matching(self):
    x0, x1, s, _ = (v.astype(jnp.float32) for v in self.pair)
    v = functools.partial(student, self.theta.astype(jnp.float32))
    wanted = flow_maps.flow_matching_loss(v, x0, x1, s, self.I)
    for loss in (
      flow_maps.mean_flow_loss,
      flow_maps.improved_mean_flow_loss,
    ):
      np.testing.assert_array_equal(loss(v, x0, x1, s, s, self.I), wanted)

  def test_head_predicts_the_tangent(self):
    # the velocity itself as head changes nothing; another one does
    with jax.enable_x64(True):
      run = functools.partial(
        flow_maps.improved_mean_flow_loss, self.v, *self.pair, I=self.I
      )
      same = run(head=self.v)
      other = run(head=lambda s, t, x: 0 * x)
    np.testing.assert_allclose(same, self.golden["loss_imf"], rtol=1e-8)
    self.assertGreater(float(jnp.abs(other - same).max()), 1e-3)

  def test_errors(self):
    run = functools.partial(
      flow_maps.mean_flow_loss, self.v, *self.pair, I=self.I
    )
    with self.assertRaisesRegex(ValueError, "unknown tangent 'dat'"):
      run(tangent="dat")
    with self.assertRaisesRegex(ValueError, r"tangent \(2,\)"):
      run(tangent=jnp.ones(2))
    with self.assertRaisesRegex(ValueError, "unknown target 'model'"):
      flow_maps.improved_mean_flow_loss(
        self.v, *self.pair, I=self.I, target="model"
      )


class AlignYourFlowTest(parameterized.TestCase):
  def run_loss(self, **options):
    golden = load()
    frozen = functools.partial(student, golden["theta"])

    def mean(theta):
      each = flow_maps.align_your_flow_loss(
        functools.partial(student, theta),
        *(golden[k] for k in ("x0", "x1", "s", "t")),
        I=flow_maps.linear(),
        teacher=frozen,
        **options,
      )
      return each.mean(), each

    grad, each = jax.jit(jax.grad(mean, has_aux=True))(golden["theta"])
    return golden, each, grad

  def test_value(self):
    # |g|^2 is the Eulerian residual squared where the teacher is the student
    with jax.enable_x64(True):
      golden, each, _ = self.run_loss(constant=0.3)
    norm = np.sqrt(golden["loss_esd_full"])
    np.testing.assert_allclose(each, (norm / (norm + 0.3)) ** 2, rtol=1e-8)

  def test_gradient_without_normalisation(self):
    # g / (|g| + c) -> g / c for large c: MeanFlow's gradient over c
    with jax.enable_x64(True):
      golden, _, grad = self.run_loss(constant=1e9)
    np.testing.assert_allclose(
      1e9 * grad, golden["grad_meanflow_model"], rtol=1e-7, atol=1e-9
    )

  def test_warmup_leaves_the_velocity(self):
    # r = 0: g = b_s - v_{s,t}
    with jax.enable_x64(True):
      golden, each, _ = self.run_loss(constant=0.1, warmup=0.0)
      s, t = golden["s"][:, None], golden["t"][:, None]
      x = (1 - s) * golden["x0"] + s * golden["x1"]
      v = functools.partial(student, golden["theta"])
      gap = v(s[:, 0], s[:, 0], x) - v(s[:, 0], t[:, 0], x)
      norm = np.linalg.norm(gap, axis=1)
    np.testing.assert_allclose(each, (norm / (norm + 0.1)) ** 2, rtol=1e-9)

  def test_normalized(self):
    g = jnp.array([[[3.0, 0], [0, 4]], [[0, 0], [0, 0]]])
    got = mean_flow.normalized(g, 0.1)
    np.testing.assert_allclose(got[0], g[0] / 5.1, rtol=1e-6)
    np.testing.assert_array_equal(got[1], 0)


if __name__ == "__main__":
  absltest.main()
