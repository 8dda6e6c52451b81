"""`code_blocks` small enough for a test: seconds on two CPU cores."""

import dataclasses

from giantsteps.experiments.configs import code_ar_smoke, code_blocks
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """Two narrow layers, 40 steps."""
  cfg, small = code_blocks.get_config(), code_ar_smoke.get_config()
  model = dataclasses.replace(
    small.model, vocab_size=257, causal=False, short_conv=0
  )
  return dataclasses.replace(
    small, task="masked", model=model, block_size=cfg.block_size
  )
