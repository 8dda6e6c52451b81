"""Optimizers and schedules for large batches."""

from giantsteps.research.large_batch.lamb import LambState, lamb, matrices

__all__ = ["LambState", "lamb", "matrices"]
