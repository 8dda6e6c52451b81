"""Schedules against golden curves, their ends and joints; recipes against
the tables of the paper."""

# pyright: reportArgumentType=false

import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research.large_batch import schedules

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "large_batch"

CURVES = {
  "linear": lambda n: schedules.linear(1.0, n),
  "wsd_w10_d20": lambda n: schedules.warmup_stable_decay(
    1.0, n, warmup=0.1, decay=0.2
  ),
  "lamb_poly": lambda n: schedules.polynomial_with_warmup(5e-3, n, warmup=0.2),
}
# all with peak 1, for what holds whatever the shape
KINDS = {
  "linear": CURVES["linear"],
  "polynomial": lambda n: schedules.polynomial_with_warmup(1.0, n, warmup=0.2),
  "continuous": lambda n: schedules.polynomial_with_warmup(
    1.0, n, warmup=0.2, power=2.0, continuous=True
  ),
  "stable": CURVES["wsd_w10_d20"],
  "sqrt": lambda n: schedules.warmup_stable_decay(1.0, n, shape="sqrt"),
}


class GoldenTest(parameterized.TestCase):
  @parameterized.product(name=list(CURVES), num_steps=[200, 1000])
  def test_curves(self, name, num_steps):
    with np.load(GOLDEN / f"schedules_T{num_steps}.npz") as data:
      t, want = data["t"], data[name]
    with jax.enable_x64(True):
      got = jax.jit(CURVES[name](num_steps))(jnp.asarray(t, jnp.float64))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    got = CURVES[name](num_steps)(jnp.asarray(t, jnp.int32))
    self.assertEqual(got.dtype, jnp.float32)
    # 4 ulp of float32, of the peak where the rate falls to 0
    np.testing.assert_allclose(got, want, rtol=5e-7, atol=5e-7 * want.max())

  def test_recipes(self):
    with np.load(GOLDEN / "schedules_T200.npz") as data:
      table = {k[11:]: data[k] for k in data if k.startswith("lamb_table/")}
    bert = [schedules.bert(int(b)) for b in table["batch"]]
    resnet = [schedules.resnet50(int(b)) for b in table["batch"]]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
    close([r.learning_rate for r in bert], table["bert_lr"])
    close([r.warmup for r in bert], table["bert_warmup_ratio"])
    close([r.num_steps for r in bert], table["bert_steps"])
    close([r.learning_rate for r in resnet], table["rn50_lr"])
    close([90 * r.warmup for r in resnet], table["rn50_warmup_epochs"])
    # the paper's tables as printed
    self.assertEqual(
      [r.num_steps for r in bert],
      [1_000_000, 500_000, 250_000, 125_000, 62_500, 31_250, 15_625],
    )
    close([1 / r.warmup for r in bert], [320, 160, 80, 40, 20, 10, 5])


