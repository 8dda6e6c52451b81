"""Trains, samples and decodes on real data, and writes a report.

  python -m giantsteps.experiments.quickstart

Three stages on two data sets that are on every machine with scikit-learn and
Python: the 1,797 handwritten digits, and the source text of Python's standard
library. (1) A flow-matching denoiser, trained on one half of the digits with
large-batch LAMB, sampled by three solvers at 3 to 50 calls. (2) LAMB at batch
1024 against AdamW at 64 and at 1024, at equal epochs. (3) A masked-diffusion
language model with LaCT layers that fills gaps one byte or several bytes per
forward pass. The work folder receives report.html, the PNGs and the numbers as
JSON; a second call resumes what is unfinished.
"""

import dataclasses
import json
import pathlib
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from giantsteps.experiments.configs import code_lm_quickstart, digits_flow
from giantsteps.experiments.harness import (
  cli,
  data,
  digits_quality,
  metrics,
  ngrams,
  plots,
  report,
  sampling,
  text_quality,
  training,
)
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import tasks as tasks_lib

_WORKDIR = flags.DEFINE_string(
  "workdir", "runs/quickstart", "Folder for the report and the checkpoints."
)

WINDOWS = 32  # held-out texts that are decoded
THRESHOLDS = (0.5, 0.7, 0.9, 0.99)
SHOWN = 0.5  # threshold of the texts in the report
GAP = 32  # bytes


class Interrupted(Exception):
  """A signal came; everything is saved."""


def main() -> int:
  """Runs the stages that are not done yet and writes the report."""
  start = time.time()
  folder = pathlib.Path(_WORKDIR.value)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise config_lib.InputError(
      f"--workdir {folder} cannot be written: {error.strerror}"
    ) from error
  with training.interruptible() as interrupted:
    run = Run(folder, interrupted)
    try:
      for name, stage in (("digits", digits), ("batch", batch), ("text", text)):
        run.stage(name, stage)
    except Interrupted:
      logging.info("interrupted and saved; the same command resumes")
      return 0
  run.write_report()
  logging.info(
    "done in %.0f s; open %s", time.time() - start, folder / "report.html"
  )
  return 0


class Run:
  """The work folder: results by stage, and the report of what is there."""

  def __init__(self, folder: pathlib.Path, interrupted: Callable[[], bool]):
    """Results of earlier calls are read from `folder`."""
    self.folder, self.interrupted = folder, interrupted
    self.mesh = mesh_lib.make({})
    self.results: dict[str, dict] = {}

  def stage(self, name: str, function: Callable[["Run"], dict]) -> None:
    """Runs a stage unless its result is in the folder."""
    path = self.folder / f"{name}.json"
    if path.exists():
      self.results[name] = json.loads(path.read_text())
      return
    start = time.time()
    result = function(self)
    if self.interrupted():
      raise Interrupted
    result["seconds"] = time.time() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result["peak_memory_gb"] = usage.ru_maxrss / 1e6
    self.results[name] = result
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(path)
    self.write_report()

  def train(
    self, cfg: config_lib.Config, name: str, dataset: data.Dataset, **options
  ) -> tuple[training.State, tasks_lib.Task, float]:
    """Trains in a subfolder; the seconds are this call's."""
    start = time.time()
    state, task = training.train(
      cfg,
      self.folder / name,
      self.mesh,
      dataset=dataset,
      label=name,
      stop=self.interrupted,
      **options,
    )
    if int(state.step) < cfg.steps:
      raise Interrupted
    return state, task, time.time() - start

  def write_report(self) -> None:
    """report.html from the results there are."""
    sections = [
      section(self.folder, self.results[name])
      for name, section in (
        ("preview", preview_section),
        ("digits", digits_section),
        ("batch", batch_section),
        ("text", text_section),
      )
      if name in self.results
      and not (name == "preview" and "digits" in self.results)
    ]
    lead = report.paragraph(
      "Do the work in fewer, larger steps: larger solver steps, larger "
      "batches, more tokens per step, on data that came with the packages."
    )
    page = report.page("giantsteps quickstart", lead, [*sections, machine()])
    (self.folder / "report.html").write_text(page)


