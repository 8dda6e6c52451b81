"""U-ViT, a transformer with the long skips of a U-Net (arXiv:2209.12152).

Times and the class are tokens beside the patches. Two times enter as tokens of
s and of t - s.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.jvp_attention import jvp_attention
from giantsteps.kernels_pallas.precision import accumulator
from giantsteps.models import dit, layers, partitioning


@dataclasses.dataclass(frozen=True)
class Config:
  """The network, written to JSON; the default is for 8x8 digits.

  Attributes:
    patch: side of a square patch; divides both sides of the image.
    width, heads: hidden size, attention heads.
    depth: blocks, odd: as many before the middle one as after it.
    expand: hidden size of the MLP of a block / width.
    qk_norm: RMSNorm of queries and keys, which the paper has not; for losses
      that differentiate in time.
    num_classes, two_times, remat, dtype, param_dtype: as in `mlp.Config`.
    time_scale: multiplies times in their tokens; 1 keeps d/dt of order 1, the
      paper has 999.
  """

  patch: int = 2
  width: int = 96
  depth: int = 5
  heads: int = 4
  expand: int = 4
  qk_norm: bool = False
  num_classes: int = 0
  two_times: bool = False
  time_scale: float = 1.0
  remat: str = "none"
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    if self.heads < 1 or self.width % self.heads:
      raise ValueError(
        f"width={self.width}: not a multiple of heads={self.heads}"
      )
    if self.width % 2:
      raise ValueError(f"width={self.width}: half of a time token are sines")
    if self.depth < 3 or self.depth % 2 == 0:
      raise ValueError(f"depth={self.depth}: must be odd, 3 or more")
    if self.patch < 1:
      raise ValueError(f"patch={self.patch}: must be 1 or more")


CIFAR10 = Config(patch=2, width=512, depth=13, heads=8)  # 44M parameters


class Uvit(nn.Module):
  """Predicts an image like x from (x, t) or (x, s, t), and a class.

  Differs from the paper: the layer from tokens to patches starts at zero, so
  that a velocity is 0 and a flow map the identity.
  """

  config: Config

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    s: jax.Array | None = None,
    labels: jax.Array | None = None,
  ) -> jax.Array:
    """Runs the network; arguments, result and errors as of `dit.Dit`.

    Positions are parameters: the network is for images of the size that it
    was initialised with.
    """
    cfg = self.config
    dtypes: Any = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    dense = functools.partial(nn.Dense, **dtypes)
    if x.ndim != 4 or x.shape[1] % cfg.patch or x.shape[2] % cfg.patch:
      raise ValueError(
        f"x {x.shape}: not [B, H, W, C] with sides in patches of {cfg.patch}"
      )
    rows, columns = x.shape[1] // cfg.patch, x.shape[2] // cfg.patch
    patches = dit.patchify(x, cfg.patch)  # [B, T, P]
    extra = self._conditions(t, s, labels)
    h = jnp.stack([token.astype(cfg.dtype) for token in extra], 1)
    h = jnp.concatenate([h, dense(cfg.width, name="in")(patches)], 1)
    init = nn.initializers.truncated_normal(0.02)
    shape, dtype = h.shape[1:], jnp.dtype(cfg.param_dtype)
    h = h + self.param("positions", init, shape, dtype).astype(h.dtype)[None]
    half = cfg.depth // 2
    h, skips = _Stack(cfg, half, name="encoder")(h, None)
    h, _ = _Stack(cfg, 1, name="middle")(h, None)
    h, _ = _Stack(cfg, half, name="decoder")(h, skips[::-1])
    h = nn.LayerNorm(epsilon=1e-5, name="out_norm", **dtypes)(h)
    zero = nn.initializers.zeros
    out = dense(patches.shape[-1], kernel_init=zero, name="out")(h)
    image = dit.unpatchify(out[:, len(extra) :], rows, columns, cfg.patch)
    image = nn.Conv(x.shape[-1], (3, 3), name="smooth", **dtypes)(image)
    return image.astype(accumulator(x.dtype))

  def _conditions(self, t, s, labels) -> list[jax.Array]:
    """The tokens before the patches, each [B, D]."""
    cfg = self.config
    if s is not None and not cfg.two_times:
      raise ValueError("a second time s needs a config with two_times=True")
    if labels is not None and not cfg.num_classes:
      raise ValueError("labels need a config with num_classes > 0")
    waves = functools.partial(
      layers.time_embedding, width=cfg.width, scale=cfg.time_scale
    )
    at = t if s is None else s
    tokens = [waves(at)]
    if cfg.two_times:
      tokens.append(waves(t - at))
    if cfg.num_classes:
      if labels is None:
        labels = jnp.full(t.shape, cfg.num_classes, jnp.int32)
      table = nn.Embed(
        cfg.num_classes + 1,
        cfg.width,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        name="label",
      )
      tokens.append(table(labels))
    return tokens


class _Stack(nn.Module):
  """`length` equal blocks, their parameters below the key "layers"."""

  config: Config
  length: int

  @nn.compact
  def __call__(self, h, skips):
    """h [B, T, D], skips [length, B, T, D] or None -> (h, what every block
    returned, or None where they take skips)."""
    cfg = self.config
    stack = nn.scan(
      layers.remat(partitioning.gather_layer(_Block, "layers"), cfg.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.length,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stack(cfg, name="layers")(h, skips)


class _Block(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, h, skip):
    """h [B, T, D], skip the same or None, as nn.scan wants it."""
    cfg = self.config
    dtypes: Any = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    dense = functools.partial(nn.Dense, **dtypes)
    norm = functools.partial(nn.LayerNorm, epsilon=1e-5, **dtypes)
    h = partitioning.constrain_rows(h)
    if skip is not None:
      h = dense(cfg.width, name="skip")(jnp.concatenate([h, skip], -1))
    y = norm(name="attention_norm")(h)
    y = dense(3 * cfg.width, use_bias=False, name="qkv")(y)
    q, k, v = jnp.split(y.reshape(*h.shape[:2], 3 * cfg.heads, -1), 3, axis=2)
    if cfg.qk_norm:
      q = layers.RMSNorm(dtype=cfg.dtype, name="q_norm")(q)
      k = layers.RMSNorm(dtype=cfg.dtype, name="k_norm")(k)
    y = jvp_attention(q, k, v).reshape(h.shape)
    h = h + dense(cfg.width, name="attention_out")(y)
    y = norm(name="mlp_norm")(h)
    y = nn.gelu(dense(cfg.expand * cfg.width, name="up")(y))
    h = h + dense(cfg.width, name="down")(y)
    return h, h if skip is None else None
