"""Device meshes from a flag: `--mesh data=8`."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from giantsteps.experiments.harness import config as config_lib

AXES = ("data",)


def parse(spec: str) -> dict[str, int]:
  """Reads "data=8" into {"data": 8}; an empty string is one device.

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


def make(sizes: Mapping[str, int]) -> Mesh:
  """The mesh over the first devices: {"data": 8} -> 8 devices.

  Raises:
    InputError: when there are fewer devices.
  """
  shape = tuple(sizes.get(axis, 1) for axis in AXES)
  count = int(np.prod(shape))
  devices = jax.devices()
  if count > len(devices):
    raise config_lib.InputError(
      f"--mesh needs {count} devices, {len(devices)} {devices[0].platform} "
      "device(s) are here; on a CPU set "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
    )
  return jax.make_mesh(
    shape,
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[:count],
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Rows (dimension `axis`) are spread over the data axis."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
