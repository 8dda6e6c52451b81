"""Optimizers and schedules for large batches."""

from giantsteps.research.large_batch import schedules
from giantsteps.research.large_batch.lamb import (
  LambState,
  lamb,
  lamb_optax,
  lamb_paper,
  lamb_tfa,
  nvlamb,
)
from giantsteps.research.large_batch.lars import LarsState, lars
from giantsteps.research.large_batch.layer_axes import matrices

__all__ = [
  "LambState",
  "LarsState",
  "lamb",
  "lamb_optax",
  "lamb_paper",
  "lamb_tfa",
  "lars",
  "matrices",
  "nvlamb",
  "schedules",
]
