"""Solvers: each returns a `tables.Table`, one run as data.

`adaptive` is the exception: it chooses its steps as it goes, and samples.
"""

from giantsteps.samplers.diffusion.solvers.adams import adams
from giantsteps.samplers.diffusion.solvers.adaptive import adaptive
from giantsteps.samplers.diffusion.solvers.ddim import ddim
from giantsteps.samplers.diffusion.solvers.default import default
from giantsteps.samplers.diffusion.solvers.deis import deis
from giantsteps.samplers.diffusion.solvers.dpm_solver import (
  dpm_solver,
  dpm_solver_pp,
  fast_orders,
)
from giantsteps.samplers.diffusion.solvers.runge_kutta import (
  edm_heun,
  edm_midpoint,
  runge_kutta,
)
from giantsteps.samplers.diffusion.solvers.sde import sa_solver
from giantsteps.samplers.diffusion.solvers.unipc import unipc

__all__ = [
  "adams",
  "adaptive",
  "ddim",
  "default",
  "deis",
  "dpm_solver",
  "dpm_solver_pp",
  "edm_heun",
  "edm_midpoint",
  "fast_orders",
  "runge_kutta",
  "sa_solver",
  "unipc",
]
