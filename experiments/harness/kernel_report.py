"""What the compiler says of a kernel on a TPU that is not here.

Compiles an `Example` in a process of its own, where libtpu writes the final
program, and counts: cycles that XLA estimates for its operations, bundles that
the Pallas kernel executes, spills, on-chip memory, temporaries. Estimates of a
compiler, never measurements; waits for memory show only as the bytes that must
be moved.
"""

import importlib
import importlib.util
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from giantsteps import kernels_pallas
from giantsteps.experiments.harness import bundles, chips, pod
from giantsteps.experiments.harness import config as config_lib
from giantsteps.kernels_pallas import tuning
from giantsteps.kernels_pallas.example import Example

TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Bytes per second of HBM. Source: as of chips.py.
BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9}
# Cycles that one vmatmul instruction of bfloat16 keeps its unit busy: 16 rows
# through 128 x 128 (v5e, v5p) or 256 x 256 (v6e). Times units and clock that
# is the chip's peak (v5p: of one of its two cores).
ISSUE = {"v5e": 16, "v5p": 16, "v6e": 8}
CORES = {"v5e": 1, "v5p": 2, "v6e": 1}

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALL = re.compile(r'%([\w.-]+) = (.*)custom_call_target="tpu_custom_call"')
_OPERAND = re.compile(r"%[\w.-]+")
_VMEM = re.compile(r"^ *#\w+ \[.*?space=vmem, size = (0x[0-9a-f]+)", re.M)
_CHILD = """
import sys, types
package = types.ModuleType("giantsteps")
package.__path__ = [{root!r}]
sys.modules["giantsteps"] = package
from giantsteps.experiments.harness import kernel_report
{source}
kernel_report.write(example, *{asked!r})
"""
_EXAMPLE = """
found = kernel_report.examples({name!r}, {case!r})
example = next(e for e in found if e.name == {case!r})
"""


def kernels() -> list[str]:
  """Packages of kernels_pallas that have examples."""
  return [
    found.name
    for found in pkgutil.iter_modules(kernels_pallas.__path__)
    if found.ispkg and _examples_spec(found.name)
  ]


def _examples_spec(name: str) -> bool:
  module = f"giantsteps.kernels_pallas.{name}.examples"
  return importlib.util.find_spec(module) is not None


def examples(name: str, case: str = "") -> list[Example]:
  """The examples of a kernel whose names contain `case`.

  Raises:
    InputError: for an unknown kernel or case, with those that are known.
  """
  if name not in kernels():
    raise config_lib.InputError(
      f"unknown kernel {name!r}: there are {', '.join(kernels())}"
    )
  module = importlib.import_module(f"giantsteps.kernels_pallas.{name}.examples")
  known = module.examples()
  found = [example for example in known if case in example.name]
  if not found:
    names = ", ".join(example.name for example in known)
    raise config_lib.InputError(f"no --case {case!r} of {name}: {names}")
  return found


def check_target(target: str) -> None:
  """Raises InputError, with the known ones, for an unknown target."""
  if target not in TARGETS:
    raise config_lib.InputError(
      f"unknown --target {target!r}: there are {', '.join(TARGETS)}"
    )


def estimate(
  name: str,
  case: str,
  target: str,
  implementation: str,
  blocks: dict[str, int] | None = None,
) -> dict[str, Any]:
  """Compiles one example in a child process and describes the program.

  Args:
    name: the package in kernels_pallas.
    case: name of the example, in full.
    target: of `TARGETS`.
    implementation: of `dispatch.IMPLEMENTATIONS`, or "auto", which is what a
      user gets.
    blocks: block sizes instead of the tuned ones.

  Returns:
    Plain JSON: "microseconds" in all, "of_peak" useful FLOPs of the peak,
    "xla" and "kernels" with their parts, "memory" in bytes; or "fails", what
    the compiler says, if it refuses the program.
  """
  source = _EXAMPLE.format(name=name, case=case)
  out = {
    "kernel": name,
    "case": case,
    "target": target,
    "implementation": implementation,
  }
  return out | compile_source(source, target, implementation, blocks)


