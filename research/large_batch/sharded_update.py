"""The optimizer step spread over the devices of a data axis (ZeRO stage 1).

"ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(arXiv:1910.02054). Per step: every device sums the gradient of its own rows
over all micro-batches; one reduce-scatter leaves it the mean gradient of its
share of the parameters; the optimizer moves that share, float32, with moments
of the same share; one all-gather returns the parameters to all. jit alone
reduces once per micro-batch and moves whole gradients (`reduce_scatter`).

A parameter [*layers, ...] is held as [*layers, R, 128], padded with zeros, its
rows R split over the devices in tiles of 8 x 128. The layers stay axes and a
matrix keeps two more, so any optax transform that treats elements alone and
layers by their norms (LAMB, LARS, AdamW) works on that form as it is, and the
partitioner adds up its norms: the zeros change none of them. Vectors and
matrices below one tile per device are held whole by all.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from giantsteps.research.large_batch.lamb import Axes, stacked_axes

LANES = 128
TILE = 8 * LANES  # a float32 array takes whole tiles of a TPU's memory

Tree = Any


class Layout(NamedTuple):
  """How one parameter is held.

  Attributes:
    shape: of the parameter itself.
    layers: how many leading axes count layers.
    rows: R of the form [*layers, R, 128]; 0: whole on every device.
  """

  shape: tuple[int, ...]
  layers: int
  rows: int

  @property
  def packed_shape(self) -> tuple[int, ...]:
    """Shape of the form that the optimizer sees."""
    if not self.rows:
      return self.shape
    return (*self.shape[: self.layers], self.rows, LANES)


def layouts(params: Tree, shards: int, layer_axes: Axes = None) -> Tree:
  """The layout of every parameter, a tree like `params`.

  Args:
    params: arrays or shapes.
    shards: devices that share the state.
    layer_axes: as in `lamb`.

  Raises:
    ValueError: if axes that count layers are not the leading ones.
  """
  leaves, treedef = jax.tree.flatten(params)
  found = []
  for x, axes in zip(leaves, stacked_axes(params, layer_axes), strict=True):
    count = len(axes)
    if sorted(a % x.ndim for a in axes) != list(range(count)):
      raise ValueError(
        f"layer_axes {axes} of a parameter {x.shape}: the sharded update "
        "wants the axes that count layers first"
      )
    size = math.prod(x.shape[count:])
    matrix = x.ndim - count >= 2 and size >= shards * TILE
    rows = -(-size // (shards * TILE)) * shards * 8 if matrix else 0
    found.append(Layout(tuple(x.shape), count, rows))
  return treedef.unflatten(found)


def pack(params: Tree, layout: Tree) -> Tree:
  """[*layers, ...] -> [*layers, R, 128] float32, zeros at the end."""
  return jax.tree.map(_pack, _wide(params), layout)


def unpack(packed: Tree, layout: Tree) -> Tree:
  """The inverse of `pack`, in the dtype of the packed leaves."""
  return jax.tree.map(_unpack, packed, layout)


def specs(layout: Tree, axes: tuple[str, ...]) -> Tree:
  """PartitionSpecs of packed leaves: rows over the mesh axes `axes`."""
  rows = lambda l: P(*[None] * l.layers, axes, None) if l.rows else P()
  return jax.tree.map(rows, layout, is_leaf=_is_layout)


def mean_gradient(
  loss: Callable,
  params: Tree,
  arrays: Tree,
  parts: int,
  axes: tuple[str, ...] = (),
) -> tuple[jax.Array, Tree]:
  """Loss and gradient of the rows at hand from `parts` micro-batches.

  Row i goes to micro-batch i mod parts: neighbours, which share a device,
  are spread evenly. The sum is float32 and nothing is reduced here.

  Args:
    loss: (params, arrays) -> [], a mean over rows.
    params: the parameters.
    arrays: leaves [B, ...], B a multiple of parts.
    parts: micro-batches.
    axes: mesh axes along which rows differ, inside `shard_map`.
  """
  gradient = jax.value_and_grad(loss)
  if parts == 1:
    return gradient(params, arrays)

  def split(x):
    rows = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.swapaxes(rows, 0, 1)

  def add(total, micro):
    value, grads = gradient(params, micro)
    return jax.tree.map(jnp.add, total, (value, _wide(grads))), None

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  start = _varying((jnp.zeros(()), zeros), axes)
  total, _ = jax.lax.scan(add, start, jax.tree.map(split, arrays))
  return jax.tree.map(lambda x: x / parts, total)


def local_then_scatter(
  loss: Callable,
  mesh: Mesh,
  axes: tuple[str, ...],
  layout: Tree,
  parts: int,
  reduce_dtype: Any = jnp.float32,
) -> Callable:
  """(params, arrays) -> mean loss and packed mean gradient, reduced once.

  Bytes on the wire per device and step, whatever `parts`: about P times the
  size of reduce_dtype for P parameters.

  Args:
    loss: (params, arrays) -> [], a mean over rows.
    mesh: the devices.
    axes: the mesh axes that split the rows, major first.
    layout: of the parameters.
    parts: micro-batches on each device.
    reduce_dtype: in which gradients are added across devices.
  """
  shards = math.prod(mesh.shape[axis] for axis in axes)

  def local(params, arrays):
    params = _varying(params, axes)  # else every micro-batch would be reduced
    value, grads = mean_gradient(loss, params, arrays, parts, axes)

    def scatter(g, l):
      if not l.rows:
        return jax.lax.psum(g.astype(jnp.float32), axes) / shards
      g = _pack(g.astype(reduce_dtype), l)
      return reduce_scatter(g, axes).astype(jnp.float32) / shards

    return jax.lax.pmean(value, axes), jax.tree.map(scatter, grads, layout)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(P(), P(axes)),
    out_specs=(P(), specs(layout, axes)),
  )


def gather(
  packed: Tree, mesh: Mesh, axes: tuple[str, ...], layout: Tree, dtype: Any
) -> Tree:
  """Packed parameters -> whole ones on every device.

  Args:
    packed: float32, rows split over `axes`.
    mesh: the devices.
    axes: mesh axes, major first.
    layout: of the parameters.
    dtype: of what is moved and of the matrices returned; what every device
      holds whole stays float32.
  """

  def local(shard):
    def whole(x, l):
      if not l.rows:
        return x
      return _unpack(all_gather(x.astype(dtype), axes), l)

    return jax.tree.map(whole, shard, layout)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs(layout, axes),),
    out_specs=P(),
  )(packed)


def reduce_scatter(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Sum over devices, of which each keeps its rows; inside `shard_map`.

  Axis by axis and along the leading dimension: over one flat axis on a torus
  of two or three sides, or along a minor dimension, the TPU compiler emits a
  full all-reduce and a slice.

  Args:
    x: [..., R, 128], R a multiple of the devices.
    axes: mesh axes, major first: device (i, j) keeps block i * |j| + j.

  Returns:
    [..., R / devices, 128].
  """
  shards = math.prod(jax.lax.axis_size(axis) for axis in axes)
  *layers, rows, lanes = x.shape
  x = x.reshape(*layers, shards, rows // shards, lanes)
  x = jnp.moveaxis(x, len(layers), 0)
  # One dimension below the scattered one: with the layers apart the compiler
  # keeps them major in memory instead of moving them, and reduces all.
  x = x.reshape(shards, -1, lanes)
  for axis in axes:
    x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
  return x.reshape(*layers, rows // shards, lanes)


def all_gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The inverse of `reduce_scatter`'s split; inside `shard_map`.

  Args:
    x: [..., R / devices, 128].
    axes: mesh axes, major first.

  Returns:
    [..., R, 128], the same on every device.
  """
  *layers, rows, lanes = x.shape
  x = x.reshape(1, -1, lanes)
  for axis in reversed(axes):
    x = jax.lax.all_gather(x, axis, tiled=True, to="invarying")
  x = jnp.moveaxis(x.reshape(-1, *layers, rows, lanes), 0, len(layers))
  return x.reshape(*layers, -1, lanes)


def _pack(x: jax.Array, layout: Layout) -> jax.Array:
  if not layout.rows:
    return x
  shape = layout.packed_shape
  flat = x.reshape(*shape[:-2], -1)
  missing = layout.rows * LANES - flat.shape[-1]
  widths = [(0, 0)] * layout.layers + [(0, missing)]
  return jnp.pad(flat, widths).reshape(shape)


def _unpack(x: jax.Array, layout: Layout) -> jax.Array:
  if not layout.rows:
    return x
  size = math.prod(layout.shape[layout.layers :])
  flat = x.reshape(*x.shape[: layout.layers], -1)[..., :size]
  return flat.reshape(layout.shape)


def _is_layout(x: Any) -> bool:
  return isinstance(x, Layout)


def _varying(tree: Tree, axes: tuple[str, ...]) -> Tree:
  """Marks values as different on each device: their gradients stay local."""
  if not axes:
    return tree
  return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree)


def _wide(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
