"""Masked-diffusion losses against LLaDA's values and exact enumeration."""
# pyright: reportCallIssue=false

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research.diffusion_lm import masked_diffusion

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/decoding"
with np.load(GOLDEN / "losses.npz", allow_pickle=False) as file:
  EXPECTED = json.loads(str(file["expected"]))
  MASK = int(file["mask_id"])
  LOSSES = {k: file[k] for k in file if file[k].ndim}
KEY = jax.random.key(5)
corrupt = jax.jit(masked_diffusion.corrupt, static_argnums=3)
pretrain_loss = jax.jit(masked_diffusion.pretrain_loss)
sft_loss = jax.jit(masked_diffusion.sft_loss)


class GoldenTest(parameterized.TestCase):
  def test_corruption_and_pretraining(self):
    noisy, masked, probability = corrupt(
      LOSSES["ids"], LOSSES["t"], LOSSES["u"], MASK
    )
    np.testing.assert_array_equal(masked, LOSSES["masked"])
    np.testing.assert_array_equal(noisy, LOSSES["noisy"])
    np.testing.assert_allclose(probability, LOSSES["p_mask"], rtol=1e-6)
    loss = pretrain_loss(LOSSES["logits"], LOSSES["ids"], masked, probability)
    np.testing.assert_allclose(loss, EXPECTED["pretrain_loss"], rtol=2e-6)

  def test_fine_tuning(self):
    lengths = LOSSES["prompt_lengths"]
    noisy, masked, probability = corrupt(
      LOSSES["ids"], LOSSES["t"], LOSSES["u"], MASK, prompt_lengths=lengths
    )
    np.testing.assert_array_equal(noisy, LOSSES["noisy_sft"])
    for i, n in enumerate(lengths):
      self.assertFalse(masked[i, :n].any())
    loss = sft_loss(
      LOSSES["logits"], LOSSES["ids"], masked, probability, lengths
    )
    np.testing.assert_allclose(loss, EXPECTED["sft_loss"], rtol=2e-6)

  def test_likelihood_strata(self):
    for case in json.loads((GOLDEN / "likelihood_strata.json").read_text()):
      got = masked_diffusion.likelihood_strata(
        case["k"], case["batch"], case["target_len"]
      )
      self.assertEqual(got.tolist(), case["masked_counts"])


class ShiftTest(parameterized.TestCase):
  """A model that scores token i + 1 at i, such as Dream."""

  def setUp(self):
    rng = np.random.default_rng(0)
    self.logits = rng.standard_normal((3, 7, 5))
    self.tokens = rng.integers(5, size=(3, 7))
    self.p = rng.uniform(0.1, 1, (3, 7))
    self.lengths = np.array([1, 3, 5])
    after = np.arange(7)[None] >= self.lengths[:, None]
    self.masked = (rng.uniform(size=(3, 7)) < 0.6) & after

  def test_pretraining_and_fine_tuning_pair_by_pair(self):
    pretrain, sft = 0.0, 0.0
    for b, i in np.argwhere(self.masked):
      row = self.logits[b, i - 1]  # the output before the token
      nats = np.log(np.exp(row).sum()) - row[self.tokens[b, i]]
      pretrain += nats / self.p[b, i] / (3 * 6)
      sft += nats / self.p[b, i] / (7 - self.lengths[b]) / 3
    with jax.enable_x64(True):
      logits, tokens, masked, p, lengths = map(
        jnp.asarray,
        (self.logits, self.tokens, self.masked, self.p, self.lengths),
      )
      got = masked_diffusion.pretrain_loss(
        logits, tokens, masked, p, shift=True
      )
      np.testing.assert_allclose(got, pretrain, rtol=1e-12)
      got = masked_diffusion.sft_loss(
        logits, tokens, masked, p, lengths, shift=True
      )
      np.testing.assert_allclose(got, sft, rtol=1e-12)

  def test_is_the_unshifted_loss_of_logits_that_are_moved(self):
    moved = np.concatenate([self.logits[:, :1], self.logits[:, :-1]], 1)
    rest = [jnp.asarray(x) for x in (self.tokens, self.masked, self.p)]
    lengths = jnp.asarray(self.lengths)
    got = masked_diffusion.sft_loss(
      jnp.asarray(self.logits), *rest, lengths, shift=True
    )
    want = masked_diffusion.sft_loss(jnp.asarray(moved), *rest, lengths)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    got = masked_diffusion.pretrain_loss(
      jnp.asarray(self.logits), *rest, shift=True
    )
    want = masked_diffusion.pretrain_loss(jnp.asarray(moved), *rest)
    # of 7 tokens 6 are predicted
    np.testing.assert_allclose(got, want * 7 / 6, rtol=1e-6)

  def test_the_first_token_does_not_count(self):
    first = jnp.arange(7)[None] == 0
    masked = jnp.broadcast_to(first, (3, 7))
    arrays = map(jnp.asarray, (self.logits, self.tokens, masked, self.p))
    self.assertEqual(masked_diffusion.pretrain_loss(*arrays, shift=True), 0)


