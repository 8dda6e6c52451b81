"""Causal LaCT on 256 bytes of source code at a time, its attention sees 8."""

from giantsteps.experiments.harness import config
from giantsteps.models import lact


def get_config() -> config.Config:
  """Short convolutions, momentum inside, Muon outside."""
  return config.Config(
    task="autoregressive",
    model=lact.Config(
      vocab_size=256,
      width=64,
      depth=2,
      num_heads=2,
      fast_heads=1,
      mlp_width=256,
      causal=True,
      window=8,
      chunk_size=8,
      muon=False,
      momentum=True,
      rate=1e-2,
      qk_norm=True,
      short_conv=4,
      unroll=2,
    ),
    data=config.Data(source="stdlib", seq_len=256),
    optim=config.Optim(
      name="muon",
      learning_rate=0.02,
      adam_learning_rate=0.01,
      b2=0.99,
      weight_decay=0.0,
      schedule="linear",
      warmup=50,
    ),
    steps=1_500,
    batch_size=32,
    steps_per_dispatch=10,
    ema_decay=0.99,
    log_every=20,
    eval_every=1_500,
    checkpoint_every=1_500,
  )
