"""What LaCT remembers: loss by position, for models that differ in one thing.

Every model is trained with several seeds from one config; a study that was
interrupted goes on where it stopped, model by model and step by step.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import data, flops, training
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import tasks as tasks_lib
from giantsteps.models import lact, transformer


def recall(overrides: list[str]) -> dict[str, config_lib.Config]:
  """Config `recall` with each inner optimizer."""
  base = config_lib.load("recall", overrides)
  inner = {
    "gradient descent": {"muon": False},
    "momentum": {"muon": False, "momentum": True},
    "Muon": {"muon": True},
    "Muon, prenorm": {"muon": True, "prenorm": True},
  }
  return {name: _replace(base, **change) for name, change in inner.items()}


def long_text(overrides: list[str]) -> dict[str, config_lib.Config]:
  """Config `long_text` beside transformers of the same depth and width whose
  attention sees its window, or everything; their MLPs are as wide as equal
  floating-point operations per forward pass allow."""
  base = config_lib.load("long_text", overrides)
  model = base.model
  rival = transformer.Config(
    vocab_size=model.vocab_size,
    width=model.width,
    depth=model.depth,
    num_heads=model.num_heads,
    num_kv_heads=model.num_heads,
    head_dim=model.width // model.num_heads,
    causal=True,
    window=model.window,
    qk_norm=True,
    short_conv=model.short_conv,
  )
  full = dataclasses.replace(rival, window=None)
  budget = forward_flops(model, base.data.seq_len)
  return {
    "LaCT": base,
    "window": _with_budget(base, rival, budget),
    "full attention": _with_budget(base, full, budget),
  }


def forward_flops(model: Any, length: int) -> float:
  """Of matrix products, logits of one row of `length` tokens."""
  if isinstance(model, lact.Config):
    network, logits = lact.Lact(model), lact.logits
  else:
    network, logits = transformer.Transformer(model), transformer.logits
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  params = jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
  run = functools.partial(logits, model)
  return flops.count(jax.make_jaxpr(run)(params, tokens))


def _with_budget(base, model, budget):
  """`model` with the MLP that brings it to the budget; cost is linear in it."""
  cost = lambda width: forward_flops(
    dataclasses.replace(model, mlp_width=width), base.data.seq_len
  )
  low, high = cost(8), cost(16)
  width = 8 + 8 * round((budget - low) / (high - low))
  if width < 8:
    raise config_lib.InputError(
      f"window={model.window}: attention alone costs more than LaCT here; "
      "shorten data.seq_len or widen model.mlp_width"
    )
  model = dataclasses.replace(model, mlp_width=width)
  return dataclasses.replace(base, model=model)


def _replace(base: config_lib.Config, **changes: Any) -> config_lib.Config:
  return dataclasses.replace(
    base, model=dataclasses.replace(base.model, **changes)
  )


def run(
  configs: dict[str, config_lib.Config],
  workdir: pathlib.Path,
  seeds: int,
  bucket: int,
  report: Callable[[str], Any],
) -> list[dict]:
  """Trains every config with every seed and measures the loss by position.

  Args:
    configs: by name; they share their data.
    workdir: gets a folder per run.
    seeds: 0 .. seeds - 1, of initial values and order of the rows.
    bucket: positions whose loss is averaged.
    report: takes a line of text.

  Returns:
    One row per run: name, seed, steps, parameters, forward_flops per row, nats
    [buckets] and standard_error [buckets] over held-out rows.
  """
  dataset = tasks_lib.load_data(next(iter(configs.values())))
  rows = []
  for seed in range(seeds):
    for name, cfg in configs.items():
      cfg = dataclasses.replace(cfg, seed=seed)
      folder = workdir / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
      state, task = training.train(
        cfg, folder, mesh_lib.make({}), dataset=dataset, label=f"{name} {seed}"
      )
      nats = losses_by_position(task.apply(state.ema), dataset, bucket)
      rows.append(
        {
          "name": name,
          "seed": seed,
          "steps": int(state.step),
          "parameters": sum(x.size for x in jax.tree.leaves(state.ema)),
          "forward_flops": forward_flops(cfg.model, cfg.data.seq_len),
          "nats": nats.mean(0).tolist(),
          "standard_error": (nats.std(0, ddof=1) / np.sqrt(len(nats))).tolist(),
        }
      )
      shown = " ".join(f"{x:.3f}" for x in nats.mean(0))
      report(f"{name}, seed {seed}: nats by position {shown}")
  return rows


def losses_by_position(
  model: Any, dataset: data.Dataset, bucket: int, rows: int = 256
) -> np.ndarray:
  """Held-out loss of a causal model, averaged over `bucket` positions.

  Args:
    model: a `Bound`, whose output at i predicts token i.
    dataset: rows [T], T a multiple of `bucket`; tokens of weight 0 do not
      count, and the first of a row never does.
    bucket: positions per average.
    rows: held-out rows, evenly spaced over the split.

  Returns:
    [rows, T / bucket] float64, nats; a few rows less where they do not fill
    groups of 8.
  """

  @jax.jit
  def losses(model, tokens):
    hidden, _ = model.forward(tokens)
    logits = (hidden @ model.head.astype(hidden.dtype)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens)

  count = dataset.held_out.num_rows
  chosen = np.linspace(0, count - 1, min(rows, count)).astype(np.int64)
  group = min(8, len(chosen))
  found = []
  for indices in chosen[: len(chosen) // group * group].reshape(-1, group):
    batch = dataset.held_out.read(indices)
    weights = np.ones(batch["tokens"].shape, np.float32)
    weights = batch.get("weights", weights).copy()
    weights[:, 0] = 0
    nats = np.asarray(losses(model, batch["tokens"]), np.float64) * weights
    split = lambda x: x.reshape(group, -1, bucket).sum(-1)
    found.append(split(nats) / split(weights))
  return np.concatenate(found)


def summary(rows: list[dict]) -> list[dict]:
  """Per name: mean over seeds of nats [buckets], and the seeds' range."""
  out = []
  for name in dict.fromkeys(row["name"] for row in rows):
    runs = np.array([row["nats"] for row in rows if row["name"] == name])
    out.append(
      {
        "name": name,
        "nats": runs.mean(0).tolist(),
        "lowest": runs.min(0).tolist(),
        "highest": runs.max(0).tolist(),
      }
    )
  return out


def gains(rows: list[dict]) -> list[str]:
  """What LaCT is ahead of the others after the first bucket, seed by seed."""
  late = {(r["name"], r["seed"]): float(np.mean(r["nats"][1:])) for r in rows}
  lines = []
  for name in dict.fromkeys(row["name"] for row in rows):
    seeds = [seed for other, seed in late if other == name != "LaCT"]
    ahead = [late[name, seed] - late["LaCT", seed] for seed in seeds]
    if ahead:
      each = ", ".join(f"{x:+.4f}" for x in ahead)
      lines.append(
        f"LaCT is ahead of {name} by {np.mean(ahead):+.4f} nats beyond the "
        f"first bucket (seeds: {each})"
      )
  return lines
