"""Decoding compiled for TPU chips that are not here: does a published model fit
on them, and what is the least that a model call takes.

Reads config.json of a checkpoint and nothing else. Needs the package libtpu.
"""

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from giantsteps.experiments.harness import chips as chips_lib
from giantsteps.experiments.harness import collectives, flops, pod
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.kernels_pallas import tuning
from giantsteps.models import pretrained, transformer
from giantsteps.samplers import decoding
from giantsteps.samplers.decoding import block_diffusion, kv_cache


class Batch(NamedTuple):
  """What is decoded.

  Attributes:
    rows: B.
    prompt_length: tokens of each prompt.
    num_tokens: of each answer.
    block_size: W.
    cache: name of a `kv_cache.Policy`.
  """

  rows: int
  prompt_length: int
  num_tokens: int
  block_size: int
  cache: str


def describe(
  directory: str, topology: str, mesh: str, batch: Batch, dtype: str
) -> dict[str, Any]:
  """Compiles the loop of `decoding.generate` and its model calls.

  Args:
    directory: of a checkpoint; only its config.json is read.
    topology: "v5e:2x4".
    mesh: "model=8"; empty is model = all chips.
    batch: what is decoded.
    dtype: of parameters and cache.

  Returns:
    Plain JSON. Of memory, bytes per chip. Of "calls": "window" is the model
    call of most steps, "refresh" fills the cache of `rows` rows anew and comes
    when they enter a block. Their seconds: what matrix products, reading
    parameters and cache once, and the collectives take at full rate, and the
    compiler's own schedule, which leaves kernels out.

  Raises:
    InputError: if topology, mesh, checkpoint or dtype do not fit together.
  """
  count = pod.num_chips(topology)
  sizes = mesh_lib.parse(mesh) if mesh else {"model": count}
  if math.prod(sizes.values()) != count:
    raise config_lib.InputError(
      f"--mesh {mesh}: {math.prod(sizes.values())} chips, {topology} has {count}"
    )
  devices = mesh_lib.make(sizes, pod.slice_devices(topology))
  try:
    config, params = pretrained.shapes(directory, dtype=dtype, mesh=devices)
  except ValueError as error:
    raise config_lib.InputError(f"--model: {error}") from error
  model = transformer.bind(config, params)
  chip = chips_lib.CHIPS[topology.partition(":")[0]]
  parts = {
    "parameters": pod.num_bytes(params),
    "cache": _cache_size(model, batch),
  }
  out: dict[str, Any] = {
    "model": directory.rstrip("/").rpartition("/")[2],
    "topology": topology,
    "mesh": dict(devices.shape),
    **batch._asdict(),
    "dtype": dtype,
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "memory": parts | {"capacity": chip.memory},
  }
  with tuning.target(devices.devices.flat[0].device_kind):
    lowered = block_diffusion.lower(
      model,
      batch.rows,
      batch.prompt_length,
      num_tokens=batch.num_tokens,
      rule=decoding.threshold(0.9),
      block_size=batch.block_size,
      cache=batch.cache,
      mask_token=0,
    )
    start = time.perf_counter()
    try:
      compiled = pod.run_compiler(lowered)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return out | {"fits": False, "compiler": pod.one_line(error)}
    out["compile_seconds"] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    out["memory"] |= {
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "peak": memory.peak_memory_in_bytes,
    }
    out["fits"] = memory.peak_memory_in_bytes <= chip.memory
    names = ("window",) if batch.cache == "none" else ("window", "refresh")
    out["calls"] = {
      name: _call(name, model, batch, devices, topology, parts)
      for name in names
    }
  return out


