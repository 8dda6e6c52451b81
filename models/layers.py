"""Layers that the networks share: norms, embeddings, attention, short
convolutions.

Every function works in the dtype of its input except where a comment says
float32: norms, rotations and softmax are always accumulated there.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.kernels_pallas.precision import accumulator

REMAT_POLICIES = ("none", "dots", "full")


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) in float32, cast back, then times `scale`.

  Attributes:
    eps: added to the mean square.
    dtype: output dtype.
    param_dtype: dtype of `scale`.
  """

  eps: float = 1e-6
  dtype: jnp.dtype | str = jnp.float32
  param_dtype: jnp.dtype | str = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x [..., D] -> [..., D]."""
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    return rms_norm(x, scale, self.eps).astype(self.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """The function of `RMSNorm`: x [..., D], scale [D] -> [..., D]."""
  wide = x.astype(accumulator(x.dtype))
  wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
  return wide.astype(x.dtype) * jax.lax.expand_dims(
    scale.astype(x.dtype), range(x.ndim - 1)
  )


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotates pairs (i, i + K/2) of each head by position * theta^(-2i/K).

  RoFormer (arXiv:2104.09864) in the half-split layout of Llama and Qwen.

  Args:
    x: [B, T, H, K], K even.
    positions: [B, T] int, or [1, T] for all rows.
    theta: base of the wavelengths.

  Returns:
    [B, T, H, K] in x.dtype; sines and products are float32 or wider.
  """
  wide = accumulator(x.dtype)
  frequency = jnp.asarray(rotary_frequencies(x.shape[-1], theta), wide)
  return rotate(x, positions[..., None].astype(wide) * frequency[None, None])


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
  """`rotary` with the angles given: x [B, T, H, K], angle [B or 1, T, K/2]."""
  sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
  a, b = jnp.split(x.astype(angle.dtype), 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return out.astype(x.dtype)


def rotary_frequencies(head_dim: int, theta: float) -> np.ndarray:
  """theta^(-2i/K) for i < K/2, in radians per position: [K/2] float64."""
  return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def llama3_frequencies(
  frequency: np.ndarray,
  *,
  factor: float,
  low: float,
  high: float,
  original_length: int,
) -> np.ndarray:
  """Stretches long wavelengths for longer contexts, as Llama 3.1 does.

  Wavelengths below original_length/high stay, those above
  original_length/low grow by `factor`, those between are interpolated
  (arXiv:2407.21783; the rule is in the model's code, not in the paper).

  Args:
    frequency: [K/2] float64 on the host, radians per position.
    factor: how much longer the context becomes.
    low, high: turns within original_length that bound the middle band.
    original_length: tokens of the first pre-training.

  Returns:
    [K/2] float64.
  """
  turns = original_length * frequency / (2 * np.pi)
  keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return frequency * (keep + (1 - keep) / factor)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool,
  window: int | None = None,
) -> jax.Array:
  """Softmax attention with scale 1/sqrt(K); softmax in float32.

  Args:
    q: [B, T, H, K].
    k: [B, S, G, K], H a multiple of G (grouped queries).
    v: [B, S, G, K].
    causal: query i sees keys j <= i.
    window: query i sees keys |i - j| < window; None is unlimited.

  Returns:
    [B, T, H, K] in q.dtype. Forms scores [B, H, T, S] in 4 B T S H K FLOPs;
    with a window below T / 3 only those within reach, S = 2 or 3 windows.
  """
  length, num_keys = q.shape[1], k.shape[1]
  if window is not None and length == num_keys and length > 3 * window:
    return _windowed(q, k, v, causal, window)
  query, key = jnp.arange(length), jnp.arange(num_keys)
  return _attend(q, k, v, _visible(query, key, causal, window)[None])


