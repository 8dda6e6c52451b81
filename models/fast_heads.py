"""What every layer around the fast weights needs: heads as rows, unit keys,
learning rates of tokens, initial weights."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import precision
from giantsteps.kernels_pallas.fast_weight import Weights
from giantsteps.models import partitioning


def split(x: jax.Array, num_heads: int) -> jax.Array:
  """[B, T, H d] -> rows [B H, T, d], as `fast_weight_scan` wants them."""
  x = x.reshape(*x.shape[:2], num_heads, -1)
  return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def join(x: jax.Array, num_heads: int) -> jax.Array:
  """The inverse of `split`, heads apart: [B H, T, d] -> [B, T, H, d]."""
  x = x.reshape(-1, num_heads, *x.shape[1:])
  return jnp.swapaxes(x, 1, 2)


def unit(x: jax.Array) -> jax.Array:
  """x / (|x| + 1e-5) over the last axis, inside in float32 or wider."""
  y = x.astype(precision.wide(x))
  return (y / (precision.length(y, -1) + 1e-5)).astype(x.dtype)


def rates(x: jax.Array, base: float) -> Weights:
  """softplus(x + softplus^-1(base)): positive, and `base` where x = 0.

  Args:
    x: [B, T, H, 3], the last axis for W0, W1, W2.
    base: above 0.

  Returns:
    Three [B H, T, 1], float32 or wider.
  """
  y = x.astype(precision.wide(x)) + math.log(math.expm1(base))
  y = jax.nn.softplus(y)
  one = lambda i: jnp.swapaxes(y[..., i], 1, 2).reshape(-1, y.shape[1], 1)
  return one(0), one(1), one(2)


def initial_weights(
  param: Callable,
  num_heads: int,
  d: int,
  h: int,
  gain: float,
  dtype: jax.typing.DTypeLike,
) -> Weights:
  """Parameters w0, w1, w2 of a layer: normal, std gain / sqrt(fan-in).

  Args:
    param: the `param` of the layer.
    num_heads: H.
    d: width of a head.
    h: hidden units of its memory.
    gain: 1 keeps the size of a normal input.
    dtype: of the parameters.

  Returns:
    W0 [H, h, d], W1 [H, d, h], W2 [H, h, d].
  """

  def make(name, rows, columns):
    init = nn.initializers.normal(gain / math.sqrt(columns))
    return param(name, init, (num_heads, rows, columns), dtype)

  return make("w0", h, d), make("w1", d, h), make("w2", h, d)


def for_rows(weights: Weights, batch: int) -> Weights:
  """[H, ...] of a layer -> [B H, ...], the same for every row of a batch."""
  w0, w1, w2 = (jnp.tile(w, (batch, 1, 1)) for w in weights)
  return w0, w1, w2


def on_each_device(function: Callable, num_heads: int) -> Callable:
  """A function of all heads of a batch, such as `fast_weight_scan`, on a mesh.

  Heads and rows of a batch never meet, and a kernel is no program that the
  partitioner could split: every device runs those it holds.

  Args:
    function: of arrays and trees of arrays with leaves [B H, ...], and so are
      its results; each row by itself.
    num_heads: H.

  Returns:
    The same function.
  """
  apart = lambda x: x.reshape(-1, num_heads, *x.shape[1:])
  rows = lambda x: x.reshape(-1, *x.shape[2:])

  def call(*arrays, **named):
    def run(tree):
      heads = jax.tree.leaves(tree)[0].shape[1]
      arrays, named = jax.tree.map(rows, tree)
      found = function(*arrays, **named)
      return jax.tree.map(lambda x: x.reshape(-1, heads, *x.shape[1:]), found)

    tree = jax.tree.map(apart, (arrays, named))
    return jax.tree.map(rows, partitioning.by_rows_and_heads(run)(tree))

  return call
