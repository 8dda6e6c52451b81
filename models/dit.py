"""DiT, the diffusion transformer with adaLN-zero (arXiv:2212.09748).

One or two times (flow maps condition on s and t - s) and classes enter by
`mlp.Conditioning`.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.kernels_pallas.jvp_attention import jvp_attention
from giantsteps.kernels_pallas.precision import accumulator
from giantsteps.models import layers, mlp, partitioning


@dataclasses.dataclass(frozen=True)
class Config:
  """The network, written to JSON; DiT-B/4 is (4, 768, 12, 12).

  Attributes:
    patch: side of a square patch; divides both sides of the image.
    width, depth, heads: hidden size, blocks, attention heads.
    expand: hidden size of the MLP of a block / width.
    positions: "sincos" is fixed (width a multiple of 4), "learned" a
      parameter.
    qk_norm: RMSNorm of queries and keys; for losses that differentiate in
      time.
    num_classes, two_times, time_scale, remat, dtype, param_dtype:
      as in `mlp.Config`.
  """

  patch: int = 2
  width: int = 128
  depth: int = 4
  heads: int = 4
  expand: int = 4
  positions: Literal["sincos", "learned"] = "sincos"
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
    if self.positions not in ("sincos", "learned"):
      raise ValueError(
        f"positions={self.positions!r}: choose sincos or learned"
      )
    if self.positions == "sincos" and self.width % 4:
      raise ValueError(f"width={self.width}: sincos needs a multiple of 4")
    if self.patch < 1:
      raise ValueError(f"patch={self.patch}: must be 1 or more")


class Dit(nn.Module):
  """Predicts an image like x from (x, t) or (x, s, t), and a class.

  The output layer and all gates start at zero: the output is exactly 0 and
  every block the identity.
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
    """Runs the network.

    Args:
      x: [B, H, W, C] float32, H and W multiples of `patch`.
      t: [B] float32 in [0, 1], the model time of x, or, where s is given, the
        time to go to.
      s: [B] float32, the model time of x; None is s = t. Needs two_times.
      labels: [B] int32 in [0, num_classes], the last of them "none"; None is
        "none" for all rows.

    Returns:
      [B, H, W, C] float32.

    Raises:
      ValueError: if the sides are no multiples of `patch`, or the config has
        no place for s or labels.
    """
    cfg = self.config
    dtypes: Any = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    if x.ndim != 4 or x.shape[1] % cfg.patch or x.shape[2] % cfg.patch:
      raise ValueError(
        f"x {x.shape}: not [B, H, W, C] with sides in patches of {cfg.patch}"
      )
    rows, columns = x.shape[1] // cfg.patch, x.shape[2] // cfg.patch
    patches = patchify(x, cfg.patch)  # [B, T, P]
    h = nn.Dense(cfg.width, name="in", **dtypes)(patches)
    if cfg.positions == "learned":
      init = nn.initializers.normal(0.02)
      shape = (rows * columns, cfg.width)
      place = self.param("positions", init, shape, jnp.dtype(cfg.param_dtype))
    else:
      place = jnp.asarray(sincos_positions(rows, columns, cfg.width))
    h = h + place.astype(h.dtype)[None]
    c = mlp.Conditioning(
      cfg.width,
      num_classes=cfg.num_classes,
      two_times=cfg.two_times,
      time_scale=cfg.time_scale,
      name="conditioning",
      **dtypes,
    )(t, s, labels)[:, None]  # [B, 1, D]
    stack = nn.scan(
      layers.remat(partitioning.gather_layer(_Block, "layers"), cfg.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
      length=cfg.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    h, _ = stack(cfg, name="layers")(h, c)
    shift, scale = mlp.modulation(2, cfg.width, dtypes, "out_modulation")(c)
    zero = nn.initializers.zeros
    out = nn.Dense(patches.shape[-1], kernel_init=zero, name="out", **dtypes)(
      mlp.modulate(h, shift, scale)
    )
    out = out.astype(accumulator(x.dtype))
    return unpatchify(out, rows, columns, cfg.patch)


class _Block(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, h, c):
    """h [B, T, D], c [B, 1, D] -> (h, None), as nn.scan wants it."""
    cfg = self.config
    dtypes: Any = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    h = partitioning.constrain_rows(h)
    parts = mlp.modulation(6, cfg.width, dtypes, "modulation")(c)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
    y = nn.Dense(3 * cfg.width, name="qkv", **dtypes)(
      mlp.modulate(h, shift, scale)
    )
    q, k, v = jnp.split(y.reshape(*h.shape[:2], 3 * cfg.heads, -1), 3, axis=2)
    if cfg.qk_norm:
      q = layers.RMSNorm(dtype=cfg.dtype, name="q_norm")(q)
      k = layers.RMSNorm(dtype=cfg.dtype, name="k_norm")(k)
    y = jvp_attention(q, k, v).reshape(h.shape)
    h = h + gate * nn.Dense(cfg.width, name="attention_out", **dtypes)(y)
    y = mlp.modulate(h, mlp_shift, mlp_scale)
    y = nn.Dense(cfg.expand * cfg.width, name="up", **dtypes)(y)
    y = nn.Dense(cfg.width, name="down", **dtypes)(nn.gelu(y))
    return h + mlp_gate * y, None


def patchify(x: jax.Array, patch: int) -> jax.Array:
  """[B, H, W, C] -> [B, T, patch * patch * C], T = H W / patch^2, by rows."""
  b, height, width, c = x.shape
  x = x.reshape(b, height // patch, patch, width // patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(x: jax.Array, rows: int, columns: int, patch: int) -> jax.Array:
  """The inverse of `patchify`; rows * columns patches."""
  x = x.reshape(x.shape[0], rows, columns, patch, patch, -1)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(x.shape[0], rows * patch, columns * patch, -1)


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
  """sin and cos of row and column at width/4 frequencies 1e4^(-4k/width).

  Returns:
    [rows * columns, width] float32, by rows.
  """
  frequency = 1e4 ** (-4 * np.arange(width // 4) / width)
  row, column = np.divmod(np.arange(rows * columns), columns)
  angles = [index[:, None] * frequency for index in (row, column)]
  parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
  return np.concatenate(parts, -1).astype(np.float32)
