"""Calls of real models: reading and writing the memory of one layer."""

import itertools

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.example import Example
from giantsteps.kernels_pallas.fast_weight import operations

# name, batch * heads, tokens of a chunk, d, h
_SIZES = (
  ("512", 4, 2048, 512, 512),
  ("language model 760M", 4, 2048, 384, 384),
  ("language model 3B", 4, 2048, 768, 768),
  ("novel views", 1, 65536, 768, 1536),
  ("video 1.3B", 2, 4680, 768, 1536),
)


def examples() -> list[Example]:
  """bfloat16 tokens and float32 states; one device's batch."""
  return [
    example
    for name, batch, length, d, h in _SIZES
    for example in _of_a_layer(
      f"{name}: {batch} x {length} x {d} x {h}", batch, length, d, h
    )
  ]


def _of_a_layer(name, batch, length, d, h) -> list[Example]:
  float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  sizes = ((h, d), (d, h), (h, d))
  weights = tuple(float32(batch, *size) for size in sizes)
  norms = tuple(float32(batch, rows, 1) for rows, _ in sizes)
  tokens = jax.ShapeDtypeStruct((batch, length, d), jnp.bfloat16)
  rates = (float32(batch, length, 1),) * 3
  momentum = float32(batch, 1, 1), weights
  product = 2.0 * batch * length * d * h
  elements = 3.0 * batch * d * h
  return [
    Example(f"apply {name}", operations.apply, (weights, tokens), 3 * product),
    Example(
      f"gradient {name}",
      operations.gradient,
      (weights, tokens, tokens, rates),
      6 * product,
    ),
    Example(
      f"update {name}",
      operations.update,
      (weights, weights, norms),
      6 * elements,
    ),
    Example(
      f"update with momentum {name}",
      operations.update,
      (weights, weights, norms, momentum),
      8 * elements,
    ),
  ]


def candidates() -> list[dict[str, int]]:
  """Block sizes worth trying, see `tpu.gradient` and `tpu.apply`."""
  sizes = itertools.product((128, 256, 512), (128, 256, 384, 512))
  return [{"tile": tile, "rows": rows} for tile, rows in sizes]
