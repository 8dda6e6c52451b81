"""Calls of real models: value and tangent of one layer's attention."""

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.example import Example
from giantsteps.kernels_pallas.jvp_attention import jvp_attention

# name, rows, tokens, heads, width of a head
_CASES = (
  ("DiT-B/2, 64 x 64 latents", 16, 1_024, 12, 64),
  ("DiT-XL/2, 128 x 128 latents", 2, 4_096, 16, 72),
  ("U-Net at 64 x 64", 4, 4_096, 4, 64),
)


def examples() -> list[Example]:
  """bfloat16, one device's rows; forward mode, as losses in v-space need it."""
  return [
    Example(
      name=f"{name}: {rows} x {tokens} x {heads} x {width}",
      function=value_and_tangent,
      operands=(
        jax.ShapeDtypeStruct((rows, tokens, heads, width), jnp.bfloat16),
      )
      * 6,
      flops=14.0 * rows * tokens**2 * heads * width,  # 7 products
    )
    for name, rows, tokens, heads, width in _CASES
  ]


def value_and_tangent(q, k, v, dq, dk, dv, *, implementation=None):
  """(output, its derivative along dq, dk and dv)."""
  attend = lambda *x: jvp_attention(*x, implementation=implementation)
  return jax.jvp(attend, (q, k, v), (dq, dk, dv))


def candidates() -> list[dict[str, int]]:
  """Block sizes worth trying, see `tpu.BLOCKS`."""
  return [
    {"queries": queries, "keys": keys}
    for queries in (256, 512)
    for keys in (256, 512, 1_024)
  ]
