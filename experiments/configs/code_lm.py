"""Masked diffusion with LaCT layers on the bytes of Python's standard library;
15 minutes on two CPU cores."""

from giantsteps.experiments.harness import config
from giantsteps.models import lact


def get_config() -> config.Config:
  """Bidirectional LaCT with short convolutions, trained with Muon."""
  return config.Config(
    task="masked",
    model=lact.Config(
      width=192,
      depth=4,
      num_heads=3,
      fast_heads=3,
      mlp_width=576,
      qk_norm=True,
      short_conv=5,
      muon=False,
      remat="none",
      unroll=4,
    ),
    data=config.Data(source="stdlib", seq_len=128),
    optim=config.Optim(
      name="muon",
      learning_rate=0.02,
      adam_learning_rate=0.01,
      b2=0.99,
      weight_decay=0.0,
      schedule="linear",
      warmup=80,
    ),
    steps=3_400,
    batch_size=16,
    steps_per_dispatch=20,
    ema_decay=0.99,
    log_every=20,
    eval_every=850,
    checkpoint_every=850,
  )
