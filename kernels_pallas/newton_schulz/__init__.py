"""Orthogonalises matrices: one Newton-Schulz iteration for every platform."""

from giantsteps.kernels_pallas.newton_schulz.orthogonalise import newton_schulz
from giantsteps.kernels_pallas.newton_schulz.reference import FIXED, SCHEDULED

__all__ = ["FIXED", "SCHEDULED", "newton_schulz"]
