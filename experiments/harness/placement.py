"""How a training step lies on its mesh.

With `optim.shards` the parameters, float32, and the moments are shared by the
data axis (research/large_batch/sharded_update.py). Otherwise the partitioner
does everything from where the arrays live: whole on every device of a data
axis, or by models/partitioning.py on a mesh with an fsdp or model axis.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import tasks as tasks_lib
from giantsteps.models import partitioning, unet
from giantsteps.research.large_batch import sharded_update


class Placement(NamedTuple):
  """What a step needs to know of its mesh.

  Attributes:
    pack: params -> the form that the optimizer moves and checkpoints hold.
    unpack: its inverse.
    gradient: (packed params, arrays) -> mean loss, packed gradient.
    shardings: shapes of a state with packed parameters -> NamedShardings.
  """

  pack: Callable
  unpack: Callable
  gradient: Callable
  shardings: Callable


def make(cfg: config_lib.Config, task: tasks_lib.Task, mesh: Mesh) -> Placement:
  """The placement of a config on a mesh.

  Raises:
    InputError: if the batch does not divide, or optim.shards does not fit.
  """
  rows = mesh_lib.batch_size(mesh)
  sizes = {"batch_size": cfg.batch_size}
  if cfg.second.start:
    sizes["second.batch_size"] = cfg.second.batch_size
  sizes |= tasks_lib.flow_map_rows(cfg)
  for name, size in sizes.items():
    if not size % (rows * cfg.accumulate):
      continue
    raise config_lib.InputError(
      f"{name}={size} is not a multiple of the {rows} parts of "
      f"--mesh (data times fsdp) times accumulate={cfg.accumulate}"
    )
  return (
    _shared(cfg, task, mesh) if cfg.optim.shards else _plain(cfg, task, mesh)
  )


def _plain(cfg, task, mesh):
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  places = partitioning.specs(shapes, mesh)

  def gradient(params, arrays):
    mean = lambda: sharded_update.mean_gradient(
      task.loss, params, arrays, cfg.accumulate
    )
    loss, grads = mesh_lib.traced_on(mesh, mean)()
    if mesh.size == 1:
      return loss, grads
    return loss, jax.lax.with_sharding_constraint(grads, shardings(grads))

  def shardings(state):
    return partitioning.shardings(state, shapes, places, mesh)

  return Placement(
    pack=lambda params: params,
    unpack=lambda params: params,
    gradient=gradient,
    shardings=shardings,
  )


def _shared(cfg, task, mesh):
  shards, parts = cfg.optim.shards, mesh_lib.data_size(mesh)
  if shards % parts or mesh.size != parts:
    raise config_lib.InputError(
      f"optim.shards={shards} wants a mesh of data alone whose size divides "
      f"it, this one is {dict(mesh.shape)}; optim.shards=0 goes with fsdp and "
      "model"
    )
  if isinstance(cfg.model, unet.Config):
    raise config_lib.InputError(
      f"optim.shards={shards} with a unet, whose weights are projected whole "
      "after every step: set optim.shards=0"
    )
  if cfg.optim.name == "muon":
    raise config_lib.InputError(
      f"optim.shards={shards} with optim.name='muon': Muon needs whole "
      "matrices; the others do not"
    )
  axes = partitioning.data_axes(mesh)
  layout = sharded_update.layouts(
    jax.eval_shape(task.init, jax.random.key(0)), shards
  )
  packed = jax.eval_shape(
    lambda key: sharded_update.pack(task.init(key), layout), jax.random.key(0)
  )
  reduce = sharded_update.local_then_scatter(
    task.loss,
    mesh,
    axes,
    layout,
    cfg.accumulate,
    jnp.dtype(cfg.optim.reduce_dtype),
  )

  def gradient(params, arrays):
    dtype = jnp.dtype(cfg.model.dtype)
    whole = sharded_update.gather(params, mesh, axes, layout, dtype)
    return reduce(whole, arrays)

  places = sharded_update.specs(layout, axes)

  def shardings(state):
    return partitioning.shardings(state, packed, places, mesh)

  return Placement(
    pack=lambda params: sharded_update.pack(params, layout),
    unpack=lambda params: sharded_update.unpack(params, layout),
    gradient=gradient,
    shardings=shardings,
  )
