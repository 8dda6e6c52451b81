"""Orthogonalises matrices: one Newton-Schulz iteration for every platform."""

from giantsteps.kernels_pallas.newton_schulz.reference import (
  FIXED,
  SCHEDULED,
  newton_schulz,
)

__all__ = ["FIXED", "SCHEDULED", "newton_schulz"]
