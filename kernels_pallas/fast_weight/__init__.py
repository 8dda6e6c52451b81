"""The memory of LaCT: reads, and gradients of writes, for every platform."""

from giantsteps.kernels_pallas.fast_weight.operations import (
  apply,
  gradient,
  update,
)
from giantsteps.kernels_pallas.fast_weight.reference import Weights

__all__ = ["Weights", "apply", "gradient", "update"]
