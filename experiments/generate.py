"""Continues byte prompts with a trained language model.

  python -m giantsteps.experiments.generate --workdir runs/code \\
      --prompt 'def main(' --num_tokens 96

Restores the averaged parameters of the newest intact checkpoint. A masked
diffusion model fills blocks of unknown bytes, several per forward pass, by the
chosen commit rule; an autoregressive model appends one byte per pass. Prints
each text with its forward passes and appends a line per text to
generated.jsonl in the work folder.
"""

import json
import pathlib

import jax
import numpy as np
from absl import flags

from giantsteps.experiments.harness import cli, training
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import tasks as tasks_lib
from giantsteps.samplers import decoding

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of a training run of a language model.",
  required=True,
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt",
  ["import os\n\ndef ", "class Error(Exception):\n", "    for i in range("],
  "Text to continue; may be repeated.",
)
_TOKENS = flags.DEFINE_integer(
  "num_tokens", 64, "Bytes to write.", lower_bound=1
)
_BLOCK = flags.DEFINE_integer(
  "block_size", 32, "Masked models: bytes per block.", lower_bound=1
)
_RULE = flags.DEFINE_enum(
  "rule",
  "threshold",
  ["threshold", "one_per_step"],
  "Masked models: which bytes become final after a forward pass.",
)
_THRESHOLD = flags.DEFINE_float(
  "threshold", 0.9, "Confidence that commits.", lower_bound=0.0
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "0 is greedy.", lower_bound=0.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling noise.", lower_bound=0)


def main() -> int:
  """Generates with the flags' rule."""
  workdir = pathlib.Path(_WORKDIR.value)
  cfg, description = training.load_workdir(workdir)
  if cfg.task in ("flow", "views"):
    raise config_lib.InputError(
      f"--workdir {workdir} holds a model of task {cfg.task!r}: generate "
      "writes tokens; use sample for flows, benchmark for views"
    )
  task = tasks_lib.build(cfg, description)
  prompts, lengths = _prompts(cfg.data.seq_len)
  state = training.restore(workdir, cfg, task, mesh_lib.make({}))
  result = decoding.generate(
    task.apply(state.ema),
    prompts,
    lengths,
    num_tokens=_TOKENS.value,
    block_size=min(_BLOCK.value, _TOKENS.value),
    rule=_rule(cfg.task),
    mask_token=tasks_lib.mask_token(cfg) if cfg.task == "masked" else None,
    temperature=_TEMPERATURE.value,
    key=jax.random.key(_SEED.value),
  )
  answers, nfe = np.asarray(result.answers), np.asarray(result.nfe)
  with (workdir / "generated.jsonl").open("a") as file:
    for prompt, answer, calls in zip(_PROMPT.value, answers, nfe, strict=True):
      text = bytes(answer.astype(np.uint8)).decode("utf-8", "replace")
      row = {
        "step": int(state.step),
        "prompt": prompt,
        "text": text,
        "forwards": int(calls),
        "tokens_per_forward": round(_TOKENS.value / int(calls), 3),
        "exactness": result.exactness,
      }
      file.write(json.dumps(row) + "\n")
      print(
        f"--- {calls} forwards, {row['tokens_per_forward']} bytes per forward, "
        f"{result.exactness}\n{prompt}{text}"
      )
  return 0


def _rule(task: str):
  if task == "autoregressive":
    return decoding.autoregressive()
  if _RULE.value == "threshold":
    return decoding.threshold(_THRESHOLD.value)
  return decoding.top_n(_TOKENS.value)


def _prompts(seq_len: int) -> tuple[np.ndarray, np.ndarray]:
  """[B, P] int32, filled on the right, and [B] lengths in bytes."""
  rows = [prompt.encode() for prompt in _PROMPT.value]
  lengths = np.array([len(row) for row in rows], np.int32)
  if not lengths.min():
    raise config_lib.InputError("--prompt '': must hold at least one byte")
  longest = int(lengths.max()) + _TOKENS.value
  if longest > seq_len:
    raise config_lib.InputError(
      f"--num_tokens={_TOKENS.value} after {lengths.max()} bytes of prompt are "
      f"{longest} bytes; the model was trained on {seq_len}"
    )
  prompts = np.zeros((len(rows), lengths.max()), np.int32)
  for row, line in zip(prompts, rows, strict=True):
    row[: len(line)] = list(line)
  return prompts, lengths


if __name__ == "__main__":
  cli.run(main)
