"""Gumbel noise by counting: a function of (seed, token), of nothing else.

The same bits on every backend, for every tile of the vocabulary, every batch
and every shard of the head.
"""

import jax
import jax.numpy as jnp
import numpy as np

STEP = np.uint32(0x9E3779B9)  # from one token to the next, in a stream
_TOP = np.float32(1 - 2**-24)  # the largest float32 below 1


def gumbel(seed: jax.Array, token: jax.Array) -> jax.Array:
  """Standard Gumbel noise, -log(E) of an exponential E from 32 bits.

  The uniform's small end is the exponential's small end, where float32 is
  fine: values reach 22.9 (2^-33), those of 23-bit uniforms end near 16, which
  acts like a lower temperature (arXiv:2409.02908).

  Args:
    seed: [..., 2] uint32, one stream each.
    token: int32 or uint32, broadcasts with [...].

  Returns:
    float32, finite.
  """
  return of_bits(hash_bits(seed[..., 0], seed[..., 1], token))


def of_bits(bits: jax.Array) -> jax.Array:
  """Gumbel noise, float32, of 32 uniform bits."""
  return -jnp.log(-jnp.log1p(-uniform(bits)))


def uniform(bits: jax.Array) -> jax.Array:
  """float32 in (0, 1), fine at its small end."""
  # 32 bits do not fit into float32: their halves do, and small sums are exact
  high = (bits >> 16).astype(jnp.int32).astype(jnp.float32) * np.float32(2**-16)
  low = (bits & 0xFFFF).astype(jnp.int32).astype(jnp.float32)
  return jnp.minimum(high + (low + np.float32(0.5)) * np.float32(2**-32), _TOP)


def hash_bits(a: jax.Array, b: jax.Array, token: jax.Array) -> jax.Array:
  """32 bits of (a, b, token), all uint32: murmur3's finaliser, twice."""
  x = token.astype(jnp.uint32) * STEP + a
  return _mix(_mix(x) ^ b)


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
