"""Samples images from a trained flow: one PNG grid, one npz, one line.

  python -m giantsteps.experiments.sample --workdir runs/digits

Restores the averaged parameters of the newest intact checkpoint, solves the
probability-flow ODE downwards (noise to data) with `--nfe` calls of the model
and writes samples/<solver>_<nfe>.{png,npz} in the work folder.
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
_NUM = flags.DEFINE_integer("num_samples", 64, "Images.", lower_bound=1)
_LABEL = flags.DEFINE_integer(
  "label", None, "Class, for models with classes; default: all in turn."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0)


def main() -> int:
  """Samples with the flags' solver."""
  workdir = pathlib.Path(_WORKDIR.value)
  cfg, description = training.load_workdir(workdir)
  if cfg.task != "flow":
    raise config_lib.InputError(
      f"--workdir {workdir} holds a model of task {cfg.task!r}: sample draws "
      "from flows; use generate for tokens, benchmark for views"
    )
  task = tasks_lib.build(cfg, description)
  labels = _labels(cfg.model.num_classes)
  state = training.restore(workdir, cfg, task, mesh_lib.make({}))
  x_T = jax.random.normal(
    jax.random.key(_SEED.value), (_NUM.value, *description["shape"])
  )
  draw = sampling.sampler(task, description["std"])
  table = sampling.table(_SOLVER.value, _NFE.value, description["std"])
  start = time.time()
  images = np.asarray(draw(state.ema, x_T, table, labels))
  seconds = time.time() - start
  if not np.isfinite(images).all():
    raise FloatingPointError(f"{_SOLVER.value}: samples are not finite")
  folder = workdir / "samples"
  folder.mkdir(exist_ok=True)
  stem = folder / f"{_SOLVER.value}_{_NFE.value}"
  np.savez(stem.with_suffix(".npz"), image=images)
  plots.image_grid(images, stem.with_suffix(".png"))
  row = {
    "step": int(state.step),
    "solver": _SOLVER.value,
    "nfe": table.nfe,
    "images": len(images),
    "seconds_with_compilation": round(seconds, 3),
    "mean": float(images.mean()),
    "std": float(images.std()),
    "png": str(stem.with_suffix(".png")),
  }
  with (folder / "samples.jsonl").open("a") as file:
    file.write(json.dumps(row) + "\n")
  print(json.dumps(row))
  return 0


def _labels(classes: int) -> jax.Array | None:
  if _LABEL.value is None:
    return jnp.arange(_NUM.value) % classes if classes else None
  if not 0 <= _LABEL.value < classes:
    raise config_lib.InputError(
      f"--label={_LABEL.value}: the model has {classes} classes"
    )
  return jnp.full(_NUM.value, _LABEL.value)


if __name__ == "__main__":
  cli.run(main)
