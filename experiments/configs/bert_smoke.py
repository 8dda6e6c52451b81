"""Two blocks of BERT-large, for compile_for_pod on sixteen chips in seconds.

Every matrix is above 4 MiB: the compiler turns smaller scatters into full
all-reduces."""

from giantsteps.experiments.harness import config
from giantsteps.models import transformer


def get_config() -> config.Config:
  """2 bidirectional blocks of width 1024, 64 rows of 128 tokens."""
  return config.Config(
    task="masked",
    model=transformer.Config(
      vocab_size=4_096,
      width=1_024,
      depth=2,
      num_heads=16,
      num_kv_heads=16,
      head_dim=64,
      mlp_width=2_816,
      causal=False,
      tie_embeddings=True,
      remat="full",
      dtype="bfloat16",
    ),
    data=config.Data(source="stdlib", seq_len=128),
    optim=config.Optim(
      name="lamb",
      learning_rate=1.25e-3,
      schedule="linear",
      warmup=10,
      weight_decay=0.01,
      shards=16,
    ),
    steps=100,
    batch_size=64,
    ema_decay=0.0,
    checkpoint_every=100,
  )
