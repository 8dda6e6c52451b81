"""`code_ar` small enough for a test: seconds on two CPU cores."""

import dataclasses

from giantsteps.experiments.configs import code_ar
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """Two narrow layers, 40 steps."""
  cfg = code_ar.get_config()
  return dataclasses.replace(
    cfg,
    model=dataclasses.replace(
      cfg.model,
      width=64,
      depth=2,
      num_heads=2,
      num_kv_heads=2,
      head_dim=32,
      mlp_width=128,
    ),
    data=dataclasses.replace(cfg.data, seq_len=128),
    steps=40,
    batch_size=16,
    steps_per_dispatch=5,
    log_every=5,
    eval_every=40,
    checkpoint_every=20,
  )
