"""Measures solvers or a trained model and writes the numbers as JSON.

  python -m giantsteps.experiments.benchmark --suite samplers
  python -m giantsteps.experiments.benchmark --suite large_batch
  python -m giantsteps.experiments.benchmark --suite lact --official CHECKOUT
  python -m giantsteps.experiments.benchmark --suite decoding
  python -m giantsteps.experiments.benchmark --suite recall --seeds 3
  python -m giantsteps.experiments.benchmark --suite long_text --seeds 3
  python -m giantsteps.experiments.benchmark --suite digits --workdir runs/digits
  python -m giantsteps.experiments.benchmark --suite text --workdir runs/code
  python -m giantsteps.experiments.benchmark --suite views --workdir runs/views

samplers: distance to the exact solution at 5 to 20 calls on mixtures of
Gaussians, for our default and for every public solver; microseconds per step
when the model is free; both beside diffusers where it is installed, else beside
its recorded figures (experiments/results/samplers.json). large_batch: one
update of LAMB against optax.lamb (time, compile time, bytes), and the
collectives of a training step compiled for sixteen TPU chips. lact: tokens per
second of LaCT's operator by size of its chunks, on this machine, beside the
authors' under torch.compile where a checkout of their repository is given
(--official; on a CPU their compilation takes minutes, TORCHDYNAMO_DISABLE=1 in
the environment leaves it out), and what bfloat16 does to its gradients. decoding: a
LLaDA-shaped model of random weights, every cache beside the loop of full
passes and full logits, 1 and 8 requests. recall: trains LaCT with each inner optimizer to remember pairs, loss by position beside that
of a perfect memory. long_text: trains LaCT, window attention and full attention
of equal cost on source code, loss by position. digits: Frechet
distance against the held-out half with floor and control, and distance to the
500-step solution, for every solver at 3 to 50 calls, over three noises; and
the solvers' ranking by their distance to the exact samples. text: bits per byte against byte n-grams with the same training
bytes; for masked models also what is lost by committing several bytes per
forward pass. views: PSNR of unseen views of held-out scenes against the number
of input views, beside two baselines. The result goes to benchmark_<suite>.json
in the work folder (runs/benchmark_<suite> for recall and long_text, which train
and go on where they stopped; runs/benchmark for those that train nothing).
"""

import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from giantsteps.experiments.harness import (
  cli,
  data,
  decoding_speed,
  diffusers_peers,
  digits_quality,
  lact_precision,
  lact_speed,
  large_batch_speed,
  memory_studies,
  metrics,
  ngrams,
  plots,
  pod,
  samplers_overhead,
  samplers_quality,
  sampling,
  text_quality,
  training,
  views_quality,
)
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import tasks as tasks_lib
from giantsteps.research.test_time_training import associative_recall

RECORDED = pathlib.Path(__file__).parent / "results" / "samplers.json"
_SUITE = flags.DEFINE_enum(
  "suite",
  None,
  [
    *("samplers", "large_batch", "lact", "decoding", "recall", "long_text"),
    *("digits", "text", "views"),
  ],
  "What is measured.",
  required=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of a training run; the suites that need none: where results go "
  "(runs/benchmark; recall, long_text: runs/benchmark_<suite>).",
)
_ROUNDS = flags.DEFINE_integer(
  "rounds",
  None,
  "Of the timings; samplers: 9, 0 for none; large_batch: 30; lact: 5; "
  "decoding: 5.",
  lower_bound=0,
)
_OFFICIAL = flags.DEFINE_string(
  "official", None, "lact: folder of the authors' repository; its code is run."
)
_CHUNKS = flags.DEFINE_list(
  "chunks",
  [str(chunk) for chunk in lact_speed.CHUNKS],
  "lact: sizes of chunks, in tokens.",
)
_SEEDS = flags.DEFINE_integer(
  "seeds", 3, "recall, long_text: trainings of each model.", lower_bound=1
)
_SET = flags.DEFINE_multi_string(
  "set", [], "recall, long_text: override a field of the config."
)
_WINDOWS = flags.DEFINE_integer(
  "windows", 208, "text: held-out windows that are decoded.", lower_bound=2
)
_ORDER = flags.DEFINE_integer(
  "ngram_order", 5, "text: largest context of the n-grams.", lower_bound=0
)

_SCENES = flags.DEFINE_integer(
  "scenes", 64, "views: held-out scenes that are drawn.", lower_bound=2
)


