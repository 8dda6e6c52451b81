"""Block diffusion in one pass against the decoder's cached pass, block by block,
and its two limits: autoregression and plain masked diffusion."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.models import transformer
from giantsteps.research.diffusion_lm import block_diffusion, masked_diffusion

KEY = jax.random.key(3)
LENGTH, MASK = 6, 40
CONFIG = transformer.Config(
  vocab_size=41,
  width=16,
  depth=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_width=24,
  causal=False,
  qk_norm=True,
  dtype="float64",
  param_dtype="float64",
)


@functools.cache
def params(config):
  tokens = jnp.zeros((1, LENGTH), jnp.int32)
  return jax.jit(transformer.Transformer(config).init)(KEY, tokens)["params"]


def bound(**changes):
  config = dataclasses.replace(CONFIG, **changes)
  return transformer.bind(config, params(config))


def rows(seed=0, count=2, share=0.6):
  """Clean and noisy rows and what is masked, token 0 given."""
  rng = np.random.default_rng(seed)
  clean = rng.integers(MASK, size=(count, LENGTH)).astype(np.int32)
  masked = rng.uniform(size=clean.shape) < share
  masked[:, 0] = False
  noisy = np.where(masked, MASK, clean)
  return jnp.asarray(clean), jnp.asarray(noisy), jnp.asarray(masked)


@functools.partial(jax.jit, static_argnums=3)
def trained(model, noisy, clean, block_size):
  """What training scores the tokens with: [B, L, D]."""
  outputs = model.outputs(*block_diffusion.doubled(noisy, clean, block_size))
  return block_diffusion.scoring(outputs, block_size, shift=model.shift)


@functools.partial(jax.jit, static_argnums=3)
def decoded(model, noisy, clean, block_size):
  """What a decoder sees: every block with the keys of the clean ones before it,
  which it reads once more when they are final."""
  batch, length = clean.shape
  cache, shift = model.init_cache(batch, length), int(model.shift)
  found = []
  for start in range(0, length, block_size):
    # with shift from one before the block, as `samplers.decoding` does
    low = max(start - shift, 0)
    place = jnp.arange(low, start + block_size)
    limits = (place // block_size + 1) * block_size
    before = clean[:, low:start]
    now = jnp.concatenate([before, noisy[:, start : start + block_size]], 1)
    call = lambda tokens, cache, place=place, limits=limits: model.extend(
      tokens,
      jnp.broadcast_to(place[None], tokens.shape),
      cache,
      jnp.broadcast_to(limits[None], tokens.shape),
    )
    hidden, _ = call(now, cache)
    _, cache = call(clean[:, low : start + block_size], cache)
    if shift and not start:
      hidden = jnp.concatenate([hidden[:, :1], hidden], 1)
    found.append(hidden[:, :block_size])
  return jnp.concatenate(found, 1)


class MaskTest(parameterized.TestCase):
  @parameterized.parameters((6, 1), (6, 2), (6, 3), (6, 6), (10, 5))
  def test_pair_by_pair(self, length, size):
    place = np.arange(2 * length)
    got = block_diffusion.Visible(length, size)(place[:, None], place[None])
    for i, j in itertools.product(range(length), repeat=2):
      same, before = i // size == j // size, j // size < i // size
      self.assertEqual(got[i, j], same)  # noisy, noisy
      self.assertEqual(got[i, length + j], before)  # noisy, clean
      self.assertEqual(got[length + i, length + j], same or before)
      self.assertFalse(got[length + i, j])

  def test_is_a_value(self):  # programs are kept by it
    a, b = block_diffusion.Visible(6, 2), block_diffusion.Visible(6, 2)
    self.assertEqual(hash(a), hash(b))
    self.assertNotEqual(a, block_diffusion.Visible(6, 3))


class ModelTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, True, "float64"),
    (3, False, "float64"),
    (3, True, "float64"),
    (3, True, "float32"),
    (6, False, "float32"),
  )
  def test_training_sees_what_the_decoder_sees(self, block_size, shift, dtype):
    with jax.enable_x64(dtype == "float64"):
      model = bound(shifted=shift, dtype=dtype, param_dtype=dtype)
      clean, noisy, _ = rows()
      got = trained(model, noisy, clean, block_size)
      want = decoded(model, noisy, clean, block_size)
      self.assertEqual(got.dtype, dtype)
      # position 0 of a shifted model has been predicted by nothing
      np.testing.assert_allclose(
        got[:, shift:],
        want[:, shift:],
        rtol=0,
        atol=1e-10 if dtype == "float64" else 1e-5,
      )

  @parameterized.parameters(1, 3)
  def test_nothing_leaks(self, size):
    # every place has a token of its own: the gradient of a row of the embedding
    # is that of a place, zero to the bit where it cannot be seen
    config = dataclasses.replace(
      CONFIG, vocab_size=2 * LENGTH, dtype="float32", param_dtype="float32"
    )
    noisy, clean = jnp.arange(2 * LENGTH).reshape(2, 1, LENGTH)
    weight = jax.random.normal(KEY, (1, size, CONFIG.width))

    @jax.jit
    def gradient(params, start):
      def score(params):
        model = transformer.bind(config, params)
        hidden = trained(model, noisy, clean, size)
        own = jax.lax.dynamic_slice_in_dim(hidden, start, size, 1)
        return jnp.sum(weight * own)

      found = jax.grad(score)(params)["embed"]["embedding"]
      return jnp.any(found != 0, -1).reshape(2, LENGTH)

    for start in range(0, LENGTH, size):
      of_noisy, of_clean = np.asarray(gradient(params(config), start))
      place = np.arange(LENGTH)
      own = (place >= start) & (place < start + size)
      np.testing.assert_array_equal(of_noisy, own)
      np.testing.assert_array_equal(of_clean, place < start)

  def test_bad_rows(self):
    clean = jnp.zeros((1, 12), jnp.int32)
    with self.assertRaisesRegex(
      ValueError, "block_size=5: a divisor of the 12"
    ):
      block_diffusion.doubled(clean, clean, 5)
    with self.assertRaisesRegex(ValueError, r"noisy \(1, 11\)"):
      block_diffusion.doubled(clean[:, 1:], clean, 4)
    for changes in ({"causal": True}, {"window": 4}, {"short_conv": 3}):
      network = transformer.Transformer(dataclasses.replace(CONFIG, **changes))
      tokens, place, mask = block_diffusion.doubled(clean, clean, 4)
      init = functools.partial(network.init, KEY, mask=mask)
      with self.assertRaisesRegex(ValueError, "a mask is for full attention"):
        jax.eval_shape(init, tokens, place)


@functools.partial(jax.jit, static_argnums=5)
def loss(model, clean, noisy, masked, probability, block_size):
  outputs = model.outputs(*block_diffusion.doubled(noisy, clean, block_size))
  return block_diffusion.loss(
    outputs,
    model.head,
    clean,
    masked,
    probability,
    block_size=block_size,
    shift=model.shift,
  )


class LossTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_one_block_is_masked_diffusion(self, shift):
    with jax.enable_x64(True):
      model = bound(shifted=shift)
      clean, noisy, masked = rows(1)
      p = jnp.asarray(np.random.default_rng(2).uniform(0.1, 1, clean.shape))
      plain = transformer.logits(model.module.config, model.params, noisy)
      want = masked_diffusion.pretrain_loss(
        plain, clean, masked, p, shift=shift
      )
      got = loss(model, clean, noisy, masked, p, LENGTH)
      np.testing.assert_allclose(got, want, rtol=1e-12)

  def test_blocks_of_one_are_autoregression_in_expectation(self):
    with jax.enable_x64(True):
      model, size = bound(), 4
      clean = rows(4)[0][:1, :size]
      # a token, MASK for it, from those before it: in rows of their own
      nats = 0
      for i in range(size):
        row = clean[:, : i + 1].at[:, i].set(MASK)
        place = jnp.arange(i + 1)[None]
        hidden, _ = model.extend(row, place, None, place + 1)
        logits = transformer.project(hidden[0, i], model.head)
        nats -= jax.nn.log_softmax(logits)[clean[0, i]]
      # all 16 masks with their probabilities
      masked = jnp.asarray(list(itertools.product([True, False], repeat=size)))
      many = jnp.repeat(clean, 16, 0)
      noisy = jnp.where(masked, MASK, many)
      for rate in (0.3, 1.0):
        p = jnp.full(masked.shape, rate)
        weight = jnp.prod(jnp.where(masked, rate, 1 - rate), 1)
        each = jax.vmap(lambda *row: loss(model, *(x[None] for x in row), 1))(
          many, noisy, masked, p
        )
        np.testing.assert_allclose(weight @ each, nats / size, rtol=1e-12)

  def test_shifted_blocks_of_one_are_the_causal_model(self):
    with jax.enable_x64(True):
      clean = rows(5)[0]
      masked = jnp.ones(clean.shape, bool).at[:, 0].set(False)
      noisy = jnp.where(masked, MASK, clean)
      p = jnp.ones(clean.shape)
      got = loss(bound(shifted=True), clean, noisy, masked, p, 1)
      causal = dataclasses.replace(CONFIG, causal=True)
      logits = transformer.logits(causal, params(CONFIG), clean[:, :-1])
      chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), clean[:, 1:, None], -1
      )
      np.testing.assert_allclose(got, -jnp.mean(chosen), rtol=1e-12)


class CorruptTest(parameterized.TestCase):
  def test_one_block_is_that_of_rows(self):
    tokens = jnp.arange(24).reshape(2, 12)
    t, u = jnp.array([0.2, 0.7]), jax.random.uniform(KEY, (2, 12))
    want = masked_diffusion.corrupt(tokens, t, u, MASK)
    got = block_diffusion.corrupt(tokens, t[:, None], u, MASK)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)

  def test_every_block_masks_its_share(self):
    t = np.array([[0.0, 0.5, 0.99]], np.float32)
    u = jax.random.uniform(KEY, (1, 90_000))
    tokens = jnp.zeros(u.shape, jnp.int32)
    noisy, masked, p = block_diffusion.corrupt(
      tokens, jnp.asarray(t), u, 7, (0.3, 0.8)
    )
    np.testing.assert_array_equal(noisy, np.where(masked, 7, 0))
    want = np.array([0.3, 0.55, 0.795])
    share = np.asarray(masked).reshape(3, -1).mean(-1)
    # 4 standard deviations: 2e-4 for the three
    self.assertTrue(
      (abs(share - want) < 4 * np.sqrt(want * (1 - want) / 3e4)).all()
    )
    np.testing.assert_allclose(p[0, ::30_000], want, rtol=1e-6)

  def test_times_are_spread_in_rows_and_in_all(self):
    times = np.asarray(block_diffusion.stratified_times(KEY, 5, 4))
    self.assertEqual(times.shape, (5, 4))
    spread = np.sort(times.ravel()) * 20 - np.arange(20)
    self.assertTrue(((spread >= -1e-5) & (spread < 1 + 1e-5)).all())
    apart = np.diff(np.sort(times, 1), axis=1)
    np.testing.assert_allclose(apart, 0.25, atol=1e-6)

  def test_bad_shapes_and_rates(self):
    tokens = jnp.zeros((2, 12), jnp.int32)
    with self.assertRaisesRegex(ValueError, r"t \(2, 5\)"):
      block_diffusion.corrupt(tokens, jnp.zeros((2, 5)), jnp.zeros((2, 12)), 7)
    for rates in ((0.0, 1.0), (0.5, 0.4), (0.5, 1.1)):
      with self.assertRaisesRegex(ValueError, "rates=.*beta <= omega"):
        block_diffusion.corrupt(
          tokens, jnp.zeros((2, 3)), jnp.zeros((2, 12)), 7, rates
        )


class ClippedRatesTest(parameterized.TestCase):
  def test_the_quiet_interval_is_found(self):
    rates = np.linspace(0.01, 1, 100)
    noise = np.where(np.arange(100) % 2, 1.0, -1.0)
    losses = 2 + noise * ~((rates > 0.295) & (rates < 0.805))
    # 0.5 wide and quiet is [0.3, 0.8] alone
    self.assertEqual(
      block_diffusion.clipped_rates(rates, losses, (0.5, 0.7, 1.0)), (0.3, 0.8)
    )

  def test_of_equals_the_widest(self):
    rates = np.linspace(0.01, 1, 100)
    self.assertEqual(
      block_diffusion.clipped_rates(rates, np.ones(100)), (0.0, 1.0)
    )

  def test_no_rates(self):
    with self.assertRaisesRegex(ValueError, "holds two"):
      block_diffusion.clipped_rates(np.array([0.5]), np.array([1.0]))


if __name__ == "__main__":
  absltest.main()
