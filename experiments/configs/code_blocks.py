"""Block diffusion on the bytes of Python's standard library: blocks of 8 bytes,
each a masked diffusion given those before it (BD3-LM, arXiv:2503.09573)."""

import dataclasses

from giantsteps.experiments.configs import code_ar
from giantsteps.experiments.harness import config


def get_config() -> config.Config:
  """The transformer and the optimizer of `code_ar`, not causal and without its
  convolutions, which would look across blocks. Not trained to its end yet."""
  cfg = code_ar.get_config()
  return dataclasses.replace(
    cfg,
    task="masked",
    model=dataclasses.replace(
      cfg.model, vocab_size=257, causal=False, short_conv=0
    ),
    block_size=8,
  )
