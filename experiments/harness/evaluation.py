"""Distances between sets of samples, honest without an Inception network.

A number is named for what it is: `fd_digitsnet64` is the Frechet distance of 64
features of a digit classifier trained here, not an FID. On raw pixels a fitted
Gaussian beats real held-out images, so beside a Frechet distance always stand
the floor (real held-out images, equal counts), that control
(`fitted_gaussian`) and the distance to the nearest training image, since
copies of the training set fall below the floor. All of it is float64 NumPy on
the host.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

_BLOCK = 256  # rows whose distances to all others are held at a time


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
  """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)).

  The distance of the Gaussians with the moments of x and y (Heusel et al.,
  arXiv:1706.08500, eq. 6). Its bias falls as 1/n: compare equal counts only.

  Args:
    x: [N, ...], N >= 2; trailing axes are one vector.
    y: [M, ...], M >= 2.

  Returns:
    The squared distance, covariances with the divisor N - 1.

  Raises:
    ValueError: for other shapes.
  """
  x, y = _rows(x, y, least=2)
  c_x, c_y = _covariance(x), _covariance(y)
  # (C_x C_y)^(1/2) has the trace of the symmetric (C_x^1/2 C_y C_x^1/2)^1/2.
  values, vectors = np.linalg.eigh(c_x)
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c_y @ root), 0)).sum()
  mean = np.sum((x.mean(0) - y.mean(0)) ** 2)
  return float(mean + np.trace(c_x) + np.trace(c_y) - 2 * cross)


def sliced_wasserstein(
  x: np.ndarray, y: np.ndarray, directions: np.ndarray, order: int = 2
) -> float:
  """Mean over directions of the 1-D Wasserstein distance^order, to 1/order.

  In one dimension the optimal coupling sorts both sides (Bonneel et al. 2015).

  Args:
    x, y: [N, ...], equal shapes; trailing axes are one vector of D.
    directions: [P, D], unit vectors, used as they are.
    order: 1 or 2 as a rule.

  Raises:
    ValueError: for other shapes.
  """
  x, y = _rows(x, y)
  if len(x) != len(y):
    raise ValueError(f"unequal counts {len(x)} and {len(y)}: drop some rows")
  directions = np.asarray(directions, np.float64)
  if directions.ndim != 2 or directions.shape[1] != x.shape[1]:
    raise ValueError(f"directions {directions.shape}: not [P, {x.shape[1]}]")
  gap = np.sort(x @ directions.T, 0) - np.sort(y @ directions.T, 0)
  return float(np.mean(np.abs(gap) ** order) ** (1 / order))


def mmd2(
  x: np.ndarray,
  y: np.ndarray,
  kernel: Literal["rbf", "poly3"] = "rbf",
  bandwidth: float | None = None,
) -> float:
  """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3).

  Args:
    x: [N, ...], N >= 2; trailing axes are one vector of D.
    y: [M, ...], M >= 2.
    kernel: "rbf", exp(-|a - b|^2 / (2 bandwidth^2)), or "poly3",
      (a.b / D + 1)^3, the kernel of KID (arXiv:1801.01401).
    bandwidth: of "rbf", in the unit of x.

  Returns:
    The estimate; it may be negative.

  Raises:
    ValueError: for other shapes, an unknown kernel, or "rbf" without a
      positive bandwidth.
  """
  x, y = _rows(x, y, least=2)
  if kernel == "rbf":
    if bandwidth is None or not bandwidth > 0:
      raise ValueError(f"bandwidth={bandwidth}: rbf needs a positive one")
    k = lambda a, b: np.exp(-_squared_distance(a, b) / (2 * bandwidth**2))
  elif kernel == "poly3":
    k = lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3
  else:
    raise ValueError(f"kernel={kernel!r}: choose rbf or poly3")

  def within(a):  # the mean over pairs of different rows
    gram = k(a, a)
    return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

  return float(within(x) + within(y) - 2 * k(x, y).mean())


def nearest_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Distance of each row of x to the nearest row of y; memorised rows: 0.

  Args:
    x: [N, ...]; trailing axes are one vector.
    y: [M, ...], the training set.

  Returns:
    [N] float64.
  """
  x, y = _rows(x, y)
  parts = [_squared_distance(rows, y).min(1) for rows in _blocks(x)]
  return np.sqrt(np.concatenate(parts))


