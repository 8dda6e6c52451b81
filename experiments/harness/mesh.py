"""Device meshes from a flag: `--mesh data=8` or `--mesh data=4,model=2`."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from giantsteps.experiments.harness import config as config_lib
from giantsteps.models import partitioning

AXES = partitioning.AXES


def parse(spec: str) -> dict[str, int]:
  """Reads "data=8" into {"data": 8}; an empty string is one device.

  The axes are those of models/partitioning.py.

  Raises:
    InputError: unknown axis, or a size that is no positive integer.
  """
  sizes = {}
  for part in filter(None, spec.split(",")):
    name, _, size = part.partition("=")
    if name not in AXES:
      raise config_lib.InputError(
        f"--mesh {spec!r}: axis {name!r} is unknown; axes: {', '.join(AXES)}"
      )
    if not size.isdecimal() or int(size) < 1:
      raise config_lib.InputError(
        f"--mesh {spec!r}: {name}={size!r} is no positive integer; "
        f"write {name}=8"
      )
    sizes[name] = int(size)
  return sizes


def make(
  sizes: Mapping[str, int], devices: Sequence[Any] | None = None
) -> Mesh:
  """The mesh over the first devices: {"data": 8} -> 8 devices.

  On a TPU torus the data axis becomes one mesh axis per side that it covers,
  data_0, data_1, ...: {"data": 256} on 16 x 16 chips is 16 x 16. Only then are
  gradients really reduced and scattered (research/large_batch/
  sharded_update.py).

  Args:
    sizes: of the axes; those left out are 1.
    devices: None is all devices there are.

  Raises:
    InputError: when there are fewer devices; in a run of several processes,
      when there are more, since each has to have its part.
  """
  devices = jax.devices() if devices is None else devices
  data, *others = (sizes.get(axis, 1) for axis in AXES)
  count = data * math.prod(others)
  if jax.process_count() > 1 and count < len(devices):
    raise config_lib.InputError(
      f"--mesh is of {count} device(s), the run has {len(devices)} on"
      f" {jax.process_count()} processes: use all, e.g. --mesh"
      f" data={len(devices)}"
    )
  if count > len(devices):
    raise config_lib.InputError(
      f"--mesh needs {count} devices, {len(devices)} {devices[0].platform} "
      "device(s) are here; on a CPU set "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
    )
  devices = devices[:count]
  sides = _split(data, _torus(devices))
  names = [f"data_{i}" for i in range(len(sides))]
  names = names if len(sides) > 1 else ["data"]
  array = mesh_utils.create_device_mesh(
    (*sides, *others), devices, allow_split_physical_axes=True
  )
  names = (*names, *AXES[1:])
  return Mesh(array, names, axis_types=(AxisType.Auto,) * len(names))


def _torus(devices: Sequence[Any]) -> tuple[int, ...]:
  """Chips along each side; one side where there are no TPUs or they
  fill no box."""
  if devices[0].platform != "tpu":
    return (len(devices),)
  coordinates = [device.coords for device in devices]
  sides = tuple(len(set(axis)) for axis in zip(*coordinates, strict=True))
  if math.prod(sides) != len(devices):
    return (len(devices),)
  return tuple(side for side in sides if side > 1)


def _split(size: int, torus: tuple[int, ...]) -> tuple[int, ...]:
  """Factors of `size` along the sides: 256 on (16, 16) -> (16, 16)."""
  factors = []
  for side in torus:
    factor = math.gcd(size, side)
    if factor > 1:
      factors.append(factor)
      size //= factor
  if size > 1 or not factors:
    factors.append(size)
  return tuple(factors)


def data_size(mesh: Mesh) -> int:
  """Devices along the data axis."""
  return math.prod(mesh.shape[name] for name in partitioning.data_axes(mesh))


def batch_size(mesh: Mesh) -> int:
  """Parts into which the rows of a batch are split: data times fsdp."""
  return math.prod(mesh.shape[name] for name in partitioning.batch_axes(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Rows (dimension `axis`) are spread over the data and fsdp axes."""
  rows = partitioning.batch_axes(mesh)
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, rows))


def traced_on(mesh: Mesh, function: Callable) -> Callable:
  """The function, traced with the mesh in sight.

  Experts and kernels must know which rows are their device's; a program for
  one device is as if there were no mesh.
  """
  if mesh.size == 1:
    return function

  @functools.wraps(function)
  def call(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  return call


def own_rows(mesh: Mesh, size: int, process: int | None = None) -> np.ndarray:
  """Indices, rising, of the rows of a batch of `size` on a process's devices.

  On a TPU pod a host has a block of the torus, and so rows that are not
  neighbours.

  Args:
    mesh: of all devices.
    size: rows of the whole batch.
    process: None is this one.
  """
  process = jax.process_index() if process is None else process
  places = batch_sharding(mesh).devices_indices_map((size,)).items()
  parts = {
    index[0].indices(size)[:2]
    for device, index in places
    if device.process_index == process and index
  }
  return np.concatenate([np.arange(*part) for part in sorted(parts)])
