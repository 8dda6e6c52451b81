"""Calls of real models: one step of a decoder's head, one device's positions."""

import functools
import itertools

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.example import Example
from giantsteps.kernels_pallas.unmask_stats import unmask_stats

# name, positions, D, V, sampled, the head is the embedding
_CASES = (
  ("LLaDA 8B", 256, 4_096, 126_464, False, False),
  ("LLaDA 8B, one block", 32, 4_096, 126_464, False, False),
  ("LLaDA 8B, sampled", 256, 4_096, 126_464, True, False),
  ("LLaDA 8B, one block sampled", 32, 4_096, 126_464, True, False),
  ("LLaDA 8B, long", 1_024, 4_096, 126_464, False, False),
  ("Dream 7B", 256, 3_584, 152_064, True, False),
  ("tied head", 256, 1_024, 151_936, False, True),
)


def examples() -> list[Example]:
  """bfloat16, with banned tokens (the mask)."""
  return [
    Example(
      name=f"{name}: {rows} x {depth} x {size}",
      function=functools.partial(
        with_sampling if sampled else without_sampling, transposed=tied
      ),
      operands=(
        jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16),
        jax.ShapeDtypeStruct(
          (size, depth) if tied else (depth, size), jnp.bfloat16
        ),
        jax.ShapeDtypeStruct((size,), jnp.float32),
        *_sampling(rows, sampled),
      ),
      flops=2.0 * rows * depth * size,
    )
    for name, rows, depth, size, sampled, tied in _CASES
  ]


def _sampling(rows, sampled):
  if not sampled:
    return ()
  return (
    jax.ShapeDtypeStruct((rows,), jnp.float32),
    jax.ShapeDtypeStruct((rows, 2), jnp.uint32),
  )


def without_sampling(hidden, head, bias, **static):
  """The best token."""
  return unmask_stats(hidden, head, bias=bias, **static)


def with_sampling(hidden, head, bias, temperature, seeds, **static):
  """A sample."""
  return unmask_stats(
    hidden, head, bias=bias, temperature=temperature, seeds=seeds, **static
  )


def candidates() -> list[dict[str, int]]:
  """Block sizes worth trying, see `tpu.BLOCKS`."""
  sizes = itertools.product((512, 1024), (256, 512))
  return [{"columns": columns, "width": width} for columns, width in sizes]
