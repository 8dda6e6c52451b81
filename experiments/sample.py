"""Samples images or points from a trained flow: one PNG, one npz, one line.

  python -m giantsteps.experiments.sample --workdir runs/digits

Restores the averaged parameters of the newest intact checkpoint, solves the
probability-flow ODE downwards (noise to data) with `--nfe` calls of the model
and writes samples/<solver>_<nfe>.{png,npz} in the work folder. A flow map
(`flow_map.loss` of its config) jumps `--steps` times instead, one call of the
model each, and writes samples/map_<steps>.{png,npz}.
"""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from giantsteps.experiments.harness import cli, plots, sampling, training
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import tasks as tasks_lib

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of a training run of a flow.", required=True
)
_SOLVER = flags.DEFINE_enum(
  "solver", "default", sampling.SOLVERS, "Which table of coefficients."
)
_NFE = flags.DEFINE_integer("nfe", 20, "Calls of the model.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
  "steps", 1, "Jumps of a flow map, instead of a solver.", lower_bound=1
)
_NUM = flags.DEFINE_integer(
  "num_samples", None, "Default: 64 images, 4,096 points.", lower_bound=1
)
_LABEL = flags.DEFINE_integer(
  "label", None, "Class, for models with classes; default: all in turn."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0)


def main() -> int:
  """Samples with the flags' solver, or the map."""
  workdir = pathlib.Path(_WORKDIR.value)
  cfg, description = training.load_workdir(workdir)
  if cfg.task != "flow":
    raise config_lib.InputError(
      f"--workdir {workdir} holds a model of task {cfg.task!r}: sample draws "
      "from flows; use generate for tokens, benchmark for views"
    )
  mapped = cfg.flow_map.loss != "none"
  _check_flags(workdir, mapped)
  kind = "image" if description["kind"] == "image" else "point"
  num = _NUM.value or (64 if kind == "image" else 4096)
  task = tasks_lib.build(cfg, description)
  labels = _labels(num, cfg.model.num_classes)
  state = training.restore(workdir, cfg, task, mesh_lib.make({}))
  x_T = jax.random.normal(
    jax.random.key(_SEED.value), (num, *description["shape"])
  )
  sigma_0 = tasks_lib.base_std(cfg, description)
  if mapped:
    solver, nfe = "map", _STEPS.value
    draw = sampling.map_sampler(task, sigma_0)
    run = sampling.uniform_jumps(nfe)
  else:
    solver = _SOLVER.value
    draw = sampling.sampler(task, sigma_0)
    run = sampling.table(solver, _NFE.value, sigma_0)
    nfe = run.nfe
  start = time.time()
  rows = np.asarray(draw(state.ema, x_T, run, labels))
  seconds = time.time() - start
  if not np.isfinite(rows).all():
    raise FloatingPointError(f"{solver}: samples are not finite")
  folder = workdir / "samples"
  folder.mkdir(exist_ok=True)
  stem = folder / f"{solver}_{_STEPS.value if mapped else _NFE.value}"
  np.savez(stem.with_suffix(".npz"), allow_pickle=False, **{kind: rows})
  show = plots.image_grid if kind == "image" else plots.scatter
  show(rows, stem.with_suffix(".png"))
  row = {
    "step": int(state.step),
    "solver": solver,
    "nfe": nfe,
    f"{kind}s": num,
    "seconds_with_compilation": round(seconds, 3),
    "mean": float(rows.mean()),
    "std": float(rows.std()),
    "png": str(stem.with_suffix(".png")),
  }
  with (folder / "samples.jsonl").open("a") as file:
    file.write(json.dumps(row) + "\n")
  print(json.dumps(row))
  return 0


def _check_flags(workdir: pathlib.Path, mapped: bool) -> None:
  others = ("nfe", "solver") if mapped else ("steps",)
  for name in others:
    if flags.FLAGS[name].present:
      raise config_lib.InputError(
        f"--{name}: --workdir {workdir} holds a "
        + (
          "flow map, choose its jumps by --steps"
          if mapped
          else "velocity and no flow map, choose --solver and --nfe"
        )
      )


def _labels(num: int, classes: int) -> jax.Array | None:
  if _LABEL.value is None:
    return jnp.arange(num) % classes if classes else None
  if not 0 <= _LABEL.value < classes:
    raise config_lib.InputError(
      f"--label={_LABEL.value}: the model has {classes} classes"
    )
  return jnp.full(num, _LABEL.value)


if __name__ == "__main__":
  cli.run(main)
