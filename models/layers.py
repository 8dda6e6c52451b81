"""Layers that the networks share: norms, embeddings, attention, short
convolutions.

Every function works in the dtype of its input except where a comment says
float32: norms, rotations and softmax are always accumulated there.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from giantsteps.kernels_pallas import block_attention as blocks
from giantsteps.kernels_pallas.precision import accumulator
from giantsteps.kernels_pallas.window_attention import (
  Mask,
  streams,
  window_attention,
)
from giantsteps.models import partitioning

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
  mask: Mask | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Softmax attention with scale 1/sqrt(K); softmax in float32.

  Args:
    q: [B, T, H, K].
    k: [B, S, G, K], H a multiple of G (grouped queries).
    v: [B, S, G, K].
    causal: query i sees keys j <= i.
    window: query i sees keys |i - j| < window; None is unlimited.
    mask, implementation: as of `window_attention`.

  Returns:
    [B, T, H, K] in q.dtype, in 4 B T S H K FLOPs; with a window below T / 3
    only the keys within reach count, S = 2 or 3 windows. Scores [B, H, T, S]
    are formed whole up to 256 MB; with a window or a mask more of them are
    streamed.
    Long bfloat16 rows take a kernel in programs for TPUs, which has no forward
    mode (`window_attention.has_kernel`).
  """
  options = {"causal": causal, "window": window, "mask": mask}
  attend = functools.partial(window_attention, **options)
  if not streams(q, k, **options):
    return attend(q, k, v, implementation=implementation)

  def own(tree):
    mesh = partitioning.automatic_mesh()
    chosen = implementation
    if mesh is not None and mesh.size > 1:
      chosen = "xla"  # the partitioner is to split the rows and knows no kernel
    k, v, q = (jnp.moveaxis(x, 1, 2) for x in tree)
    return jnp.moveaxis(attend(q, k, v, implementation=chosen), 1, 2)

  # k is first: the heads of a group are not to be parted
  tree = [jnp.moveaxis(x, 1, 2) for x in (k, v, q)]
  out = partitioning.by_rows_and_heads(own, check_vma=False)(tree)
  return jnp.moveaxis(out, 1, 2)


def block_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  limits: jax.Array,
  layer: jax.Array | None = None,
) -> jax.Array:
  """`kernels_pallas.block_attention`; on a mesh each device has its rows and
  heads, if the axis "model" divides those of the keys.

  Args:
    q: [B, T, H, K].
    k, v: [B, S, G, K], or with `layer`, [] int, [L, B, S, G, K].
    limits: [B, T] int32; query t sees the keys below limits[:, t].
  """
  operands = q, k, v, limits, layer
  mesh = partitioning.automatic_mesh()
  parts = 1 if mesh is None else mesh.shape.get("model", 1)
  if mesh is None or mesh.size == 1 or k.shape[-2] % parts:
    return blocks.block_attention(*operands)
  rows = partitioning.row_axes(mesh, q.shape[0])
  heads = P(rows, None, partitioning.model_axis(mesh, k.shape[-2]))
  cache = heads if layer is None else P(None, *heads)
  return jax.shard_map(
    blocks.block_attention,
    in_specs=(heads, cache, cache, P(rows), P()),
    out_specs=heads,
    check_vma=False,  # the kernel does not say along what its results differ
  )(*operands)


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
    [B, width] float32, or t.dtype where that is wider.
  """
  half, wide = width // 2, accumulator(t.dtype)
  frequency = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=wide) / half)
  angle = scale * t.astype(wide)[:, None] * frequency[None]
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def remat(
  module: type[nn.Module], policy: str, *, scanned: bool = True
) -> type[nn.Module]:
  """Wraps a block by the name of a rematerialisation policy.

  Args:
    module: the block.
    policy: "none" keeps all activations, "full" recomputes the block in the
      backward pass, "dots" keeps matrix products without batch dimensions.
    scanned: whether the block is the body of `nn.scan`; elsewhere the compiler
      must be kept from finding the first results again.

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
  return nn.remat(module, policy=keep, prevent_cse=not scanned)
