"""Schedules against high precision, recorded values and their definitions."""

import decimal
import json
import pathlib

import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import betas, schedules

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "diffusion_samplers"
ALL = {
  "vp_linear": schedules.vp_linear(),
  "vp_cosine": schedules.vp_cosine(),
  "vp_cosine_raw": schedules.vp_cosine(normalize=False),
  "edm": schedules.edm(),
  "flow": schedules.rectified_flow(),
  "flow_3": schedules.rectified_flow(shift=3.0),
  "discrete_linear": schedules.discrete(betas.linear()),
  "stable_diffusion": schedules.discrete(betas.scaled_linear()),
  "zero_snr": schedules.discrete(
    betas.zero_terminal_snr(betas.scaled_linear())
  ),
  "squared_cosine": schedules.discrete(betas.squared_cosine(), lambda_min=-5.1),
  "flow_on_vp": schedules.on_clock(
    schedules.rectified_flow(), schedules.vp_linear()
  ),
}


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters(1e-14, 1e-9, 1e-5, 1e-3, 0.3, 1.0)
  def test_vp_linear_in_fifty_digits(self, t):
    decimal.getcontext().prec = 50
    exact = decimal.Decimal(t)
    log = -(exact**2) * decimal.Decimal("19.9") / 4
    log -= exact * decimal.Decimal("0.1") / 2
    alpha, sigma = ALL["vp_linear"].alpha_sigma(t)
    # 19.9 and .1 are rounded in float64; then about 8 operations
    rtol = 8 * np.finfo(float).eps
    np.testing.assert_allclose(alpha, float(log.exp()), rtol=rtol)
    variance = (1 - (2 * log).exp()).sqrt()
    np.testing.assert_allclose(sigma, float(variance), rtol=rtol)

  @parameterized.parameters(
    "dpm_solver_pytorch", "dpm_solver_jax", "unipc_pytorch", "deis_jax"
  )
  def test_recorded_by_public_code(self, family):
    arrays = np.load(GOLDEN / f"{family}.npz")
    for name, case in json.loads(bytes(arrays["manifest"])).items():
      kind = case["schedule"].replace("-", "_")
      if kind == "vp_cosine" and family == "deis_jax":
        kind = "vp_cosine_raw"
      alpha, sigma = ALL[kind].alpha_sigma(arrays[f"{name}/t"])
      # theirs is 1 - alpha^2 by subtraction: eps / (2 sigma^2), sigma > .01;
      # UniPC's discrete levels pass through float32
      single = kind == "discrete_linear" and family == "unipc_pytorch"
      rtol = 4e-7 if single else 3e-12
      np.testing.assert_allclose(alpha, arrays[f"{name}/alpha"], rtol=rtol)
      np.testing.assert_allclose(sigma, arrays[f"{name}/sigma"], rtol=rtol)

  @parameterized.parameters(*ALL)
  def test_lambda_round_trip(self, name):
    schedule = ALL[name]
    t = np.geomspace(1e-3, schedule.t_max, 50)
    back = schedule.t_of_lambda(schedule.lam(t))
    # d t / d lambda <= t t_max / t_max: errors of lambda of 1e-15 stay that
    np.testing.assert_allclose(back, t, rtol=2e-13)

  @parameterized.parameters(*ALL)
  def test_monotone(self, name):
    schedule = ALL[name]
    t = np.linspace(0, schedule.t_max, 1000)
    self.assertTrue((np.diff(schedule.phi(t)) > 0).all())

  @parameterized.parameters(*ALL)
  def test_rate_is_the_derivative(self, name):
    schedule = ALL[name]
    t = np.linspace(0.05, 0.95, 19) + 3e-4  # between the discrete levels
    h = 1e-5
    high, low = schedule.alpha_sigma(t + h), schedule.alpha_sigma(t - h)
    for exact, b, a in zip(schedule.rate(t), high, low, strict=True):
      # central difference: h^2 f'''/6 with f''' < 1e3, eps / h = 1e-11
      np.testing.assert_allclose((b - a) / (2 * h), exact, atol=2e-8)

  def test_ends_are_exact(self):
    for name in set(ALL) - {"vp_cosine_raw"}:
      self.assertEqual(ALL[name].alpha_sigma(0.0), (1.0, 0.0), name)
      self.assertEqual(ALL[name].lam(0.0), np.inf, name)
      self.assertEqual(ALL[name].t_of_lambda(np.inf), 0.0, name)
    for name in ("vp_cosine", "flow", "flow_3", "zero_snr"):
      alpha, sigma = ALL[name].alpha_sigma(1.0)
      self.assertEqual(alpha, 0.0, name)
      np.testing.assert_allclose(sigma, 1.0, rtol=1e-15)
      self.assertEqual(ALL[name].lam(1.0), -np.inf, name)
      np.testing.assert_allclose(ALL[name].t_of_lambda(-np.inf), 1, rtol=1e-15)

  def test_variance_is_preserved(self):
    for name in (
      "vp_linear",
      "vp_cosine",
      "vp_cosine_raw",
      "discrete_linear",
      "zero_snr",
      "squared_cosine",
    ):
      alpha, sigma = ALL[name].alpha_sigma(np.linspace(0, 1, 101))
      np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)

  def test_cosine_at_its_conventional_end(self):
    np.testing.assert_allclose(ALL["vp_cosine"].lam(0.9946), -4.78, atol=5e-3)

  def test_shift_moves_lambda(self):
    t = np.linspace(0.01, 0.99, 50)
    for shift in (0.5, 3.0):
      shifted = schedules.rectified_flow(shift)
      np.testing.assert_allclose(
        shifted.lam(t), ALL["flow"].lam(t) - np.log(shift), atol=1e-14
      )
      alpha, _ = shifted.alpha_sigma(t)  # on the same path, at model_time
      np.testing.assert_allclose(alpha, 1 - shifted.model_time(t), rtol=1e-13)

  @parameterized.parameters("linear", "scaled_linear")
  def test_discrete_levels_in_fifty_digits(self, name):
    decimal.getcontext().prec = 50
    levels = getattr(betas, name)()
    schedule = schedules.discrete(levels)
    product = decimal.Decimal(1)
    for i, beta in enumerate(levels):
      product *= 1 - decimal.Decimal(float(beta))
      if i in (0, 1, 10, 499, 999):
        alpha, sigma = schedule.alpha_sigma((i + 1) / 1000)
        # a sum of 1000 logarithms, relative to the log itself
        rtol = 1000 * np.finfo(float).eps
        np.testing.assert_allclose(alpha, float(product.sqrt()), rtol=rtol)
        exact = float((1 - product).sqrt())
        np.testing.assert_allclose(sigma, exact, rtol=rtol)

  def test_betas(self):
    linear = betas.linear(5, 0.1, 0.3)
    np.testing.assert_allclose(linear, [0.1, 0.15, 0.2, 0.25, 0.3])
    root = np.sqrt(betas.scaled_linear())
    np.testing.assert_allclose(root[[0, -1]] ** 2, [0.00085, 0.012])
    np.testing.assert_allclose(np.diff(root, 2), 0, atol=1e-15)
    u = np.arange(1001) / 1000
    bar = np.cos(np.pi / 2 * (u + 0.008) / 1.008) ** 2
    cosine = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    np.testing.assert_allclose(betas.squared_cosine(), cosine, atol=1e-14)

  def test_zero_terminal_snr(self):
    before = np.sqrt(np.cumprod(1 - betas.linear()))
    after = np.sqrt(np.cumprod(1 - betas.zero_terminal_snr(betas.linear())))
    self.assertEqual(after[-1], 0)
    np.testing.assert_allclose(after[0], before[0], rtol=1e-15)
    scale = before[0] / (before[0] - before[-1])
    exact = (before - before[-1]) * scale
    np.testing.assert_allclose(after, exact, atol=1e-13)
    alpha, sigma = ALL["zero_snr"].alpha_sigma([0.9995, 1.0])
    self.assertGreater(alpha[0], 0)  # inside the last interval
    np.testing.assert_array_equal([alpha[1], sigma[1]], [0, 1])

  def test_discrete_clocks(self):
    t = np.array([1.0, 0.5, 0.0015, 0.001])
    np.testing.assert_allclose(
      ALL["discrete_linear"].model_time(t), [999, 499, 0.5, 0], atol=1e-12
    )
    integer = schedules.discrete(betas.linear(), clock="diffusers")
    np.testing.assert_array_equal(
      integer.model_time([1.0, 0.5, 0.001, 0.0]), [999, 499, 0, 0]
    )

  def test_dynamic_shift(self):
    # mu = .5 at 256 tokens, 1.15 at 4096 (FLUX)
    np.testing.assert_allclose(schedules.dynamic_shift(256), np.exp(0.5))
    np.testing.assert_allclose(schedules.dynamic_shift(4096), np.exp(1.15))

  def test_on_clock(self):
    vp, flow, t = ALL["vp_linear"], ALL["flow"], np.linspace(0.01, 1, 20)
    mixed = ALL["flow_on_vp"]
    np.testing.assert_allclose(mixed.lam(t), vp.lam(t), rtol=1e-12)
    alpha, sigma = mixed.alpha_sigma(t)
    np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-14)
    np.testing.assert_allclose(mixed.model_time(t), sigma, rtol=1e-13)
    self.assertEqual(mixed.alpha_sigma(0.0), (1.0, 0.0))
    self.assertEqual(flow.t_max, 1.0)

  def test_from_functions_inverts_any_clock(self):
    cosine = ALL["vp_cosine"]
    copy = schedules.from_functions(cosine.alpha_sigma, cosine.rate)
    lam = np.array([-np.inf, -30.0, -3.0, 0.0, 3.0, 30.0, np.inf])
    np.testing.assert_allclose(
      copy.t_of_lambda(lam), cosine.t_of_lambda(lam), rtol=1e-13, atol=0
    )
    self.assertEqual(copy.t_of_lambda(0.5).shape, ())

  def test_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, "shift.*-1"):
      schedules.rectified_flow(-1.0)
    with self.assertRaisesRegex(ValueError, "beta_max: 3.0, 2.0"):
      schedules.vp_linear(3.0, 2.0)
    with self.assertRaisesRegex(ValueError, r"\(1,\)"):
      schedules.discrete([0.1])
    with self.assertRaisesRegex(ValueError, "0.0 0.5"):
      schedules.discrete([0.0, 0.5])
    with self.assertRaisesRegex(ValueError, "'sd'.*diffusers"):
      schedules.discrete([0.1, 0.2], clock="sd")
    with self.assertRaisesRegex(ValueError, "lambda_min=9"):
      schedules.discrete([0.1, 0.2], lambda_min=9.0)


if __name__ == "__main__":
  absltest.main()