def main() -> int:
  """Runs the suite of the flags."""
  start = time.time()
  untrained = {
    "samplers": samplers,
    "large_batch": updates,
    "lact": operator,
    "decoding": decoders,
  }
  if _SUITE.value in untrained:
    workdir = pathlib.Path(_WORKDIR.value or "runs/benchmark")
    result = untrained[_SUITE.value](workdir)
  elif _SUITE.value in ("recall", "long_text"):
    workdir = pathlib.Path(_WORKDIR.value or f"runs/benchmark_{_SUITE.value}")
    _make(workdir)
    result = memory(workdir)
  else:
    if _WORKDIR.value is None:
      raise config_lib.InputError(
        f"--suite {_SUITE.value} needs --workdir, the folder of a training run"
      )
    workdir = pathlib.Path(_WORKDIR.value)
    result = _trained(workdir)
  result |= {
    "environment": metrics.environment(),
    "seconds": time.time() - start,
  }
  path = workdir / f"benchmark_{_SUITE.value}.json"
  path.write_text(json.dumps(result, indent=1) + "\n")
  logging.info("wrote %s", path)
  return 0


def samplers(workdir: pathlib.Path) -> dict:
  """Errors on mixtures, then overhead; tables as text, JSON and plots."""
  core = samplers_overhead.pin()
  rounds = 9 if _ROUNDS.value is None else _ROUNDS.value
  _make(workdir)
  peers, recorded = diffusers_peers.versions(), None
  if peers:
    logging.info("peers: %s", peers)
  else:
    recorded = json.loads(RECORDED.read_text())
    logging.info(
      "diffusers or torch is not installed (pip install 'giantsteps[peers]'):"
      " their rows are the recorded ones of %s",
      recorded["environment"]["started"],
    )
  result: dict[str, Any] = {"peers": peers or "recorded", "problems": {}}
  for problem in samplers_quality.problems():
    measured = samplers_quality.measure(problem, logging.info)
    if recorded:
      rows = recorded["problems"][problem.name]["rows"]
      measured["rows"] += [r for r in rows if r["source"] == "diffusers"]
    measured["summary"] = samplers_quality.summary(measured["rows"])
    result["problems"][problem.name] = measured
    _print_problem(problem.name, measured)
  plots.error_curves(
    {k: v["rows"] for k, v in result["problems"].items()},
    workdir / "samplers_error.png",
  )
  if rounds:
    overhead = samplers_overhead.measure(rounds, report=logging.info)
    result["overhead"] = overhead | {"core": core}
    theirs = recorded["overhead"]["rows"] if recorded else []
    _print_overhead(overhead, theirs)
  return result


def updates(workdir: pathlib.Path) -> dict:
  """LAMB's update beside optax's, and what a step sends between chips."""
  _make(workdir)
  rounds = 30 if _ROUNDS.value is None else max(2, _ROUNDS.value)
  speed = large_batch_speed.measure(rounds)
  show = lambda s: (
    f"{s['median']:.3g} [{s['quartiles'][0]:.3g}, {s['quartiles'][1]:.3g}]"
  )
  print(
    f"one update of {speed['parameters'] / 1e6:.1f} M float32 parameters in"
    f" {speed['leaves']} arrays; median [quartiles] of {rounds} rounds"
  )
  for name in ("lamb", "optax.lamb", "optax.adamw"):
    row = speed[name]
    print(
      f"{name:12s} {show(row['update_ms'])} ms, compiled in"
      f" {show(row['compile_s'])} s, {row['bytes_per_parameter']:.0f} bytes per"
      f" parameter (floor {speed['floor_bytes_per_parameter']})"
    )
  print(f"lamb / optax.lamb, time of a round: {show(speed['update_ratio'])}")
  print(f"lamb / optax.lamb, compile time: {show(speed['compile_ratio'])}")
  try:
    steps = pod.compare("bert_smoke", "v5e:4x4")
  except config_lib.InputError as error:
    logging.warning("no collectives: %s", error)
    return {"update": speed}
  print("\nbert_smoke on 16 chips of TPU v5e, per chip and step")
  print(pod.table(steps))
  return {"update": speed, "steps": steps}


