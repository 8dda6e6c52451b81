"""Bidirectional softmax attention with derivatives in both modes, no matter
how many tokens: what flow maps differentiate in time."""

from giantsteps.kernels_pallas.jvp_attention.operation import jvp_attention

__all__ = ["jvp_attention"]
