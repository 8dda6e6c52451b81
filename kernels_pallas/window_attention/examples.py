"""Calls of real models: value and gradients of one layer's attention."""

import functools

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.example import Example
from giantsteps.kernels_pallas.window_attention import window_attention

# name, rows, tokens, heads, groups, width of a head, window
_CASES = (
  ("language model 760M", 1, 32_768, 24, 24, 64, 2_048),
  ("language model 3B", 1, 32_768, 24, 24, 128, 2_048),
  ("short", 1, 8_192, 24, 24, 64, 2_048),
  ("shortest", 4, 2_048, 24, 24, 64, 256),
)


def examples() -> list[Example]:
  """bfloat16, causal, one device's rows; with the gradients, as in training."""
  return [
    Example(
      name=f"{name}: {rows} x {tokens} x {heads} x {width}, window {window}",
      function=functools.partial(value_and_gradients, window=window),
      operands=(
        jax.ShapeDtypeStruct((rows, tokens, heads, width), jnp.bfloat16),
        *[jax.ShapeDtypeStruct((rows, tokens, groups, width), jnp.bfloat16)]
        * 2,
        jax.ShapeDtypeStruct((rows, tokens, heads, width), jnp.bfloat16),
      ),
      # 2 products forwards, 5 backwards; of window keys, fewer at the start
      flops=14.0 * rows * heads * width * window * (tokens - window / 2),
    )
    for name, rows, tokens, heads, groups, width, window in _CASES
  ]


def value_and_gradients(q, k, v, cotangent, *, window, implementation=None):
  """(output, (dq, dk, dv)) of causal attention."""
  attend = functools.partial(
    window_attention,
    causal=True,
    window=window,
    implementation=implementation,
  )
  out, pull = jax.vjp(attend, q, k, v)
  return out, pull(cotangent)


def candidates() -> list[dict[str, int]]:
  """The kernel's blocks are fixed."""
  return []
