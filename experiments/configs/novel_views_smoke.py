"""`novel_views` small enough for a test: half a minute of one CPU core."""

import dataclasses

from giantsteps.experiments.configs import novel_views
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """Two narrow blocks, five pictures of 8x8 pixels, 300 steps."""
  cfg = novel_views.get_config()
  return dataclasses.replace(
    cfg,
    model=dataclasses.replace(
      cfg.model, patch=4, width=32, depth=2, heads=1, fast_heads=1, unroll=1
    ),
    data=dataclasses.replace(cfg.data, views=5, side=8),
    steps=300,
    batch_size=8,
    steps_per_dispatch=5,
    log_every=5,
    checkpoint_every=100,
  )
