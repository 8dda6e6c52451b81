"""What every kernel must show, as functions for its tests.

    import harness

    harness.assert_parity(kernel, xla, exact, operands)   # numerics, vjp, jvp
    harness.run_checked(kernel_tpu, *operands)            # races, bounds, NaN
    compiled = harness.compile_for(example, "v5e")        # chips not here
    harness.assert_holds_kernel(compiled)
    harness.assert_within_record("newton_schulz", example, "v5e")

where kernel_tpu takes `interpret=` and hands it to `pl.pallas_call`.
"""

import functools
import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import (
  interpret_pallas_call,  # holds races_found, which has no public name
)
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from giantsteps.experiments.harness import kernel_report
from giantsteps.kernels_pallas.example import Example

# Two cores, or a revisited block of a parallel grid axis is not a race;
# memory that nobody wrote is NaN; copies land as late as they may.
STRICT = pltpu.InterpretParams(
  detect_races=True,
  num_cores_or_threads=2,
  uninitialized_memory="nan",
  out_of_bounds_reads="raise",
  dma_execution_mode="on_wait",
)

TPUS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}
GPUS = {"h200": "1x1x1"}
# What one compiler said of every kernel, case and TPU. A better kernel is
# recorded anew; a worse one needs a reason.
RECORD = pathlib.Path(__file__).parent / "recorded.json"
_TARGET_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150122528768
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 patch: 0 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""

# Relative L2 error that no kernel is blamed for: rounding the result once
# (bfloat16: half an ulp of a uniform mantissa is 2^-9), another order of sums.
FLOOR = {"bfloat16": 2**-9, "float16": 2**-12, "float32": 1e-5}
FLOOR["float64"] = 1e-11


class Fault(AssertionError):
  """A kernel did what no chip promises to survive."""


def relative_error(found: Any, exact: Any) -> list[float]:
  """|found - exact| / |exact| in L2, per leaf, in float64."""

  def one(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"shape {a.shape}, want {b.shape}"
    size = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / (size if size > 0 else 1.0))

  a, b = jax.tree.leaves(found), jax.tree.leaves(exact)
  assert len(a) == len(b), f"{len(a)} results, want {len(b)}"
  return [one(x, y) for x, y in zip(a, b, strict=True)]


