"""How close a few model calls come to the exact solution, against every public
solver: on mixtures of Gaussians, whose denoiser and exact ODE are known."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.experiments.harness import diffusers_peers, mixtures
from giantsteps.samplers.diffusion import (
  betas,
  grids,
  schedules,
  solvers,
  tables,
)

NFES = (5, 8, 10, 15, 20)
ROWS = 128  # samples per seed
SEEDS = (77, 78, 79)  # `default` was chosen on 77 and on draws not used here


class Problem(NamedTuple):
  """A mixture on a path, and what is compared on it."""

  name: str
  mixture: mixtures.Mixture
  schedule: schedules.Schedule
  path: str  # "vp" or "flow"


def problems() -> list[Problem]:
  """The first two are those that `solvers.default` was chosen on."""
  vp, flow = schedules.vp_linear(), schedules.rectified_flow()
  discrete = schedules.discrete(betas.linear())
  gmm2, gmm8, gmm32 = mixtures.gmm2(), mixtures.gmm8(), mixtures.gmm32()
  return [
    Problem("gmm8, VP-linear", gmm8, vp, "vp"),
    Problem("gmm8, flow", gmm8, flow, "flow"),
    Problem("gmm8, discrete betas", gmm8, discrete, "vp"),
    Problem("gmm2, VP-linear", gmm2, vp, "vp"),
    Problem("gmm2, flow", gmm2, flow, "flow"),
    Problem("gmm32 of std 3, VP-linear", gmm32, vp, "vp"),
    Problem("gmm32 of std 3, flow", gmm32, flow, "flow"),
  ]


def authors(
  schedule: schedules.Schedule, nfe: int, prediction: str
) -> dict[str, tables.Table]:
  """The authors' released solvers and grids at `nfe` calls or just below.

  Tables with `published=True` follow their trajectories to 1e-10
  (tests/samplers/diffusion/solvers/test_golden.py), so their code is not
  needed to know what it returns.
  """
  spacings = {
    "time": grids.uniform_time,
    "logSNR": grids.log_snr,
    "quadratic": grids.quadratic_time,
  }
  say: dict[str, Any] = dict(prediction=prediction)
  rows: dict[str, tables.Table] = {}
  for name, grid in spacings.items():
    t = grid(schedule, num_steps=nfe)
    final = "ramp" if nfe < 10 else "none"
    for order in (2, 3):
      rows[f"DPM++ {order}M {name}"] = solvers.dpm_solver_pp(
        schedule, t, order=order, final=final, published=True, **say
      )
      rows[f"UniPC {order} bh2 {name}"] = solvers.unipc(
        schedule, t, order=order, **say
      )
    rows[f"UniPC 3 bh1 {name}"] = solvers.unipc(
      schedule, t, order=3, variant="bh1", **say
    )
    orders = solvers.fast_orders(nfe, 3)
    if name == "logSNR":
      outer = grid(schedule, num_steps=len(orders))
    else:
      outer = t[np.cumsum([0, *orders])]
    rows[f"DPM-Solver-fast 3 {name}"] = solvers.dpm_solver(
      schedule,
      outer,
      order=orders,
      method="singlestep",
      inner=grid.__name__,
      **say,
    )
  quadratic, log_snr = (
    spacings[k](schedule, num_steps=nfe) for k in ("quadratic", "logSNR")
  )
  for order in (3, 4):
    name = f"DEIS tAB{order - 1}"
    rows[f"{name} quadratic"] = solvers.deis(
      schedule, quadratic, order=order, **say
    )
  for variable, name in (("t", "tAB3"), ("rho", "rhoAB3")):
    rows[f"DEIS {name} logSNR"] = solvers.deis(
      schedule, log_snr, variable=variable, **say
    )
  rows["DEIS rhoAB3 quadratic"] = solvers.deis(
    schedule, quadratic, variable="rho", **say
  )
  for tableau, stages in (("heun", 2), ("kutta3", 3)):
    t = spacings["quadratic"](schedule, num_steps=max(1, nfe // stages))
    rows[f"DEIS rhoRK {tableau} quadratic"] = solvers.deis(
      schedule, t, method="rk", tableau=tableau, **say
    )
  uniform = spacings["time"](schedule, num_steps=nfe)
  rows["iPNDM"] = solvers.deis(schedule, uniform, method="ipndm", **say)
  return rows


def straight(
  schedule: schedules.Schedule,
  nfe: int,
  prediction: str,
  shifts: Sequence[float] = (0.5, 1.0, 3.0),
) -> dict[str, tables.Table]:
  """What diffusers does on a straight path, as tables, for any t in [0, 1].

  DEIS starts at t = .999, as there, since eps says nothing of x0 at t = 1.
  """
  rows: dict[str, tables.Table] = {}
  say: dict[str, Any] = dict(prediction=prediction)
  final = "ramp" if nfe < 15 else "ddim_last"
  for shift in shifts:
    t = grids.shift(np.linspace(1, 0, nfe + 1), shift)
    below = grids.shift(np.linspace(0.999, 0, nfe + 1), shift)
    half = grids.shift(np.linspace(1, 0, max(1, nfe // 2) + 1), shift)
    made = {"Euler": solvers.ddim(schedule, t, **say)}
    made["Heun"] = solvers.runge_kutta(schedule, half, gauge="flow", **say)
    for order in (2, 3):
      made[f"DPM++ {order}M"] = solvers.dpm_solver_pp(
        schedule, t, order=order, final=final, published=True, **say
      )
      made[f"UniPC {order}"] = solvers.unipc(schedule, t, order=order, **say)
      made[f"DEIS {order}"] = solvers.deis(
        schedule, below, variable="lambda", order=order, final=final, **say
      )
    rows |= {f"{name} shift {shift:g}": made[name] for name in made}
  return rows


def noises(mixture: mixtures.Mixture) -> np.ndarray:
  """[128 len(SEEDS), D] float64 unit normals, seed after seed."""
  shape = ROWS, mixture.mu.shape[1]
  return np.concatenate(
    [np.random.RandomState(seed).standard_normal(shape) for seed in SEEDS]
  )


def errors(difference: np.ndarray) -> dict[str, float]:
  """Median over samples of the rms error: first seed, the fresh ones; rms."""
  each = np.sqrt(np.mean(difference**2, -1))
  return {
    "median": float(np.median(each[:ROWS])),
    "median_fresh": float(np.median(each[ROWS:])),
    "rms": float(np.sqrt(np.mean(each**2))),
  }


class Solve:
  """Runs tables on a problem in float32, counting traces of the model."""

  def __init__(self, problem: Problem):
    self.traces = 0
    # the model is told the angle, from which both paths follow exactly
    told = dataclasses.replace(
      problem.schedule, model_time=problem.schedule.phi
    )
    self.schedule = told if problem.path == "vp" else problem.schedule
    self.prediction = "eps" if problem.path == "vp" else "flow"

    def predict(x, t):
      self.traces += 1
      t = t[0]
      if problem.path == "vp":
        point = jnp.cos(t), jnp.sin(t)
      else:
        point = 1 - t, t
      x0, eps = mixtures.posterior(problem.mixture, x, *point)
      return eps if problem.path == "vp" else eps - x0

    self._run = jax.jit(lambda x, table: tables.sample(predict, x, table))

  def __call__(self, x_T: np.ndarray, table: tables.Table) -> np.ndarray:
    x = self._run(jnp.asarray(x_T, jnp.float32), tables.resize(table, 4))
    return np.asarray(x, np.float64)


def measure(
  problem: Problem, report: Callable[[str], Any] = lambda note: None
) -> dict:
  """Every solver on one problem.

  Args:
    problem: which.
    report: told what is being run.

  Returns:
    "rows": {name, source ("giantsteps", "authors" or "diffusers"), nfe, calls,
    median, median_fresh, rms}; "programs", compiled, and "tables", run.
  """
  x_T = noises(problem.mixture)
  s = problem.schedule
  solve, ends = Solve(problem), {}

  def exact(start, end, scale=1.0):
    key = (*np.round(start, 12), *np.round(end, 12), scale)
    if key not in ends:
      ends[key] = mixtures.exact_end(problem.mixture, scale * x_T, start, end)
    return ends[key]

  point = lambda t: tuple(float(v) for v in s.alpha_sigma(t))
  end = exact(point(s.t_max), point(s.t_min))
  rows, count = [], 0

  def add(name, source, nfe, calls, difference):
    row = {"name": name, "source": source, "nfe": nfe, "calls": calls}
    rows.append(row | errors(difference))

  for nfe in NFES:
    report(f"{problem.name}, {nfe} calls")
    mine = solvers.default(
      solve.schedule, nfe, problem.mixture.std, prediction=solve.prediction
    )
    runs = {("default", "giantsteps"): mine}
    if problem.path == "vp":
      made = authors(solve.schedule, nfe, solve.prediction)
      runs |= {(name, "authors"): table for name, table in made.items()}
    for (name, source), table in runs.items():
      count += 1
      add(name, source, nfe, table.nfe, solve(x_T, table) - end)
    if diffusers_peers.versions() is None:
      continue
    peers = diffusers_peers.vp_peers
    if problem.path == "flow":
      peers = diffusers_peers.flow_peers
    for peer in peers():
      forms = lambda x, *at: mixtures.posterior(problem.mixture, x, *at)
      run = diffusers_peers.run(peer, forms, x_T, nfe)
      difference = run.x - exact(run.start, run.end, run.scale)
      add(peer.name, "diffusers", nfe, run.calls, difference)
  return {"rows": rows, "programs": solve.traces, "tables": count}


def summary(rows: Sequence[dict]) -> list[dict]:
  """Per NFE: ours, the best public solver of that column, and their ratio.

  The public one is chosen by its median on the same noise, that is with
  hindsight, anew for every column.
  """
  lines = []
  for nfe in NFES:
    column = [row for row in rows if row["nfe"] == nfe]
    mine = next(row for row in column if row["source"] == "giantsteps")
    line: dict[str, Any] = {"nfe": nfe}
    for key in ("median", "median_fresh"):
      # a NaN of a peer is its own loss
      public = [
        row
        for row in column
        if row["source"] != "giantsteps" and np.isfinite(row[key])
      ]
      best = min(public, key=lambda row: row[key])
      line |= {
        key: mine[key],
        f"best_{key}": best[key],
        f"best_by_{key}": f"{best['name']} ({best['source']})",
        f"times_lower_{key}": best[key] / mine[key],
      }
    lines.append(line)
  return lines
