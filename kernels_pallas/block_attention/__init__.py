"""Attention of a few queries to a cache of keys, each up to its own limit."""

from giantsteps.kernels_pallas.block_attention.operation import block_attention

__all__ = ["block_attention"]