class ShapeTest(parameterized.TestCase):
  @parameterized.parameters(*KINDS)
  def test_ends_are_clamped(self, name):
    for n in (10, 1000):
      rate = KINDS[name](n)
      self.assertEqual(float(rate(n)), 0)
      self.assertEqual(float(rate(n + 7)), 0)
      self.assertEqual(float(rate(-3)), float(rate(0)))
      values = np.asarray(rate(jnp.arange(n + 1)))
      self.assertTrue(np.all((values >= 0) & (values <= 1)))
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # a part of one step is less than one
      self.assertEqual(float(KINDS[name](1)(1)), 0)
      self.assertEqual(float(KINDS[name](0)(0)), 0)

  @parameterized.parameters(*KINDS)
  def test_vmap_jit_and_one_step_at_a_time_agree(self, name):
    rate = KINDS[name](20)
    steps = jnp.arange(25)
    one = [float(rate(i)) for i in range(25)]
    np.testing.assert_allclose(rate(steps), one, rtol=2e-7)  # 2 ulp
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(steps), one, rtol=2e-7)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
      self.assertEqual(rate(jnp.int32(3)).dtype, jnp.float32)

  def test_jump_and_no_jump(self):
    before, at = 200.0 - 1e-3, 200.0
    jumps = schedules.polynomial_with_warmup(1.0, 1000, warmup=200)
    self.assertAlmostEqual(float(jumps(before)), 1.0, places=4)
    self.assertAlmostEqual(float(jumps(at)), 0.8, places=6)
    smooth = schedules.polynomial_with_warmup(
      1.0, 1000, warmup=200, continuous=True
    )
    self.assertAlmostEqual(float(smooth(before)), 1.0, places=4)
    self.assertAlmostEqual(float(smooth(at)), 1.0, places=6)
    self.assertAlmostEqual(float(smooth(600)), 0.5, places=6)

  def test_square_root_decay(self):
    rate = schedules.warmup_stable_decay(
      2.0, 100, warmup=10, decay=40, shape="sqrt"
    )
    # z = 1/4: 1 - 1/2; z = 9/16: 1 - 3/4
    np.testing.assert_allclose(
      rate(jnp.asarray([5.0, 10.0, 60.0, 70.0, 82.5, 100.0])),
      [1.0, 2.0, 2.0, 1.0, 0.5, 0.0],
      atol=1e-6,
    )

  def test_stages_rise_again(self):
    first, second = schedules.bert_64k_32k()
    self.assertEqual(first.num_steps + second.num_steps, 8_601)
    rate = jax.jit(schedules.stages((first, second)))
    self.assertEqual(float(rate(first.num_steps)), 0)
    self.assertLess(float(rate(first.num_steps - 1)), 1e-6)
    peaks = rate(jnp.asarray([2000.0, 7_038 + 200.0]))
    # 2000 / (.2843 * 7038) and 200 / (.128 * 1563) of the peaks
    np.testing.assert_allclose(
      peaks, [6e-3 * 0.99956, 4e-3 * 0.99968], rtol=1e-4
    )
    self.assertEqual(float(rate(8_601)), 0)
    alone = schedules.polynomial_with_warmup(4e-3, 1_563, warmup=0.128)
    steps = jnp.arange(0, 1_563, 50)
    np.testing.assert_allclose(rate(7_038 + steps), alone(steps), rtol=1e-6)

  def test_scaling(self):
    self.assertAlmostEqual(schedules.scale_lr(1e-3, 256, 1024), 2e-3)
    self.assertAlmostEqual(
      schedules.scale_lr(1e-3, 256, 1024, rule="linear"), 4e-3
    )
    self.assertAlmostEqual(schedules.scale_warmup(0.05, 256, 1024), 0.2)

  def test_errors(self):
    for call, message in (
      (lambda: schedules.scale_lr(1.0, 1, 2, rule="cubic"), "rule='cubic'"),
      (lambda: schedules.scale_lr(1.0, 0, 2), "positive"),
      (lambda: schedules.bert(1 << 20), "warm-up"),
      (lambda: schedules.stages(()), "at least one"),
      (lambda: schedules.linear(1.0, -1), "num_steps=-1"),
      (
        lambda: schedules.polynomial_with_warmup(1.0, 10, warmup=11),
        "warmup=11",
      ),
      (
        lambda: schedules.polynomial_with_warmup(1.0, 10, warmup=1.5),
        "warmup=1.5",
      ),
      (
        lambda: schedules.warmup_stable_decay(1.0, 10, warmup=6, decay=5),
        "exceed",
      ),
      (
        lambda: schedules.warmup_stable_decay(1.0, 10, shape="cosine"),
        "shape='cosine'",
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        call()
    with self.assertWarnsRegex(UserWarning, "0.2 steps"):
      schedules.polynomial_with_warmup(1.0, 10, warmup=0.02)
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      schedules.polynomial_with_warmup(1.0, 10, warmup=0)


if __name__ == "__main__":
  absltest.main()