def digits(run: Run) -> dict:
  """Stage 1: train on one half, sample, judge against the other half."""
  cfg = digits_flow.get_config()
  dataset = tasks_lib.load_data(cfg)
  sigma_0 = dataset.description["std"]
  labels = np.arange(64) % 10
  shape = tuple(dataset.description["shape"])

  def preview(step: int, params: Any) -> None:
    """The first grid, long before training ends."""
    noise = jax.random.normal(jax.random.key(1), (64, *shape))
    images = draw(
      params, noise, sampling.table("dpm_solver_pp", 12, sigma_0), labels
    )
    plots.image_grid(
      np.asarray(images),
      run.folder / "digits_preview.png",
      title=f"after {step} of {cfg.steps} steps, 12 calls per image",
    )
    run.results["preview"] = {}
    run.write_report()

  task = tasks_lib.build(cfg, dataset.description)
  draw = sampling.sampler(task, sigma_0)
  state, _, seconds = run.train(cfg, "digits", dataset, on_eval=preview)
  numbers, images = digits_quality.measure(
    draw, state.ema, dataset, conditional=True
  )
  shown = digits_quality.NFES
  rows = [images["dpm_solver_pp", n][:16] for n in shown]
  rows.append(images["dpm_solver_pp", digits_quality.REFERENCE_STEPS][:16])
  rows.append(dataset.held_out.read(np.arange(16))["image"])
  plots.image_grid(
    np.concatenate(rows),
    run.folder / "digits_grid.png",
    row_labels=[*(f"{n} calls" for n in shown), "500 calls", "real, held out"],
    title="the same 16 noises, DPM-Solver++(2M)",
  )
  solver_rows = {
    s: [r for r in numbers["rows"] if r["solver"] == s]
    for s in sampling.SOLVERS
  }
  line = lambda key: {
    s: ([r["nfe"] for r in rows], [r[key] for r in rows])
    for s, rows in solver_rows.items()
  }
  plots.curves(
    line("fd_digitsnet64"),
    run.folder / "digits_fd.png",
    x_label="calls of the model (NFE)",
    y_label="fd_digitsnet64, lower is better",
    title="quality against the held-out half",
    levels={
      "500 calls": numbers["fd_reference"],
      "floor: the real training half": numbers["fd_floor"],
      "fitted Gaussian": numbers["fd_fitted_gaussian"],
    },
    log_x=True,
    log_y=True,
    ticks=digits_quality.NFES,
  )
  plots.curves(
    line("distance_to_reference"),
    run.folder / "digits_distance.png",
    x_label="calls of the model (NFE)",
    y_label="median rms distance per image",
    title="distance to the 500-step solution, same noise",
    log_x=True,
    log_y=True,
    ticks=digits_quality.NFES,
  )
  return numbers | {
    "settings": config_lib.to_json(cfg),
    "training_seconds": seconds,
    "data": dataset.description,
  }


