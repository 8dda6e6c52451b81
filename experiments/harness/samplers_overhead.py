"""Microseconds per solver step when the model is free, beside diffusers."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from numpy.typing import ArrayLike

from giantsteps.experiments.harness import diffusers_peers
from giantsteps.samplers.diffusion import grids, schedules, solvers, tables

SHAPES = ((1, 4, 64, 64), (16, 3, 32, 32), (1, 4, 128, 128))
STEPS = 100
# method: our table's history K, their scheduler and options
METHODS = {
  "DDIM": (1, "DDIMScheduler", {"clip_sample": False}),
  "DPM++ 2M": (2, "DPMSolverMultistepScheduler", {"solver_order": 2}),
  "DPM++ 3M": (3, "DPMSolverMultistepScheduler", {"solver_order": 3}),
  "DEIS 3": (3, "DEISMultistepScheduler", {"solver_order": 3}),
  "UniPC 3": (4, "UniPCMultistepScheduler", {"solver_order": 3}),
  "flow Euler": (1, "FlowMatchEulerDiscreteScheduler", {}),
  "default": (4, None, {}),
}


def pin() -> int:
  """Gives this process one core, for us and the peer alike.

  Call it before JAX or torch has started any thread. Returns the core.
  """
  core = min(os.sched_getaffinity(0))
  os.sched_setaffinity(0, {core})
  return core


def measure(
  rounds: int = 9,
  shapes: Sequence[tuple[int, ...]] = SHAPES,
  report: Callable[[str], object] = lambda note: None,
) -> dict:
  """Times every method by turns with its peer.

  Ours is the jitted `tables.sample` on a given model output, theirs
  `scheduler.step` in a loop on the same; tables, timesteps and compilation
  are made before, and each is run once untimed before it is timed. A step of
  ours touches at least K + 6 arrays of the state's size (a count, not a
  measurement): it reads the point, the committed sample, the model's output and K targets, and
  writes the first two and one target.

  Args:
    rounds: of all methods, interleaved; medians and quartiles over them.
    shapes: of the state, float32.
    report: told what is being run.

  Returns:
    rows {method, shape, ours [q1, median, q3] us, theirs, ratio of the
    round-by-round quotients, bytes per step, GB/s}; copy bandwidth of one
    core at each shape; programs compiled; how often the model is in one.
  """
  peers = diffusers_peers.versions() is not None
  if peers:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
  made, traces = _tables(), []

  def sample(x, out, table):
    traces.append(x.shape)
    model = lambda z, t: checkpoint_name(out, "model")
    return tables.sample(model, x, table)

  run = jax.jit(sample)
  rows, copies = [], {}
  for shape in shapes:
    report(f"overhead at {shape}")
    x = jax.random.normal(jax.random.key(0), shape)
    out = 0.3 * x
    ours = {name: [] for name in METHODS}
    theirs = {name: [] for name in METHODS}
    copies[str(shape)] = _copy_bandwidth(x.size)
    for i in range(rounds + 1):  # the first one compiles and warms up
      for name, (_, scheduler, options) in METHODS.items():
        run(x, out, made[name]).block_until_ready()  # caches as in a long run
        start = time.perf_counter()
        run(x, out, made[name]).block_until_ready()
        spent = (time.perf_counter() - start) / STEPS * 1e6
        if i:
          ours[name].append(spent)
        if peers and scheduler:
          peer = diffusers_peers.Peer(name, scheduler, options, "vp")
          diffusers_peers.microseconds_per_step(peer, shape, 10)
          spent = diffusers_peers.microseconds_per_step(peer, shape, STEPS)
          if i:
            theirs[name].append(spent)
    for name, (width, *_) in METHODS.items():
      moved = (width + 6) * x.size * 4
      row = {"method": name, "shape": shape, "K": width, "bytes": moved}
      row["ours"] = _quartiles(ours[name])
      row["gigabytes_per_second"] = moved / row["ours"][1] / 1e3
      if theirs[name]:
        row["theirs"] = _quartiles(theirs[name])
        row["times_less"] = _quartiles(np.divide(theirs[name], ours[name]))
      rows.append(row)
  programs = len(traces)
  jaxpr = jax.make_jaxpr(sample)(x, out, made["default"])
  return {
    "rows": rows,
    "copy_gigabytes_per_second": copies,
    "programs": programs,
    "shapes_and_widths": len(shapes) * len({k for k, *_ in METHODS.values()}),
    "model_in_program": str(jaxpr).count("name=model"),
    "steps": STEPS,
    "rounds": rounds,
  }


def _tables() -> dict[str, tables.Table]:
  """On the device in float32, as a loop over batches would hold them."""
  vp, flow = schedules.vp_linear(), schedules.rectified_flow()
  t = grids.uniform_time(vp, num_steps=STEPS)
  eps: dict[str, Any] = dict(prediction="eps")
  made = {
    "DDIM": solvers.ddim(vp, t, **eps),
    "DPM++ 2M": solvers.dpm_solver_pp(vp, t, order=2, **eps),
    "DPM++ 3M": solvers.dpm_solver_pp(vp, t, order=3, **eps),
    "DEIS 3": solvers.deis(vp, t, variable="lambda", order=3, **eps),
    "UniPC 3": solvers.unipc(vp, t, order=3, **eps),
    "flow Euler": solvers.ddim(
      flow, grids.uniform_time(flow, num_steps=STEPS), prediction="flow"
    ),
    "default": solvers.default(vp, STEPS, **eps),
  }
  return {
    name: jax.tree.map(
      lambda leaf: jnp.asarray(leaf, jnp.float32),
      tables.resize(table, METHODS[name][0]),
    )
    for name, table in made.items()
  }


def _copy_bandwidth(size: int) -> float:
  """GB/s read plus written by copying a float32 array of this size."""
  source, target = np.ones((2, size), np.float32)
  spent = []
  for _ in range(200):
    start = time.perf_counter()
    np.copyto(target, source)
    spent.append(time.perf_counter() - start)
  return 8 * size / float(np.median(spent)) / 1e9


def _quartiles(values: ArrayLike) -> list[float]:
  return [float(v) for v in np.quantile(np.asarray(values), (0.25, 0.5, 0.75))]
