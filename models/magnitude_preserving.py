"""Layers that keep the size of what passes through them (EDM2,
arXiv:2312.02696): inputs of root mean square 1 leave with about 1.

Weights live on a sphere: each output's weights have root mean square 1, in the
forward pass and, by `project` after every update, where they are stored. Only
their direction is learned, so the learning rate alone says how fast. There are
no biases.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.precision import accumulator
from giantsteps.models import layers

EPS = 1e-4  # of `unit`
_SILU = 0.596  # root mean square of silu(x), x ~ N(0, 1)


def unit(x: jax.Array, axes: int | Sequence[int]) -> jax.Array:
  """x / sqrt(mean(x^2) + EPS^2) over `axes`, in float32 or wider.

  Differs from the paper: there EPS is added to the root, which has no
  derivative at x = 0 and moves a vector of length 1 by 1e-4.
  """
  wide = x.astype(accumulator(x.dtype))
  square = jnp.mean(wide * wide, axes, keepdims=True)
  return (wide * jax.lax.rsqrt(square + EPS**2)).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
  """silu(x) / 0.596 (the paper's equation 81)."""
  return jax.nn.silu(x) / _SILU


def add(a: jax.Array, b: jax.Array, share: float = 0.5) -> jax.Array:
  """((1 - share) a + share b) / |(1 - share, share)| (equation 88)."""
  return ((1 - share) * a + share * b) / math.hypot(1 - share, share)


def concatenate(a: jax.Array, b: jax.Array, share: float = 0.5) -> jax.Array:
  """Along the last axis, so that b has `share` of the whole (equation 103)."""
  size_a, size_b = a.shape[-1], b.shape[-1]
  whole = math.sqrt(size_a + size_b) / math.hypot(1 - share, share)
  a = whole * (1 - share) / math.sqrt(size_a) * a
  b = whole * share / math.sqrt(size_b) * b
  return jnp.concatenate([a, b], -1)


def time_embedding(t: jax.Array, width: int, scale: float = 1.0) -> jax.Array:
  """sqrt(2) `layers.time_embedding`: t [B] -> [B, width], root mean square 1.

  Differs from the paper, which draws random frequencies: these are at most
  `scale`, so that the derivative in t stays below it (flow maps).
  """
  return math.sqrt(2) * layers.time_embedding(t, width, scale)


class Linear(nn.Module):
  """Dense layer, or convolution, without bias, with weights on the sphere.

  Attributes:
    features: size of the output's last axis.
    side: 1 is a dense layer; otherwise of the square kernel, odd.
    dtype, param_dtype: of the product and of the stored `weight`.
  """

  features: int
  side: int = 1
  dtype: jnp.dtype | str = jnp.float32
  param_dtype: jnp.dtype | str = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
    """x [..., D], or [B, H, W, D] where side > 1 -> [..., features] in dtype.

    `gain` [] multiplies the result, by way of the weights.
    """
    window = () if self.side == 1 else (self.side, self.side)
    shape = (*window, x.shape[-1], self.features)
    weight = self.param("weight", _on_sphere, shape, self.param_dtype)
    weight = weight.astype(accumulator(weight.dtype))
    inputs = tuple(range(len(shape) - 1))
    weight = unit(weight, inputs) * (gain / math.sqrt(math.prod(shape[:-1])))
    weight = weight.astype(self.dtype)
    x = x.astype(self.dtype)
    if self.side == 1:
      return x @ weight
    return jax.lax.conv_general_dilated(
      x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _on_sphere(key, shape, dtype):
  weight = jax.random.normal(key, shape, accumulator(dtype))
  return unit(weight, tuple(range(len(shape) - 1))).astype(dtype)


def project(params: Any) -> Any:
  """Puts every stored weight back on the sphere; to follow each update.

  Args:
    params: a tree; leaves called "weight" are [in, out] or [side, side, in,
      out], and [layers, ...] of these below a key "layers".

  Returns:
    The tree, each output's weights of root mean square 1. All other leaves
    are as they were.
  """

  def leaf(path, x):
    keys = [getattr(key, "key", None) for key in path]
    if keys[-1] != "weight":
      return x
    return unit(x, tuple(range(keys.count("layers"), x.ndim - 1)))

  return jax.tree_util.tree_map_with_path(leaf, params)
