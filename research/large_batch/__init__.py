"""Optimizers, schedules and losses for large batches."""

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
from giantsteps.research.large_batch.load_balance import (
  global_batch_loss,
  micro_batch_loss,
)

__all__ = [
  "LambState",
  "LarsState",
  "global_batch_loss",
  "lamb",
  "lamb_optax",
  "lamb_paper",
  "lamb_tfa",
  "lars",
  "matrices",
  "micro_batch_loss",
  "nvlamb",
  "schedules",
]
