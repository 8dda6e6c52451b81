"""BERT-base size: a masked language model of 109 million parameters with the
LAMB recipe of arXiv:1904.00962, the update shared by up to 64 chips. Nobody
has trained it here; it is compiled for the pod by compile_for_pod."""

import dataclasses

from giantsteps.experiments.configs import bert_large
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """12 bidirectional blocks of width 768, 2048 rows of 512 tokens."""
  cfg = bert_large.get_config()
  return dataclasses.replace(
    cfg,
    model=dataclasses.replace(
      cfg.model,
      width=768,
      depth=12,
      num_heads=12,
      num_kv_heads=12,
      mlp_width=2_048,
    ),
    optim=dataclasses.replace(cfg.optim, shards=64),
  )
