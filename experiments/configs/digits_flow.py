"""Flow matching on the 8x8 handwritten digits of scikit-learn, large-batch
LAMB; about a minute on two CPU cores."""

from giantsteps.experiments.harness import config
from giantsteps.models import dit


def get_config() -> config.Config:
  """The digits of the quickstart."""
  return config.Config(
    task="flow",
    model=dit.Config(patch=4, width=128, depth=3, heads=2, num_classes=10),
    data=config.Data(source="digits"),
    optim=config.Optim(
      name="lamb", learning_rate=0.02, warmup=60, b2=0.99, weight_decay=0.01
    ),
    steps=600,
    batch_size=512,
    steps_per_dispatch=20,
    ema_decay=0.98,
    log_every=10,
    eval_every=120,
    checkpoint_every=240,
  )
