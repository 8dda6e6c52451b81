"""The solver for a user who does not want to choose one."""

from giantsteps.samplers.diffusion import grids
from giantsteps.samplers.diffusion.schedules import Schedule
from giantsteps.samplers.diffusion.solvers.adams import adams
from giantsteps.samplers.diffusion.tables import Table

SHIFT, POWER = 1.4, 1.5  # of the nodes, see below
SECOND_ORDER_BELOW = 7  # calls


def default(
  schedule: Schedule,
  nfe: int,
  data_std: float = 1.0,
  t_end: float | None = None,
  *,
  prediction: str,
  t_start: float | None = None,
) -> Table:
  """Corrected Adams steps on the velocity, nodes chosen by the data's scale.

  `adams` with the flow gauge and variable, its corrector, the full order kept
  to the end (also where alpha or sigma is 0 there), and the nodes of
  `grids.flow_time` with scale 1.4 data_std and power 1.5. Order 3, and 2
  below 7 calls. The same on every schedule, and covariant: data scaled by s
  with s data_std gives the scaled samples, exactly where the run starts at
  alpha = 0 and ends at sigma = 0, or its ends move with s.

  The three constants were chosen on one mixture of Gaussians in 8 dimensions
  along a VP and a straight path (see experiments/results/samplers.json for
  that, and for problems they were not chosen on). Under strong guidance, or
  for a model with large errors, fewer orders may be better: compare.

  Args:
    schedule: alpha, sigma and the model's clock.
    nfe: N >= 1 model calls.
    data_std: standard deviation of the data (of the latents, for a latent
      model), pooled over coordinates, its mean removed.
    t_end: last node; schedule.t_min if None.
    prediction: what the model returns: "eps", "x0", "v", "flow", "velocity"
      or "score".
    t_start: first node; schedule.t_max if None.

  Returns:
    A table of nfe rows.

  Raises:
    ValueError: nfe < 1, data_std <= 0, t_end outside the schedule, a
      prediction that says nothing at the first node.
  """
  times = grids.flow_time(
    schedule,
    num_steps=nfe,
    t_start=t_start,
    t_end=t_end,
    scale=SHIFT * data_std,
    power=POWER,
  )
  return adams(
    schedule,
    times,
    prediction=prediction,
    gauge="flow",
    variable="flow",
    order=2 if nfe < SECOND_ORDER_BELOW else 3,
    corrector=True,
    final="full",
    data_std=data_std,
  )
