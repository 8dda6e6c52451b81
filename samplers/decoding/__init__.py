"""Decoders for token models: a commit rule over one state and one loop.

`fill` fills masked positions, `generate` continues prompts; `commit` is one
step of a rule on given logits. A model is anything with `state.Model`.
"""

from giantsteps.samplers.decoding.block_diffusion import (
  Result,
  fill,
  generate,
)
from giantsteps.samplers.decoding.commit_rules import (
  Rule,
  autoregressive,
  commit,
  entropy_threshold,
  factor,
  threshold,
  top_n,
)

__all__ = [
  "Result",
  "Rule",
  "autoregressive",
  "commit",
  "entropy_threshold",
  "factor",
  "fill",
  "generate",
  "threshold",
  "top_n",
]
