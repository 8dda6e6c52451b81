"""BERT's recipe in small: a masked language model on the bytes of Python's
standard library with LAMB, 128 bytes per row and then 512, the rate risen anew;
some minutes on two CPU cores."""

from giantsteps.experiments.harness import config
from giantsteps.models import transformer


def get_config() -> config.Config:
  """4 bidirectional blocks of width 192; 160 steps, then 40 on longer rows."""
  return config.Config(
    task="masked",
    model=transformer.Config(
      vocab_size=257,
      width=192,
      depth=4,
      num_heads=3,
      num_kv_heads=3,
      head_dim=64,
      mlp_width=512,
      causal=False,
      tie_embeddings=True,
    ),
    data=config.Data(source="stdlib", seq_len=128),
    optim=config.Optim(
      name="lamb",
      learning_rate=0.01,
      schedule="linear",
      warmup=30,
      weight_decay=0.01,
    ),
    second=config.Stage(
      start=160, seq_len=512, batch_size=16, learning_rate=0.005, warmup=10
    ),
    steps=200,
    batch_size=64,
    steps_per_dispatch=5,
    ema_decay=0.0,
    log_every=2,
    eval_every=40,
    checkpoint_every=40,
  )