def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> jax.Array:
  """`attention` under a mask [B or 1, T, S], True where a key is seen."""
  _, length, heads, _ = q.shape
  groups = k.shape[2]
  # Queries of a group are rows of one matrix and every product has exactly
  # two leading batch axes: with more of them XLA's CPU code is 3 times slower.
  q = jnp.moveaxis(q, 1, 2).reshape(q.shape[0], groups, -1, q.shape[3])
  k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
  wide = accumulator(q.dtype)
  scores = jnp.einsum("bgtk,bgsk->bgts", q, k, preferred_element_type=wide)
  scores = scores * (q.shape[-1] ** -0.5)
  visible = jnp.tile(visible, (1, heads // groups, 1))[:, None]
  scores = jnp.where(visible, scores, jnp.finfo(wide).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("bgts,bgsk->bgtk", weights, v)
  out = out.reshape(out.shape[0], heads, length, -1)
  return jnp.moveaxis(out, 2, 1)


def _windowed(
  q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, window: int
) -> jax.Array:
  """`attention` where each block of `window` queries meets its neighbours."""
  rows, length = q.shape[:2]
  count = -(-length // window)

  def blocks(x):  # [B, T, ...] -> [B, count, window, ...]
    pad = ((0, 0), (0, count * window - length), (0, 0), (0, 0))
    return jnp.pad(x, pad).reshape(rows, count, window, *x.shape[2:])

  def reach(x):  # the block before, itself and, unless causal, the one after
    x = blocks(x)
    around = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    near = [around[:, i : i + count] for i in range(2 if causal else 3)]
    return jnp.concatenate(near, 2).reshape(rows * count, -1, *x.shape[3:])

  start = window * jnp.arange(count)[:, None]
  query = start + jnp.arange(window)[None]
  key = start + jnp.arange(-window, window if causal else 2 * window)[None]
  visible = jax.vmap(lambda i, j: _visible(i, j, causal, window))(query, key)
  visible &= ((key >= 0) & (key < length))[:, None]
  merged = blocks(q).reshape(rows * count, window, *q.shape[2:])
  out = _attend(merged, reach(k), reach(v), jnp.tile(visible, (rows, 1, 1)))
  return out.reshape(rows, count * window, *out.shape[2:])[:, :length]


def _visible(
  query: jax.Array, key: jax.Array, causal: bool, window: int | None
) -> jax.Array:
  """Positions [T] of queries and [S] of keys -> bool [T, S]."""
  distance = query[:, None] - key[None]
  visible = jnp.ones(distance.shape, bool)
  if causal:
    visible &= distance >= 0
  if window is not None:
    visible &= jnp.abs(distance) < window
  return visible


class ShortConv(nn.Module):
  """x + depthwise convolution over time, zero at the start of training.

  Written as shifted sums: a grouped convolution is slow on CPUs.

  Attributes:
    width: taps. Causal: positions i-width+1..i; otherwise centred on i.
    causal: whether later positions stay hidden.
    dtype: compute dtype.
    param_dtype: dtype of `kernel`.
  """

  width: int = 4
  causal: bool = True
  dtype: jnp.dtype | str = jnp.float32
  param_dtype: jnp.dtype | str = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x [B, T, D] -> [B, T, D]."""
    kernel = self.param(
      "kernel",
      nn.initializers.zeros,
      (self.width, x.shape[-1]),
      self.param_dtype,
    ).astype(self.dtype)
    x = x.astype(self.dtype)
    before = self.width - 1 if self.causal else self.width // 2
    after = self.width - 1 - before
    padded = jnp.pad(x, ((0, 0), (before, after), (0, 0)))
    taps = (
      padded[:, j : j + x.shape[1]] * kernel[j][None, None]
      for j in range(self.width)
    )
    return x + sum(taps, start=jnp.zeros((), x.dtype))


def time_embedding(t: jax.Array, width: int, scale: float = 1.0) -> jax.Array:
  """cos and sin of scale * t * exp(-ln(1e4) k / half), k < half = width/2.

  With scale 1 the derivative in t stays of order one, which losses that
  differentiate through time need (flow maps); DDPM code uses 1000.

  Args:
    t: [B] model time.
    width: even size of the embedding.
    scale: multiplies t.

  Returns:
    [B, width] float32.
  """
  half = width // 2
  frequency = jnp.exp(-math.log(1e4) * jnp.arange(half) / half)
  angle = scale * t.astype(jnp.float32)[:, None] * frequency[None]
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def remat(module: type[nn.Module], policy: str) -> type[nn.Module]:
  """Wraps a block for `nn.scan` by the name of a rematerialisation policy.

  Args:
    module: the block.
    policy: "none" keeps all activations, "full" recomputes the block in the
      backward pass, "dots" keeps matrix products without batch dimensions.

  Raises:
    ValueError: for any other name.
  """
  if policy not in REMAT_POLICIES:
    raise ValueError(
      f"remat={policy!r}: choose one of {', '.join(REMAT_POLICIES)}"
    )
  if policy == "none":
    return module
  keep = None
  if policy == "dots":
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return nn.remat(module, policy=keep, prevent_cse=False)