def operator(workdir: pathlib.Path) -> dict:
  """LaCT's operator: speed by chunk size, and errors of bfloat16."""
  _make(workdir)
  for chunk in _CHUNKS.value:
    if not chunk.isdecimal() or not int(chunk):
      raise config_lib.InputError(f"--chunks {chunk}: wants numbers above 0")
  shapes = lact_speed.SHAPES.get(jax.default_backend())
  speed = lact_speed.measure(
    shapes or lact_speed.SHAPES["other"],
    [int(chunk) for chunk in _CHUNKS.value],
    rounds=5 if _ROUNDS.value is None else max(2, _ROUNDS.value),
    official=pathlib.Path(_OFFICIAL.value) if _OFFICIAL.value else None,
    report=print,
  )
  precision = [row for d in (32, 128, 256) for row in lact_precision.measure(d)]
  print("\nerrors of bfloat16, relative to float32; three chunks of 4 d tokens")
  for row in precision:
    print(_figures(row))
  return {"speed": speed, "precision": precision}


def decoders(workdir: pathlib.Path) -> dict:
  """Milliseconds per token of every cache beside the plain loop."""
  _make(workdir)
  rounds = 5 if _ROUNDS.value is None else max(1, _ROUNDS.value)
  rows = []
  print(
    f"{decoding_speed.ANSWER} tokens after {decoding_speed.PROMPT}, blocks of "
    f"{decoding_speed.BLOCK}, one token per step; median [lowest, highest] of "
    f"{rounds} rounds"
  )
  for batch in (1, 8):
    for row in decoding_speed.measure(rows=batch, rounds=rounds):
      rows.append(row)
      times = row["times_faster"]
      print(
        f"B={batch} {row['name']:25s} {row['milliseconds_per_token']:7.2f} ms "
        f"per token, {np.median(times):5.2f} [{min(times):.2f}, "
        f"{max(times):.2f}] times faster, temporaries "
        f"{row['temporaries'] / 1e6:6.1f} MB, tokens equal "
        f"{row['tokens_equal_to_the_plain_loop']:.3f}"
      )
  return {"rounds": rounds, "rows": rows}


