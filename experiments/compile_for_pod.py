"""Compiles training or decoding for a TPU pod on a machine without one.

  python -m giantsteps.experiments.compile_for_pod --config bert_large \\
      --topology v5e:16x16 --mesh data=256 --accumulate 4 --json pod.json
  python -m giantsteps.experiments.compile_for_pod --model LLaDA-8B-Instruct \\
      --topology v5e:2x4 --mesh model=8 --rows 8 --cache dual

Says before a chip is rented: memory per chip and what takes it, floating-point
operations, every collective with its bytes per step, the time below which no
step can be on that chip, whether it fits and what dominates. The first is the
training step of a config, the second the decoding loop of a published
checkpoint, of which config.json is read and nothing else. Needs the package
libtpu, which is the compiler and wants no TPU.
"""

import json
import pathlib
from typing import Any

import jax
from absl import flags, logging

from giantsteps.experiments.harness import cli, decode_pod, pod
from giantsteps.experiments.harness import config as config_lib
from giantsteps.samplers.decoding import kv_cache

compile_step = pod.compile_step

_CONFIG = flags.DEFINE_string(
  "config", None, "Module in experiments/configs, to be trained."
)
_MODEL = flags.DEFINE_string(
  "model", None, "Folder with a checkpoint's config.json, to be decoded."
)
_SET = flags.DEFINE_multi_string(
  "set", [], "Override a field, e.g. optim.shards=0; may be repeated."
)
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "Chip and slice.")
_MESH = flags.DEFINE_string(
  "mesh",
  "",
  "Chips by axis, e.g. data=256; empty is data = all chips, or with --model "
  "model = all chips.",
)
_ACCUMULATE = flags.DEFINE_integer(
  "accumulate", None, "Short for --set accumulate=N.", lower_bound=1
)
_TABLE = flags.DEFINE_bool(
  "table",
  False,
  "Instead: the update whole on every chip (optim.shards=0) and as the config "
  "says, each with accumulate=1 and 4, as one table.",
)
_ROWS = flags.DEFINE_integer("rows", 8, "Of --model: texts.", lower_bound=1)
_PROMPT = flags.DEFINE_integer(
  "prompt_length", 128, "Of --model: tokens of each prompt.", lower_bound=1
)
_TOKENS = flags.DEFINE_integer(
  "num_tokens", 128, "Of --model: tokens of each answer.", lower_bound=1
)
_BLOCK = flags.DEFINE_integer(
  "block_size", 32, "Of --model: tokens per block.", lower_bound=1
)
_CACHE = flags.DEFINE_enum(
  "cache", "dual", list(kv_cache.NAMES), "Of --model: what is kept."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of --model and its cache."
)
_JSON = flags.DEFINE_string("json", None, "Writes the report to this file.")


def main() -> int:
  """Prints the report of the flags' config; 1 if it does not fit."""
  jax.config.update("jax_platforms", "cpu")  # the chips are not here
  path = _JSON.value and pathlib.Path(_JSON.value)
  if path and not path.parent.is_dir():
    raise config_lib.InputError(f"--json {path}: no folder {path.parent}")
  if (_CONFIG.value is None) == (_MODEL.value is None):
    raise config_lib.InputError(
      "give --config, to be trained, or --model, to be decoded"
    )
  if _MODEL.value is not None:
    found, text = _decoding(_MODEL.value)
  elif _TABLE.value:
    found, text = _table(_CONFIG.value)
  else:
    found, text = _training(_CONFIG.value)
  print(text)
  if path:
    path.write_text(json.dumps(found, indent=2) + "\n")
  return 0 if isinstance(found, list) or found["fits"] else 1


def _decoding(folder: str) -> tuple[Any, str]:
  batch = decode_pod.Batch(
    rows=_ROWS.value,
    prompt_length=_PROMPT.value,
    num_tokens=_TOKENS.value,
    block_size=_BLOCK.value,
    cache=_CACHE.value,
  )
  chips = _TOPOLOGY.value, _MESH.value
  found = decode_pod.describe(folder, *chips, batch, _DTYPE.value)
  return found, decode_pod.words(found)


def _table(config: Any) -> tuple[Any, str]:
  tell = lambda row: logging.info("%s\n%s", row["overrides"], pod.words(row))
  chips = _TOPOLOGY.value, _MESH.value
  found = pod.compare(config, *chips, _SET.value, tell)
  return found, pod.table(found)


def _training(config: Any) -> tuple[Any, str]:
  more = _ACCUMULATE.value
  more = [f"accumulate={more}"] if more is not None else []
  chips = _TOPOLOGY.value, _MESH.value
  found = pod.describe(config, *chips, [*_SET.value, *more])
  return found, pod.words(found)


if __name__ == "__main__":
  cli.run(main)
