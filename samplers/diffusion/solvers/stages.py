"""Methods that call the model inside a step: singlestep and Runge-Kutta.

An outer step is a list of stages. Each stage calls the model once and moves
on from the sample at the start of the step, with all targets of the step so
far: rows of the same table as a multistep method's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers import exponential
from giantsteps.samplers.diffusion.solvers.exponential import Point
from giantsteps.samplers.diffusion.tables import Table


class Stage(NamedTuple):
  """One model call, at time t, and the move to the next point.

  next = advance start + sum_j weights[j] m_j + noise xi, start the sample at
  the beginning of the step, m_0, m_1, .. its targets, oldest first.
  """

  t: float
  advance: float
  weights: Sequence[float] | np.ndarray
  noise: float = 0.0


def point(schedule: Schedule, lam: float) -> Point:
  """The point of the schedule with half log-SNR lam."""
  t = float(schedule.t_of_lambda(lam))
  alpha, sigma = schedule.alpha_sigma(t)
  return Point(t, float(alpha), float(sigma), lam)


def descent(a: Point, b: Point, eta: float) -> tuple[Point, float]:
  """Ancestral sampling: (where a deterministic step goes, noise to add).

  In sigma / alpha = rho: up = min(rho_b, eta rho_b sqrt(1 - rho_b^2 /
  rho_a^2)), down = sqrt(rho_b^2 - up^2), as in k-diffusion. The point has
  alpha_b and a smaller sigma.
  """
  if eta == 0 or b.sigma == 0:
    return b, 0.0
  spread = np.sqrt(-np.expm1(-2 * (b.lam - a.lam)))
  up = min(1.0, eta * spread)  # of rho_b
  down = np.sqrt((1 - up) * (1 + up))
  sigma = b.sigma * down
  lam = b.lam - np.log(down) if down > 0 else np.inf
  return b._replace(sigma=sigma, lam=lam), b.sigma * up


def ddim(a: Point, b: Point, gauge: str) -> Stage:
  """One call, x0 and eps kept: all that is defined where lambda is infinite."""
  advance, weight, _ = exponential.ddim_step(gauge, a, b, 0.0)
  return Stage(a.t, advance, [weight])


def assemble(
  schedule: Schedule,
  steps: Sequence[Sequence[Stage]],
  *,
  prediction: str,
  gauge: str,
) -> Table:
  """The table of a run, given the stages of each outer step.

  Returns:
    One row per stage, K = 4: steps of at most four stages.

  Raises:
    ValueError: the prediction says nothing at one of the calls.
  """
  stages = [(j, stage) for step in steps for j, stage in enumerate(step)]
  num = len(stages)
  history = np.zeros((num, exponential.MIN_TARGETS))
  for i, (_, stage) in enumerate(stages):
    history[i, : len(stage.weights)] = np.asarray(stage.weights)[::-1]
  time = np.array([stage.t for _, stage in stages])
  return Table(
    time=np.asarray(schedule.model_time(time), np.float64),
    target=exponential.targets(schedule, time, prediction, gauge),
    anchor=np.array([[1.0, 0.0] if j else [0.0, 1.0] for j, _ in stages]),
    corrector=np.zeros_like(history),
    advance=np.array([stage.advance for _, stage in stages]),
    history=history,
    noise=np.array([stage.noise for _, stage in stages]),
  )
