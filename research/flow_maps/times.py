"""Pairs of times (s, t) to train a flow map at, one function per custom.

All draws are for the global batch: rows on the diagonal (s = t) stand first,
so that the two losses see two static slices of it. A data-parallel program
that splits each shard separately keeps the expectation only if every shard
has rows of both kinds.
"""

import jax
import jax.numpy as jnp


def diagonal_count(batch_size: int, diagonal: float = 0.75) -> int:
  """Rows on the diagonal, round(diagonal * batch_size).

  Raises:
    ValueError: diagonal outside [0, 1].
  """
  if not 0 <= diagonal <= 1:
    raise ValueError(f"diagonal={diagonal} must be in [0, 1]")
  return round(diagonal * batch_size)


def triangle(
  key: jax.Array, batch_size: int, diagonal: float = 0.75
) -> tuple[jax.Array, jax.Array]:
  """s = t uniform on the first rows, a sorted pair of uniforms on the others.

  The default of the flow-map code (arXiv:2505.18825).

  Args:
    key: PRNG key.
    batch_size: B of the global batch.
    diagonal: share of rows with s = t; `diagonal_count` of them, first.

  Returns:
    s [B], t [B] float32 in [0, 1], s <= t.
  """
  # neither of a sorted pair is uniform: the diagonal draws its own
  single, *pair = jax.random.uniform(key, (3, batch_size))
  low, high = jnp.sort(jnp.stack(pair), axis=0)
  same = jnp.arange(batch_size) < diagonal_count(batch_size, diagonal)
  return jnp.where(same, single, low), jnp.where(same, single, high)


def between(key: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
  """u = r s + (1 - r) t, r uniform: the middle time of PSD-U. [B]."""
  r = jax.random.uniform(key, s.shape, s.dtype)
  return r * s + (1 - r) * t


def logit_normal(
  key: jax.Array,
  batch_size: int,
  *,
  mean: float = -0.4,
  std: float = 1.0,
  diagonal: float = 0.75,
) -> tuple[jax.Array, jax.Array]:
  """MeanFlow's times: two logit-normal noise times 1 - s >= 1 - t.

  Args:
    key: PRNG key.
    batch_size: B of the global batch.
    mean: of logit(1 - s), that is in noise time.
    std: of it.
    diagonal: share of rows with s = t, the earlier (noisier) of the pair, as
      in the paper's code; `diagonal_count` of them, first.

  Returns:
    s [B], t [B] float32 in (0, 1), s <= t.
  """
  pair = jax.random.normal(key, (2, batch_size)) * std + mean
  pair = jax.nn.sigmoid(-pair)  # 1 - noise time
  s, t = jnp.sort(pair, axis=0)
  same = jnp.arange(batch_size) < diagonal_count(batch_size, diagonal)
  return s, jnp.where(same, s, t)


def annealed(
  s: jax.Array, t: jax.Array, progress: float | jax.Array
) -> jax.Array:
  """s no earlier than t - progress: jumps that grow from the diagonal.

  Args:
    s: [B].
    t: [B].
    progress: from 0 (diagonal only) to 1 (no bound), [], for instance
      step / (0.1 to 0.2 of all steps); beyond 1 it is 1.

  Returns:
    [B], the new s.
  """
  return jnp.maximum(s, t - jnp.minimum(progress, 1.0))


def dyadic(
  key: jax.Array, batch_size: int, *, levels: int = 7
) -> tuple[jax.Array, jax.Array]:
  """Shortcut models' times: t - s = 2^-k, s a multiple of it.

  Args:
    key: PRNG key.
    batch_size: B.
    levels: k is uniform in 0, .., levels - 1; halves of the shortest step
      have length 2^-levels (1/128 in arXiv:2410.12557).

  Returns:
    s [B], t [B] float32, exact binary fractions in [0, 1].
  """
  key_k, key_s = jax.random.split(key)
  step = 2.0 ** -jax.random.randint(key_k, (batch_size,), 0, levels)
  count = jnp.floor(jax.random.uniform(key_s, (batch_size,)) / step)
  return count * step, (count + 1) * step


def trig_flow(
  key: jax.Array,
  batch_size: int,
  *,
  sigma_d: float,
  mean: float = -1.0,
  std: float = 1.4,
) -> jax.Array:
  """sCM's angles arctan(e^tau / sigma_d), tau ~ N(mean, std^2). [B].

  (arXiv:2410.11081; for consistency training on EDM's network the custom is
  std = 1.8.) In (0, pi/2), pi/2 noise.
  """
  tau = mean + std * jax.random.normal(key, (batch_size,))
  return jnp.arctan(jnp.exp(tau) / sigma_d)
