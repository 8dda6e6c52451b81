"""Associative recall: 32 keys, 128 pairs in chunks of 16 pairs; two minutes on
one CPU core."""

from giantsteps.experiments.harness import config
from giantsteps.models import lact


def get_config() -> config.Config:
  """A causal LaCT whose attention sees one chunk, Muon inside."""
  return config.Config(
    task="autoregressive",
    model=lact.Config(
      vocab_size=64,
      width=64,
      depth=2,
      num_heads=2,
      fast_heads=2,
      mlp_width=128,
      causal=True,
      window=32,
      chunk_size=32,
      rate=1e-2,
      qk_norm=True,
      short_conv=4,
      unroll=2,
    ),
    data=config.Data(source="recall:32", seq_len=256),
    optim=config.Optim(
      name="muon",
      learning_rate=0.02,
      adam_learning_rate=0.01,
      b2=0.99,
      weight_decay=0.0,
      schedule="linear",
      warmup=50,
    ),
    steps=400,
    batch_size=16,
    steps_per_dispatch=10,
    log_every=20,
    eval_every=200,
    checkpoint_every=200,
  )
