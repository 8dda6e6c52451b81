"""Pictures of shapes whose factors can be read back: the set "shapes32".

One filled shape on black, 32 x 32, RGB in [-1, 1]. Its class, position, scale
and hue are independent draws from known laws, a pure function of (seed,
index), so there is no end to the data and nothing to store, and generated
pictures are judged factor by factor instead of by a network's features.

Every shape is the ball {g(p) <= a} of a gauge g: the distance from its middle
for a circle, the largest distance along the normals of its sides for a polygon.
Coverage falls linearly from 1 to 0 as g runs from a - RAMP / 2 to a + RAMP / 2,
which smooths the edge, and its integral is known: level sets are scaled copies
of area K g^2, so the area is K (a^2 + RAMP^2 / 12) and the centroid is the
middle. `recover` inverts this; what remains is the error of sums over pixels in
place of integrals.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from giantsteps.experiments.harness import by_index

SIDE = 32
RAMP = 2.0  # pixels; a whole number sums exactly over upright edges
CLASSES = ("circle", "square", "triangle", "diamond")
# Uniform on these intervals; the class is uniform too, hue on [0, 1).
POSITION = (-3.5, 3.5)  # pixels from the middle, x to the right, y downward
SCALE = (6.0, 12.0)  # pixels, the square root of the nominal area K a^2
_AREA = np.array([np.pi, 4.0, 3 * np.sqrt(3), 4.0])  # K: of {g <= 1}
_STREAM = 0x7368  # of by_index
_BLOCK = 256  # pictures at a time where many are measured


class Factors(NamedTuple):
  """What a picture shows.

  Attributes:
    label: [B] int32, index in CLASSES.
    position: [B, 2], (x, y) in pixels from the middle of the picture.
    scale: [B], square root of the nominal area, in pixels.
    hue: [B] in [0, 1): 0 red, 1/3 green, 2/3 blue; saturation and value are 1.
  """

  label: np.ndarray
  position: np.ndarray
  scale: np.ndarray
  hue: np.ndarray


class Recovered(NamedTuple):
  """What a picture shows, as measured.

  Attributes:
    factors: the factors.
    residual: [B] root mean square of the picture minus the one that
      `make(factors)` gives, all channels: how much of it is no shape.
  """

  factors: Factors
  residual: np.ndarray


def draw(seed: int, indices: ArrayLike) -> Factors:
  """The factors of pictures `indices` [B] of the endless list of `seed`."""
  u = by_index.uniform(seed, _STREAM, indices, 5)
  low, high = POSITION
  return Factors(
    np.floor(len(CLASSES) * u[:, 0]).astype(np.int32),
    low + (high - low) * u[:, 1:3],
    SCALE[0] + (SCALE[1] - SCALE[0]) * u[:, 3],
    u[:, 4],
  )


def make(factors: Factors) -> np.ndarray:
  """Pictures of the factors, [B, 32, 32, 3] float32 in [-1, 1].

  Shapes that reach beyond the picture are cut off; those drawn do not.

  Raises:
    ValueError: for a label that is no class, or a scale that is not positive.
  """
  label = np.asarray(factors.label)
  scale = np.asarray(factors.scale, np.float64)
  if not np.isin(label, np.arange(len(CLASSES))).all():
    raise ValueError(f"labels {np.unique(label)}: not all in 0..3, {CLASSES}")
  if not (scale > 0).all():
    raise ValueError(f"scale {scale.min()}: must be positive")
  middle = np.arange(SIDE) - (SIDE - 1) / 2
  position = np.asarray(factors.position, np.float64)
  x = middle[None, None] - position[:, 0, None, None]  # [B, 1, 32]
  y = middle[None, :, None] - position[:, 1, None, None]  # [B, 32, 1]
  gauge = np.empty((len(label), SIDE, SIDE))
  for k, one in enumerate((_circle, _square, _triangle, _diamond)):
    rows = label == k
    gauge[rows] = one(x[rows], y[rows])
  a = (scale / np.sqrt(_AREA[label]))[:, None, None]
  coverage = np.clip((a - gauge) / RAMP + 0.5, 0, 1)
  colour = _rgb(np.asarray(factors.hue, np.float64))
  image = 2 * coverage[..., None] * colour[:, None, None] - 1
  return image.astype(np.float32)


def sample(seed: int, indices: ArrayLike) -> dict[str, np.ndarray]:
  """Rows of the data set: "image" [B, 32, 32, 3] and "label" [B] int32."""
  factors = draw(seed, indices)
  return {"image": make(factors), "label": factors.label}


def recover(images: np.ndarray) -> Recovered:
  """The factors of pictures, by sums over their pixels.

  Hue is that of the summed colour, position the centroid of the brightest
  channel, scale follows from its area, and the class is the one whose picture
  with these factors is nearest. Of clean pictures no class is wrong, position
  and scale are within 0.1 pixels, hue within 1e-6 (2,048 draws, a test).

  Args:
    images: [B, 32, 32, 3] float, real or generated; [-1, 1] is not enforced.

  Returns:
    Factors and residuals. A picture with no light in it gets scale 1e-3.

  Raises:
    ValueError: for other shapes, or numbers that are not finite.
  """
  images = np.asarray(images, np.float64)
  if images.shape[1:] != (SIDE, SIDE, 3):
    raise ValueError(f"images {images.shape}: not [B, {SIDE}, {SIDE}, 3]")
  if not np.isfinite(images).all():
    raise ValueError("images hold numbers that are not finite")
  blocks = np.split(images, range(_BLOCK, len(images), _BLOCK))
  parts = [_recover(block) for block in blocks]
  factors = Factors(
    *map(np.concatenate, zip(*(f for f, _ in parts), strict=True))
  )
  return Recovered(factors, np.concatenate([r for _, r in parts]))


def factor_distances(factors: Factors) -> dict[str, float]:
  """Distances of the factors' laws from the known ones.

  The largest gap between distribution functions (Kolmogorov and Smirnov) for
  x, y, scale and hue; total variation for the class; the largest correlation
  between two of these, as independence is part of the law. `ks_critical` is
  the gap that exact draws exceed with probability 0.01; measuring by `recover`
  adds at most its error times the density, 0.1 / 6.

  Args:
    factors: of N pictures.

  Returns:
    ks_x, ks_y, ks_scale, ks_hue, tv_class, max_correlation, ks_critical, count.

  Raises:
    ValueError: for fewer than two pictures.
  """
  n = len(factors.label)
  if n < 2:
    raise ValueError(f"{n} pictures: need at least 2")
  spread = lambda v, ends: (v - ends[0]) / (ends[1] - ends[0])
  position = np.asarray(factors.position, np.float64)
  uniform = {
    "x": spread(position[:, 0], POSITION),
    "y": spread(position[:, 1], POSITION),
    "scale": spread(np.asarray(factors.scale, np.float64), SCALE),
    "hue": np.asarray(factors.hue, np.float64),
  }
  out = {f"ks_{k}": ks_uniform(v) for k, v in uniform.items()}
  share = np.bincount(factors.label, minlength=len(CLASSES)) / n
  out["tv_class"] = float(np.abs(share - 1 / len(CLASSES)).sum() / 2)
  columns = np.stack(list(uniform.values()), -1)
  one_hot = np.eye(len(CLASSES))[factors.label]
  out["max_correlation"] = _largest_correlation(columns, one_hot)
  # 2 sum (-1)^(k-1) exp(-2 k^2 n gap^2) = 0.01, of which the first term is all
  out["ks_critical"] = float(np.sqrt(np.log(2 / 0.01) / (2 * n)))
  out["count"] = n
  return out


def ks_uniform(values: np.ndarray) -> float:
  """sup |F_n(u) - u| for values [N], against the uniform law on [0, 1]."""
  values = np.clip(np.sort(np.asarray(values, np.float64)), 0, 1)
  n = len(values)
  above = np.arange(1, n + 1) / n - values
  below = values - np.arange(n) / n
  return float(max(above.max(), below.max()))


def _recover(images: np.ndarray) -> Recovered:
  light = (images + 1) / 2
  total = light.sum((1, 2))  # [B, 3]
  brightest = total.argmax(-1)
  area = np.maximum(total.max(-1), 1e-6)
  chosen = np.take_along_axis(light, brightest[:, None, None, None], -1)[..., 0]
  middle = np.arange(SIDE) - (SIDE - 1) / 2
  position = np.stack(
    [chosen.sum(1) @ middle / area, chosen.sum(2) @ middle / area], -1
  )
  hue = _hue(total)
  best = residual = None
  for k, size in enumerate(_AREA):
    nominal = np.maximum(area - size * RAMP**2 / 12, 1e-6)
    label = np.full(len(images), k, np.int32)
    guess = Factors(label, position, np.sqrt(nominal), hue)
    error = np.sqrt(np.mean((make(guess) - images) ** 2, axis=(1, 2, 3)))
    if best is None or residual is None:
      best, residual = guess, error
      continue
    better = error < residual
    residual = np.where(better, error, residual)
    best = best._replace(
      label=np.where(better, guess.label, best.label),
      scale=np.where(better, guess.scale, best.scale),
    )
  assert best is not None and residual is not None
  return Recovered(best, residual)


def _largest_correlation(columns: np.ndarray, one_hot: np.ndarray) -> float:
  """Of different columns, or of a column and a class; constants count as 0."""
  both = np.concatenate([columns, one_hot], -1)
  both = both - both.mean(0, keepdims=True)
  norm = np.linalg.norm(both, axis=0)
  both = both / np.where(norm > 0, norm, 1)[None]
  c = np.abs(both.T @ both)
  d = columns.shape[1]
  return float(max(np.triu(c[:d, :d], 1).max(), c[:d, d:].max()))


def _circle(x, y):
  return np.hypot(x, y)


def _square(x, y):
  return np.maximum(np.abs(x), np.abs(y))


def _triangle(x, y):
  """Equilateral, a corner upward; y points downward."""
  return np.maximum(y, np.sqrt(3) / 2 * np.abs(x) - y / 2)


def _diamond(x, y):
  return (np.abs(x) + np.abs(y)) / np.sqrt(2)


def _rgb(hue: np.ndarray) -> np.ndarray:
  """[B] -> [B, 3], full saturation and value; piecewise linear in hue."""
  turn = (6 * hue[:, None] + np.array([[0, 4, 2]])) % 6
  return np.clip(np.abs(turn - 3) - 1, 0, 1)


def _hue(rgb: np.ndarray) -> np.ndarray:
  """[B, 3] -> [B] in [0, 1); grey is 0."""
  top = rgb.argmax(-1)
  spread = np.ptp(rgb, axis=-1)
  rows = np.arange(len(rgb))
  # the two others in the order red, green, blue, red, ...
  gap = rgb[rows, (top + 1) % 3] - rgb[rows, (top + 2) % 3]
  sextant = 2 * top + gap / np.where(spread > 0, spread, 1)
  return np.where(spread > 0, sextant / 6 % 1, 0)
