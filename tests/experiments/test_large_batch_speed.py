"""The measurement of the LAMB update, on a model that takes no time."""

from unittest import mock

from absl.testing import absltest

from giantsteps.experiments.harness import large_batch_speed as speed


class MeasureTest(absltest.TestCase):
  def test_counts_and_names(self):
    with mock.patch.multiple(
      speed, COMPILES=2, WIDTH=8, DEPTH=2, VOCABULARY=16, POSITIONS=4
    ):
      result = speed.measure(rounds=2)
    # per block 12 matrices' worth of 8 x 8 and two vectors, then 16 + 4 + 1
    self.assertEqual(result["parameters"], 2 * (12 * 64 + 16) + 21 * 8)
    self.assertEqual(result["leaves"], 15)
    for name in speed.TRANSFORMS:
      self.assertGreater(result[name]["update_ms"]["median"], 0)
      low, high = result[name]["compile_s"]["quartiles"]
      self.assertLessEqual(low, high)
      # m, v, x and g are read at least once, m, v and x are written
      self.assertGreater(result[name]["bytes_per_parameter"], 4 * 7)

  def test_a_spread_needs_two_rounds(self):
    with self.assertRaisesRegex(ValueError, "rounds=1"):
      speed.measure(rounds=1)


if __name__ == "__main__":
  absltest.main()
