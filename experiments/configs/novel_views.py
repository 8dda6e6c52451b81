"""LaCT on views of rendered scenes: unseen views from 1 to 16 given ones.

32x32 pixels, four blocks, about seven minutes of one CPU core. The paper's
model is `model.width=768 model.depth=24 model.heads=12 model.fast_heads=1`, on
photographs of 256x256 pixels and more: nobody has run it here.
"""

from giantsteps.experiments.harness import config
from giantsteps.models import lact_views


def get_config() -> config.Config:
  """Small enough for one core."""
  return config.Config(
    task="views",
    model=lact_views.Config(
      patch=8,
      width=128,
      depth=4,
      heads=2,
      fast_heads=2,
      remat_write=False,
      unroll=4,
    ),
    data=config.Data(source="scenes", views=20, side=32),
    optim=config.Optim(
      name="muon",
      learning_rate=0.02,
      adam_learning_rate=0.003,
      b2=0.99,
      weight_decay=0.0,
      schedule="linear",
      warmup=40,
    ),
    steps=1_000,
    batch_size=5,
    steps_per_dispatch=5,
    ema_decay=0.98,
    log_every=10,
    checkpoint_every=100,
  )
