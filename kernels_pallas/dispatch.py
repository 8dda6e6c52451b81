"""Chooses the implementation of an operation where its program is lowered.

A laptop that compiles for a pod gets the pod's kernels: the choice is made by
the platform of the program, never by the devices of the process that traces it.
"""

from collections.abc import Callable
from typing import Any

import jax

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")


def call(
  *operands: Any,
  xla: Callable,
  pallas_tpu: Callable | None = None,
  pallas_gpu: Callable | None = None,
  implementation: str | None = None,
) -> Any:
  """Calls the implementation that fits the platform of the program.

  Args:
    *operands: pytrees of arrays, handed to the implementation.
    xla: the reference in jax.numpy, for every platform.
    pallas_tpu: a kernel for TPUs; None where it does not exist or does not pay
      at these shapes.
    pallas_gpu: a kernel for GPUs from Hopper on, likewise.
    implementation: None chooses by platform; otherwise one of
      `IMPLEMENTATIONS`, on whatever platform the program is for.

  Returns:
    What the implementation returns; all return the same shapes and dtypes.

  Raises:
    ValueError: for another name, or one that these shapes do not have.
  """
  known = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
  if implementation is not None:
    chosen = known.get(implementation)
    if chosen is None:
      have = ", ".join(name for name, f in known.items() if f)
      raise ValueError(
        f"implementation={implementation!r}: here there is {have}, or None"
      )
    return chosen(*operands)
  kernels = {"tpu": pallas_tpu, "cuda": pallas_gpu}
  kernels = {platform: f for platform, f in kernels.items() if f}
  if not kernels:
    return xla(*operands)
  return jax.lax.platform_dependent(*operands, **kernels, default=xla)


def automatic_mesh() -> jax.sharding.AbstractMesh | None:
  """The mesh in use (`jax.sharding.use_abstract_mesh`), if the partitioner is
  to place arrays on it; inside `shard_map` nothing is left to place."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = set(mesh.axis_types) <= {jax.sharding.AxisType.Auto}
  return mesh if not mesh.empty and kinds else None


def divided() -> bool:
  """Whether the partitioner is to divide the program, as it could no kernel."""
  mesh = automatic_mesh()
  return mesh is not None and mesh.size > 1


def result(
  shape: tuple[int, ...], dtype: jax.typing.DTypeLike, operands: Any
) -> jax.ShapeDtypeStruct:
  """What a kernel returns: inside `shard_map` it differs from device to device
  where one of the operands does."""
  kinds = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(operands)]
  varying = frozenset().union(*(kind.varying for kind in kinds))
  kind = jax.sharding.ManualAxisType(varying=varying)
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
