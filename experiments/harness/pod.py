"""The training step compiled for TPU chips that are not here, and described.

Memory per chip and what takes it, floating-point operations, every collective
with its bytes per step, the time below which no step can be. Needs the package
libtpu, which is the compiler and wants no TPU.
"""

import collections
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from giantsteps.experiments.harness import chips as chips_lib
from giantsteps.experiments.harness import (
  collectives,
  data,
  flops,
  tasks,
  training,
)
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import placement as placement_lib
from giantsteps.kernels_pallas import tuning

_NO_TPU_HERE = {  # what libtpu would ask the machine, and warn about
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


class Step(NamedTuple):
  """A training step that is ready for the compiler.

  Attributes:
    cfg: the run.
    topology: the slice, "v5e:16x16".
    mesh: its chips.
    state, batches: shapes with shardings; one step's batch, leaves [1, B, ..].
    parameters: numbers in the network.
    flops: of matrix products, per chip and step.
    lowered: to be compiled.
  """

  cfg: config_lib.Config
  topology: str
  mesh: Mesh
  state: training.State
  batches: dict
  parameters: int
  flops: float
  lowered: jax.stages.Lowered


def compile_step(
  config: str, topology: str, mesh: str = "", overrides: Sequence[str] = ()
) -> jax.stages.Compiled:
  """The step that `train` runs, compiled for a slice.

  Args:
    config: module in experiments/configs.
    topology: "v5e:16x16".
    mesh: "data=256"; empty is data = all chips.
    overrides: as of `--set`.

  Raises:
    InputError: if config, topology and mesh do not fit together.
    jax.errors.JaxRuntimeError: what the compiler says; RESOURCE_EXHAUSTED if
      the step does not fit.
  """
  return run_compiler(lower(config, topology, mesh, overrides).lowered)


def lower(
  config: str, topology: str, mesh: str = "", overrides: Sequence[str] = ()
) -> Step:
  """As `compile_step`, up to the compiler."""
  cfg = config_lib.load(config, [*overrides, "steps_per_dispatch=1"])
  count = num_chips(topology)
  sizes = mesh_lib.parse(mesh) if mesh else {"data": count}
  if math.prod(sizes.values()) != count:
    raise config_lib.InputError(
      f"--mesh {mesh} is {math.prod(sizes.values())} chips, {topology} has "
      f"{count}"
    )
  chips = slice_devices(topology)
  task = tasks.build(cfg, _description(cfg))
  tx, devices = tasks.optimizer(cfg), mesh_lib.make(sizes, chips)
  state = training.state_shapes(
    cfg, task, tx, placement_lib.make(cfg, task, devices)
  )
  batches = _batches(cfg, devices)
  update = training.compile_update(cfg, task, tx, devices)
  with tuning.target(chips[0].device_kind):
    traced = update.trace(state, batches, jnp.int32(1))
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  return Step(
    cfg=cfg,
    topology=topology,
    mesh=devices,
    state=state,
    batches=batches,
    parameters=sum(x.size for x in jax.tree.leaves(shapes)),
    flops=flops.count(traced.jaxpr, len(chips)) / len(chips),
    lowered=traced.lower(),
  )


def num_chips(topology: str) -> int:
  """Chips of a topology, or InputError with those that are known."""
  known = chips_lib.known()
  if topology not in known:
    raise config_lib.InputError(
      f"unknown --topology {topology!r}: there are {', '.join(known)}"
    )
  return math.prod(chips_lib.sides(topology))


def slice_devices(topology: str) -> Sequence[Any]:
  """The chips of a slice that is not here.

  Raises:
    InputError: if libtpu is missing or refuses the topology.
  """
  for name, value in _NO_TPU_HERE.items():
    os.environ.setdefault(name, value)
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise config_lib.InputError(
      "the compiler for TPUs is missing: pip install libtpu"
    ) from error
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:  # libtpu of another jax, a locked device
    raise config_lib.InputError(
      f"--topology {topology}: libtpu says {str(error).splitlines()[0]}"
    ) from error
  return found.devices


def report(step: Step) -> dict[str, Any]:
  """Compiles the step and describes it; plain JSON, bytes per chip and step."""
  chip = chips_lib.CHIPS[step.topology.partition(":")[0]]
  parts = {
    "parameters": num_bytes(step.state.params),
    "optimizer": num_bytes(step.state.opt_state),
    "average": num_bytes(step.state.ema),
    "batch": num_bytes(step.batches),
  }
  out: dict[str, Any] = {
    "chips": step.mesh.size,
    "mesh": dict(step.mesh.shape),
    "parameters": step.parameters,
    "flops": step.flops,
    "memory": parts | {"capacity": chip.memory},
    "blocked": [],
  }
  seconds = {"products": step.flops / chip.flops}
  start = time.perf_counter()
  try:
    compiled = run_compiler(step.lowered)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return out | {"fits": False, "compiler": one_line(error)}
  out["compile_seconds"] = time.perf_counter() - start
  memory = compiled.memory_analysis()
  assert memory is not None
  out["memory"] |= {
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "reused": memory.alias_size_in_bytes,
    "peak": memory.peak_memory_in_bytes,
  }
  out["fits"] = memory.peak_memory_in_bytes <= chip.memory
  try:
    text = compiled.as_text() or ""
  except jax.errors.JaxRuntimeError as error:
    out["blocked"].append(
      "collectives and network: jaxlib cannot read the text of this program "
      f"({one_line(error)}); memory is right, take collectives from v5e"
    )
    return out | {"seconds": seconds, "dominates": "products"}
  found = collectives.parse(text)
  seconds["network"] = network_seconds(found, step.topology)
  out["dominates"] = max(seconds, key=lambda name: seconds[name])
  seconds["schedule"] = collectives.cycles(text) / chip.clock
  return out | {"seconds": seconds, "collectives": [*map(_per_step, found)]}


def run_compiler(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """`lowered.compile()`, for chips that are not here."""
  with warnings.catch_warnings():
    # a compilation cache cannot hold programs of machines that are not here
    warnings.filterwarnings("ignore", "Error reading persistent compilation")
    return lowered.compile()


def _per_step(c: collectives.Collective) -> dict[str, Any]:
  """A collective as JSON, bytes times executions."""
  return {
    "kind": c.kind,
    "dtype": c.dtype,
    "bytes": c.bytes * c.count,
    "operand_bytes": c.operand_bytes * c.count,
    "wire_bytes": c.wire_bytes * c.count,
    "group": c.group,
    "count": c.count,
    "in_loop": c.in_loop,
    "source": c.source,
  }


def one_line(error: Exception) -> str:
  """The first 250 characters of its message, without line breaks."""
  return " ".join(str(error).split())[:250]


def network_seconds(
  found: Sequence[collectives.Collective], topology: str
) -> float:
  """Time of the ring algorithms at full speed, one collective after another.

  A side of the torus has two links per chip; a group of more chips than the
  longest side may use several sides at once.
  """
  link = chips_lib.CHIPS[topology.partition(":")[0]].link
  sides = sorted(chips_lib.sides(topology), reverse=True)
  total = 0.0
  for c in found:
    reach = [math.prod(sides[: i + 1]) for i in range(len(sides))]
    used = next(i + 1 for i, n in enumerate(reach) if n >= c.group)
    total += c.wire_bytes * c.count / (2 * link * used)
  return total


def words(found: dict[str, Any]) -> str:
  """The report as a text of a dozen lines."""
  gib = lambda size: f"{size / 2**30:.3f} GiB"
  memory = found["memory"]
  lines = [
    f"{found['parameters'] / 1e6:.1f} M parameters on {found['chips']} chips, "
    f"mesh {found['mesh']}; {found['flops'] / 1e12:.3f} TFLOP per chip and step",
    "memory per chip:",
    *(f"  {name:<12} {gib(size)}" for name, size in memory.items()),
    *_collective_lines(found.get("collectives", [])),
    *(f"blocked: {what}" for what in found["blocked"]),
  ]
  if not found["fits"]:
    said = found.get("compiler", f"the peak is {gib(memory.get('peak', 0))}")
    return "\n".join([*lines, f"does NOT fit: {said}"])
  about = {
    "products": "matrix products at full rate",
    "network": "collectives at full rate",
    "schedule": "the compiler's estimate with memory traffic",
  }
  lines += ["time per step and chip:"]
  lines += [
    f"  {name:<12} {1e3 * t:9.2f} ms  {about[name]}"
    for name, t in found["seconds"].items()
  ]
  limit = found["dominates"]
  verb = "dominate" if limit == "products" else "dominates"
  return "\n".join(
    [
      *lines,
      f"fits: {gib(memory['peak'])} of {gib(memory['capacity'])} at the peak; "
      f"{limit} {verb}",
    ]
  )


def _collective_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
  """One line per kind and dtype."""
  groups = collections.defaultdict(list)
  for row in rows:
    groups[row["kind"], row["dtype"]].append(row)
  lines = ["collectives per chip and step:"] if rows else []
  for (kind, dtype), same in sorted(groups.items()):
    total = lambda key, same=same: sum(row[key] for row in same)
    inside = sum(row["count"] for row in same if row["in_loop"])
    lines.append(
      f"  {kind:<18} {dtype:<10} {total('count'):5d} x, "
      f"results {total('bytes') / 1e6:9.1f} MB, "
      f"sent {total('wire_bytes') / 1e6:9.1f} MB, {inside} of them in loops"
    )
  return lines


def _batches(cfg: config_lib.Config, mesh: Mesh) -> dict:
  """Shapes of one step's rows, [1, B, ...], over the batch axes."""
  places = mesh_lib.batch_sharding(mesh, axis=1)

  def put(shape, dtype):
    shape = (1, cfg.batch_size, *shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=places)

  if cfg.task not in ("flow", "views"):
    return {"tokens": put((cfg.data.seq_len,), jnp.int32)}
  rows = tasks.load_data(cfg).train.read(np.zeros(1, np.int64))
  return {name: put(x.shape[1:], x.dtype) for name, x in rows.items()}


def _description(cfg: config_lib.Config) -> dict:
  if cfg.task not in ("flow", "views"):
    return {"kind": "tokens"}
  return data.load(cfg.data).description


def num_bytes(tree: Any) -> int:
  """Bytes on one chip."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Reports side by side as Markdown; MB are results per chip and step."""
  kinds = ("all-reduce", "reduce-scatter", "all-gather")
  head = ["overrides", "arguments GiB", "temporaries GiB", "peak GiB"]
  head += [*(f"{kind} MB" for kind in kinds), "sent MB", "compile s"]
  lines = [head, ["---"] * len(head)]
  for row in rows:
    if "collectives" not in row:
      verdict = "fits" if row["fits"] else "does not fit"
      lines.append([" ".join(row["overrides"]), verdict, *[""] * 7])
      continue
    memory, found = row["memory"], row["collectives"]
    total = lambda kind, found=found: sum(
      c["bytes"] for c in found if c["kind"] == kind
    )
    sent = sum(c["wire_bytes"] for c in found)
    parts = ("arguments", "temporaries", "peak")
    lines.append(
      [" ".join(row["overrides"])]
      + [f"{memory[part] / 2**30:.3f}" for part in parts]
      + [f"{total(kind) / 1e6:.1f}" for kind in kinds]
      + [f"{sent / 1e6:.1f}", f"{row['compile_seconds']:.0f}"]
    )
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(
  config: str, topology: str, mesh: str, overrides: Sequence[str]
) -> dict[str, Any]:
  """`report` of one step, with what was asked."""
  asked = {"config": config, "topology": topology, "overrides": [*overrides]}
  return asked | report(lower(config, topology, mesh, overrides))


def compare(
  config: str,
  topology: str,
  mesh: str = "",
  overrides: Sequence[str] = (),
  tell: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> list[dict[str, Any]]:
  """`describe` of four steps: the update whole on every chip (optim.shards=0)
  and as the config says, each with accumulate=1 and 4."""
  rows = []
  for shards in (["optim.shards=0"], []):
    for accumulate in (1, 4):
      more = [*overrides, *shards, f"accumulate={accumulate}"]
      rows.append(describe(config, topology, mesh, more))
      tell(rows[-1])
  return rows