def compile_source(
  source: str,
  target: str,
  implementation: str,
  blocks: dict[str, int] | None = None,
) -> dict[str, Any]:
  """As `estimate`, of the `example` that some Python source defines."""
  check_target(target)
  with tempfile.TemporaryDirectory() as folder:
    dump = pathlib.Path(folder) / "dump"
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    root = str(pathlib.Path(__file__).resolve().parents[2])
    asked = (target, implementation, blocks, folder)
    done = subprocess.run(
      [
        sys.executable,
        "-c",
        _CHILD.format(root=root, source=source, asked=asked),
      ],
      env=os.environ
      | {
        "LIBTPU_INIT_ARGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a hit writes no dump
      },
      capture_output=True,
      text=True,
      check=False,
    )
    written = pathlib.Path(folder) / "compiled.json"
    if done.returncode or not written.is_file():
      raise RuntimeError(f"the compiler for {target}: {done.stderr[-3000:]}")
    compiled = json.loads(written.read_text())
    if "fails" in compiled:
      return compiled
    return describe(compiled, dump, target)


def write(
  example: Example,
  target: str,
  implementation: str,
  blocks: dict[str, int] | None,
  folder: str,
) -> None:
  """In the child: compiles, leaves HLO and memory as JSON in the folder."""
  device = pod.slice_devices(TARGETS[target])[0]
  kind = device.device_kind
  out: dict[str, Any] = {"flops": example.flops, "device_kind": kind}
  try:
    with tuning.target(kind, blocks) as asked:
      chosen = None if implementation == "auto" else implementation
      lowered = example.lower(chosen, SingleDeviceSharding(device))
      compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    out["asked"] = sorted(set(asked))
    out["text"] = compiled.as_text()
    out["memory"] = {
      "arguments": memory.argument_size_in_bytes,
      "outputs": memory.output_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
    }
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    out["fails"] = str(error).splitlines()[0]
  (pathlib.Path(folder) / "compiled.json").write_text(json.dumps(out))


def describe(
  compiled: dict[str, Any], dump: pathlib.Path, target: str
) -> dict[str, Any]:
  """The figures of one compiled program and what was dumped with it."""
  chip = chips.CHIPS[target]
  cycles = [int(n) for n in _CYCLES.findall(compiled["text"])]
  calls = [
    _kernel(dump, call, target) for call in _dumped(dump, compiled["text"])
  ]
  seconds = (sum(cycles) + sum(k["cycles"] for k in calls)) / chip.clock
  memory = compiled["memory"]
  moved = (memory["arguments"] + memory["outputs"]) / BANDWIDTH[target]
  return {
    "flops": compiled["flops"],
    "microseconds": seconds * 1e6,
    "of_peak": compiled["flops"] / chip.flops / seconds if seconds else 0.0,
    "hbm_microseconds": moved * 1e6,
    "xla": {
      "operations": len(cycles),
      "microseconds": sum(cycles) / chip.clock * 1e6,
      "loops": len(re.findall(r"\bwhile\(", compiled["text"])),
    },
    "kernels": calls,
    "memory": memory,
    "device_kind": compiled["device_kind"],
    "asked": compiled["asked"],
  }


def tune(
  name: str, example: Example, target: str, tell: Callable[..., None]
) -> dict[str, int]:
  """Tries the kernel's candidates for one example and keeps the best.

  The fewest estimated microseconds without a register spill win. The best
  goes to tuned/<chip>.json under the call that the kernel looks up.

  Args:
    name: the package; `candidates(example)` of its examples.py are tried.
    example: the call.
    target: of `TARGETS`.
    tell: receives a line per candidate, as `logging.info`.

  Returns:
    The best; {} for an example without candidates.

  Raises:
    InputError: if every candidate spills or does not fit.
  """
  module = importlib.import_module(f"giantsteps.kernels_pallas.{name}.examples")
  if not module.candidates(example):
    return {}
  tried = []
  for blocks in module.candidates(example):
    found = estimate(name, example.name, target, "pallas_tpu", blocks)
    if "fails" in found:
      tell("%s: %s", blocks, found["fails"])
      continue
    spills = sum(kernel["spills"] for kernel in found["kernels"])
    tell("%s: %.1f us, %d spills", blocks, found["microseconds"], spills)
    if not spills:
      tried.append((found["microseconds"], blocks, found))
  if not tried:
    raise config_lib.InputError(
      f"{example.name}: no candidate compiles without spills; "
      f"candidates() of {name}/examples.py needs smaller blocks"
    )
  _, best, found = min(tried, key=lambda row: row[0])
  path = tuning.file(found["device_kind"])
  known = json.loads(path.read_text()) if path.is_file() else {}
  for kernel, call in found["asked"]:
    known.setdefault(kernel, {})[call] = best
  path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
  return best


