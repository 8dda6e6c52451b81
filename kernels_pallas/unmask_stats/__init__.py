"""A language model's head without its logits: what decoders ask of them."""

from giantsteps.kernels_pallas.unmask_stats.operation import unmask_stats
from giantsteps.kernels_pallas.unmask_stats.reference import Stats

__all__ = ["Stats", "unmask_stats"]
