"""What is accumulated in which dtype: sums, norms and states are float32 or
wider, products take the dtype of their inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def accumulator(dtype: jax.typing.DTypeLike) -> np.dtype:
  """float32, or `dtype` where that is wider: for sums, norms and angles."""
  return np.promote_types(dtype, np.float32)


def wide(*arrays: jax.Array) -> np.dtype:
  """float32, or the widest dtype of the arrays if that is wider."""
  dtypes = (np.dtype(x.dtype) for x in arrays)
  return accumulator(functools.reduce(np.promote_types, dtypes))


def length(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
  """Euclidean norm, axes kept, with gradient zero where x = 0."""
  square = jnp.sum(x * x, axis=axis, keepdims=True)
  safe = jnp.where(square > 0, square, 1)
  return jnp.where(square > 0, jnp.sqrt(safe), 0)


def einsum(
  equation: str, a: jax.Array, b: jax.Array, like: jax.Array
) -> jax.Array:
  """Inputs in the dtype of `like`, a wide accumulator and result."""
  out = wide(a, b, like)
  a, b = a.astype(like.dtype), b.astype(like.dtype)
  return jnp.einsum(equation, a, b, preferred_element_type=out)
