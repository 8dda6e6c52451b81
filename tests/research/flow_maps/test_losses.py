"""Losses against an independent transcription and closed forms."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research import flow_maps

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "flow_maps"
FILES = ("losses_linear_a", "losses_trig")
KINDS = {"linear": flow_maps.linear(), "trig": flow_maps.trigonometric()}


def student(theta, s, t, x):
  """The imperfect student of the golden file, 12 parameters."""
  s, t = s[:, None], t[:, None]
  a, b1, b2, c = jnp.split(theta, (4, 6, 8))
  linear = x @ a.reshape(2, 2).T + s * b1[None] + t * b2[None]
  return linear + (t - s) * (jnp.tanh(x) @ c.reshape(2, 2).T)


def load(name) -> Any:
  return {
    k: v if k == "kind" else jnp.asarray(v)
    for k, v in np.load(GOLDEN / f"{name}.npz").items()
  }


def arguments(golden) -> Any:
  I = KINDS[str(golden["kind"])]
  return *(golden[k] for k in ("x0", "x1", "s", "t")), I


def of_golden(loss, **options):
  """f(v, golden) -> [B], for a loss of (v, x0, x1, s, t, I, **options)."""
  return lambda v, golden: loss(v, *arguments(golden), **options)


def progressive(stop_gradient):
  return lambda v, golden: flow_maps.progressive_loss(
    v, *arguments(golden), u=golden["u"], stop_gradient=stop_gradient
  )


def diagonal(v, golden):
  x0, x1, _, t, I = arguments(golden)
  return flow_maps.flow_matching_loss(v, x0, x1, t, I)


LOSSES = {
  "diag": diagonal,
  "lsd_sg": of_golden(flow_maps.lagrangian_loss),
  "lsd_none": of_golden(flow_maps.lagrangian_loss, stop_gradient="none"),
  "esd_full": of_golden(flow_maps.eulerian_loss),
  "esd_convex": of_golden(flow_maps.eulerian_loss, stop_gradient="convex"),
  "esd_none": of_golden(flow_maps.eulerian_loss, stop_gradient="none"),
  "meanflow_data": of_golden(flow_maps.mean_flow_loss),
  "meanflow_model": of_golden(flow_maps.mean_flow_loss, tangent="model"),
  "imf": of_golden(flow_maps.improved_mean_flow_loss),
  "psd_u_sg": progressive("full"),
  "psd_u_none": progressive("none"),
  "psd_mid_sg": of_golden(flow_maps.progressive_loss),
  "psd_mid_none": of_golden(flow_maps.progressive_loss, stop_gradient="none"),
}
# the same with a teacher that is the student, parameters frozen
WITH_TEACHER = {
  "lsd_sg": (flow_maps.lagrangian_loss, {}),
  "lsd_sg_b_only": (flow_maps.lagrangian_loss, {"stop_gradient": "none"}),
  "esd_full": (flow_maps.eulerian_loss, {}),
  "esd_convex": (flow_maps.eulerian_loss, {"stop_gradient": "none"}),
  "meanflow_model": (flow_maps.mean_flow_loss, {"tangent": "model"}),
  "psd_mid_sg": (flow_maps.progressive_loss, {"stop_gradient": "none"}),
}


def value_and_grad(loss, theta):
  """The losses [B] and the gradient of their mean in theta."""

  def mean(theta):
    each = loss(theta)
    return each.mean(), each

  grad, each = jax.jit(jax.grad(mean, has_aux=True))(theta)
  return each, grad


class GoldenTest(parameterized.TestCase):
  @parameterized.product(name=FILES, loss=tuple(LOSSES))
  def test_value_and_gradient(self, name, loss):
    with jax.enable_x64(True):
      golden = load(name)
      each, grad = value_and_grad(
        lambda theta: LOSSES[loss](functools.partial(student, theta), golden),
        golden["theta"],
      )
    self.assertEqual(each.shape, (16,))
    np.testing.assert_allclose(each, golden[f"loss_{loss}"], rtol=1e-8)
    np.testing.assert_allclose(
      grad, golden[f"grad_{loss}"], rtol=1e-8, atol=1e-12
    )

  @parameterized.product(name=FILES, loss=tuple(WITH_TEACHER))
  def test_frozen_teacher(self, name, loss):
    function, options = WITH_TEACHER[loss]
    with jax.enable_x64(True):
      golden = load(name)
      frozen = functools.partial(student, golden["theta"])
      each, grad = value_and_grad(
        lambda theta: function(
          functools.partial(student, theta),
          *arguments(golden),
          teacher=frozen,
          **options,
        ),
        golden["theta"],
      )
    np.testing.assert_allclose(each, golden[f"loss_{loss}"], rtol=1e-8)
    np.testing.assert_allclose(
      grad, golden[f"grad_{loss}"], rtol=1e-8, atol=1e-12
    )

  @parameterized.parameters("lsd_sg", "esd_full", "meanflow_data", "psd_u_sg")
  def test_float32(self, loss):
    golden = load("losses_trig")
    each, grad = value_and_grad(
      lambda theta: LOSSES[loss](functools.partial(student, theta), golden),
      golden["theta"],
    )
    self.assertEqual(each.dtype, jnp.float32)
    wanted: Any = {"rtol": 2e-4, "atol": 2e-5}  # of the golden file
    np.testing.assert_allclose(each, golden[f"loss_{loss}"], **wanted)
    np.testing.assert_allclose(grad, golden[f"grad_{loss}"], **wanted)

  @parameterized.parameters(*FILES)
  def test_frozen_lagrangian(self, name):
    # the value of the Lagrangian loss; its gradient is R dv/dtheta, which is
    # linear in theta here: finite differences of |v - frozen target|^2
    with jax.enable_x64(True):
      golden = load(name)
      loss = lambda theta: flow_maps.frozen_lagrangian_loss(
        functools.partial(student, theta), *arguments(golden)
      )
      each, grad = value_and_grad(loss, golden["theta"])
      x0, x1, s, t, I = arguments(golden)
      x, _ = I(s, x0, x1)
      theta = golden["theta"]
      v = student(theta, s, t, x)
      c = theta[8:].reshape(2, 2)
      h = (t - s)[:, None]
      slope = theta[6:8][None] + jnp.tanh(x) @ c.T  # d_t v
      target = student(theta, t, t, x + h * v) - h * slope
      wanted = jax.grad(
        lambda theta: jnp.sum((student(theta, s, t, x) - target) ** 2) / 16
      )(theta)
    np.testing.assert_allclose(each, golden["loss_lsd_sg"], rtol=1e-8)
    np.testing.assert_allclose(grad, wanted, rtol=1e-8, atol=1e-12)


class DiscreteLagrangianTest(parameterized.TestCase):
  @parameterized.product(
    name=FILES, rule=(("convex", "lsd_sg"), ("none", "lsd_none"))
  )
  def test_tends_to_the_lagrangian(self, name, rule):
    stop_gradient, golden_name = rule
    with jax.enable_x64(True):
      golden = load(name)
      errors = []
      for delta in (1e-3, 5e-4):
        each, grad = value_and_grad(
          lambda theta, delta=delta: flow_maps.discrete_lagrangian_loss(
            functools.partial(student, theta),
            *arguments(golden),
            delta=delta,
            stop_gradient=stop_gradient,
          ),
          golden["theta"],
        )
        errors.append(
          [
            float(jnp.abs(each - golden[f"loss_{golden_name}"]).max()),
            float(jnp.abs(grad - golden[f"grad_{golden_name}"]).max()),
          ]
        )
    (value, grad), (half_value, half_grad) = errors
    self.assertLess(value, 0.02)
    np.testing.assert_allclose(value / half_value, 2, rtol=0.02)  # order 1
    np.testing.assert_allclose(grad / half_grad, 2, rtol=0.02)

  def test_frozen_target(self):
    # under "full" the gradient is that of |h v_{s,t} - const|^2 / delta^2
    with jax.enable_x64(True):
      golden = load("losses_trig")
      delta = 0.05
      each, grad = value_and_grad(
        lambda theta: flow_maps.discrete_lagrangian_loss(
          functools.partial(student, theta), *arguments(golden), delta=delta
        ),
        golden["theta"],
      )
      x0, x1, s, t, I = arguments(golden)
      x, _ = I(s, x0, x1)
      theta, u = golden["theta"], t - delta
      move = lambda theta, s, t, x: (
        x + (t - s)[:, None] * student(theta, s, t, x)
      )
      y = move(theta, s, u, x)
      goal = y + delta * student(theta, u, u, y)

      def transcribed(theta):
        return jnp.sum(((move(theta, s, t, x) - goal) / delta) ** 2, 1)

      value = transcribed(theta)
      wanted = jax.grad(lambda theta: transcribed(theta).mean())(theta)
    np.testing.assert_allclose(each, value, rtol=1e-8)
    np.testing.assert_allclose(grad, wanted, rtol=1e-8)


class ShortcutTest(parameterized.TestCase):
  def test_is_progressive_without_clipping(self):
    with jax.enable_x64(True):
      golden = load("losses_linear_a")
      frozen = functools.partial(student, golden["theta"])
      each, grad = value_and_grad(
        lambda theta: flow_maps.shortcut_loss(
          functools.partial(student, theta),
          *arguments(golden),
          teacher=frozen,
          clip=None,
        ),
        golden["theta"],
      )
    np.testing.assert_allclose(each, golden["loss_psd_mid_sg"], rtol=1e-8)
    np.testing.assert_allclose(
      grad, golden["grad_psd_mid_sg"], rtol=1e-8, atol=1e-12
    )

  def test_clip(self):
    # teacher 10 x: from x = 1, s = 0, t = 1 the middle 6 becomes 4, the second
    # velocity 40, the target (10 + 40) / 2 = 25 becomes 4; the student is 1
    x, zero = jnp.ones((1, 1)), jnp.zeros(1)
    loss = flow_maps.shortcut_loss(
      lambda s, t, x: x,
      x,
      x,
      zero,
      zero + 1,
      flow_maps.linear(),
      teacher=lambda s, t, x: 10 * x,
    )
    np.testing.assert_array_equal(loss, [9.0])


class FlowMatchingTest(parameterized.TestCase):
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


def all_losses(v, x0, x1, s, t, I):
  """Every loss of a pair of times, by name."""
  teach = {"teacher": v}
  return {
    "lagrangian": flow_maps.lagrangian_loss(v, x0, x1, s, t, I),
    "frozen": flow_maps.frozen_lagrangian_loss(v, x0, x1, s, t, I),
    "discrete": flow_maps.discrete_lagrangian_loss(v, x0, x1, s, t, I, 0.1),
    "eulerian": flow_maps.eulerian_loss(v, x0, x1, s, t, I),
    "progressive": flow_maps.progressive_loss(v, x0, x1, s, t, I),
    "shortcut": flow_maps.shortcut_loss(v, x0, x1, s, t, I, **teach),
    "mean_flow": flow_maps.mean_flow_loss(v, x0, x1, s, t, I),
    "improved": flow_maps.improved_mean_flow_loss(v, x0, x1, s, t, I),
    "align": flow_maps.align_your_flow_loss(v, x0, x1, s, t, I, **teach),
    "consistency": flow_maps.discrete_consistency_loss(v, x0, x1, s, t, I),
  }


class TypesTest(parameterized.TestCase):
  def test_float32_under_bfloat16(self):
    x = jnp.ones((3, 4, 2), jnp.bfloat16)
    half = jnp.full(3, 0.5, jnp.bfloat16)
    network = lambda s, t, x: (0 * x).astype(jnp.bfloat16)
    I = flow_maps.linear()
    loss = flow_maps.flow_matching_loss(network, -x, x, half, I)
    self.assertEqual(loss.dtype, jnp.float32)
    np.testing.assert_array_equal(loss, np.full(3, 8 * 4.0))  # summed
    for name, loss in all_losses(network, -x, x, half, half + 0.25, I).items():
      self.assertEqual((loss.dtype, loss.shape), (jnp.float32, (3,)), name)

  def test_strict_promotion(self):
    x = jnp.ones((3, 2))
    half = jnp.full(3, 0.5)
    network = lambda s, t, x: x * (t - s)[:, None]
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
      losses = all_losses(network, -x, x, half, half, flow_maps.linear())
    for name, loss in losses.items():
      self.assertTrue(np.isfinite(loss).all(), name)

  def test_shapes(self):
    x, t = jnp.ones((3, 2)), jnp.ones(3)
    I, network = flow_maps.linear(), lambda s, t, x: x
    for bad in ((x, x[:2], t), (x, x, t[:2]), (x, x, t[0])):
      with self.assertRaisesRegex(ValueError, "must agree"):
        flow_maps.flow_matching_loss(network, *bad, I)
      with self.assertRaisesRegex(ValueError, "must agree"):
        flow_maps.lagrangian_loss(network, *bad, t, I)
    for loss in (
      flow_maps.lagrangian_loss,
      flow_maps.eulerian_loss,
      flow_maps.progressive_loss,
      flow_maps.mean_flow_loss,
    ):
      with self.assertRaisesRegex(ValueError, r"t \(2,\)"):
        loss(network, x, x, t, t[:2], I)
    with self.assertRaisesRegex(ValueError, r"u \(1,\)"):
      flow_maps.progressive_loss(network, x, x, t, t, I, u=t[:1])

  def test_unknown_stop_gradient(self):
    x, t = jnp.ones((3, 2)), jnp.ones(3)
    rest = (lambda s, t, x: x, x, x, t, t, flow_maps.linear())
    narrow = lambda s, t, x: x[:, :1]  # would broadcast without a word
    for loss in (
      flow_maps.lagrangian_loss,
      flow_maps.eulerian_loss,
      flow_maps.progressive_loss,
      flow_maps.mean_flow_loss,
    ):
      with self.assertRaisesRegex(ValueError, r"is \(3, 1\): must be \(3, 2\)"):
        ones = jnp.ones((3, 2))
        loss(
          narrow, ones, ones, 0.2 * ones[:, 0], ones[:, 0], flow_maps.linear()
        )
    with self.assertRaisesRegex(ValueError, r"is \(3, 1\): must be \(3, 2\)"):
      flow_maps.flow_matching_loss(
        narrow, ones, ones, ones[:, 0], flow_maps.linear()
      )
    with self.assertRaisesRegex(ValueError, "'convex': full or none"):
      flow_maps.lagrangian_loss(*rest, stop_gradient="convex")
    with self.assertRaisesRegex(ValueError, "'all': full or convex or none"):
      flow_maps.eulerian_loss(*rest, stop_gradient="all")
    with self.assertRaisesRegex(ValueError, "'convex': full or none"):
      flow_maps.progressive_loss(*rest, stop_gradient="convex")


def sharded_and_single():
  """Mean losses and gradients on 8 devices and on one, as nested lists."""
  sharding = jax.sharding.NamedSharding(
    jax.sharding.Mesh(np.array(jax.devices()), ("data",)),
    jax.sharding.PartitionSpec("data"),
  )
  golden = load("losses_trig")
  x0, x1, s, t, I = arguments(golden)

  def step(theta, x0, x1, s, t):
    def total(theta):
      v = functools.partial(student, theta)
      losses = all_losses(v, x0[8:], x1[8:], s[8:], t[8:], I)
      first = flow_maps.flow_matching_loss(v, x0[:8], x1[:8], t[:8], I)
      return sum(loss.sum() for loss in losses.values()) + first.sum()

    return jax.value_and_grad(total)(theta)

  out = []
  for place in (lambda a: jax.device_put(a, sharding), lambda a: a):
    args = (place(a) for a in (x0, x1, s, t))
    value, grad = jax.jit(step)(golden["theta"], *args)
    out.append([float(value), *np.asarray(grad, float).tolist()])
  return out


def test_sharded_batch(on_devices):
  # the split into diagonal and the rest is one of the global batch
  sharded, single = on_devices(8, __file__, "sharded_and_single()")
  # float32 sums in another order: 1e-6 of the largest term
  scale = np.abs(single).max()
  np.testing.assert_allclose(sharded, single, rtol=0, atol=2e-6 * scale)


if __name__ == "__main__":
  absltest.main()
