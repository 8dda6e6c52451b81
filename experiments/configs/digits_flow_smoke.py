"""`digits_flow` small enough for a test: seconds on two CPU cores."""

import dataclasses

from giantsteps.experiments.configs import digits_flow
from giantsteps.experiments.harness import config
from giantsteps.models import mlp


def get_config() -> config.Config:
  """An MLP, 300 steps, a checkpoint every 20."""
  return dataclasses.replace(
    digits_flow.get_config(),
    model=mlp.Config(),
    steps=300,
    batch_size=128,
    steps_per_dispatch=5,
    log_every=1,
    eval_every=100,
    checkpoint_every=20,
  )
