"""Flow matching on the 8x8 handwritten digits of scikit-learn, large-batch
LAMB; about a minute on two CPU cores."""

from giantsteps.experiments.harness import config
from giantsteps.models import dit


def get_config() -> config.Config:
  """The digits of the quickstart."""
  return config.Config(
    task="flow",
    model=dit.Config(),
    data=config.Data(source="digits"),
    optim=config.Optim(name="lamb", learning_rate=1e-2, warmup=50),
    steps=1_000,
    batch_size=512,
    steps_per_dispatch=20,
    ema_decay=0.995,
    log_every=10,
    checkpoint_every=200,
  )
