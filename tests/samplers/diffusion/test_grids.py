"""Grids against their definitions and recorded ones."""

import functools
import json
import math
import pathlib

import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import betas, grids, schedules

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "diffusion_samplers"
GRIDS = (
  grids.uniform_time,
  grids.quadratic_time,
  functools.partial(grids.power_time, power=3),
  grids.log_snr,
  grids.karras,
  functools.partial(grids.polyexponential, power=1.5),
  grids.beta,
  grids.vp,
)
SCHEDULES = (
  schedules.vp_linear(),
  schedules.vp_cosine(),
  schedules.edm(),
  schedules.rectified_flow(),
  schedules.rectified_flow(shift=3.0),
)


class GridTest(parameterized.TestCase):
  @parameterized.product(grid=GRIDS, schedule=SCHEDULES, num_steps=(1, 2, 7))
  def test_falls_between_the_exact_ends(self, grid, schedule, num_steps):
    for end in (None, 0.0):
      times = grid(schedule, num_steps=num_steps, t_end=end)
      self.assertEqual(times.shape, (num_steps + 1,))
      self.assertEqual(times.dtype, np.float64)
      self.assertTrue((np.diff(times) < 0).all(), times)
      self.assertEqual(times[0], schedule.t_max)
      self.assertEqual(times[-1], schedule.t_min if end is None else end)

  def test_spacing(self):
    vp = schedules.vp_linear()
    lam = vp.lam(grids.log_snr(vp, num_steps=9, t_end=1e-4))
    np.testing.assert_allclose(np.diff(lam, 2), 0, atol=1e-12)
    times = grids.uniform_time(vp, num_steps=9, t_start=0.6)
    np.testing.assert_allclose(np.diff(times), (1e-3 - 0.6) / 9, rtol=1e-12)
    root = np.sqrt(grids.quadratic_time(vp, num_steps=9))
    np.testing.assert_allclose(np.diff(root, 2), 0, atol=1e-15)

  def test_karras_is_the_published_grid(self):
    # arXiv:2206.00364 eq. 5 with sigma 80 to .002, rho = 7 and a final 0
    i = np.arange(18)
    sigma = 80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    times = grids.karras(schedules.edm(), num_steps=18, t_end=0.0)
    np.testing.assert_allclose(times, np.append(sigma**7, 0), rtol=1e-12)

  @parameterized.parameters(
    ("sigmas_karras", grids.karras, {}),
    ("sigmas_karras_rho3", grids.karras, dict(power=3)),
    ("sigmas_exponential", grids.exponential, {}),
    ("sigmas_polyexp1.5", grids.polyexponential, dict(power=1.5)),
    ("sigmas_vp", grids.vp, {}),
  )
  def test_grids_of_k_diffusion(self, name, grid, settings):
    sigmas = np.load(GOLDEN / "k_diffusion.npz")[f"{name}/sigmas"]
    edm = schedules.edm(sigmas[-2], sigmas[0])
    times = grid(edm, num_steps=sigmas.size - 1, t_end=0.0, **settings)
    # float32 files
    np.testing.assert_allclose(times, sigmas, rtol=2e-6)

  def test_beta_quantiles(self):
    level = np.linspace(0, 1, 21)
    # Beta(1/2, 1/2) is the arcsine law, Beta(2, 1) has P(x) = x^2
    arcsine = np.sin(np.pi / 2 * level) ** 2
    got = grids.beta_quantile(level, 0.5, 0.5)
    np.testing.assert_allclose(got, arcsine, atol=1e-14)
    got = grids.beta_quantile(level, 2.0, 1.0)
    np.testing.assert_allclose(got, np.sqrt(level), atol=1e-14)
    # the median of a symmetric law, and its symmetry
    got = grids.beta_quantile(level, 0.6, 0.6)
    np.testing.assert_allclose(got + got[::-1], 1, atol=1e-14)
    self.assertAlmostEqual(got[10], 0.5, places=14)
    # P(x) near 0 is x^a / (a B(a, b))
    total = math.gamma(0.6) ** 2 / math.gamma(1.2)
    small = grids.beta_quantile(np.array([1e-6]), 0.6, 0.6)
    series = small**0.6 / 0.6 * (1 + 0.4 * 0.6 / 1.6 * small) / total
    np.testing.assert_allclose(series, 1e-6, rtol=1e-12)

  @parameterized.parameters("linspace", "leading", "trailing")
  def test_integer_grids_of_diffusers(self, spacing):
    arrays = np.load(GOLDEN / "diffusers.npz")
    seen = 0
    for name, case in json.loads(bytes(arrays["manifest"])).items():
      kwargs, steps = case["kwargs"], case["steps"]
      ddim = case["scheduler"] == "DDIMScheduler"
      default = "leading" if ddim else "linspace"
      plain = ddim or case["scheduler"].startswith("DPMSolver")
      if kwargs.get("timestep_spacing", default) != spacing or not plain:
        continue
      if any(k.startswith("use_") or k == "lambda_min_clipped" for k in kwargs):
        continue
      rule = f"ddim_{spacing}" if ddim and spacing != "trailing" else spacing
      times = grids.integers(steps, spacing=rule, t_end=0.0)
      levels = np.round(times[:-1] * 1000 - 1)
      np.testing.assert_array_equal(levels, arrays[f"{name}/timesteps"], name)
      seen += 1
    self.assertGreaterEqual(seen, {"leading": 4}.get(spacing, 1))

  def test_integer_grid_by_hand(self):
    times = grids.integers(3, spacing="leading", num_train=100, offset=1)
    np.testing.assert_allclose(times, [0.77, 0.52, 0.27, 0.01])
    with self.assertRaisesRegex(ValueError, "'even'.*trailing"):
      grids.integers(3, spacing="even")
    with self.assertRaisesRegex(ValueError, "does not fall"):
      grids.integers(10, spacing="ddim_leading")  # ends on level 0 twice

  def test_transfer_keeps_lambda(self):
    vp, flow = schedules.vp_linear(), schedules.rectified_flow()
    times = grids.quadratic_time(vp, num_steps=9)
    moved = grids.transfer(times, vp, flow)
    np.testing.assert_allclose(flow.lam(moved), vp.lam(times), rtol=1e-12)

  def test_shift_is_the_shifted_schedule(self):
    times = np.linspace(1, 0, 9)
    moved = grids.shift(times, 3.0)
    _, sigma = schedules.rectified_flow(3.0).alpha_sigma(times)
    np.testing.assert_allclose(moved, sigma, rtol=1e-15)
    np.testing.assert_array_equal(moved[[0, -1]], [1, 0])

  def test_squared_cosine_starts_at_its_clip(self):
    squared = schedules.discrete(betas.squared_cosine(), lambda_min=-5.1)
    # recorded: DPM-Solver++ with lambda_min_clipped = -5.1 starts at level 995
    self.assertEqual(squared.t_max, 0.996)
    times = grids.uniform_time(squared, num_steps=5)
    self.assertGreater(squared.lam(times[0]), -5.1)

  def test_infinite_ends_are_set_apart(self):
    flow = schedules.rectified_flow()
    times = grids.log_snr(flow, num_steps=8)
    rho = times[1:-1] / (1 - times[1:-1])
    np.testing.assert_allclose(rho, np.geomspace(80, 0.002, 7), rtol=1e-12)

  @parameterized.parameters(
    (dict(num_steps=0), "num_steps=0"),
    (dict(num_steps=5, t_start=0.1, t_end=0.2), "t_start=0.1 to t_end=0.2"),
    (dict(num_steps=5, t_end=-1.0), "t_end=-1.0"),
    (dict(num_steps=5, t_start=float("nan")), "nan"),
    (dict(num_steps=5, t_start=1.5), "t_start=1.5 is outside"),
  )
  def test_bad_arguments(self, arguments, message):
    for grid in GRIDS:
      with self.assertRaisesRegex(ValueError, message):
        grid(schedules.rectified_flow(), **arguments)

  def test_no_room_in_log_snr(self):
    with self.assertRaisesRegex(ValueError, "no room.*uniform_time"):
      grids.log_snr(
        schedules.rectified_flow(), num_steps=5, t_start=1e-4, t_end=0.0
      )


if __name__ == "__main__":
  absltest.main()
