"""Two blocks of BERT-large, for compile_for_pod on sixteen chips in seconds.

Every matrix is above 4 MiB: the compiler turns smaller scatters into full
all-reduces."""

import dataclasses

from giantsteps.experiments.configs import bert_large
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """2 bidirectional blocks of width 1024, 64 rows of 128 tokens."""
  cfg = bert_large.get_config()
  return dataclasses.replace(
    cfg,
    model=dataclasses.replace(cfg.model, vocab_size=4_096, depth=2),
    data=dataclasses.replace(cfg.data, seq_len=128),
    optim=dataclasses.replace(cfg.optim, warmup=10, shards=16),
    steps=100,
    batch_size=64,
    checkpoint_every=100,
  )
