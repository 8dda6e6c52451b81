"""Solvers: each returns a `tables.Table`, one run as data."""

from giantsteps.samplers.diffusion.solvers.adams import adams
from giantsteps.samplers.diffusion.solvers.ddim import ddim
from giantsteps.samplers.diffusion.solvers.dpm_solver import dpm_solver_pp
from giantsteps.samplers.diffusion.solvers.unipc import unipc

__all__ = ["adams", "ddim", "dpm_solver_pp", "unipc"]
