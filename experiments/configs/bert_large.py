"""BERT-large size: a masked language model of 340 million parameters with the
LAMB recipe of arXiv:1904.00962 and the update shared by 256 chips. Nobody has
trained it here; it is compiled for the pod by compile_for_pod."""

from giantsteps.experiments.harness import config
from giantsteps.models import transformer


def get_config() -> config.Config:
  """24 bidirectional blocks of width 1024, 2048 rows of 512 tokens."""
  return config.Config(
    task="masked",
    model=transformer.Config(
      vocab_size=30_720,
      width=1_024,
      depth=24,
      num_heads=16,
      num_kv_heads=16,
      head_dim=64,
      mlp_width=2_816,
      causal=False,
      tie_embeddings=True,
      remat="full",
      dtype="bfloat16",
    ),
    data=config.Data(source="stdlib", seq_len=512),
    optim=config.Optim(
      name="lamb",
      learning_rate=1.25e-3,
      schedule="linear",
      warmup=3_125,
      weight_decay=0.01,
      shards=256,
    ),
    steps=250_000,
    batch_size=2_048,
    ema_decay=0.0,
    checkpoint_every=1_000,
  )
