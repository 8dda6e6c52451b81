"""Grids against their definitions."""

import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import grids, schedules

GRIDS = (grids.uniform_time, grids.quadratic_time, grids.log_snr, grids.karras)
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
