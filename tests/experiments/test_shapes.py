"""Pictures of shapes: factors in, factors out; laws against SciPy."""

import colorsys

import numpy as np
import pytest
from scipy import stats

from giantsteps.experiments.harness import config, data, shapes

COUNT = 2048  # draws that are made and read back


@pytest.fixture(scope="module")
def drawn():
  factors = shapes.draw(0, np.arange(COUNT))
  images = shapes.make(factors)
  return factors, images, shapes.recover(images)


def test_recovers_what_was_drawn(drawn):
  want, _, (got, residual) = drawn
  np.testing.assert_array_equal(got.label, want.label)
  np.testing.assert_allclose(got.position, want.position, atol=0.1)
  np.testing.assert_allclose(got.scale, want.scale, atol=0.1)
  turn = np.abs((got.hue - want.hue + 0.5) % 1 - 0.5)
  assert turn.max() < 1e-6
  # an edge 0.1 pixels off: 0.1 of a ramp's height (2 / RAMP) on its pixels
  assert residual.max() < 0.05


def test_pictures_are_whole_and_in_range(drawn):
  _, images, _ = drawn
  assert images.dtype == np.float32 and images.shape == (COUNT, 32, 32, 3)
  assert images.min() == -1 and images.max() <= 1
  # inside a shape one channel is full; nothing is lost at the border: the
  # largest is bright on the border row at most as an edge that fades
  assert (images.max((1, 2, 3)) == 1).all()
  border = max(images[:, [0, -1]].max(), images[:, :, [0, -1]].max())
  assert border < -0.5


def test_anti_aliasing_against_many_points():
  # The mean of hard shapes over the ramp, counted on a fine grid: the area
  # K (a^2 + RAMP^2 / 12) that the module derives.
  fine = (np.arange(800) + 0.5) / 50 - 8
  x, y = np.meshgrid(fine, fine)
  inside = {
    "circle": lambda a: x**2 + y**2 < a**2,
    "square": lambda a: (abs(x) < a) & (abs(y) < a),
    "triangle": lambda a: (y < a) & (3**0.5 * abs(x) - y < 2 * a),
    "diamond": lambda a: abs(x) + abs(y) < a * 2**0.5,
  }
  for k, name in enumerate(shapes.CLASSES):
    scale = 6.0
    a = scale / np.sqrt(inside[name](1.0).sum() / 2500)
    nodes = (np.arange(8) + 0.5) / 8 - 0.5
    area = np.mean([inside[name](a + shapes.RAMP * u).sum() for u in nodes])
    # middles all over a pixel: the error of single sums averages out
    u = np.arange(8) / 8
    position = np.stack(np.meshgrid(u, u), -1).reshape(64, 2)
    images = shapes.make(
      shapes.Factors(np.full(64, k), position, np.full(64, scale), np.zeros(64))
    )
    got = (images[..., 0] + 1).sum() / 2 / 64
    np.testing.assert_allclose(got, area / 2500, rtol=0.01, err_msg=name)


def test_which_way_things_point():
  # red square to the right of and below the middle; triangle on its base
  factors = shapes.Factors(
    np.array([1, 2]),
    np.array([[3.0, 2.0], [0, 0]]),
    np.array([8.0, 10]),
    np.array([0.0, 2 / 3]),
  )
  square, triangle = (shapes.make(factors) + 1) / 2
  # half side 4 about (3, 2): columns of middles from -1 to 7
  full = np.zeros((32, 32))
  middle = np.arange(32) - 15.5
  full[np.ix_(abs(middle - 2) <= 3, abs(middle - 3) <= 3)] = 1
  assert (square[..., 0][full == 1] == 1).all()
  assert square[..., 1:].max() == 0
  far = np.maximum(abs(middle - 2)[:, None], abs(middle - 3)[None]) > 5
  assert square[..., 0][far].max() == 0
  widths = triangle[..., 2].sum(1)
  lit = widths[widths > 1]
  assert (np.diff(lit[:-2]) > 0).all()  # wider and wider to the base


@pytest.mark.parametrize("hue", [0.0, 0.1, 1 / 3, 0.45, 0.6, 0.75, 0.99])
def test_colour_equals_colorsys(hue):
  one = shapes.Factors(
    np.zeros(1, int), np.zeros((1, 2)), np.full(1, 10.0), np.full(1, hue)
  )
  colour = (shapes.make(one)[0, 16, 16] + 1) / 2
  np.testing.assert_allclose(colour, colorsys.hsv_to_rgb(hue, 1, 1), atol=1e-6)


def test_by_index():
  rows = shapes.sample(3, np.arange(20))
  some = np.array([19, 0, 7, 7])
  again = shapes.sample(3, some)
  for key in ("image", "label"):
    np.testing.assert_array_equal(again[key], rows[key][some])
  other = shapes.sample(4, np.arange(20))
  assert np.abs(other["image"] - rows["image"]).max((1, 2, 3)).min() > 0


