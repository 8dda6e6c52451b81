"""LaCT language model of 760 million parameters with the authors' recipe: rows
of 32,768 tokens in chunks of 2,048. Nobody has trained it here; compile_for_pod
compiles and sizes it."""

from giantsteps.experiments.harness import config
from giantsteps.models import lact


def get_config() -> config.Config:
  """24 blocks of width 1536, four fast heads with momentum and Muon."""
  return config.Config(
    task="autoregressive",
    model=lact.Config(
      vocab_size=32_000,
      width=1_536,
      depth=24,
      num_heads=24,
      fast_heads=4,
      mlp_width=4_096,
      causal=True,
      window=2_048,
      chunk_size=2_048,
      momentum=True,
      low_rank=32,
      ns_dtype="bfloat16",
      rope_theta=1e6,
      remat="full",
      dtype="bfloat16",
    ),
    data=config.Data(source="stdlib", seq_len=32_768),
    optim=config.Optim(
      name="adamw",
      learning_rate=1e-3,
      b2=0.95,
      eps=1e-15,
      weight_decay=0.0,
      warmup=1_024,
      end_factor=0.1,
    ),
    steps=40_960,
    batch_size=32,
    ema_decay=0.0,
    checkpoint_every=1_000,
  )