def comparison() -> dict[str, config_lib.Config]:
  """The runs of stage 2: equal epochs, each at its own learning rate."""
  base = dataclasses.replace(
    digits_flow.get_config(), ema_decay=0.0, checkpoint_every=0
  )
  runs = {}
  for name, size, rate, steps in (
    ("lamb", 1024, 2e-2, 53),
    ("adamw", 64, 4e-3, 848),
    ("adamw", 1024, 1e-2, 53),
  ):
    runs[f"{name} {size}"] = dataclasses.replace(
      base,
      batch_size=size,
      steps=steps,
      eval_every=max(steps // 10, 1),
      steps_per_dispatch=8,
      optim=dataclasses.replace(
        base.optim,
        name=name,
        learning_rate=rate,
        warmup=steps // 10,
      ),
    )
  return runs


def batch(run: Run) -> dict:
  """Stage 2: three optimizers at equal epochs."""
  rows, lines = [], {}
  for label, cfg in comparison().items():
    dataset = tasks_lib.load_data(cfg)
    name = "batch_" + label.lower().replace(" ", "_")
    state, task, seconds = run.train(cfg, name, dataset)
    evaluate = jax.jit(task.evaluate)
    loss = lambda split, c=cfg, e=evaluate, s=state: training.held_out(
      c, e, split, s.params
    )["held_out_loss"]
    epochs = cfg.steps * cfg.batch_size / dataset.train.num_rows
    rows.append(
      {
        "optimizer": label,
        "learning rate": cfg.optim.learning_rate,
        "epochs": round(epochs, 1),
        "optimizer steps": cfg.steps,
        "training loss": loss(dataset.train),
        "held-out loss": loss(dataset.held_out),
        "seconds": seconds,
      }
    )
    history = metrics.read(run.folder / name)
    history = [row for row in history if "held_out_loss" in row]
    lines[label] = (
      [r["step"] * epochs / cfg.steps for r in history],
      [r["held_out_loss"] for r in history],
    )
  plots.curves(
    lines,
    run.folder / "batch.png",
    x_label="epochs",
    y_label="held-out flow-matching loss per pixel",
    title="equal epochs, one schedule family",
    log_y=True,
  )
  return {"rows": rows}


def text(run: Run) -> dict:
  """Stage 3: a masked-diffusion language model, one or many bytes per pass."""
  cfg = code_lm_quickstart.get_config()
  dataset = tasks_lib.load_data(cfg)
  state, task, seconds = run.train(cfg, "text", dataset)
  history = metrics.read(run.folder / "text")
  bits = [r for r in history if "held_out_bits_per_byte" in r]
  model = task.apply(state.ema)
  tokens = text_quality.windows(dataset, WINDOWS)
  rows, length = tokens.shape
  masks = {
    "random": text_quality.random_mask(rows, length, 0.15, seed=0),
    "gap": text_quality.gap_mask(rows, length, GAP),
  }
  out: dict[str, Any] = {}
  for name, masked in masks.items():
    curve, results = text_quality.fill_curve(
      model,
      tokens,
      masked,
      tasks_lib.mask_token(cfg),
      THRESHOLDS,
      likelihood=name == "gap",  # agreement barely moves there
    )
    out[name] = curve
    at = THRESHOLDS.index(SHOWN)
    out[name + "_true_nll"] = text_quality.true_nll(
      model, tokens, masked, tasks_lib.mask_token(cfg)
    )
    out[name + "_text"] = [
      {
        "true": tokens[i].tolist(),
        "tokens": np.asarray(results[at].tokens[i]).tolist(),
        "committed_at": np.asarray(results[at].committed_at[i]).tolist(),
        "forwards": int(results[at].nfe[i]),
      }
      for i in range(3)
    ]
  plots.curves(
    {
      f"{name} masks": (
        [r["tokens_per_forward"] for r in out[name]],
        [r["agreement"] for r in out[name]],
      )
      for name in masks
    },
    run.folder / "text_curve.png",
    x_label="bytes committed per forward pass",
    y_label="agreement with the held-out text",
    title="thresholds .5 to .99, one per step at the left end",
  )
  plots.curves(
    {
      "held out": (
        [r["step"] for r in bits],
        [r["held_out_bits_per_byte"] for r in bits],
      )
    },
    run.folder / "text_training.png",
    x_label="step",
    y_label="bits per byte (bound)",
    title="masked diffusion with LaCT layers",
  )
  return out | {
    "settings": config_lib.to_json(cfg),
    "training_seconds": seconds,
    "bits_per_byte": bits[-1]["held_out_bits_per_byte"],
    "ngrams": ngrams.held_out_bits(dataset, max_order=3),
    "windows": rows,
    "window_bytes": length,
    "data": dataset.description,
  }


def preview_section(folder: pathlib.Path, _: dict) -> str:
  """What there is while the first stage still trains."""
  return report.section(
    "Handwritten digits, still training",
    report.figure(folder / "digits_preview.png", "First samples."),
  )


def digits_section(folder: pathlib.Path, result: dict) -> str:
  """Stage 1 of the report."""
  tables = [
    [
      {"calls": nfe}
      | {r["solver"]: r[key] for r in result["rows"] if r["nfe"] == nfe}
      for nfe in digits_quality.NFES
    ]
    for key in ("fd_digitsnet64", "distance_to_reference")
  ]
  summary = [
    {"against the held-out half": name, "fd_digitsnet64": value}
    for name, value in (
      ("floor: the real training half", result["fd_floor"]),
      ("generated, 500 calls", result["fd_reference"]),
      ("control: Gaussian fitted to the pixels", result["fd_fitted_gaussian"]),
    )
  ]
  return report.section(
    "Larger solver steps: handwritten digits",
    report.paragraph(
      f"A denoiser trained by flow matching for "
      f"{result['training_seconds']:.0f} s on {result['count_generated']} "
      f"digits and judged against the other {result['count_held_out']}. "
      "Every solver is a table of coefficients for one compiled program."
    ),
    report.figure(
      folder / "digits_grid.png",
      "The same 16 starting noises, more calls from row to row; last row: real "
      "digits that were not trained on.",
    ),
    report.figure(
      folder / "digits_fd.png",
      "Frechet distance of the 64 ReLU features of a small digit classifier "
      "(not FID). At the floor the images are statistically as good as real "
      "ones.",
    ),
    report.figure(
      folder / "digits_distance.png",
      "How far a solver is from the exact answer for the same noise: this "
      "goes on separating solvers where the Frechet distance has saturated.",
    ),
    report.table(summary),
    report.paragraph("fd_digitsnet64 by calls of the model:"),
    report.table(tables[0]),
    report.paragraph("Distance to the 500-step solution by calls:"),
    report.table(tables[1]),
    report.paragraph(
      "Memorising check: the mean distance to the nearest training image is "
      f"{result['nearest_train_generated']:.3f} for generated and "
      f"{result['nearest_train_held_out']:.3f} for held-out digits, ratio "
      f"{result['nearest_ratio']:.2f}. Against its own training half the "
      "Frechet distance can fall below the floor by memorising; longer "
      "training is not better.",
      note=True,
    ),
    report.paragraph(
      "Feature net: "
      + ", ".join(f"{k} {v}" for k, v in result["feature_net"].items()),
      note=True,
    ),
  )


def batch_section(folder: pathlib.Path, result: dict) -> str:
  """Stage 2 of the report."""
  return report.section(
    "Larger batches: LAMB and AdamW at equal epochs",
    report.table(result["rows"]),
    report.figure(
      folder / "batch.png", "Held-out loss against epochs, one seed each."
    ),
    report.paragraph(
      "The third row separates the batch from the optimizer: it is AdamW with "
      "LAMB's batch. Losses are per pixel, on the final parameters, with the "
      "same noise for all rows; each learning rate is the best of three or "
      "four (LAMB .01 to .04, AdamW 64 .0005 to .004, AdamW 1024 .001 to .01).",
      note=True,
    ),
  )


def text_section(folder: pathlib.Path, result: dict) -> str:
  """Stage 3 of the report."""
  bits = [
    {
      "model": "masked diffusion, LaCT (bound)",
      "bits per byte": result["bits_per_byte"],
    }
  ]
  bits += [
    {
      "model": f"n-gram with {row['order']} bytes of context",
      "bits per byte": row["bits_per_byte"],
    }
    for row in result["ngrams"]
  ]
  tables = []
  for name, title in (
    ("random", "15 % of the bytes masked at random"),
    ("gap", f"contiguous gaps of {GAP} bytes"),
  ):
    tables += [
      report.paragraph(
        f"{title}: {result['windows']} held-out windows of "
        f"{result['window_bytes']} bytes; the true text has "
        f"{result[name + '_true_nll']:.3f} nats per byte under the model."
      ),
      report.table(result[name]),
    ]
  texts = []
  for row in result["gap_text"][:1] + result["random_text"][:2]:
    tokens, at = np.array(row["tokens"]), np.array(row["committed_at"])
    texts += [
      report.paragraph(
        f"{int((at >= 0).sum())} bytes in {row['forwards']} forward passes, "
        f"threshold {SHOWN}; darker is later."
      ),
      report.committed_text(tokens, at, row["forwards"]),
    ]
  described = result["data"]
  beaten = [
    row["order"]
    for row in result["ngrams"]
    if result["bits_per_byte"] < row["bits_per_byte"]
  ]
  standing = "no better than counting single bytes"
  if beaten:
    standing = f"better than n-grams with {max(beaten)} bytes of context"
    if max(beaten) < result["ngrams"][-1]["order"]:
      standing += f" and no better than those with {max(beaten) + 1}"
  return report.section(
    "More tokens per step: filling gaps in source code",
    report.paragraph(
      f"A masked-diffusion model with LaCT layers, trained for "
      f"{result['training_seconds']:.0f} s on the bytes of Python's standard "
      f"library. After so short a training it is {standing}; what is compared "
      "here is the decoding."
    ),
    report.figure(folder / "text_training.png", "Held-out bound."),
    report.figure(
      folder / "text_curve.png",
      "What committing several bytes per forward pass costs in agreement.",
    ),
    report.table(bits),
    *tables,
    report.paragraph(
      "agreement: share of the filled bytes equal to the held-out text; its "
      "change to one per step has the standard error of the paired windows. "
      "nll_per_token: of the filled text under the model, revealed in reading "
      "order, in nats. seconds: all windows in one batch, which waits for its "
      "slowest row, compiled.",
      note=True,
    ),
    *texts,
    report.paragraph(f"Data: {json.dumps(described)}", note=True),
  )


def machine() -> str:
  """What this ran on."""
  environment = metrics.environment()
  rows = [{"": key, "value": str(value)} for key, value in environment.items()]
  rows.append({"": "processor", "value": platform.processor() or "unknown"})
  return report.section("Machine", report.table(rows))


if __name__ == "__main__":
  cli.run(main)
