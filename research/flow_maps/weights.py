"""Weights of per-sample losses: learned, adaptive, robust.

The learned weight is that of EDM2 (arXiv:2312.02696, eq. 21) with two times
(arXiv:2505.18825); the power is MeanFlow's (arXiv:2505.13447).
"""

import math

import jax
import jax.numpy as jnp

from giantsteps.models import layers


def init(key: jax.Array, width: int = 128) -> jax.Array:
  """Parameters of `log_weight`: [width] float32, unit normal.

  Raises:
    ValueError: an odd width.
  """
  if width < 2 or width % 2:
    raise ValueError(f"width={width} must be even and positive")
  return jax.random.normal(key, (width,))


def log_weight(params: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
  """w(s, t) = params / |params| . (emb(s) + emb(t)) / sqrt(2).

  A magnitude-preserving layer to one number, without bias, of the
  magnitude-preserving sum of two embeddings (cos and sin of raw time, norm
  sqrt(width / 2)). Bounded: |w| <= sqrt(width), 11.3 at 128, a silent clamp on
  log L where losses are summed over many coordinates.

  Args:
    params: [width] from `init`; scaling them changes nothing.
    s: [B].
    t: [B]; t = s on the diagonal, with the same parameters.

  Returns:
    [B] float32.
  """
  width = params.shape[0]
  emb = layers.time_embedding(s, width) + layers.time_embedding(t, width)
  row = params / jnp.linalg.norm(params)
  return emb @ row / math.sqrt(2)


def learned(loss: jax.Array, w: jax.Array) -> jax.Array:
  """e^{-w} L + w: at the best w = log E[L | s, t], so gradients lose scale.

  Args:
    loss: [B] >= 0.
    w: [B] from `log_weight`.

  Returns:
    [B].
  """
  return jnp.exp(-w) * loss + w


def adaptive(
  loss: jax.Array, power: float = 1.0, constant: float = 1e-2
) -> jax.Array:
  """L / sg(L + c)^p: MeanFlow's weight, no network.

  With p = 1 the value is near 1 whatever the residual: log the loss itself.
  c is in the unit of the summed loss.

  Args:
    loss: [B] >= 0.
    power: p; 0 leaves the loss alone.
    constant: c > 0.

  Returns:
    [B].
  """
  return loss / jax.lax.stop_gradient(loss + constant) ** power


def pseudo_huber(loss: jax.Array, constant: float) -> jax.Array:
  """sqrt(L + c^2) - c of a squared norm L (iCT, arXiv:2310.14189). [B]."""
  return jnp.sqrt(loss + constant**2) - constant
