"""A trained flow as a sampler: the two clocks meet in `flow_maps.to_sampler`."""

from collections.abc import Callable

import jax
import numpy as np

from giantsteps.experiments.harness import tasks as tasks_lib
from giantsteps.research import flow_maps
from giantsteps.samplers.diffusion import flow_map, grids, solvers, tables

SOLVERS = ("ddim", "dpm_solver_pp", "unipc", "default")


def table(solver: str, nfe: int, sigma_0: float) -> tables.Table:
  """`nfe` calls along the linear path, noise to data.

  All solvers give tables of one shape at equal `nfe`, so one compiled
  program runs them all.
  """
  schedule, _ = flow_maps.to_sampler(
    flow_maps.linear(), lambda s, t, x: x, sigma_0
  )
  times = grids.uniform_time(schedule, num_steps=nfe)
  match solver:
    case "ddim":
      return solvers.ddim(schedule, times, prediction="velocity")
    case "dpm_solver_pp":
      return solvers.dpm_solver_pp(
        schedule, times, prediction="velocity", order=2
      )
    case "unipc":
      return solvers.unipc(schedule, times, prediction="velocity", order=3)
    case _:
      return solvers.default(schedule, nfe, sigma_0, prediction="velocity")


def sampler(task: tasks_lib.Task, sigma_0: float) -> Callable:
  """Compiles draw(params, x_T, table, labels) -> images [B, H, W, C].

  x_T is standard normal; the base of the flow is sigma_0 x_T.
  """

  @jax.jit
  def draw(params, x_T, table, labels=None):
    velocity = lambda s, t, x: task.apply(params, s, t, x, labels)
    _, predict = flow_maps.to_sampler(flow_maps.linear(), velocity, sigma_0)
    return tables.sample(predict, sigma_0 * x_T, table)

  return draw


def map_sampler(task: tasks_lib.Task, sigma_0: float) -> Callable:
  """Compiles draw(params, x_T, jumps, labels) -> rows [B, ...].

  x_T is standard normal, noise of the map is sigma_0 x_T; `jumps` as made by
  `uniform_jumps`, one call of the network each.
  """

  @jax.jit
  def draw(params, x_T, jumps, labels=None):
    velocity = lambda s, t, x: task.apply(params, s, t, x, labels)
    return flow_map.sample(velocity, sigma_0 * x_T, jumps)

  return draw


def uniform_jumps(steps: int) -> flow_map.Jumps:
  """`steps` jumps of equal length from noise to data."""
  return flow_map.jumps(np.linspace(0, 1, steps + 1))
