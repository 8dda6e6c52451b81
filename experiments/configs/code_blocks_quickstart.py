"""`code_blocks` in about a minute on two CPU cores, for the notebook."""

import dataclasses

from giantsteps.experiments.configs import code_blocks
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """Two layers, rows of 128 bytes."""
  cfg = code_blocks.get_config()
  return dataclasses.replace(
    cfg,
    model=dataclasses.replace(
      cfg.model,
      width=128,
      depth=2,
      num_heads=2,
      num_kv_heads=2,
      mlp_width=256,
      remat="none",
    ),
    data=dataclasses.replace(cfg.data, seq_len=128),
    steps=400,
    batch_size=16,
    steps_per_dispatch=10,
    log_every=20,
    eval_every=200,
    checkpoint_every=200,
  )
