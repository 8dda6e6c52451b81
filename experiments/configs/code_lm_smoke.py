"""`code_lm` small enough for a test: seconds on two CPU cores."""

import dataclasses

from giantsteps.experiments.configs import code_lm_quickstart
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """One narrow layer, 40 steps."""
  cfg = code_lm_quickstart.get_config()
  return dataclasses.replace(
    cfg,
    model=dataclasses.replace(cfg.model, width=64, depth=1, mlp_width=128),
    steps=40,
    batch_size=16,
    eval_every=40,
    checkpoint_every=20,
  )
