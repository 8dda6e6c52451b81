"""Figures of TPU chips, for a roofline; chips that are one device each.

Source: Google Cloud's pages of each generation ("TPU v5e", ...) and "How to
Scale Your Model" (jax-ml.github.io/scaling-book), table of TPU specs.
"""

from typing import NamedTuple


class Chip(NamedTuple):
  """Peak figures of one chip.

  Attributes:
    flops: of bfloat16 products, per second.
    memory: bytes of HBM.
    bandwidth: of HBM, bytes per second.
    link: bytes per second of one link of the network, one way; a chip has
      two per side of its torus.
    clock: Hz.
    topologies: slices that can be rented.
  """

  flops: float
  memory: float
  bandwidth: float
  link: float
  clock: float
  topologies: tuple[str, ...]


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
_SOLID = (*_SOLID, "8x8x8", "8x8x16", "8x16x16")
GIB = 2.0**30

CHIPS = {
  "v5e": Chip(197e12, 16 * GIB, 819e9, 45e9, 1.5e9, _FLAT),
  "v5p": Chip(459e12, 95 * GIB, 2765e9, 90e9, 1.75e9, _SOLID),
  "v6e": Chip(920e12, 32 * GIB, 1640e9, 90e9, 1.75e9, _FLAT),
}


def known() -> list[str]:
  """All topologies by name: "v5e:16x16", ..."""
  return [f"{name}:{s}" for name, c in CHIPS.items() for s in c.topologies]


def sides(topology: str) -> tuple[int, ...]:
  """Chips along each side of a topology: "v5e:4x8" -> (4, 8)."""
  return tuple(int(side) for side in topology.partition(":")[2].split("x"))
