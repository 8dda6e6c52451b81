"""`code_lm` as the quickstart trains it: under a minute on two CPU cores."""

import dataclasses

from giantsteps.experiments.configs import code_lm
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """Two layers; no better than one byte of context, which is enough to see
  what parallel decoding costs."""
  cfg = code_lm.get_config()
  return dataclasses.replace(
    cfg,
    model=dataclasses.replace(
      cfg.model, width=128, depth=2, mlp_width=256, num_heads=2, fast_heads=2
    ),
    steps=400,
    batch_size=16,
    steps_per_dispatch=10,
    log_every=5,
    eval_every=100,
    checkpoint_every=200,
  )
