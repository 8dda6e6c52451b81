"""Decoders for token models: a commit rule over one state and one loop.

`fill` fills masked positions, `generate` continues prompts; `commit` is one
step of a rule on given logits, `logits` has transforms for sampling. A model is
anything with `state.Model`.
"""

from giantsteps.samplers.decoding import logits
from giantsteps.samplers.decoding.block_diffusion import (
  Partial,
  Result,
  fill,
  generate,
)
from giantsteps.samplers.decoding.commit_rules import (
  Rule,
  autoregressive,
  commit,
  credit,
  editing,
  entropy_threshold,
  factor,
  hierarchical,
  remasking,
  smoothing,
  threshold,
  top_n,
)

__all__ = [
  "Partial",
  "Result",
  "Rule",
  "autoregressive",
  "commit",
  "credit",
  "editing",
  "entropy_threshold",
  "factor",
  "fill",
  "generate",
  "hierarchical",
  "logits",
  "remasking",
  "smoothing",
  "threshold",
  "top_n",
]
