"""Flow matching and flow maps: time rises from noise (0) to data (1)."""

from giantsteps.research.flow_maps import (
  clocks,
  closed_forms,
  couplings,
  guidance,
  times,
  weights,
)
from giantsteps.research.flow_maps.consistency import (
  consistency_distillation_loss,
  consistency_training_loss,
  discrete_consistency_loss,
  scm_loss,
)
from giantsteps.research.flow_maps.interpolants import (
  Interpolant,
  endpoints,
  from_schedule,
  linear,
  score,
  to_sampler,
  trigonometric,
)
from giantsteps.research.flow_maps.losses import (
  discrete_lagrangian_loss,
  eulerian_loss,
  flow_matching_loss,
  frozen_lagrangian_loss,
  lagrangian_loss,
  progressive_loss,
  shortcut_loss,
)
from giantsteps.research.flow_maps.mean_flow import (
  align_your_flow_loss,
  improved_mean_flow_loss,
  mean_flow_loss,
)

__all__ = [
  "Interpolant",
  "align_your_flow_loss",
  "clocks",
  "closed_forms",
  "consistency_distillation_loss",
  "consistency_training_loss",
  "couplings",
  "discrete_consistency_loss",
  "discrete_lagrangian_loss",
  "endpoints",
  "eulerian_loss",
  "flow_matching_loss",
  "from_schedule",
  "frozen_lagrangian_loss",
  "guidance",
  "improved_mean_flow_loss",
  "lagrangian_loss",
  "linear",
  "mean_flow_loss",
  "progressive_loss",
  "scm_loss",
  "score",
  "shortcut_loss",
  "times",
  "to_sampler",
  "trigonometric",
  "weights",
]
