"""Calls of real models: one layer's attention over the cache, one device."""

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.block_attention import block_attention
from giantsteps.kernels_pallas.example import Example

# name, rows, queries, slots, heads, groups, width of a head
_CASES = (
  ("decode", 8, 32, 4_096, 32, 8, 128),
  ("decode without groups", 8, 32, 4_096, 32, 32, 128),  # LLaDA 8B
  ("decode one token", 8, 1, 4_096, 32, 8, 128),
  ("decode one row", 1, 64, 8_192, 28, 4, 128),  # Dream 7B
  ("decode narrow heads", 8, 32, 2_048, 14, 2, 64),
  ("full pass", 1, 4_096, 4_096, 32, 8, 128),
  ("full pass, short", 8, 512, 512, 32, 32, 128),
)


def examples() -> list[Example]:
  """bfloat16; FLOPs as if no limit were below the number of slots."""
  return [
    Example(
      name=f"{name}: {rows} x {length} x {slots}, {heads} heads, {groups} "
      f"groups of {width}",
      function=block_attention,
      operands=(
        jax.ShapeDtypeStruct((rows, length, heads, width), jnp.bfloat16),
        *[jax.ShapeDtypeStruct((rows, slots, groups, width), jnp.bfloat16)] * 2,
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
      ),
      flops=4.0 * rows * length * slots * heads * width,
    )
    for name, rows, length, slots, heads, groups, width in _CASES
  ]


def candidates() -> list[dict[str, int]]:
  """Block sizes worth trying, see `tpu.BLOCKS`."""
  return [{"slots": slots} for slots in (256, 512, 1024)]
