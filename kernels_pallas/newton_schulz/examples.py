"""Calls of real models: the Muon step of every fast weight of a batch."""

import functools

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.example import Example
from giantsteps.kernels_pallas.newton_schulz import newton_schulz

# name, matrices per head, batch * heads, rows, columns, coefficients
_CASES = (
  ("512", 3, 4, 512, 512, "scheduled"),
  ("language model 760M", 3, 4, 384, 384, "scheduled"),
  ("language model 3B", 3, 4, 768, 768, "scheduled"),
  ("novel views", 3, 1, 768, 1536, "fixed"),
  ("video 1.3B", 3, 2, 768, 1536, "fixed"),
)


def examples() -> list[Example]:
  """bfloat16 iterations of float32 gradients, 5 steps; one device's batch."""
  return [
    Example(
      name=f"{name}: {stack * batch} x {rows} x {columns}",
      function=functools.partial(newton_schulz, kind=kind, dtype=jnp.bfloat16),
      operands=(
        jax.ShapeDtypeStruct((stack, batch, rows, columns), jnp.float32),
      ),
      flops=5.0 * stack * batch * (4 * rows**2 * columns + 2 * rows**3),
    )
    for name, stack, batch, rows, columns, kind in _CASES
  ]


def candidates(example: Example) -> list[dict[str, int]]:
  """Block sizes worth trying, see `tpu.iterate`: those of matrix units of 128
  (before v6e) and of 256, few enough for an hour of one core per chip."""
  del example
  narrow = [
    {"matrices": z, "block": 128, "height": 128, "depth": k, "columns": 128}
    for z, k in ((1, 128), (1, 256), (1, 512), (2, 128))
  ]
  wide = [
    {"matrices": z, "block": 256, "height": height, "depth": k, "columns": 256}
    for z, height, k in (
      (4, 1024, 512),
      (4, 256, 512),
      (1, 1024, 256),
      (1, 256, 256),
    )
  ]
  return narrow + wide