class CorruptTest(parameterized.TestCase):
  def test_every_time_masks_its_share(self):
    t = np.array([0.0, 0.25, 0.9], np.float32)
    u = jax.random.uniform(KEY, (3, 100_000))
    tokens = jnp.zeros(u.shape, jnp.int32)
    masked = corrupt(tokens, jnp.asarray(t), u, 7, eps=0.01)[1]
    p = 0.99 * t + 0.01
    np.testing.assert_array_less(
      np.abs(masked.mean(-1) - p), 4 * np.sqrt(p * (1 - p) / 1e5)
    )

  def test_times_are_uniform_and_evenly_spread(self):
    draw = jax.vmap(lambda k: masked_diffusion.stratified_times(k, 8))
    times = np.asarray(draw(jax.random.split(KEY, 2000)))
    strata = np.sort(times, -1) * 8 - np.arange(8)
    self.assertTrue(((strata >= -1e-5) & (strata < 1 + 1e-5)).all())
    counts = np.histogram(times[:, 3], 10, (0, 1))[0]
    self.assertLess(((counts - 200) ** 2 / 200).sum(), 33.7)  # 9 df, 1e-4

  def test_shapes_are_checked(self):
    tokens = jnp.zeros((2, 5), jnp.int32)
    with self.assertRaisesRegex(ValueError, r"t \(3,\)"):
      masked_diffusion.corrupt(tokens, jnp.zeros(3), jnp.zeros((2, 5)), 7)


def joint(length, vocab):
  """A random law over all sequences: [V] * L float64."""
  rng = np.random.default_rng(6)
  p = rng.dirichlet(np.full(vocab**length, 0.3))
  return p.reshape((vocab,) * length)


def conditionals(p, tokens):
  """log p(token_i | unmasked), -1 = masked: the model that knows the law."""
  given = tuple(slice(None) if x < 0 else slice(x, x + 1) for x in tokens)
  rest = p[given]
  out = np.zeros((len(tokens), p.shape[0]))
  for i, x in enumerate(tokens):
    axes = tuple(j for j in range(len(tokens)) if j != i)
    marginal = rest.sum(axes)
    out[i] = np.log(marginal / marginal.sum()) if x < 0 else 0
  return out


