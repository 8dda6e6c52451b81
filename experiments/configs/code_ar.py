"""Autoregressive byte model of Python's standard library; 15 minutes on two
CPU cores."""

from giantsteps.experiments.harness import config
from giantsteps.models import transformer


def get_config() -> config.Config:
  """A causal transformer with short convolutions, trained with Muon."""
  return config.Config(
    task="autoregressive",
    model=transformer.Config(
      width=256,
      depth=4,
      num_heads=4,
      num_kv_heads=4,
      head_dim=64,
      mlp_width=768,
      causal=True,
      short_conv=4,
    ),
    data=config.Data(source="stdlib", seq_len=256),
    optim=config.Optim(name="muon", learning_rate=1e-2, warmup=50),
    steps=2_000,
    batch_size=32,
    steps_per_dispatch=10,
    ema_decay=0.99,
    log_every=10,
    eval_every=200,
    checkpoint_every=200,
  )
