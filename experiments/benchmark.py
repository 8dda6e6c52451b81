"""Measures a trained model and writes the numbers as JSON.

  python -m giantsteps.experiments.benchmark --suite digits --workdir runs/digits
  python -m giantsteps.experiments.benchmark --suite text --workdir runs/code

digits: Frechet distance against the held-out half with floor and control, and
distance to the 500-step solution, for every solver at 3 to 50 calls, over
three noises. text: bits per byte against byte n-grams with the same training
bytes; for masked models also what is lost by committing several bytes per
forward pass. The result goes to benchmark_<suite>.json in the work folder.
"""

import json
import pathlib
import time
from typing import Any

import numpy as np
from absl import flags, logging

from giantsteps.experiments.harness import (
  cli,
  data,
  digits_quality,
  metrics,
  ngrams,
  sampling,
  text_quality,
  training,
)
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import tasks as tasks_lib

_SUITE = flags.DEFINE_enum(
  "suite", None, ["digits", "text"], "What is measured.", required=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of a training run.", required=True
)
_WINDOWS = flags.DEFINE_integer(
  "windows", 208, "text: held-out windows that are decoded.", lower_bound=2
)
_ORDER = flags.DEFINE_integer(
  "ngram_order", 5, "text: largest context of the n-grams.", lower_bound=0
)


def main() -> int:
  """Runs the suite of the flags."""
  workdir = pathlib.Path(_WORKDIR.value)
  cfg, description = training.load_workdir(workdir)
  if (cfg.task == "flow") != (_SUITE.value == "digits"):
    raise config_lib.InputError(
      f"--suite {_SUITE.value} does not fit the model of task {cfg.task!r} in "
      f"--workdir {workdir}"
    )
  dataset = tasks_lib.load_data(cfg)
  task = tasks_lib.build(cfg, description)
  state = training.restore(workdir, cfg, task, mesh_lib.make({}))
  start = time.time()
  suite = digits if _SUITE.value == "digits" else text
  result = suite(cfg, task, state.ema, dataset) | {
    "step": int(state.step),
    "config": config_lib.to_json(cfg),
    "environment": metrics.environment(),
    "seconds": time.time() - start,
  }
  path = workdir / f"benchmark_{_SUITE.value}.json"
  path.write_text(json.dumps(result, indent=1) + "\n")
  logging.info("wrote %s", path)
  return 0


def digits(cfg, task, params: Any, dataset: data.Dataset) -> dict:
  """Three noises; prints the mean and the range of every figure."""
  draw = sampling.sampler(task, dataset.description["std"])
  runs = [
    digits_quality.measure(
      draw, params, dataset, seed=seed, conditional=cfg.model.num_classes > 0
    )[0]
    for seed in range(3)
  ]
  names = ("fd_floor", "fd_fitted_gaussian", "fd_reference", "nearest_ratio")
  for name in names:
    print(f"{name:46s} {_spread([run[name] for run in runs])}")
  for rows in zip(*(run["rows"] for run in runs), strict=True):
    for key in ("fd_digitsnet64", "distance_to_reference"):
      label = f"{rows[0]['solver']} {rows[0]['nfe']} calls {key}"
      print(f"{label:46s} {_spread([row[key] for row in rows])}")
  return {"runs": runs}


def text(cfg, task, params: Any, dataset: data.Dataset) -> dict:
  """Bits per byte beside n-grams; infilling for masked models."""
  model = task.apply(params)
  if cfg.task == "autoregressive":
    bits = text_quality.autoregressive_bits(model, dataset)
  else:
    bits = text_quality.masked_bits(task.evaluate, params, dataset)
  print(f"{cfg.task} model: {_figures(bits)}")
  grams = ngrams.held_out_bits(dataset, max_order=_ORDER.value)
  for row in grams:
    print(f"n-gram: {_figures(row)}")
  result: dict[str, Any] = {"model": bits, "ngrams": grams}
  if cfg.task == "autoregressive":
    return result
  tokens = text_quality.windows(dataset, _WINDOWS.value)
  rows, length = tokens.shape
  mask = tasks_lib.mask_token(cfg)
  for name, masked in (
    ("random", text_quality.random_mask(rows, length, 0.15, seed=0)),
    ("gap", text_quality.gap_mask(rows, length, 32)),
  ):
    truth = text_quality.true_nll(model, tokens, masked, mask)
    print(f"{name} masks, {rows} windows, true text {truth:.3f} nats per byte")
    # agreement barely moves in contiguous gaps: their likelihood tells more
    curve, _ = text_quality.fill_curve(
      model, tokens, masked, mask, likelihood=name == "gap"
    )
    for row in curve:
      print(f"  {_figures(row)}")
    result[name] = {"rows": curve, "true_nll": truth}
  return result


def _spread(values: list[float]) -> str:
  low, high = min(values), max(values)
  return f"mean {np.mean(values):.4g} range {low:.4g} .. {high:.4g}"


def _figures(row: dict) -> str:
  show = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
  return ", ".join(f"{key} {show(value)}" for key, value in row.items())


if __name__ == "__main__":
  cli.run(main)
