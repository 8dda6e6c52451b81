"""Text measures against a model whose law is known: independent bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.experiments.harness import data, text_quality

V, MASK, T = 5, 4, 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unigram:
  """Every position has the same logits, whatever it sees."""

  log_p: jax.Array  # [V]

  @property
  def head(self):
    return self.log_p[None]  # [1, V]

  def forward(self, tokens, positions=None, cache=None):
    return jnp.ones((*tokens.shape, 1)), cache


def model():
  # a tenth of the mass on MASK, which must never be predicted
  p = np.array([0.5, 0.2, 0.15, 0.05, 0.1])
  return Unigram(jnp.log(jnp.asarray(p, jnp.float32))), p


def rows(n):
  return np.random.default_rng(0).integers(0, 4, (n, T)).astype(np.int32)


def test_left_to_right_nll_of_independent_bytes():
  unigram, p = model()
  tokens = rows(6)
  masked = text_quality.random_mask(6, T, 0.5, seed=1)
  assert (masked.sum(1) == 6).all()
  nll = text_quality.left_to_right_nll(
    unigram, jnp.asarray(tokens), jnp.asarray(masked), MASK, 6
  )
  q = p[:4] / p[:4].sum()
  expected = -(np.log(q)[tokens] * masked).sum(1)
  np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_fill_curve_from_all_at_once_to_one_per_step():
  unigram, p = model()
  tokens = rows(8)
  masked = text_quality.gap_mask(8, T, 4)
  assert masked[:, 4:8].all() and masked.sum() == 32
  # byte 0 has probability 5/9 without MASK: .5 commits it everywhere, .6 never
  curve, results = text_quality.fill_curve(
    unigram, tokens, masked, MASK, thresholds=(0.5, 0.6)
  )
  agreement = (tokens[:, 4:8] == 0).mean()
  for row, per_forward in zip(curve, (4, 1, 1), strict=True):
    assert row["tokens_per_forward"] == per_forward
    np.testing.assert_allclose(row["agreement"], agreement)
    np.testing.assert_allclose(
      row["nll_per_token"], -np.log(0.5 / 0.9), rtol=1e-5
    )
    assert row["agreement_change"] == 0 and row["paired_error"] == 0
  assert curve[-1]["threshold"] == "one per step"
  np.testing.assert_array_equal(results[0].committed_at[:, 4:8], 0)


def test_autoregressive_bits_of_independent_bytes():
  unigram, p = model()
  text = rows(40)
  split = data.Split(40, lambda i: {"tokens": text[i]})
  dataset = data.Dataset(split, split, "tokens", {})
  out = text_quality.autoregressive_bits(unigram, dataset, batch=7)
  stream = text.ravel()
  counted = stream[T // 2 :]  # the first half window is context only
  np.testing.assert_allclose(
    out["bits_per_byte"], -np.log2(p)[counted].mean(), rtol=1e-5
  )
  assert out["bytes"] == len(counted)


def test_windows_are_spread_and_never_more_than_there_are():
  text = rows(40)
  split = data.Split(40, lambda i: {"tokens": text[i]})
  dataset = data.Dataset(split, split, "tokens", {})
  assert len(text_quality.windows(dataset, 100)) == 40
  np.testing.assert_array_equal(
    text_quality.windows(dataset, 3), text[[0, 19, 39]]
  )
