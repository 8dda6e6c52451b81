"""Samplers in continuous time, for anything with a denoiser."""

from giantsteps.samplers.diffusion import (
  betas,
  flow_map,
  grids,
  guidance,
  predictions,
  schedules,
  solvers,
  tables,
)

__all__ = [
  "betas",
  "flow_map",
  "grids",
  "guidance",
  "predictions",
  "schedules",
  "solvers",
  "tables",
]
