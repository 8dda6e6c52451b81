"""LaCT language model of 3 billion parameters: `lact_760m` twice as wide."""

import dataclasses

from giantsteps.experiments.configs import lact_760m
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """24 blocks of width 3072, four fast heads of 768."""
  base = lact_760m.get_config()
  model = dataclasses.replace(base.model, width=3_072, mlp_width=8_192)
  return dataclasses.replace(base, model=model)