def _call(name, model, batch, devices, topology, parts) -> dict[str, Any]:
  """One model call with the statistics of its logits."""
  size = batch.block_size
  if batch.cache != "block":  # as the loop has it
    size = min(size, batch.num_tokens)
  policy = kv_cache.Policy(
    name=batch.cache,
    block_size=size,
    longest=block_diffusion.bucket(batch.num_tokens, size),
    blocks_only=batch.cache == "block",
    shift=int(model.shift),
    causal=model.causal,
  )
  slots = block_diffusion.bucket(batch.prompt_length + batch.num_tokens)
  rows, width = batch.rows, sum(policy.around) + size
  if name == "refresh":
    rows = kv_cache.group_size(batch.rows, slots)
  if name == "refresh" or batch.cache == "none":
    width = slots

  @functools.partial(jax.jit, donate_argnums=3)
  def call(model, tokens, positions, cache, limits):
    hidden, cache = model.extend(tokens, positions, cache, limits)
    block = hidden[:, :size]
    return model.unmask_stats(block.reshape(-1, block.shape[-1])), cache

  tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)
  with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
    cache = None
    if batch.cache != "none":
      cache = jax.eval_shape(lambda m: m.init_cache(rows, slots), model)
    traced = call.trace(model, tokens, tokens, cache, tokens)
    compiled = pod.run_compiler(traced.lower())
  chip = chips_lib.CHIPS[topology.partition(":")[0]]
  text = compiled.as_text() or ""
  found = collectives.parse(text)
  products = flops.count(traced.jaxpr, devices.size) / devices.size
  # Of the embedding a call reads the rows of its tokens only.
  once = parts["parameters"] - pod.num_bytes(model.params["embed"])
  once = once if "head" in model.params else parts["parameters"]
  seconds = {
    "products": products / chip.flops,
    "memory": (once + parts["cache"] * rows / batch.rows) / chip.bandwidth,
    "network": pod.network_seconds(found, topology),
    "schedule": collectives.cycles(text) / chip.clock,
  }
  return {
    "rows": rows,
    "width": width,
    "flops": products,
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "sent_bytes": sum(c.wire_bytes * c.count for c in found),
    "seconds": seconds,
  }


def _cache_size(model: transformer.Bound, batch: Batch) -> int:
  """Bytes on one chip: heads lie over `model` as far as it divides them."""
  if batch.cache == "none":
    return 0
  slots = block_diffusion.bucket(batch.prompt_length + batch.num_tokens)
  cache = jax.eval_shape(lambda m: m.init_cache(batch.rows, slots), model)
  mesh = jax.tree.leaves(model.params)[0].sharding.mesh
  heads = mesh.shape.get("model", 1)
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  return whole // (heads if cache.keys.shape[3] % heads == 0 else 1)


def words(found: dict[str, Any]) -> str:
  """The report as a text of a dozen lines."""
  gib = lambda size: f"{size / 2**30:.3f} GiB"
  memory = found["memory"]
  lines = [
    f"{found['model']}: {found['parameters'] / 1e9:.2f} G parameters on "
    f"{found['topology']}, mesh {found['mesh']}; {found['rows']} rows of "
    f"{found['prompt_length']} + {found['num_tokens']} tokens, blocks of "
    f"{found['block_size']}, cache {found['cache']}",
    "memory per chip:",
    *(f"  {name:<12} {gib(size)}" for name, size in memory.items()),
  ]
  if not found["fits"]:
    said = found.get("compiler", f"the peak is {gib(memory.get('peak', 0))}")
    return "\n".join([*lines, f"does NOT fit: {said}"])
  about = {
    "products": "matrix products at full rate",
    "memory": "parameters and cache read once",
    "network": "collectives at full rate",
    "schedule": "the compiler's estimate, kernels left out",
  }
  for name, call in found["calls"].items():
    lines += [
      f"{name} call, {call['rows']} x {call['width']} positions, "
      f"{call['kernels']} kernels:"
    ]
    lines += [
      f"  {part:<12} {1e3 * seconds:9.3f} ms  {about[part]}"
      for part, seconds in call["seconds"].items()
    ]
  return "\n".join([*lines, f"fits: {gib(memory['peak'])} at the peak"])
