"""Byte n-grams against counting by hand and in plain Python."""

import collections
import time

import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.experiments.harness import data, ngrams


def text_of(content):
  return np.frombuffer(content, np.uint8)


def plain(train, context, byte):
  """Witten-Bell by its recursion, one context at a time."""
  after = collections.Counter(
    train[i + len(context)]
    for i in range(len(train) - len(context))
    if train[i : i + len(context)] == context
  )
  lower = plain(train, context[1:], byte) if context else 1 / 256
  total, different = after.total(), len(after)
  if not total:
    return lower
  return (after[byte] + different * lower) / (total + different)


class NgramTest(parameterized.TestCase):
  def test_by_hand(self):
    # abab: a 2, b 2, two kinds: p(a) = p(b) = (2 + 2/256) / 6.
    # After a: b 2, one kind: p(b|a) = (2 + p(b)) / 3; a|a: p(a) / 3.
    got = 2 ** -ngrams.bits_by_order(text_of(b"abab"), text_of(b"abaac"), 1)
    a, c = (2 + 2 / 256) / 6, (2 / 256) / 6
    np.testing.assert_allclose(got[0], [a, a, a, a, c], rtol=1e-12)
    want = [a, (2 + a) / 3, (1 + a) / 2, a / 3, c / 3]
    np.testing.assert_allclose(got[1], want, rtol=1e-12)

  def test_against_plain_python(self):
    rng = np.random.default_rng(0)
    train, held_out = (
      bytes(rng.integers(4, size=n).astype(np.uint8)) for n in (300, 80)
    )
    held_out += b"\xff\x00\xff"  # never seen, at both ends of the alphabet
    got = 2 ** -ngrams.bits_by_order(text_of(train), text_of(held_out), 6)
    for order in range(7):
      for i, byte in enumerate(held_out):
        context = held_out[max(i - order, 0) : i]
        np.testing.assert_allclose(
          got[order, i], plain(train, context, byte), rtol=1e-12
        )

  @parameterized.parameters(0, 2, 5)
  def test_sums_to_one(self, order):
    rng = np.random.default_rng(1)
    train = rng.choice(256, size=4000, p=rng.dirichlet(np.full(256, 0.1)))
    train = train.astype(np.uint8)
    for context in (train[50 : 50 + order], train[7 : 7 + order] // 2):
      rows = [np.append(context, b).astype(np.uint8) for b in range(256)]
      total = sum(
        2.0 ** -ngrams.bits_by_order(train, row, order)[order, -1]
        for row in rows
      )
      self.assertAlmostEqual(total, 1, places=9)

  def test_order_zero_is_the_smoothed_histogram(self):
    rng = np.random.default_rng(2)
    train = rng.integers(16, size=50_000).astype(np.uint8)
    p = (np.bincount(train, minlength=16) + 16 / 256) / (len(train) + 16)
    frequency = np.bincount(train, minlength=16) / len(train)
    bits = ngrams.bits_by_order(train, train, 0)[0]
    want = -(frequency * np.log2(p)).sum()
    self.assertAlmostEqual(bits.mean(), want, places=10)
    entropy = -(frequency * np.log2(frequency)).sum()
    self.assertBetween(bits.mean() - entropy, 0, 0.001)

  def test_more_context_finds_the_rule(self):
    # Every byte is determined by the two before it.
    train = text_of(b"aabaacbbc" * 400)
    bits = ngrams.bits_by_order(train, text_of(b"aabaacbbc" * 30), 2)
    self.assertGreater(bits[0].mean(), 1.5)
    self.assertGreater(bits[1].mean(), 0.8)
    self.assertLess(bits[2, 9:].mean(), bits[1].mean())

  def test_dataset_rows_are_running_text(self):
    rng = np.random.default_rng(3)
    train, held_out = (
      rng.integers(5, size=(n, 16)).astype(np.int32) for n in (90, 64)
    )
    dataset = data.Dataset(
      *(
        data.Split(len(x), lambda i, x=x: {"tokens": x[i]})
        for x in (train, held_out)
      ),
      kind="tokens",
      description={},
    )
    rows = ngrams.held_out_bits(dataset, max_order=2)
    bits = ngrams.bits_by_order(
      train.ravel().astype(np.uint8), held_out.ravel().astype(np.uint8), 2
    )
    self.assertEqual([row["order"] for row in rows], [0, 1, 2])
    for row, want in zip(rows, bits, strict=True):
      self.assertAlmostEqual(row["bits_per_byte"], want.mean())
      means = want.reshape(4, 256).mean(1)
      self.assertAlmostEqual(row["standard_error"], means.std(ddof=1) / 2)
      self.assertEqual(row["bytes"], 1024)

  def test_eleven_megabytes_take_seconds(self):
    rng = np.random.default_rng(4)
    text = rng.geometric(0.1, size=11_000_000).clip(0, 255).astype(np.uint8)
    start = time.process_time()
    ngrams.bits_by_order(text, text[:500_000], 1)
    self.assertLess(time.process_time() - start, 15)

  def test_errors(self):
    text = text_of(b"abc")
    with self.assertRaisesRegex(ValueError, "max_order=7"):
      ngrams.bits_by_order(text, text, 7)
    with self.assertRaisesRegex(ValueError, r"int64\[3\]"):
      ngrams.bits_by_order(text.astype(np.int64), text, 2)
    split = data.Split(1, lambda i: {"tokens": np.full((1, 8), 256)})
    with self.assertRaisesRegex(ValueError, "256..256"):
      ngrams.held_out_bits(data.Dataset(split, split, "tokens", {}), 1)
    with self.assertRaisesRegex(ValueError, "'image'"):
      ngrams.held_out_bits(data.Dataset(split, split, "image", {}), 1)


if __name__ == "__main__":
  absltest.main()
