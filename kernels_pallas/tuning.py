"""Block sizes by kernel, call and chip: tuned/<chip>.json.

A program compiled ahead of time is for a chip that is not here, so the chip is
named, never guessed from the process that traces:

    with tuning.target("TPU v6 lite"):
      lowered = jax.jit(step).lower(...)

Without a name the blocks are those of the local accelerator, if there is one,
or the kernel's own, which every chip of its platform can hold. Blocks are read
while tracing: a function that is jitted already keeps those of its first trace.
"""

import contextlib
import contextvars
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

FOLDER = pathlib.Path(__file__).parent / "tuned"

Blocks = Mapping[str, int]


class _Target(NamedTuple):
  device_kind: str
  blocks: Blocks | None
  asked: list[tuple[str, str]]


_CURRENT: contextvars.ContextVar[_Target | None] = contextvars.ContextVar(
  "tuning_target", default=None
)


@contextlib.contextmanager
def target(
  device_kind: str, blocks: Blocks | None = None
) -> Iterator[list[tuple[str, str]]]:
  """Names the chip that programs traced inside are for.

  Args:
    device_kind: as of `jax.Device.device_kind`, "TPU v5 lite".
    blocks: used for every kernel instead of the tuned ones; for tuners.

  Yields:
    A list that receives (kernel, call) of every look-up.
  """
  asked: list[tuple[str, str]] = []
  token = _CURRENT.set(_Target(device_kind, blocks, asked))
  try:
    yield asked
  finally:
    _CURRENT.reset(token)


def blocks(kernel: str, call: str, default: Blocks) -> dict[str, int]:
  """The block sizes of one call.

  Args:
    kernel: name of its package, "newton_schulz".
    call: shapes and dtypes that decide, "512x512 bfloat16".
    default: sizes that every chip can hold.

  Returns:
    `default`, with what is tuned for the chip in its place.

  Raises:
    ValueError: if blocks name a size that `default` does not have.
  """
  current = _CURRENT.get()
  if current:
    current.asked.append((kernel, call))
  if current and current.blocks is not None:
    found = current.blocks
  else:
    kind = current.device_kind if current else _local()
    found = table(kind).get(kernel, {}).get(call, {}) if kind else {}
  surplus = sorted(set(found) - set(default))
  if surplus:
    raise ValueError(f"{kernel} has no block {surplus}: has {sorted(default)}")
  return {**default, **found}


def file(device_kind: str) -> pathlib.Path:
  """tuned/tpu_v5_lite.json for "TPU v5 lite"."""
  return FOLDER / f"{device_kind.lower().replace(' ', '_')}.json"


@functools.lru_cache
def table(device_kind: str) -> dict[str, dict[str, dict[str, int]]]:
  """Blocks of a chip by kernel and call; empty for a chip without a file."""
  path = file(device_kind)
  return json.loads(path.read_text()) if path.is_file() else {}


def _local() -> str | None:
  """The kind of the local accelerator; None on a CPU."""
  device = jax.local_devices()[0]
  return None if device.platform == "cpu" else device.device_kind