def memory(workdir: pathlib.Path) -> dict:
  """Trains the study's models; prints and draws the loss by position."""
  study = getattr(memory_studies, _SUITE.value)
  configs = study(_SET.value)
  first = next(iter(configs.values()))
  bucket = first.model.chunk_size
  if _SUITE.value == "long_text":
    bucket = 4 * first.model.window
  rows = memory_studies.run(
    configs, workdir, _SEEDS.value, bucket, logging.info
  )
  result = {"overrides": _SET.value, "bucket": bucket, "rows": rows}
  result["summary"] = memory_studies.summary(rows)
  length = first.data.seq_len
  lines = {row["name"]: row["nats"] for row in result["summary"]}
  if _SUITE.value == "recall":
    keys = int(first.data.source.partition(":")[2])
    best = associative_recall.best_nats(length // 2, keys)
    result["perfect_memory"] = best.reshape(-1, bucket // 2).mean(1).tolist()
    lines["perfect memory"] = result["perfect_memory"]
  middle = [bucket * (i + 0.5) for i in range(length // bucket)]
  plots.curves(
    {name: (middle, nats) for name, nats in lines.items()},
    workdir / f"{_SUITE.value}.png",
    x_label="position",
    y_label="nats per token",
    title=f"{first.data.source}, mean of {_SEEDS.value} seeds",
  )
  print(f"nats per token, averages over {bucket} positions, mean of the seeds")
  for name, nats in lines.items():
    print(f"{name:18s} " + " ".join(f"{x:6.3f}" for x in nats))
  if _SUITE.value == "long_text":
    for line in memory_studies.gains(rows):
      print(line)
  return result


def _make(workdir: pathlib.Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise config_lib.InputError(f"--workdir {workdir}: {error}") from error


def _print_problem(name: str, measured: dict) -> None:
  print(
    f"\n{name}: median error of 128 samples (of 256 fresh ones);"
    f" {measured['tables']} tables in {measured['programs']} programs"
  )
  print("NFE   default            best public solver of this column")
  for line in measured["summary"]:
    print(
      f"{line['nfe']:3d}   {line['median']:.1e} ({line['median_fresh']:.1e})"
      f"  {line['best_median']:.1e} ({line['best_median_fresh']:.1e})"
      f"  {line['times_lower_median']:.2f} ({line['times_lower_median_fresh']:.2f})"
      f" times lower than {line['best_by_median']}"
    )


def _print_overhead(overhead: dict, recorded: list[dict]) -> None:
  print(
    "\nmicroseconds per step, free model, one core: median"
    f" [quartiles] of {overhead['rounds']} rounds of {overhead['steps']} steps;"
    f" the model stands {overhead['model_in_program']} time(s) in the program;"
    f" {overhead['programs']} programs for {overhead['shapes_and_widths']}"
    " shapes x widths"
  )
  old = {(r["method"], *r["shape"]): r.get("theirs") for r in recorded}
  show = lambda q: f"{q[1]:7.1f} [{q[0]:.1f}, {q[2]:.1f}]"
  for row in overhead["rows"]:
    line = f"{row['method']:11s} {row['shape']!s:17s} {show(row['ours'])}"
    line += f" {row['gigabytes_per_second']:5.1f} GB/s"
    if "theirs" in row:
      line += f"  diffusers {show(row['theirs'])}"
      line += f"  {show(row['times_less'])} times less"
    elif old.get((row["method"], *row["shape"])):
      line += f"  diffusers, recorded {show(old[row['method'], *row['shape']])}"
    print(line)
  print(f"copying, GB/s: {overhead['copy_gigabytes_per_second']}")


def _trained(workdir: pathlib.Path) -> dict:
  cfg, description = training.load_workdir(workdir)
  fits = {"flow": "digits", "views": "views"}.get(cfg.task, "text")
  if fits != _SUITE.value:
    raise config_lib.InputError(
      f"--suite {_SUITE.value} does not fit the model of task {cfg.task!r} in "
      f"--workdir {workdir}"
    )
  if cfg.block_size:
    raise config_lib.InputError(
      f"--suite text fills whole rows, the model in --workdir {workdir} was "
      f"trained on blocks of {cfg.block_size}: use generate"
    )
  dataset = tasks_lib.load_data(cfg)
  task = tasks_lib.build(cfg, description)
  state = training.restore(workdir, cfg, task, mesh_lib.make({}))
  match _SUITE.value:
    case "digits":
      measured = digits(cfg, task, state.ema, dataset)
    case "views":
      measured = views(cfg, state.ema, dataset, workdir)
    case _:
      measured = text(cfg, task, state.ema, dataset)
  return measured | {
    "step": int(state.step),
    "config": config_lib.to_json(cfg),
  }


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
  ranking = digits_quality.rank(
    draw, params, dataset, conditional=cfg.model.num_classes > 0
  )
  print("\nmedian distance to the exact samples of this model, best first")
  for nfe in samplers_quality.NFES:
    column = [row for row in ranking if row["nfe"] == nfe]
    for place, row in enumerate(sorted(column, key=lambda r: r["median"]), 1):
      if place <= 3 or row["source"] == "giantsteps":
        print(f"{nfe:3d} calls, place {place:2d}: {_figures(row)}")
  return {"runs": runs, "ranking": ranking}


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


def views(
  cfg, params: Any, dataset: data.Dataset, workdir: pathlib.Path
) -> dict:
  """PSNR by number of input views; pictures of eight scenes."""
  result = views_quality.measure(cfg, params, dataset, _SCENES.value)
  pictures = result.pop("pictures")
  counts = [row["input_views"] for row in result["rows"]]
  rows, columns, *shape = pictures.shape
  plots.image_grid(
    2 * pictures.swapaxes(0, 1).reshape(columns * rows, *shape) - 1,
    workdir / "views.png",
    columns=rows,
    row_labels=["true", *map(str, counts)],
    title="unseen views, by number of input views",
  )
  for row in result["rows"]:
    line = ", ".join(
      f"{name} {row[name]:.2f} +- {row[f'{name}_standard_error']:.2f} dB"
      for name in ("psnr", "mean_colour", "nearest_view")
    )
    print(f"{row['input_views']:3d} input views: {line}")
  print(
    f"from {counts[0]} to {counts[-1]}: {result['gain']:+.2f} +- "
    f"{result['gain_standard_error']:.2f} dB over {result['scenes']} scenes"
  )
  return result


def _spread(values: list[float]) -> str:
  low, high = min(values), max(values)
  return f"mean {np.mean(values):.4g} range {low:.4g} .. {high:.4g}"


def _figures(row: dict) -> str:
  show = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
  return ", ".join(f"{key} {show(value)}" for key, value in row.items())


if __name__ == "__main__":
  cli.run(main)