def precision_recall(
  real: np.ndarray, generated: np.ndarray, k: int = 5
) -> tuple[float, float]:
  """How much of `generated` lies near `real`, and the other way.

  Of each set, a ball about every row that reaches to its k-th nearest other
  row; precision is the share of generated rows within a ball of the real ones,
  recall with the sets exchanged (Kynkaanniemi et al., arXiv:1904.06991, eq. 1
  and 2). In blocks of rows: memory N times 256, not N M D.

  Args:
    real: [N, ...], N > k; trailing axes are one vector.
    generated: [M, ...], M > k; compare equal counts only.
    k: 5 as a rule; 3 in the paper.

  Raises:
    ValueError: for other shapes or k.
  """
  if k < 1:
    raise ValueError(f"k={k} must be at least 1")
  x, y = _rows(real, generated, least=k + 1)
  return _covered(y, x, k), _covered(x, y, k)


def histogram_entropy(labels: np.ndarray, num_classes: int) -> float:
  """Entropy of the class histogram in nats; log(num_classes) if balanced.

  Args:
    labels: [N] integers in [0, num_classes), as a classifier gives them.
    num_classes: K.

  Raises:
    ValueError: for no labels, or labels outside.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
    raise ValueError(f"labels {labels.shape} {labels.dtype}: not [N] integers")
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(
      f"labels {labels.min()} to {labels.max()}: not in 0..{num_classes - 1}"
    )
  p = np.bincount(labels, minlength=num_classes) / len(labels)
  p = p[p > 0]
  return float(-np.sum(p * np.log(p)))


def record(
  train: np.ndarray,
  held_out: np.ndarray,
  generated: np.ndarray,
  features: Callable[[np.ndarray], np.ndarray],
  feature_net: Mapping[str, Any],
  *,
  seed: int = 0,
  num_directions: int = 256,
) -> dict[str, Any]:
  """Distances of generated images from held-out ones, with both controls.

  Every distance is measured three times, at equal counts n = min of the three:
  of the generated images, of real training images (`floor`), and of a Gaussian
  fitted to the training images' pixels (`fitted_gaussian`). All are against the
  first n held-out images.

  Args:
    train, held_out, generated: [N, ...] images, N >= 6; the first n are used,
      but memorisation is looked for in all of `train`.
    features: [n, ...] -> [n, F].
    feature_net: its name under "features" and "weights_sha256", as
      `digits_features` returns; it is kept whole.
    seed: of the directions and the fitted Gaussian.
    num_directions: of the sliced distance, on pixels.

  Returns:
    n_ref, n_gen, seed, feature_net, and for generated, floor and
    fitted_gaussian: fd_<net>, mmd2_<net> (poly3, unbiased), precision, recall
    (k = 5, on features), swd_pixel, fd_pixel and nearest_train, the median
    distance to the nearest training image; nearest_train_held_out is its
    control, far below which there are copies. It is None for the floor.

  Raises:
    ValueError: if the net's name or hash is missing.
  """
  for key in ("features", "weights_sha256"):
    if not feature_net.get(key):
      raise ValueError(f"feature_net={dict(feature_net)}: {key!r} is missing")
  net = feature_net["features"]
  n = min(len(train), len(held_out), len(generated))
  reference = np.asarray(held_out[:n])
  known = features(reference)
  size = int(np.prod(reference.shape[1:]))
  directions = np.random.default_rng(seed).normal(size=(num_directions, size))
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  nearest = lambda x: float(np.median(nearest_distance(x, train)))

  def against(images: np.ndarray) -> dict[str, Any]:
    there = features(images)
    precision, recall = precision_recall(known, there)
    return {
      f"fd_{net}": frechet_distance(there, known),
      f"mmd2_{net}": mmd2(there, known, "poly3"),
      "precision": precision,
      "recall": recall,
      "swd_pixel": sliced_wasserstein(images, reference, directions),
      "fd_pixel": frechet_distance(images, reference),
    }

  made = np.asarray(generated[:n])
  control = fitted_gaussian(train, n, seed)
  return {
    "n_ref": n,
    "n_gen": n,
    "seed": seed,
    "feature_net": dict(feature_net),
    "generated": against(made) | {"nearest_train": nearest(made)},
    "floor": against(np.asarray(train[:n])) | {"nearest_train": None},
    "fitted_gaussian": against(control) | {"nearest_train": nearest(control)},
    "nearest_train_held_out": nearest(reference),
  }


def fitted_gaussian(reference: np.ndarray, n: int, seed: int) -> np.ndarray:
  """Draws n rows from the Gaussian with the moments of `reference`.

  The control beside a Frechet distance: a metric that prefers these rows to
  real held-out ones measures moments, not images.

  Args:
    reference: [M, ...], M >= 2.
    n: rows to draw.
    seed: of NumPy's generator.

  Returns:
    [n, ...] float64.
  """
  flat, _ = _rows(reference, reference, least=2)
  values, vectors = np.linalg.eigh(_covariance(flat))
  noise = np.random.default_rng(seed).standard_normal((n, flat.shape[1]))
  out = flat.mean(0) + noise * np.sqrt(np.maximum(values, 0)) @ vectors.T
  return out.reshape(n, *np.shape(reference)[1:])


def digits_features(
  train: Mapping[str, np.ndarray],
  held_out: Mapping[str, np.ndarray],
  seed: int = 0,
) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
  """The features of fd_digitsnet64: the ReLU units of a small classifier.

  scikit-learn's MLPClassifier with one hidden layer of 64, trained on `train`
  alone, about a second; the same seed gives the same weights on one machine.

  Args:
    train: "image" [N, ...] float in [-1, 1] and "label" [N] int, the training
      half.
    held_out: likewise the other half; only the accuracy is measured on it.
    seed: of initialisation and shuffling.

  Returns:
    features: [N, ...] images -> [N, 64] float64.
    record: name, seed, counts, accuracy on `held_out`, sha256 of the weights;
      it belongs beside every number made with these features.

  Raises:
    ModuleNotFoundError: if scikit-learn is not installed.
  """
  try:
    from sklearn import exceptions, neural_network
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "digits_features needs scikit-learn: pip install '.[demo]'"
    ) from error
  flat = lambda images: np.asarray(images, np.float64).reshape(len(images), -1)
  epochs = 300
  net = neural_network.MLPClassifier(
    (64,),
    batch_size=64,  # pyright: ignore[reportArgumentType]
    max_iter=epochs,
    n_iter_no_change=epochs,  # all of them: no early end that hangs on a tie
    random_state=seed,
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
    net.fit(flat(train["image"]), train["label"])
  accuracy = net.score(flat(held_out["image"]), held_out["label"])
  weights = [np.asarray(a) for a in (*net.coefs_, *net.intercepts_)]
  digest = hashlib.sha256(b"".join(a.tobytes() for a in weights))
  kernel, bias = net.coefs_[0], net.intercepts_[0][None]
  features = lambda images: np.maximum(flat(images) @ kernel + bias, 0)
  record = {
    "features": "digitsnet64",
    "seed": seed,
    "n_train": len(train["label"]),
    "n_held_out": len(held_out["label"]),
    "held_out_accuracy": float(accuracy),
    "weights_sha256": digest.hexdigest(),
  }
  return features, record


def _rows(x, y, least=1) -> tuple[np.ndarray, np.ndarray]:
  """Both as [N, D] float64, D equal."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if x.ndim < 2 or x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < least:
    raise ValueError(
      f"x {x.shape}, y {y.shape}: not [N, ...] and [M, ...] with equal"
      f" trailing axes and at least {least} rows"
    )
  return x.reshape(len(x), -1), y.reshape(len(y), -1)


def _blocks(x: np.ndarray) -> list[np.ndarray]:
  return np.split(x, range(_BLOCK, len(x), _BLOCK))


def _covered(x: np.ndarray, y: np.ndarray, k: int) -> float:
  """Share of rows of x within the k-neighbour ball of some row of y."""
  # a row is its own nearest: its k-th other one is at place k
  reach = [np.partition(_squared_distance(b, y), k)[:, k] for b in _blocks(y)]
  radius = np.concatenate(reach)[None]
  inside = [(_squared_distance(b, y) <= radius).any(1) for b in _blocks(x)]
  return float(np.concatenate(inside).mean())


def _covariance(x: np.ndarray) -> np.ndarray:
  centred = x - x.mean(0, keepdims=True)
  return centred.T @ centred / (len(x) - 1)


def _squared_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """[N, D], [M, D] -> [N, M]; sums of squares, free of cancellation.

  |a|^2 + |b|^2 - 2 a.b would lose half the digits for near copies.
  """
  out = np.zeros((len(x), len(y)))
  for a, b in zip(x.T, y.T, strict=True):
    out += (a[:, None] - b[None]) ** 2
  return out
