"""Programs compiled for an NVIDIA H200 that is not here, and what ptxas says.

Needs the compiler in the packages of the extra `gpu_compile`, and no driver.
Neither numbers nor deadlocks show here, and XLA's products are not autotuned.
"""

import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from giantsteps.experiments.harness import config as config_lib

SHARED_MEMORY = 232448  # bytes that one block of threads may have
_DESCRIPTION = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150122528768
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 patch: 0 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""
# What Mosaic GPU prints while it compiles: ptxas' words, and the call that
# asks the driver for shared memory.
_DUMPS = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_HOST_LLVM")
_NO_LAUNCH = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")


class Kernel(NamedTuple):
  """A Mosaic GPU kernel as compiled for sm_90a.

  Attributes:
    name: of its entry point.
    registers: per thread at the start; warpgroups trade them afterwards.
    spills: bytes that a thread stores to and loads from local memory.
    shared: bytes of shared memory per block of threads.
    serialized: whether ptxas gave up overlapping matrix products.
  """

  name: str
  registers: int
  spills: int
  shared: int
  serialized: bool


def device() -> Any:
  """One H200 for the compiler.

  Raises:
    InputError: if the compiler is not installed or does not start.
  """
  try:
    topology = topologies.get_topology_desc(
      "h200", "cuda", target_config=_DESCRIPTION, topology="1x1x1"
    )
  except Exception as error:  # no plugin, or one of another jax
    raise config_lib.InputError(
      "the compiler for the H200 is missing (pip install "
      f"'giantsteps[gpu_compile]') or says {str(error).splitlines()[0]}"
    ) from error
  return topology.devices[0]


def compile_kernels(
  lowered: jax.stages.Lowered,
) -> tuple[jax.stages.Compiled, list[Kernel]]:
  """Compiles a program lowered for `device()`.

  Returns:
    The program, and its Mosaic GPU kernels in the order of compilation; one
    that occurs several times may be compiled, and listed, once.

  Raises:
    ValueError: by Mosaic GPU, if a kernel wants more than `SHARED_MEMORY`.
    RuntimeError: if this process has compiled the program before.
  """
  before = {name: os.environ.get(name) for name in _DUMPS}
  os.environ.update(dict.fromkeys(_DUMPS, "1"))
  try:
    with _printed() as text, warnings.catch_warnings():
      # a compilation cache cannot hold programs of machines that are not here
      warnings.filterwarnings("ignore", "Error reading persistent compilation")
      compiled = lowered.compile()
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value
  found = kernels("".join(text))
  if not found and "mosaic_gpu" in (compiled.as_text() or ""):
    raise RuntimeError(
      "jax kept this program from an earlier compilation: call "
      "jax.clear_caches() or compile another function"
    )
  return compiled, found


@contextlib.contextmanager
def _printed() -> Iterator[list[str]]:
  """What this process prints meanwhile, its C++ included."""
  text = []
  streams = (sys.stdout, sys.stderr)
  with tempfile.TemporaryFile() as file:
    saved = [os.dup(1), os.dup(2)]
    try:
      for number, stream in zip((1, 2), streams, strict=True):
        stream.flush()
        os.dup2(file.fileno(), number)
      yield text
    finally:
      for number, old, stream in zip((1, 2), saved, streams, strict=True):
        stream.flush()
        os.dup2(old, number)
        os.close(old)
      file.seek(0)
      text.append(file.read().decode(errors="replace"))


def kernels(text: str) -> list[Kernel]:
  """Reads the dumps of Mosaic GPU.

  Raises:
    ValueError: if ptxas spoke of a kernel in words this does not know.
  """
  shared = dict(
    re.findall(
      r"@mosaic_gpu_get_function\(ptr %\w+, ptr @(\w+)_name, i32 (\d+)", text
    )
  )
  found = []
  for part in re.split(r"Compiling entry function ", text)[1:]:
    name = part[1 : part.index("'", 1)]
    spills = re.search(
      r"(\d+) bytes spill stores, (\d+) bytes spill loads", part
    )
    registers = re.search(r"Used (\d+) registers", part)
    if spills is None or registers is None or name not in shared:
      raise ValueError(f"ptxas of another kind, for {name}: {part[:500]}")
    found.append(
      Kernel(
        name=name.removesuffix("_mosaic_gpu_kernel"),
        registers=int(registers[1]),
        spills=int(spills[1]) + int(spills[2]),
        shared=int(shared[name]),
        serialized=_serialized(text, name),
      )
    )
  return found


def _serialized(text: str, name: str) -> bool:
  """ptxas says so in a line that names the function, before it compiles it."""
  return any(
    "serialized" in line and name in line for line in text.splitlines()
  )


def launches(compiled: jax.stages.Compiled) -> int:
  """Kernels and library calls that one run of a program without loops starts.

  Raises:
    ValueError: for a program with a loop or branch, which this cannot count.
  """
  text = compiled.as_text() or ""
  entry = text[text.index("\nENTRY ") :].split("\n}")[0].splitlines()[1:]
  found = [re.search(r"(?:^|[\s}\])])([a-z][a-z0-9-]*)\(", x) for x in entry]
  names = [match[1] for match in found if match]
  for name in ("while", "conditional", "call"):
    if name in names:
      raise ValueError(f"the program has a {name}: launches are not static")
  return sum(name not in _NO_LAUNCH for name in names)