def _dumped(dump: pathlib.Path, text: str) -> list[str]:
  """Per custom call the one whose files stand for it: of calls of one kernel
  at the same shapes the compiler writes the first that it meets."""
  own = re.compile(r"-([\w.-]+?)-\d+-final_bundles\.txt$")
  files = {m[1] for f in dump.iterdir() if (m := own.search(f.name))}
  kinds = {
    name: (name.rpartition(".")[0], _OPERAND.sub("", line))
    for name, line in _CALL.findall(text)
  }
  has = lambda name: any(f == name or f.endswith(f"-{name}") for f in files)
  twins = {kind: name for name, kind in kinds.items() if has(name)}
  return [n if has(n) else twins.get(kind, n) for n, kind in kinds.items()]


def _kernel(dump: pathlib.Path, call: str, target: str) -> dict[str, Any]:
  """The figures of one custom call, from its files in the dump."""

  def text(ending: str) -> str:
    found = [
      file
      for file in dump.iterdir()
      if re.search(rf"-{re.escape(call)}-\d+-{re.escape(ending)}$", file.name)
    ]
    if len(found) != 1:
      raise RuntimeError(f"{len(found)} dumped files {call}-*-{ending}")
    return found[0].read_text()

  counted = bundles.count(
    text("final_bundles.txt"),
    text("final_hlo-static-per-bundle-utilization.txt"),
    ISSUE[target],
  )
  vmem = _VMEM.findall(text("post-delay-converter.txt"))
  return {
    "name": call,
    "cycles": counted.cycles,
    "microseconds": counted.cycles / chips.CHIPS[target].clock * 1e6,
    "bundles": counted.bundles,
    "static_bundles": counted.static,
    "matmul_utilisation": counted.utilisation,
    "spills": counted.spills,
    "fills": counted.fills,
    "unknown_branches": counted.unknown,
    "vmem": sum(int(size, 16) for size in vmem),
  }


def words(report: dict[str, Any]) -> str:
  """The report as lines for people."""
  out = [f"{report['case']}, {report['target']}, {report['implementation']}:"]
  if "fails" in report:
    return "\n".join([*out, f"  does not compile: {report['fails']}"])
  xla, memory = report["xla"], report["memory"]
  out.append(
    f"  {report['microseconds']:9.1f} us estimated, "
    f"{100 * report['of_peak']:.0f} % of the chip's peak; operands and "
    f"results alone {report['hbm_microseconds']:.1f} us of HBM"
  )
  if xla["operations"]:
    out.append(
      f"  {xla['microseconds']:9.1f} us in {xla['operations']} XLA operations"
    )
  if xla["loops"]:
    out.append(f"  {xla['loops']} loops of XLA, each body counted once")
  for kernel in report["kernels"]:
    out.append(
      f"  {kernel['microseconds']:9.1f} us in {kernel['name']}: "
      f"{kernel['bundles']} bundles executed of {kernel['static_bundles']}, "
      f"matmul units {100 * kernel['matmul_utilisation']:.0f} % busy, "
      f"{kernel['spills']} spills, {kernel['fills']} fills, "
      f"VMEM {kernel['vmem'] / 2**20:.1f} MiB"
    )
    if kernel["unknown_branches"]:
      out.append(
        f"    {kernel['unknown_branches']} branches on data: not taken"
      )
  out.append(f"  temporaries {memory['temporaries'] / 1e6:.1f} MB of HBM")
  return "\n".join(out)
