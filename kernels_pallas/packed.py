"""Scratch of a TPU whose rows of bfloat16 lie in pairs, as in registers.

As bfloat16 a v5e keeps 8 rows to a tile of memory and joins two halves for
every register that a product reads. As pairs in 32 bits a register is one load,
which the compiler repeats where registers are short, instead of a spill.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def scratch(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
  """VMEM for matrices [..., rows, columns]; float32 lies as ever."""
  if dtype == jnp.float32:
    return pltpu.VMEM(shape, jnp.dtype(dtype))
  return pltpu.VMEM((*shape[:-2], shape[-2] // 2, shape[-1]), jnp.uint32)


def load(ref: Any, index: tuple) -> jax.Array:
  """Part of a matrix; rows of the index a slice or `pl.ds`, even."""
  if ref.dtype != jnp.uint32:
    return ref[index]
  return pltpu.bitcast(ref[_pairs(index)], jnp.bfloat16)


def store(ref: Any, index: tuple, value: jax.Array) -> None:
  """Rounds to bfloat16, or to the dtype of other scratch, and stores."""
  if ref.dtype != jnp.uint32:
    ref[index] = value.astype(ref.dtype)
  else:
    value = value.astype(jnp.bfloat16)
    ref[_pairs(index)] = pltpu.bitcast(value, jnp.uint32)


def _pairs(index: tuple) -> tuple:
  *rest, rows, columns = index
  if isinstance(rows, slice):
    return *rest, slice(rows.start // 2, rows.stop // 2), columns
  half = pl.multiple_of(rows.start >> 1, rows.size // 2)
  return *rest, pl.ds(half, rows.size // 2), columns
