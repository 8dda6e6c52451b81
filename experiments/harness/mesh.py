"""Device meshes from a flag: `--mesh data=8` or `--mesh data=4,model=2`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
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
    InputError: when there are fewer devices.
  """
  devices = jax.devices() if devices is None else devices
  data, *others = (sizes.get(axis, 1) for axis in AXES)
  count = data * math.prod(others)
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


def own_rows(mesh: Mesh, size: int) -> slice:
  """The rows of a batch of `size` that lie on this process's devices.

  Raises:
    InputError: if they are not consecutive.
  """
  sharding = batch_sharding(mesh)
  indices = sharding.addressable_devices_indices_map((size,)).values()
  parts = {index[0].indices(size)[:2] for index in indices if index}
  ordered = sorted(parts)
  for (_, end), (start, _) in zip(ordered, ordered[1:], strict=False):
    if end != start:
      raise config_lib.InputError(
        f"--mesh {dict(mesh.shape)}: the rows of process"
        f" {jax.process_index()} are not consecutive; make data times fsdp a"
        " multiple of the number of processes"
      )
  return slice(ordered[0][0], ordered[-1][1])
