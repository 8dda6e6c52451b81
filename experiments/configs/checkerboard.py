"""A flow map of the checkerboard, the plane's problem of the flow-map papers:
their network and optimizer, a smaller batch and 2,500 steps instead of 250,000
(arXiv:2505.18825)."""

from giantsteps.experiments.harness import config
from giantsteps.models import plain_mlp


def get_config() -> config.Config:
  """The Lagrangian loss; `--set flow_map.loss=..` for the others."""
  return config.Config(
    task="flow",
    model=plain_mlp.Config(),
    data=config.Data(source="checkerboard"),
    optim=config.Optim(
      name="radam",
      learning_rate=1e-3,
      schedule="inverse_sqrt",
      eps=1e-8,
      weight_decay=0.0,
      clip_norm=10.0,
    ),
    flow_map=config.FlowMap(loss="lagrangian"),
    steps=2_500,
    batch_size=1024,
    steps_per_dispatch=25,
    checkpoint_every=500,
  )
