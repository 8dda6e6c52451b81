"""The memory of LaCT: reads, and gradients of writes, for every platform."""

from giantsteps.kernels_pallas.fast_weight.reference import (
  Weights,
  apply,
  gradient,
)

__all__ = ["Weights", "apply", "gradient"]
