"""Continues prompts with a trained language model or a published one.

  python -m giantsteps.experiments.generate --workdir runs/code \\
      --prompt 'def main(' --num_tokens 96
  python -m giantsteps.experiments.generate --model LLaDA-8B-Instruct \\
      --chat --prompt 'Why is the sky blue?'

Restores the averaged parameters of the newest intact checkpoint of a work
folder, whose tokens are bytes, or loads a folder of models/pretrained.py with
its tokenizer.json. A masked diffusion model fills blocks of unknown tokens,
several per forward pass, by the chosen commit rule; an autoregressive model
appends one token per pass. Prints each text with its forward passes; in a work
folder also appends a line per text to generated.jsonl.
"""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from giantsteps.experiments.harness import cli, training
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import tasks as tasks_lib
from giantsteps.experiments.harness import tokens as tokens_lib
from giantsteps.models import (
  families,
  pretrained,
  safetensors_folder,
  transformer,
)
from giantsteps.samplers import decoding
from giantsteps.samplers.decoding import kv_cache

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of a training run of a language model."
)
_MODEL = flags.DEFINE_string(
  "model",
  None,
  "Folder of a published checkpoint: config.json, safetensors, tokenizer.json.",
)
flags.mark_flags_as_mutual_exclusive(["workdir", "model"], required=True)
_CHAT = flags.DEFINE_bool(
  "chat", False, "With --model: prompts are turns of its chat template."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "With --model: of parameters and computing; as in the files by default.",
)
_MESH = flags.DEFINE_string(
  "mesh", "", "With --model: spreads the parameters, e.g. model=8."
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt",
  ["import os\n\ndef ", "class Error(Exception):\n", "    for i in range("],
  "Text to continue; may be repeated.",
)
_TOKENS = flags.DEFINE_integer(
  "num_tokens", 64, "Tokens to write.", lower_bound=1
)
_BLOCK = flags.DEFINE_integer(
  "block_size",
  None,
  "Masked models: tokens per block; by default what the model was trained on, "
  "or 32.",
  lower_bound=1,
)
# What each rule does with --threshold, and its value where none is given.
_RULES = {
  "threshold": (decoding.threshold, 0.9),
  "entropy": (decoding.entropy_threshold, 0.5),
  "factor": (decoding.factor, 1.0),
  "hierarchical": (decoding.hierarchical, 0.9),
  "credit": (decoding.credit, 0.9),
  "smoothing": (decoding.smoothing, 0.9),
  "editing": (decoding.editing, 0.5),
}
_RULE = flags.DEFINE_enum(
  "rule",
  "threshold",
  [*_RULES, "one_per_step"],
  "Masked models: which tokens become final after a forward pass.",
)
_THRESHOLD = flags.DEFINE_float(
  "threshold",
  None,
  "Number of the rule: the confidence, entropy or factor that commits. By "
  "default "
  + ", ".join(f"{name} {value}" for name, (_, value) in _RULES.items())
  + ".",
  lower_bound=0.0,
)
_CACHE = flags.DEFINE_enum(
  "cache",
  None,
  list(kv_cache.NAMES),
  "Keys and values that are kept. By default what is exact: block for "
  "transformers that predict the next token or were trained on blocks, else "
  "none; prefix and dual are fast and approximate.",
)
_REFRESH = flags.DEFINE_integer(
  "refresh_every", 8, "Of --cache refresh, in forward passes.", lower_bound=1
)
_SHOW = flags.DEFINE_integer(
  "show_every",
  0,
  "Prints the first text after every so many passes, unknown tokens as dots; "
  "0 is never.",
  lower_bound=0,
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "0 is greedy.", lower_bound=0.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling noise.", lower_bound=0)


class _Source(NamedTuple):
  """A model to decode.

  Attributes:
    model: as `decoding.generate` takes it.
    tokens: its texts.
    causal: predicts the next token and nothing else.
    max_length: tokens that a text may have, None: unknown.
    block_size: of the training, a block sees those before it; 0: whole rows.
    step: of the training run.
    log: file that a line per text is added to.
  """

  model: Any
  tokens: tokens_lib.Tokens
  causal: bool
  max_length: int | None
  block_size: int = 0
  step: int | None = None
  log: pathlib.Path | None = None


def main() -> int:
  """Generates with the flags' rule."""
  if _MODEL.value is not None:
    source = _published(_MODEL.value)
  else:
    assert _WORKDIR.value is not None  # one of them is given
    source = _trained(_WORKDIR.value)
  rows = [source.tokens.encode(prompt) for prompt in _PROMPT.value]
  prompts, lengths = _pad(rows, source)
  result = decoding.generate(
    source.model,
    prompts,
    lengths,
    num_tokens=_TOKENS.value,
    block_size=_block_size(source),
    block_causal=True if source.block_size else None,
    rule=_rule(source.causal),
    mask_token=None if source.causal else source.tokens.mask,
    cache=_cache(source),
    refresh_every=_REFRESH.value,
    eos_token=source.tokens.eos or None,
    temperature=_TEMPERATURE.value,
    key=jax.random.key(_SEED.value),
    callback=_show(source, int(lengths[0])) if _SHOW.value else None,
    every=_SHOW.value or 1,
  )
  answers, nfe = np.asarray(result.answers), np.asarray(result.nfe)
  for prompt, answer, calls in zip(_PROMPT.value, answers, nfe, strict=True):
    text = source.tokens.decode(answer)
    ends = np.flatnonzero(np.isin(answer, source.tokens.eos or ()))
    written = int(ends[0]) + 1 if len(ends) else len(answer)
    row = {
      "step": source.step,
      "prompt": prompt,
      "text": text,
      "forwards": int(calls),
      "tokens_per_forward": round(written / int(calls), 3),
      "exactness": result.exactness,
    }
    if source.log is not None:
      with source.log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(
      f"--- {calls} forwards, {row['tokens_per_forward']} "
      f"{source.tokens.unit} per forward, {result.exactness}\n{prompt}{text}"
    )
  return 0


def _trained(folder: str) -> _Source:
  """The averaged parameters of a training run."""
  for flag in (_CHAT, _DTYPE, _MESH):
    if flag.present:
      raise config_lib.InputError(
        f"--{flag.name}={flag.value}: only a --model takes it"
      )
  workdir = pathlib.Path(folder)
  cfg, description = training.load_workdir(workdir)
  if cfg.task in ("flow", "views"):
    raise config_lib.InputError(
      f"--workdir {workdir} holds a model of task {cfg.task!r}: generate "
      "writes tokens; use sample for flows, benchmark for views"
    )
  task = tasks_lib.build(cfg, description)
  causal = cfg.task == "autoregressive"
  state = training.restore(workdir, cfg, task, mesh_lib.make({}))
  return _Source(
    task.apply(state.ema),
    tokens_lib.utf8(None if causal else tasks_lib.mask_token(cfg)),
    causal,
    cfg.data.seq_len,
    cfg.block_size,
    int(state.step),
    workdir / "generated.jsonl",
  )


def _published(folder: str) -> _Source:
  """A checkpoint in the form of Hugging Face, with its tokenizer."""
  directory = pathlib.Path(folder)
  sizes = mesh_lib.parse(_MESH.value)
  mesh = mesh_lib.make(sizes) if sizes else None
  try:
    raw = safetensors_folder.read_json(directory / "config.json")
    # Before the parameters: their loading takes a while.
    _, shape = families.read(raw)
    tokens = tokens_lib.published(directory, shape.vocab_size, chat=_CHAT.value)
    if not shape.causal and tokens.mask is None:
      raise config_lib.InputError(
        f"--model {directory}: config.json has no mask_token_id, which a "
        "masked diffusion model decodes with"
      )
    config, params = pretrained.load(directory, dtype=_DTYPE.value, mesh=mesh)
  except (safetensors_folder.FolderError, ImportError) as error:
    raise config_lib.InputError(f"--model: {error}") from error
  rows = config.embedding_size or config.vocab_size
  # Differs from the published decoders: ids without a token, such as Dream's
  # 151667 to 152063, get no probability; they would be no text.
  if tokens.size is not None and 0 < tokens.size < config.vocab_size:
    config = dataclasses.replace(
      config, vocab_size=tokens.size, embedding_size=rows
    )
  length = raw.get("max_position_embeddings", raw.get("max_sequence_length"))
  return _Source(
    transformer.bind(config, params),
    tokens,
    config.causal,
    length if type(length) is int else None,
  )


def _rule(causal: bool):
  if causal:
    return decoding.autoregressive()
  if _RULE.value == "one_per_step":
    return decoding.threshold(1.01)  # nothing reaches it: the best token alone
  make, value = _RULES[_RULE.value]
  return make(value if _THRESHOLD.value is None else _THRESHOLD.value)


def _block_size(source: _Source) -> int:
  trained, wanted = source.block_size, _BLOCK.value
  if not trained:
    return min(wanted or 32, _TOKENS.value)
  if wanted not in (None, trained):
    raise config_lib.InputError(
      f"--block_size={wanted}: this model was trained on blocks of {trained}, "
      "leave the flag out"
    )
  return trained


def _cache(source: _Source) -> str:
  if _CACHE.value is not None:
    if _CACHE.value != "none" and not source.model.ragged:
      raise config_lib.InputError(
        f"--cache {_CACHE.value}: this model takes no cache (attention windows, "
        "short convolutions and LaCT have none here), leave the flag out"
      )
    return _CACHE.value
  exact = source.causal or source.block_size
  return "block" if exact and source.model.ragged else "none"


def _show(source: _Source, start: int):
  """Prints what is known of the first row's answer, runs of tokens apart."""

  def show(seen: decoding.Partial) -> None:
    answer = slice(start, start + _TOKENS.value)
    tokens, masked = seen.tokens[0, answer], seen.masked[0, answer]
    edges = np.flatnonzero(np.diff(masked)) + 1
    parts = zip(np.split(tokens, edges), np.split(masked, edges), strict=True)
    text = "".join(
      "\N{MIDDLE DOT}" * len(run) if unknown[0] else source.tokens.decode(run)
      for run, unknown in parts
    )
    print(f"{int(seen.nfe[0]):4d} {text!r}", flush=True)

  return show


def _pad(
  rows: list[list[int]], source: _Source
) -> tuple[np.ndarray, np.ndarray]:
  """[B, P] int32, filled on the right, and [B] lengths in tokens."""
  unit = source.tokens.unit
  lengths = np.array([len(row) for row in rows], np.int32)
  if not lengths.min():
    raise config_lib.InputError(
      f"--prompt '': must hold at least one of the {unit}"
    )
  longest = int(lengths.max()) + _TOKENS.value
  if source.max_length is not None and longest > source.max_length:
    raise config_lib.InputError(
      f"--num_tokens={_TOKENS.value} after {lengths.max()} {unit} of prompt "
      f"are {longest} {unit}; the model was trained on {source.max_length}"
    )
  prompts = np.zeros((len(rows), lengths.max()), np.int32)
  for row, line in zip(prompts, rows, strict=True):
    row[: len(line)] = line
  return prompts, lengths


if __name__ == "__main__":
  cli.run(main)
