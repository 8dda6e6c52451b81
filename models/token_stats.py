"""What a decoder needs of a model's logits, wherever the head lies."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from giantsteps.kernels_pallas import unmask_stats as kernel
from giantsteps.models import partitioning


def unmask_stats(
  hidden: jax.Array,
  head: jax.Array,
  bias: jax.Array | None = None,
  temperature: jax.Array | None = None,
  seeds: jax.Array | None = None,
  *,
  transposed: bool = False,
  size: int | None = None,
) -> kernel.Stats:
  """`kernels_pallas.unmask_stats` of a head that stays where it is: on a mesh
  every device reads the columns that it holds.

  Args:
    hidden: [T, D].
    head: [D, C], or [C, D] with `transposed`, as an embedding is.
    bias: [V] added to the logits.
    temperature, seeds: [T] and [T, 2], as there.
    transposed: see head.
    size: V, if C is larger: columns from V on are padding. None: C.

  Returns:
    `Stats`, [T] each.
  """
  columns = head.shape[0 if transposed else 1]
  if size is not None and size < columns:
    bias = jnp.zeros(size) if bias is None else bias
    bias = jnp.pad(bias, (0, columns - size), constant_values=-jnp.inf)

  def stats(axis, hidden, head, bias, temperature, seeds):
    return kernel.unmask_stats(
      hidden,
      head,
      bias=bias,
      temperature=temperature,
      seeds=seeds,
      transposed=transposed,
      axis_name=axis,
    )

  operands = hidden, head, bias, temperature, seeds
  mesh = partitioning.automatic_mesh()
  if mesh is None or mesh.size == 1:
    return stats(None, *operands)
  axis = partitioning.model_axis(mesh, columns)
  rows = P(partitioning.row_axes(mesh, hidden.shape[0]))
  own = P(axis) if transposed else P(None, axis)
  return jax.shard_map(
    functools.partial(stats, axis),
    in_specs=(rows, own, P(axis), rows, rows),
    out_specs=rows,
    check_vma=False,  # the kernel does not say along what its results differ
  )(*operands)
