"""Samplers in continuous time, for anything with a denoiser."""

from giantsteps.samplers.diffusion import (
  betas,
  grids,
  guidance,
  predictions,
  schedules,
  solvers,
  tables,
)

__all__ = [
  "betas",
  "grids",
  "guidance",
  "predictions",
  "schedules",
  "solvers",
  "tables",
]