class BoundTest(parameterized.TestCase):
  """L = 3, V = 2, MASK = 2: every masked sequence has a row in a table."""

  def setUp(self):
    super().setUp()
    self.p = joint(3, 2)
    table = np.zeros((3, 3, 3, 3, 2))
    for tokens in itertools.product(range(3), repeat=3):
      seen = [-1 if x == 2 else x for x in tokens]
      table[tokens] = conditionals(self.p, seen)
    self.table = jnp.asarray(table, jnp.float32)

  def forward(self, noisy):
    return self.table[noisy[:, 0], noisy[:, 1], noisy[:, 2]]

  def estimate(self, tokens, num_samples, **options):
    run = jax.jit(
      lambda tokens: masked_diffusion.negative_log_likelihood_bound(
        self.forward,
        tokens,
        KEY,
        mask_token=2,
        num_samples=num_samples,
        **options,
      )
    )
    return np.asarray(run(tokens))

  def test_perfect_model_gives_the_exact_likelihood(self):
    # The chain rule holds in every order, so the bound is tight.
    tokens = np.array([[0, 1, 1], [1, 1, 0], [0, 0, 0]], np.int32)
    exact = -np.log([self.p[tuple(row)] for row in tokens]) / 3
    got = self.estimate(tokens, 20_000)
    np.testing.assert_allclose(got, exact, atol=0.02)
    bits = self.estimate(tokens, 20_000, unit="bits")
    np.testing.assert_allclose(bits, got / np.log(2), rtol=1e-5)

  def test_scored_positions_are_conditional(self):
    tokens = np.array([[0, 1, 1], [1, 1, 0]], np.int32)
    scored = np.array([[False, True, True], [False, False, False]])
    exact = -np.log(self.p[0, 1, 1] / self.p[0].sum()) / 2
    got = self.estimate(tokens, 20_000, scored=jnp.asarray(scored))
    np.testing.assert_allclose(got, [exact, 0], atol=0.02)

  def test_counts_are_uniform_for_every_row(self):
    # Cross entropy replaced by 1 where all three are masked: P = 1/3 each.
    def forward(noisy):
      full = jnp.all(noisy == 2, -1)
      first = jnp.where(full, np.log(np.expm1(1)), -1e9)[:, None, None]
      other = jnp.zeros_like(first)
      logits = jnp.concatenate([other, first], -1)
      return jnp.broadcast_to(logits, (*noisy.shape, 2))

    one = lambda key: masked_diffusion.negative_log_likelihood_bound(
      forward, jnp.zeros((4, 3), jnp.int32), key, mask_token=2
    )
    got = jax.jit(jax.vmap(one))(jax.random.split(KEY, 6000))
    np.testing.assert_allclose(got.mean(0), 1 / 3, atol=4 * 0.471 / 6000**0.5)
    # and stratified: a third of the circle holds 1 or 2 of 4 even points
    full = np.asarray(got).sum(-1).round()
    self.assertTrue(((full == 1) | (full == 2)).all())

  def test_exact_count_mask(self):
    scored = np.random.default_rng(0).random((50, 9)) < 0.6
    counts = np.minimum(np.arange(50) % 6, scored.sum(-1))
    masked = jax.jit(masked_diffusion.exact_count_mask)(KEY, counts, scored)
    np.testing.assert_array_equal(masked.sum(-1), counts)
    self.assertFalse((masked & ~scored).any())

  def test_errors(self):
    tokens = jnp.zeros((1, 3), jnp.int32)
    with self.assertRaisesRegex(ValueError, "unit='bytes'"):
      self.estimate(tokens, 1, unit="bytes")
    with self.assertRaisesRegex(ValueError, "num_samples=0"):
      self.estimate(tokens, 0)
    with self.assertRaisesRegex(ValueError, r"scored \(1, 2\)"):
      self.estimate(tokens, 1, scored=jnp.ones((1, 2), bool))


class LossTest(parameterized.TestCase):
  def test_loss_and_bound_agree_for_one_text(self):
    # E over t of the loss (eps -> 0) is the bound of likelihood per token.
    rng = np.random.default_rng(8)
    weights = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)

    def forward(noisy):
      h = jax.nn.one_hot(noisy, 6).sum(1, keepdims=True) @ weights[None]
      return jnp.broadcast_to(h, (*noisy.shape, 6))

    tokens = jnp.asarray(rng.integers(5, size=(1, 4)))

    @jax.jit
    def both(key):
      many = jnp.broadcast_to(tokens, (40_000, 4))
      a, b, c = jax.random.split(key, 3)
      t = masked_diffusion.stratified_times(a, len(many))
      u = jax.random.uniform(b, many.shape)
      noisy, masked, p = masked_diffusion.corrupt(many, t, u, 5, eps=1e-4)
      loss = masked_diffusion.pretrain_loss(forward(noisy), many, masked, p)
      bound = masked_diffusion.negative_log_likelihood_bound(
        forward, many, c, mask_token=5
      )
      return loss, jnp.mean(bound)

    loss, bound = both(KEY)
    # Differences: sampling error, and eps times a bounded loss.
    np.testing.assert_allclose(loss, bound, rtol=0.02)

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_half_precision_logits_are_widened(self, dtype):
    logits = jnp.asarray(LOSSES["logits"], dtype)
    got = masked_diffusion.cross_entropy(logits, LOSSES["ids"])
    self.assertEqual(got.dtype, jnp.float32)
    want = masked_diffusion.cross_entropy(
      logits.astype(jnp.float32), LOSSES["ids"]
    )
    np.testing.assert_array_equal(got, want)

  def test_strict_promotion_and_nan_debugging(self):
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
      arrays = {k: jnp.asarray(v) for k, v in LOSSES.items()}
      noisy, masked, p = corrupt(arrays["ids"], arrays["t"], arrays["u"], MASK)
      del noisy
      pretrain_loss(arrays["logits"], arrays["ids"], masked, p)


if __name__ == "__main__":
  absltest.main()
