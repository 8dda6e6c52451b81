"""Flow matching and flow maps: time rises from noise (0) to data (1)."""

from giantsteps.research.flow_maps.interpolants import (
  Interpolant,
  endpoints,
  linear,
  to_sampler,
  trigonometric,
)
from giantsteps.research.flow_maps.losses import flow_matching_loss

__all__ = [
  "Interpolant",
  "endpoints",
  "flow_matching_loss",
  "linear",
  "to_sampler",
  "trigonometric",
]
