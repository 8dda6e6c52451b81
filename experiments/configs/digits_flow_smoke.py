"""`digits_flow` small enough for a test: seconds on two CPU cores."""

import dataclasses

from giantsteps.experiments.configs import digits_flow
from giantsteps.experiments.harness import config
from giantsteps.models import mlp


def get_config() -> config.Config:
  """An MLP, 60 steps, a checkpoint every 10."""
  return dataclasses.replace(
    digits_flow.get_config(),
    model=mlp.Config(),
    steps=60,
    batch_size=128,
    steps_per_dispatch=5,
    log_every=1,
    eval_every=20,
    checkpoint_every=10,
  )
