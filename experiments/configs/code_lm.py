"""Masked diffusion with LaCT layers on the bytes of Python's standard library;
15 minutes on two CPU cores."""

from giantsteps.experiments.harness import config
from giantsteps.models import lact


def get_config() -> config.Config:
  """Bidirectional LaCT with short convolutions, trained with Muon."""
  return config.Config(
    task="masked",
    model=lact.Config(
      width=256,
      depth=4,
      num_heads=4,
      fast_heads=4,
      mlp_width=768,
      short_conv=5,
    ),
    data=config.Data(source="stdlib", seq_len=128),
    optim=config.Optim(name="muon", learning_rate=1e-2, warmup=50),
    steps=2_000,
    batch_size=64,
    steps_per_dispatch=10,
    ema_decay=0.99,
    log_every=10,
    eval_every=200,
    checkpoint_every=200,
  )