def test_laws_of_the_draws():
  f = shapes.draw(1, np.arange(20_000))
  for values, (low, high) in (
    (f.position[:, 0], shapes.POSITION),
    (f.position[:, 1], shapes.POSITION),
    (f.scale, shapes.SCALE),
    (f.hue, (0, 1)),
  ):
    test = stats.kstest(values, stats.uniform(low, high - low).cdf)
    assert test.pvalue > 1e-6
  assert stats.chisquare(np.bincount(f.label)).pvalue > 1e-6


def test_factor_distances_of_real_and_recovered(drawn):
  factors, _, (recovered, _) = drawn
  exact = shapes.factor_distances(factors)
  for name, values, (low, high) in (
    ("ks_x", factors.position[:, 0], shapes.POSITION),
    ("ks_scale", factors.scale, shapes.SCALE),
    ("ks_hue", factors.hue, (0, 1)),
  ):
    want = stats.kstest(values, stats.uniform(low, high - low).cdf).statistic
    np.testing.assert_allclose(exact[name], want, rtol=1e-9)
  critical = stats.kstwobign.isf(0.01) / np.sqrt(COUNT)
  np.testing.assert_allclose(exact["ks_critical"], critical, rtol=1e-4)
  measured = shapes.factor_distances(recovered)
  for key in ("ks_x", "ks_y", "ks_scale"):
    assert abs(measured[key] - exact[key]) < 0.1 / 6
  assert abs(measured["ks_hue"] - exact["ks_hue"]) < 1e-6
  assert measured["tv_class"] == exact["tv_class"] < 0.05
  assert exact["max_correlation"] < 5.5 / np.sqrt(COUNT)


def test_factor_distances_see_what_is_wrong():
  good = shapes.draw(2, np.arange(COUNT))
  only = lambda rows: shapes.Factors(*(v[rows] for v in good))
  # half the circles away, the other classes kept
  no_circle = shapes.factor_distances(only(good.label > 0))
  np.testing.assert_allclose(no_circle["tv_class"], 0.25, atol=0.02)
  # the lower half of the scales: the largest gap is 1/2
  small = shapes.factor_distances(only(good.scale < 9))
  np.testing.assert_allclose(small["ks_scale"], 0.5, atol=0.02)
  assert small["ks_hue"] < 0.05
  # one place for all: a gap of 1/2, whatever the rest
  centred = good._replace(position=np.zeros((COUNT, 2)))
  np.testing.assert_allclose(shapes.factor_distances(centred)["ks_y"], 0.5)
  # right marginals, but scale tells hue
  tied = good._replace(hue=(good.scale - 6) / 6)
  got = shapes.factor_distances(tied)
  assert got["ks_hue"] < 0.05 and got["max_correlation"] > 0.999


def test_recovers_through_noise():
  factors = shapes.draw(5, np.arange(256))
  rng = np.random.default_rng(0)
  images = shapes.make(factors)
  noisy = images + 0.05 * rng.standard_normal(images.shape)
  got, residual = shapes.recover(noisy)
  assert np.mean(got.label == factors.label) > 0.99
  # the sum of 1,024 errors of 0.025 is 0.8 pixels of area: scale by 0.8 / 12
  assert np.abs(got.scale - factors.scale).max() < 0.1 + 6 * 0.8 / 12
  assert np.abs(residual - 0.05).max() < 0.1
  nothing = shapes.recover(rng.uniform(-1, 1, (4, 32, 32, 3)))
  assert nothing.residual.min() > 0.4
  dark = shapes.recover(np.full((1, 32, 32, 3), -1.0))
  assert np.isfinite(dark.residual).all() and dark.factors.scale[0] < 0.01


def test_refuses():
  one = shapes.draw(0, np.arange(1))
  for call, message in (
    (lambda: shapes.make(one._replace(label=np.array([4]))), "0..3"),
    (lambda: shapes.make(one._replace(scale=np.zeros(1))), "positive"),
    (lambda: shapes.recover(np.zeros((2, 8, 8, 3))), r"\(2, 8, 8, 3\)"),
    (lambda: shapes.recover(np.full((1, 32, 32, 3), np.nan)), "finite"),
    (lambda: shapes.factor_distances(one), "at least 2"),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def test_source(monkeypatch):
  monkeypatch.setattr(data, "NUM_SHAPES", 400)
  cfg = config.Data(source="shapes32", held_out=0.25)
  got = data.load(cfg)
  assert (got.train.num_rows, got.held_out.num_rows) == (300, 100)
  assert got.description["shape"] == [32, 32, 3]
  assert got.description["num_classes"] == 4
  rows = data.batch(got.train, 8, seed=1, step=3)
  assert rows["image"].dtype == np.float32 and rows["label"].dtype == np.int32
  first = got.held_out.read(np.array([0]))["image"]
  np.testing.assert_array_equal(first, shapes.sample(0, [300])["image"])
  np.testing.assert_allclose(
    got.description["std"],
    shapes.sample(0, np.arange(300))["image"].std(dtype=np.float64),
    rtol=1e-5,
  )
