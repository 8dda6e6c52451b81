"""What a loss trains is what the decoder decodes: a model that knows one text by
heart writes it down, whatever scores a token and with every exact cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from giantsteps.models import transformer
from giantsteps.research.diffusion_lm import block_diffusion, masked_diffusion
from giantsteps.samplers import decoding

LENGTH, MASK = 12, 12
TEXT = jnp.asarray(np.random.default_rng(0).permutation(LENGTH), jnp.int32)
ROWS = 8


def loss_of(config, block_size):
  """(params, key) -> loss of rows of the text with token 0 given."""
  clean = jnp.broadcast_to(TEXT[None], (ROWS, LENGTH))
  given = jnp.ones(ROWS, jnp.int32)

  def rows(params, key):
    time, place = jax.random.split(key)
    noisy, masked, p = masked_diffusion.corrupt(
      clean,
      masked_diffusion.stratified_times(time, ROWS),
      jax.random.uniform(place, clean.shape),
      MASK,
      prompt_lengths=given,
    )
    logits = transformer.logits(config, params, noisy)
    return masked_diffusion.pretrain_loss(
      logits, clean, masked, p, shift=config.shifted
    )

  def answers(params, key):
    time, place = jax.random.split(key)
    lengths = jnp.arange(ROWS) % 4 + 1
    noisy, masked, p = masked_diffusion.corrupt(
      clean,
      masked_diffusion.stratified_times(time, ROWS),
      jax.random.uniform(place, clean.shape),
      MASK,
      prompt_lengths=lengths,
    )
    logits = transformer.logits(config, params, noisy)
    return masked_diffusion.sft_loss(
      logits, clean, masked, p, lengths, shift=config.shifted
    )

  def blocks(params, key):
    time, place = jax.random.split(key)
    t = block_diffusion.stratified_times(time, ROWS, LENGTH // block_size)
    noisy, masked, p = block_diffusion.corrupt(
      clean, t, jax.random.uniform(place, clean.shape), MASK
    )
    noisy, masked = noisy.at[:, 0].set(TEXT[0]), masked.at[:, 0].set(False)
    model = transformer.bind(config, params)
    outputs = model.outputs(*block_diffusion.doubled(noisy, clean, block_size))
    return block_diffusion.loss(
      outputs,
      model.head,
      clean,
      masked,
      p,
      block_size=block_size,
      shift=model.shift,
    )

  return {"rows": rows, "answers": answers, "blocks": blocks}


@functools.cache
def trained(kind, shifted, block_size):
  config = transformer.Config(
    vocab_size=LENGTH + 1,
    width=32,
    depth=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_width=64,
    causal=False,
    shifted=shifted,
  )
  loss = loss_of(config, block_size)[kind]
  tx = optax.adam(optax.cosine_decay_schedule(1e-2, 300))

  @jax.jit
  def run(key):
    init = transformer.Transformer(config).init
    params = init(key, TEXT[None])["params"]

    def step(state, key):
      params, moments = state
      value, grads = jax.value_and_grad(loss)(params, key)
      updates, moments = tx.update(grads, moments)
      return (optax.apply_updates(params, updates), moments), value

    keys = jax.random.split(key, 300)
    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params, losses

  params, losses = run(jax.random.key(1))
  return transformer.bind(config, params), np.asarray(losses)


class OverfitTest(parameterized.TestCase):
  @parameterized.parameters(("answers", True, 12), ("blocks", True, 4))
  def test_the_text_is_written_down(self, kind, shifted, block_size):
    self.check(kind, shifted, block_size)

  @parameterized.parameters(
    ("rows", False, 12), ("rows", True, 12), ("blocks", False, 4)
  )
  @pytest.mark.slow
  def test_by_other_losses_too(self, kind, shifted, block_size):
    self.check(kind, shifted, block_size)

  def check(self, kind, shifted, block_size):
    model, losses = trained(kind, shifted, block_size)
    # a blind guess costs log 12 = 2.5 nats
    self.assertLess(losses[-20:].mean(), 0.1)
    masked = np.arange(LENGTH)[None] >= 1
    caches = [("none", {}), ("refresh", {"refresh_every": 1})]
    if kind == "blocks":
      caches += [("block", {})]
    for cache, options in caches:
      result = decoding.fill(
        model,
        np.where(masked, 0, TEXT[None]),
        masked,
        rule=decoding.top_n(LENGTH),
        mask_token=MASK,
        block_size=block_size,
        block_causal=kind == "blocks",
        cache=cache,
        **options,
      )
      np.testing.assert_array_equal(result.tokens[0], TEXT)


if __name__ == "__main__":
  absltest.main()
