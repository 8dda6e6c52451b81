"""Samplers in continuous time, for anything with a denoiser."""

from giantsteps.samplers.diffusion import (
  grids,
  predictions,
  schedules,
  solvers,
  tables,
)

__all__ = ["grids", "predictions", "schedules", "solvers", "tables"]
