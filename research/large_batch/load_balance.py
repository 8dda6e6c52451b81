"""Load-balancing losses for mixtures of experts: per micro-batch and global.

"Demons in the Detail: On Implementing Load Balancing Loss for Training
Specialized Mixture-of-Expert Models" (arXiv:2501.11873). Both have the form of
Switch (arXiv:2101.03961, equation 4), for E experts of which a token takes k,

  L = E sum_i f_i p_i,

f_i the share of all choices that went to expert i, p_i the mean of the router's
probability of i; L = 1 for a uniform router. If each device takes f from its
own few rows, every row is pushed to use all experts alike and none can
specialise. So f is taken from the rows of all devices here. f is a count and
has no gradient: E integers per layer are added across devices, in one psum for
the whole stack, and p stays where it is.
"""

import math

import jax
import jax.numpy as jnp

from giantsteps.models import moe


def micro_batch_loss(
  load: moe.Load, experts_per_token: int, groups: int = 1
) -> jax.Array:
  """L with f and p of the same few rows, averaged over the groups of rows.

  Inside `shard_map` that is the loss of this device: the mean over devices is
  the usual implementation, the one that the paper argues against.

  Args:
    load: leaves [..., B, E].
    experts_per_token: k.
    groups: parts of equal size into which the rows are cut, in order; with
      the rows of all devices at hand, how many devices there are.

  Returns:
    [...] float32, one number per layer; 0 where no token counts.

  Raises:
    ValueError: if groups does not divide the rows.
  """
  rows = load.counts.shape[-2]
  if rows % groups:
    raise ValueError(f"groups={groups} does not divide the {rows} rows")
  *layers, _, experts = load.counts.shape
  shape = (*layers, groups, rows // groups, experts)
  counts, probabilities = (jnp.sum(x.reshape(shape), axis=-2) for x in load)
  tokens = jnp.sum(counts, axis=-1, keepdims=True) / experts_per_token
  losses = _product(counts, probabilities / jnp.maximum(tokens, 1))
  return jnp.mean(losses, axis=-1)


def global_batch_loss(
  load: moe.Load,
  experts_per_token: int,
  axes: tuple[str, ...] = (),
  earlier: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """L with f of the rows of all devices.

  Inside `shard_map` a device returns E sum_i f_i p_i with its own tokens in p,
  divided by the mean number of tokens per device: the mean of the losses over
  devices, and of their gradients, is then that of one device with all rows,
  to rounding, also where devices hold unlike numbers of tokens.

  Differs from the paper: its p_i is divided by the device's own tokens, the
  same thing while no device has padding.

  Args:
    load: leaves [..., B, E], the rows of this device inside `shard_map`, of
      all devices outside (`jit` adds up over the shards by itself).
    experts_per_token: k.
    axes: mesh axes that split the rows, inside `shard_map`.
    earlier: [..., E] int32, the counts that this function returned for the
      micro-batches before this one (the paper's buffer, for when a global
      batch does not fit); None: this is the first.

  Returns:
    losses [...] float32, one per layer, 0 where no token counts; counts
    [..., E] int32 of all devices, those of `earlier` included. One psum of
    [..., E] int32.
  """
  counts = jnp.sum(load.counts, axis=-2)
  if axes:
    counts = jax.lax.psum(counts, axes)
  devices = math.prod(jax.lax.axis_size(axis) for axis in axes)
  tokens = jnp.sum(counts, axis=-1, keepdims=True) / experts_per_token
  sums = jnp.sum(load.probabilities, axis=-2)
  mean = devices * sums / jnp.maximum(tokens, 1)
  if earlier is not None:
    counts = counts + earlier
  return _product(counts, mean), counts


def _product(counts: jax.Array, mean: jax.Array) -> jax.Array:
  """E sum_i f_i p_i: counts, mean [..., E] -> [...]."""
  total = jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)
  return counts.shape[-1] * jnp.sum(counts / total * mean, axis=-1)
