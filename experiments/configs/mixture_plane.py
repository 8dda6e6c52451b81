"""A flow map of a Gaussian mixture in the plane, whose exact velocity is known."""

import dataclasses

from giantsteps.experiments.configs import checkerboard
from giantsteps.experiments.harness import config
from giantsteps.models import plain_mlp


def get_config() -> config.Config:
  """As `checkerboard`, with a smaller network."""
  return dataclasses.replace(
    checkerboard.get_config(),
    model=plain_mlp.Config(width=128, depth=3),
    data=config.Data(source="mixture:2"),
  )
