"""Trains a model in a work folder; the same command again resumes.

  python -m giantsteps.experiments.train --config digits_flow \\
      --workdir runs/digits --set optim.learning_rate=3e-3

The folder receives config.json, data.json and environment.json before the
first step, then metrics.jsonl (one flushed line per report) and checkpoints
with checksums. SIGTERM and Ctrl-C save and exit 0; a kill loses what came
after the newest checkpoint. `sample` (images) and `generate` (tokens) read
the folder.

On several hosts run the same command on each, with --cluster (TPU pod, Slurm,
Kubernetes) or --coordinator HOST:PORT --num_processes N --process_id I, and a
work folder that all of them see.
"""

import pathlib

from absl import flags, logging

from giantsteps.experiments.harness import cli, processes, training
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib

_CONFIG = flags.DEFINE_string(
  "config", None, "Module in experiments/configs.", required=True
)
_SET = flags.DEFINE_multi_string(
  "set", [], "Override a field, e.g. optim.name=adamw; may be repeated."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for logs and checkpoints.", required=True
)
_MESH = flags.DEFINE_string(
  "mesh", "", "Devices by axis, e.g. data=8; empty is one device."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Several processes: HOST:PORT of process 0."
)
_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Several processes: how many."
)
_PROCESS = flags.DEFINE_integer(
  "process_id", None, "Several processes: which one this is, from 0."
)
_CLUSTER = flags.DEFINE_bool(
  "cluster", False, "Several processes, as the cluster's environment says."
)


def main() -> int:
  """Runs the flags' config to its end or to the first signal."""
  with training.interruptible() as interrupted:
    cfg = config_lib.load(_CONFIG.value, _SET.value)
    processes.connect(
      _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _CLUSTER.value
    )
    mesh = mesh_lib.make(mesh_lib.parse(_MESH.value))
    workdir = pathlib.Path(_WORKDIR.value)
    try:
      with processes.Watch(workdir):
        state, _ = training.train(
          cfg, workdir, mesh, label=_CONFIG.value, stop=interrupted
        )
    except training.Diverged as error:
      logging.error("%s", error)
      return 1
    if int(state.step) < cfg.steps:
      logging.info(
        "interrupted: saved step %d of %d in %s; the same command resumes",
        int(state.step),
        cfg.steps,
        workdir,
      )
    else:
      logging.info("done: step %d in %s", int(state.step), workdir)
    return 0


if __name__ == "__main__":
  cli.run(main)