def random_like(tree: Any, seed: int) -> Any:
  """Standard normal leaves of the same shapes and dtypes."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree
  )


def _results(function, operands, cotangent, tangents, modes):
  """What `function` gives in every mode, one jitted program each."""
  out = {}
  if "value" in modes:
    out["value"] = jax.jit(function)(*operands)
  if "vjp" in modes:
    pull = lambda xs, c: jax.vjp(function, *xs)[1](c)
    out["vjp"] = jax.jit(pull)(operands, cotangent)
  if "jvp" in modes:
    push = lambda xs, t: jax.jvp(function, xs, t)[1]
    out["jvp"] = jax.jit(push)(operands, tangents)
  return out


def assert_parity(
  kernel: Callable,
  xla: Callable,
  exact: Callable,
  operands: Sequence[Any],
  *,
  ratio: float = 1.5,
  floor: float | None = None,
  modes: Sequence[str] = ("value", "vjp", "jvp"),
) -> dict[str, list[tuple[float, float]]]:
  """The kernel errs at most `ratio` times as much as XLA at the same dtype.

  Both are compared with `exact` on the same operands, converted to float64.

  Args:
    kernel: f(*operands) through the kernel, interpreted.
    xla: f(*operands), the reference in the dtype of the kernel.
    exact: f(*operands), the reference, given float64 operands under x64.
    operands: pytrees of floating-point arrays.
    ratio: of the relative L2 errors, per result.
    floor: an error that is forgiven anyway; None is `FLOOR` of the narrowest
      dtype among the operands.
    modes: of "value", "vjp" (random cotangents), "jvp" (random tangents).

  Returns:
    Per mode, (error of the kernel, error of XLA) of every result.
  """
  operands = tuple(operands)
  dtypes = [np.dtype(x.dtype) for x in jax.tree.leaves(operands)]
  if floor is None:
    floor = max(FLOOR[dtype.name] for dtype in dtypes)
  cotangent = random_like(jax.eval_shape(xla, *operands), 1)
  tangents = random_like(operands, 2)
  given = operands, cotangent, tangents
  found = _results(kernel, operands, cotangent, tangents, modes)
  plain = _results(xla, operands, cotangent, tangents, modes)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), given)
    truth = _results(exact, wide[0], wide[1], wide[2], modes)
    truth = jax.tree.map(np.asarray, truth)
  errors = {}
  for mode in modes:
    got = jax.tree.leaves(found[mode])
    want = jax.tree.leaves(plain[mode])
    assert [x.dtype for x in got] == [x.dtype for x in want], mode
    mine = relative_error(found[mode], truth[mode])
    theirs = relative_error(plain[mode], truth[mode])
    errors[mode] = list(zip(mine, theirs, strict=True))
    for i, (a, b) in enumerate(errors[mode]):
      limit = max(ratio * b, floor)
      assert a <= limit, (
        f"{mode}, result {i}: error {a:.3g}, XLA errs {b:.3g}, limit {limit:.3g}"
      )
  return errors


def run_checked(kernel: Callable, *operands: Any) -> Any:
  """Runs a TPU kernel on two simulated cores that forgive nothing.

  Args:
    kernel: f(*operands, interpret=...).
    *operands: finite arrays.

  Returns:
    What the kernel returns.

  Raises:
    Fault: for a race between the cores, an access out of bounds, or a result
      that is not finite (scratch or output that nobody wrote is NaN).
  """
  call = jax.jit(functools.partial(kernel, interpret=STRICT))
  try:
    out = jax.block_until_ready(call(*operands))
    raced = interpret_pallas_call.races
    assert raced is not None, "no Pallas TPU kernel ran: is interpret= passed?"
    if raced.races_found:
      raise Fault("race: two cores touch the same memory, one of them writes")
  except jax.errors.JaxRuntimeError as error:
    if "out-of-bounds" in str(error).lower():
      raise Fault(f"out of bounds: {error}") from error
    raise
  finally:
    pltpu.reset_tpu_interpret_mode_state()
  if not all(
    bool(jnp.isfinite(x).all())
    for x in jax.tree.leaves(out)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ):
    raise Fault("not finite: reads memory that nobody wrote, or overflows")
  return out


def device(target: str) -> Any:
  """One device of `TPUS` or `GPUS` for the compiler; skips without its one."""
  needs = "libtpu" if target in TPUS else "jax_plugins.xla_cuda12"
  if target in TPUS and importlib.util.find_spec("libtpu") is None:
    pytest.skip(f"{target}: libtpu is not installed (extra `test`)")
  if target in GPUS and not _has_cuda_plugin():
    pytest.skip(f"{target}: the package jax-cuda12-plugin is not installed")
  try:
    if target in TPUS:
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=TPUS[target]
      )
    else:
      found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=target,
        target_config=_TARGET_H200,
        topology=GPUS[target],
      )
  except Exception as error:  # a plugin of another jax, a locked device
    pytest.skip(f"{target}: no topology from {needs}: {error}")
  return found.devices[0]


def _has_cuda_plugin() -> bool:
  try:
    return any(
      importlib.util.find_spec(f"jax_plugins.{name}") is not None
      for name in ("xla_cuda12", "xla_cuda13")
    )
  except ModuleNotFoundError:
    return False


def compile_for(
  example: Example, target: str, implementation: str | None = None
) -> jax.stages.Compiled:
  """Compiles an example for a chip that need not be here; may skip.

  Args:
    example: the call.
    target: of `TPUS` or `GPUS`.
    implementation: as of the operation; None is what a user gets.
  """
  place = SingleDeviceSharding(device(target))
  return example.lower(implementation, place).compile()


def assert_holds_kernel(
  compiled: jax.stages.Compiled, name: str = "tpu_custom_call"
) -> None:
  """The compiled program calls a Pallas kernel ("mosaic_gpu" on GPUs)."""
  text = compiled.as_text() or ""
  assert name in text, f"no {name} in the program: XLA alone was chosen"


def assert_within_record(
  name: str, example: Example, target: str
) -> dict[str, Any]:
  """The program of `implementation=None` is not worse than recorded.json.

  Compared are cycles (1 % slack), spills and on-chip memory of the Pallas
  kernels in it. Skips for another version of libtpu than was recorded.

  Args:
    name: package in kernels_pallas.
    example: one of its examples.
    target: of `TPUS`.

  Returns:
    The report of the compiler, see `kernel_report.estimate`.
  """
  device(target)  # skips without libtpu
  record = json.loads(RECORD.read_text())
  version = importlib.metadata.version("libtpu")
  if version != record["libtpu"]:
    pytest.skip(f"libtpu {version}: {record['libtpu']} is what was recorded")
  report = kernel_report.estimate(name, example.name, target, "auto")
  kernels = report["kernels"]
  assert kernels, f"{example.name} on {target}: XLA alone was chosen"
  found = {
    "cycles": sum(kernel["cycles"] for kernel in kernels),
    "spills": sum(kernel["spills"] for kernel in kernels),
    "vmem": max(kernel["vmem"] for kernel in kernels),
  }
  assert not any(kernel["unknown_branches"] for kernel in kernels)
  known = record.get(name, {}).get(f"{example.name}, {target}")
  if known is None:  # it compiles and was chosen, which is checked above
    pytest.skip(f"{example.name}, {target} is not in {RECORD.name}: {found}")
  slack = {"cycles": 1.01, "spills": 1, "vmem": 1}
  worse = {k: v for k, v in found.items() if v > slack[k] * known[k]}
  assert not worse, f"{example.name}, {target}: {worse}, recorded {known}"
  return report
