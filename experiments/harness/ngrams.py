"""Byte n-grams with interpolated backoff: what a model has to beat.

Witten-Bell smoothing (1991; method C of Bell, Cleary and Witten) in the form
of Chen and Goodman (1999), section 2.4: with N(c) occurrences of context c,
D(c) different bytes after it, and c' the context without its oldest byte,

  p(b | c) = (N(c b) + D(c) p(b | c')) / (N(c) + D(c)),

and p(b | c') where c was never seen; below no context stands 1/256. It has
nothing to tune, and one pass gives every order. (Kneser-Ney is 0.00, 0.01, 0.02
bits better at orders 1, 2, 3 and 0.1 at order 5 on Python source.)

Counts are differences of positions in sorted arrays of integers: 11 MB of
text and orders up to 5 take seconds.
"""

import numpy as np

from giantsteps.experiments.harness import data

MAX_ORDER = 6  # seven bytes, shifted by one more, still fit into 64 bits
WINDOW = 256  # bytes per window of the standard error


def held_out_bits(dataset: data.Dataset, max_order: int) -> list[dict]:
  """Bits per byte of the held-out split for orders 0 .. max_order.

  The rows of each split are joined in their order, so that a byte at the
  start of a row has the bytes before it as context, as in running text.

  Args:
    dataset: rows of bytes, tokens in 0..255.
    max_order: bytes of context of the largest model.

  Returns:
    One dict per order: order, bits_per_byte, its standard_error over windows
    of 256 bytes, bytes.

  Raises:
    ValueError: for images, tokens above 255, max_order outside 0..6.
  """
  if dataset.kind != "tokens":
    raise ValueError(f"n-grams need tokens, these rows are {dataset.kind!r}")
  bits = bits_by_order(_text(dataset.train), _text(dataset.held_out), max_order)
  return [
    {
      "order": order,
      "bits_per_byte": float(row.mean()),
      "standard_error": standard_error(row),
      "bytes": len(row),
    }
    for order, row in enumerate(bits)
  ]


def bits_by_order(
  train: np.ndarray, held_out: np.ndarray, max_order: int
) -> np.ndarray:
  """-log2 p of every held-out byte given the k bytes before it, k = 0, 1, ..

  Both texts are continuous. The first k held-out bytes have less context
  than k: they get the order they have bytes for.

  Args:
    train: [N] uint8.
    held_out: [M] uint8, M >= 1.
    max_order: K in 0..6. Memory is about 24 N bytes.

  Returns:
    [K + 1, M] float64; row k belongs to order k.

  Raises:
    ValueError: for another dtype or shape, or K.
  """
  for text in (train, held_out):
    if text.ndim != 1 or text.dtype != np.uint8 or not len(text):
      raise ValueError(
        f"text {text.dtype}{list(text.shape)}: expected uint8 [N], N >= 1"
      )
  if not 0 <= max_order <= MAX_ORDER:
    raise ValueError(f"max_order={max_order}: must be in 0..{MAX_ORDER}")
  p = np.full(len(held_out), 1 / 256)
  bits = np.empty((max_order + 1, len(held_out)))
  for order in range(max_order + 1):
    if min(len(train), len(held_out)) > order:
      p[order:] = _interpolate(train, held_out, order, p[order:])
    bits[order] = -np.log2(p)
  return bits


def standard_error(bits: np.ndarray, window: int = WINDOW) -> float:
  """Of the mean of bits [M], over windows: neighbouring bytes are dependent.

  What does not fill a window is left out; fewer than two windows give nan.
  """
  count = len(bits) // window
  if count < 2:
    return float("nan")
  means = bits[: count * window].reshape(count, window).mean(1)
  return float(means.std(ddof=1) / np.sqrt(count))


def _interpolate(
  train: np.ndarray, held_out: np.ndarray, order: int, lower: np.ndarray
) -> np.ndarray:
  """p of held_out[order:] from p of the order below, both [M - order]."""
  grams = np.sort(_codes(train, order + 1))
  kinds = grams[np.append(True, grams[1:] != grams[:-1])]
  asked, place = np.unique(_codes(held_out, order + 1), return_inverse=True)
  context = asked - asked % 256  # the first gram with this context
  together = _count(grams, asked, 1)  # N(c b)
  total = _count(grams, context, 256)  # N(c)
  different = _count(kinds, context, 256)  # D(c)
  together, total, different = (x[place] for x in (together, total, different))
  smoothed = (together + different * lower) / np.maximum(total + different, 1)
  return np.where(total > 0, smoothed, lower)


def _codes(text: np.ndarray, size: int) -> np.ndarray:
  """Every run of `size` bytes as one number: [N] -> [N - size + 1] uint64."""
  count = len(text) - size + 1
  code = np.zeros(count, np.uint64)
  for i in range(size):
    code = code * np.uint64(256) + text[i : i + count]
  return code


def _count(values: np.ndarray, start: np.ndarray, width: int) -> np.ndarray:
  """How many of the sorted values lie in [start, start + width)."""
  end = start + np.uint64(width)
  return np.searchsorted(values, end) - np.searchsorted(values, start)


def _text(split: data.Split) -> np.ndarray:
  tokens = split.read(np.arange(split.num_rows))["tokens"].ravel()
  if tokens.min() < 0 or tokens.max() > 255:
    raise ValueError(
      f"tokens in {tokens.min()}..{tokens.max()}: n-grams need bytes, 0..255"
    )
  return tokens.astype(np.uint8)
