"""Where parameters and activations live on a mesh: path -> PartitionSpec.

Three kinds of mesh axis. `data` splits the rows of a batch. `fsdp` splits the
rows, too, and every matrix along the side that `model` leaves alone: a layer
is gathered when it is needed ("fully sharded data parallel", arXiv:2304.11277).
`model` splits the heads and hidden units of a layer ("tensor parallel",
arXiv:1909.08053): the matrices into a block by columns, those out of it by
rows, so that a block sums over the axis twice. Experts lie along it whole, each
on one device. On a TPU torus the data axis
may lie on several sides and is then several mesh axes, data_0, data_1, ...

The table is for the stacks of transformer.py, lact.py, dit.py and uvit.py; what
it does not name is held whole by every device.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from giantsteps.kernels_pallas.dispatch import automatic_mesh

AXES = ("data", "fsdp", "model")

# Pattern of the whole path -> axes of the last dimensions.
_RULES = (
  (r"embed/embedding", ("model", "fsdp")),  # [V, D]
  (r"head", ("fsdp", "model")),  # [D, V]
  (r"layers/(.*/)?(q|k|v|qkv|gate|up|modulation)/kernel", ("fsdp", "model")),
  (r"layers/(.*/)?(q|k|v|qkv|gate|up|modulation)/bias", ("model",)),
  (r"layers/(.*/)?(o|attention_out|down)/kernel", ("model", "fsdp")),
  (r"layers/skip/kernel", ("fsdp", None)),  # [2 D, D]
  (r"layers/moe/experts/(gate|up|down)", ("model", "fsdp", None)),  # [E, ., .]
  (r"layers/mixer/w[012](_left|_right)?", ("model", "fsdp", None)),  # [H, ., .]
  (r"(conditioning/.*|out_modulation)/kernel", ("fsdp", None)),
)


def data_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """The mesh axes that the data axis is made of, major first."""
  return tuple(name for name in mesh.axis_names if name.startswith("data"))


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """The mesh axes that split the rows of a batch: data and fsdp."""
  fsdp = ("fsdp",) if "fsdp" in mesh.axis_names else ()
  return (*data_axes(mesh), *fsdp)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
  """Where one parameter lives.

  Args:
    path: its keys, "layers/q/kernel".
    shape: its shape; a dimension that an axis does not divide stays whole.
    mesh: axes it lacks, or has with size 1, are left out.
  """
  path = re.sub("^(encoder|middle|decoder)/", "", path)  # of uvit.py
  axes = next((a for p, a in _RULES if re.fullmatch(p, path)), ())
  axes = (None,) * (len(shape) - len(axes)) + axes[: len(shape)]
  fits = lambda axis, size: (
    mesh.shape.get(axis, 1) > 1 and size % mesh.shape[axis] == 0
  )
  return P(
    *(a if fits(a, n) else None for a, n in zip(axes, shape, strict=True))
  )


def specs(params: Any, mesh: Mesh | AbstractMesh) -> Any:
  """`spec` of every leaf of a tree of parameters, gradients or moments."""
  place = lambda path, x: spec(_join(path), x.shape, mesh)
  return jax.tree_util.tree_map_with_path(place, params)


def shardings(state: Any, params: Any, places: Any, mesh: Mesh) -> Any:
  """Shardings of a state that holds trees like `params`, such as moments.

  Args:
    state: arrays or shapes. A leaf lies as the parameter whose path its own
      path ends with, if it has that shape; all others are whole everywhere.
    params: the parameters, or their shapes.
    places: a tree of PartitionSpec like `params`.
    mesh: the devices.

  Returns:
    A tree of NamedSharding like `state`.
  """
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  owners = {
    (_join(path), x.shape): place
    for (path, x), place in zip(flat, jax.tree.leaves(places), strict=True)
  }

  def leaf(path, x):
    keys = _join(path).split("/")
    ends = [("/".join(keys[i:]), x.shape) for i in range(len(keys))]
    place = next((owners[end] for end in ends if end in owners), P())
    return NamedSharding(mesh, place)

  return jax.tree_util.tree_map_with_path(leaf, state)


def constrain_rows(
  x: jax.Array, axis: int = 0, heads: int | None = None
) -> jax.Array:
  """x with its rows (`axis`) over the batch axes and the rest whole, or its
  axis `heads` over `model`, as far as the mesh divides them.

  Without it the partitioner may move the activations to where the weights
  are. Does nothing where no mesh is set (`jax.sharding.use_abstract_mesh`) and
  inside `shard_map`, whose arrays have one place already.
  """
  mesh = automatic_mesh()
  if mesh is None:
    return x
  places: list[Any] = [None] * x.ndim
  places[axis] = row_axes(mesh, x.shape[axis])
  if heads is not None:
    places[heads] = model_axis(mesh, x.shape[heads])
  return jax.lax.with_sharding_constraint(x, P(*places))


def by_rows_and_heads(function: Callable, check_vma: bool = True) -> Callable:
  """function(tree) -> tree, leaves [B, H, ...]: every device runs its own.

  Rows lie over the batch axes, heads over `model`, where they divide them;
  otherwise every device of the axis runs the same. The function must treat
  each row and head alone. Without a mesh, and inside `shard_map`, it is called
  as it is.

  Args:
    function: of the tree that one device holds.
    check_vma: of `jax.shard_map`; False for kernels that do not say along
      which axes their results differ.
  """

  def call(tree):
    mesh = automatic_mesh()
    if mesh is None or mesh.size == 1:
      return function(tree)
    rows, heads = jax.tree.leaves(tree)[0].shape[:2]
    place = P(row_axes(mesh, rows), model_axis(mesh, heads))
    return jax.shard_map(
      function, in_specs=(place,), out_specs=place, check_vma=check_vma
    )(tree)

  return call


def row_axes(mesh: AbstractMesh, rows: int) -> tuple[str, ...] | None:
  """The batch axes if they divide the rows, else None: a held-out batch or a
  prompt that is decoded lies whole on every device."""
  axes = batch_axes(mesh)
  parts = math.prod(mesh.shape[axis] for axis in axes)
  return None if rows % parts else axes


def model_axis(mesh: AbstractMesh, size: int) -> str | None:
  """ "model", if the mesh has such an axis and it divides `size`."""
  parts = mesh.shape.get("model", 1)
  return "model" if parts > 1 and size % parts == 0 else None


def gather_layer(block: type[nn.Module], name: str) -> type[nn.Module]:
  """A block whose parameters are whole along `fsdp` while it runs.

  Put inside `nn.scan` and `nn.remat`: one layer is gathered at a time, and
  again in the backward pass.

  Args:
    block: the module that is scanned.
    name: of the stack in the parameters, "layers".
  """
  mesh = automatic_mesh()
  if mesh is None or mesh.shape.get("fsdp", 1) == 1:
    return block

  def gather(variables):
    def leaf(path, x):
      keys = _join(path).split("/")
      place = spec("/".join([name, *keys[1:]]), x.shape, mesh)
      kept = P(*(None if axis == "fsdp" else axis for axis in place))
      return jax.lax.with_sharding_constraint(x, kept)

    return jax.tree_util.tree_map_with_path(leaf, variables)

  return nn.map_variables(block, "params", trans_in_fn=gather, init=False)


def mapped_axes() -> tuple[str, ...]:
  """The axes of the `shard_map` around the caller that split the rows.

  () outside, where arrays hold the rows of all devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  split = lambda axis: axis in mesh.manual_axes and mesh.shape[axis] > 1
  return tuple(axis for axis in batch_axes(mesh) if split(axis))


def _join(path: tuple) -> str:
  keys = (getattr(key, "key", getattr(key, "name", key)) for key in path)
  return "/".join(str(key) for key in keys)
