"""The tasks of masked diffusion against their losses, called by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import tasks
from giantsteps.models import transformer
from giantsteps.research import large_batch
from giantsteps.research.diffusion_lm import block_diffusion, masked_diffusion

KEY = jax.random.key(2)
LENGTH, SIZE, MASK = 16, 4, 30
CONFIG = config_lib.Config(
  task="masked",
  model=transformer.Config(
    vocab_size=MASK + 1,
    width=16,
    depth=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=16,
    causal=False,
  ),
  data=config_lib.Data(source="stdlib", seq_len=LENGTH),
)
DESCRIPTION = {"kind": "tokens"}
BATCH = {"tokens": jax.random.randint(KEY, (6, LENGTH), 0, MASK)}


def made(block_size=0, shifted=False, **changes):
  cfg = dataclasses.replace(
    CONFIG,
    block_size=block_size,
    model=dataclasses.replace(CONFIG.model, shifted=shifted),
    **changes,
  )
  config_lib.validate(cfg)
  return cfg, tasks.build(cfg, DESCRIPTION)


class MaskedTaskTest(parameterized.TestCase):
  @parameterized.product(block_size=[0, 1, SIZE], shifted=[False, True])
  def test_counts_of_masked_tokens(self, block_size, shifted):
    _, task = made(block_size, shifted)
    draw = jax.jit(task.corrupt)
    size, seen = block_size or LENGTH, set()
    for seed in range(20):
      arrays = draw(BATCH, jax.random.key(seed))
      masked = np.asarray(arrays["masked"])
      tokens = np.where(masked, MASK, BATCH["tokens"])
      np.testing.assert_array_equal(arrays["noisy"], tokens)
      split = lambda x: np.asarray(x).reshape(-1, size)
      total = split(np.arange(6 * LENGTH) % LENGTH >= shifted).sum(1)
      count = split(masked).sum(1)
      self.assertFalse(shifted and masked[:, 0].any())
      # one or more wherever there is something to predict; p is the share
      np.testing.assert_array_equal(count > 0, total > 0)
      some = total > 0
      np.testing.assert_allclose(
        split(arrays["p"])[some],
        (count / np.maximum(total, 1))[some, None] * np.ones(size),
        rtol=1e-6,
      )
      seen |= set(count[total == size])
    if block_size or not shifted:  # else no row has all its tokens scored
      self.assertEqual(seen, set(range(1, size + 1)))

  def test_rates_are_clipped(self):
    _, task = made(SIZE, rate_low=0.25, rate_high=0.75)
    counts = set()
    for seed in range(20):
      masked = task.corrupt(BATCH, jax.random.key(seed))["masked"]
      counts |= set(np.asarray(masked).reshape(-1, SIZE).sum(1).tolist())
    self.assertEqual(counts, {2, 3})  # a share of a quarter to three quarters

  @parameterized.product(block_size=[0, SIZE], shifted=[False, True])
  def test_loss(self, block_size, shifted):
    cfg, task = made(block_size, shifted)
    params, arrays = task.init(KEY), task.corrupt(BATCH, KEY)
    masked, p = arrays["masked"], arrays["p"]
    model = transformer.bind(cfg.model, params)
    if block_size:
      outputs = model.outputs(
        *block_diffusion.doubled(arrays["noisy"], BATCH["tokens"], SIZE)
      )
      want = block_diffusion.loss(
        outputs,
        model.head,
        BATCH["tokens"],
        masked,
        p,
        block_size=SIZE,
        shift=shifted,
      )
    else:
      logits = transformer.logits(cfg.model, params, arrays["noisy"])
      want = masked_diffusion.pretrain_loss(
        logits, BATCH["tokens"], masked, p, shift=shifted
      )
    got = jax.jit(task.loss)(params, arrays)
    np.testing.assert_allclose(got, want, rtol=1e-6)

  @parameterized.product(block_size=[0, SIZE], shifted=[False, True])
  def test_a_model_that_knows_nothing_costs_log_v(self, block_size, shifted):
    _, task = made(block_size, shifted, rate_low=0.25, rate_high=0.75)
    params = task.init(KEY)
    params = {**params, "head": jnp.zeros_like(params["head"])}
    said = jax.jit(task.evaluate)(params, BATCH, KEY)
    bits, want = said["held_out_bits_per_byte"], np.log2(MASK + 1)
    np.testing.assert_allclose(bits, want, rtol=1e-5)

  def test_experts_are_balanced_over_both_halves(self):
    cfg, _ = made()
    cfg = dataclasses.replace(
      cfg,
      block_size=SIZE,
      model=dataclasses.replace(cfg.model, num_experts=2, experts_per_token=1),
    )
    task = tasks.build(cfg, DESCRIPTION)
    params, arrays = task.init(KEY), task.corrupt(BATCH, KEY)
    without = tasks.build(
      dataclasses.replace(cfg, balance_weight=0.0), DESCRIPTION
    )
    tokens, place, mask = block_diffusion.doubled(
      arrays["noisy"], BATCH["tokens"], SIZE
    )
    _, load = transformer.hidden_and_load(
      cfg.model, params, tokens, None, place, mask
    )
    want = cfg.balance_weight * large_batch.micro_batch_loss(load, 1).sum()
    added = jax.jit(task.loss)(params, arrays) - without.loss(params, arrays)
    np.testing.assert_allclose(added, want, atol=2e-6)  # of losses of about 4
    self.assertEqual(load.counts.sum(), 6 * 2 * LENGTH)


if __name__ == "__main__":
  absltest.main()
