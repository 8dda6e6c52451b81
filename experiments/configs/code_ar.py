"""Autoregressive byte model of Python's standard library; 15 minutes on two
CPU cores."""

from giantsteps.experiments.harness import config
from giantsteps.models import transformer


def get_config() -> config.Config:
  """A causal transformer with short convolutions, trained with Muon."""
  return config.Config(
    task="autoregressive",
    model=transformer.Config(
      width=192,
      depth=4,
      num_heads=3,
      num_kv_heads=3,
      head_dim=64,
      mlp_width=576,
      causal=True,
      qk_norm=True,
      short_conv=4,
      remat="dots",
    ),
    data=config.Data(source="stdlib", seq_len=256),
    optim=config.Optim(
      name="muon",
      learning_rate=0.02,
      adam_learning_rate=0.01,
      b2=0.99,
      weight_decay=0.0,
      schedule="linear",
      warmup=80,
    ),
    steps=3_300,
    batch_size=8,
    steps_per_dispatch=20,
    ema_decay=0.99,
    log_every=20,
    eval_every=1_100,
    checkpoint_every=1_100,
  )
