"""A residual MLP denoiser with adaLN-zero conditioning, for data without a
grid.

The conditioning (one or two times, classes) is the one of the diffusion
transformer (arXiv:2212.09748) and shared with `dit`.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.precision import accumulator
from giantsteps.models import layers

SINUSOIDS = 128  # width of the time embedding before its MLP


@dataclasses.dataclass(frozen=True)
class Config:
  """The network, written to JSON.

  Attributes:
    width, depth: hidden size, number of residual blocks.
    expand: hidden size of a block / width.
    num_classes: 0 ignores labels; otherwise label num_classes is "none".
    two_times: the network takes (s, t), as flow maps need, and not t alone.
    time_scale: multiplies times in their embedding; 1 keeps d/dt of order 1.
    remat: none, full or dots (`layers.remat`).
    dtype, param_dtype: of the computation and of the parameters.
  """

  width: int = 256
  depth: int = 4
  expand: int = 2
  num_classes: int = 0
  two_times: bool = False
  time_scale: float = 1.0
  remat: str = "none"
  dtype: str = "float32"
  param_dtype: str = "float32"


class Mlp(nn.Module):
  """Predicts an array like x from (x, t) or (x, s, t), and a class.

  The output layer starts at zero: a velocity is 0 and a flow map the identity.
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
      x: [B, ...] float32; all trailing axes are one vector.
      t: [B] float32 in [0, 1], the model time of x, or, where s is given, the
        time to go to.
      s: [B] float32, the model time of x; None is s = t. Needs two_times.
      labels: [B] int32 in [0, num_classes], the last of them "none"; None is
        "none" for all rows.

    Returns:
      [B, ...] float32.

    Raises:
      ValueError: if the config has no place for s or labels.
    """
    cfg = self.config
    dtypes: Any = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    flat = x.reshape(x.shape[0], -1)
    h = nn.Dense(cfg.width, name="in", **dtypes)(flat)
    c = Conditioning(
      cfg.width,
      num_classes=cfg.num_classes,
      two_times=cfg.two_times,
      time_scale=cfg.time_scale,
      name="conditioning",
      **dtypes,
    )(t, s, labels)
    stack = nn.scan(
      layers.remat(_Block, cfg.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
      length=cfg.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    h, _ = stack(cfg, name="layers")(h, c)
    shift, scale = modulation(2, h.shape[-1], dtypes, "out_modulation")(c)
    zero = nn.initializers.zeros
    out = nn.Dense(flat.shape[-1], kernel_init=zero, name="out", **dtypes)(
      modulate(h, shift, scale)
    )
    return out.astype(accumulator(x.dtype)).reshape(x.shape)


class _Block(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, h, c):
    """h [B, D], c [B, D] -> (h, None), as nn.scan wants it."""
    cfg = self.config
    dtypes: Any = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    shift, scale, gate = modulation(3, cfg.width, dtypes, "modulation")(c)
    y = modulate(h, shift, scale)
    y = nn.Dense(cfg.expand * cfg.width, name="up", **dtypes)(y)
    y = nn.Dense(cfg.width, name="down", **dtypes)(nn.silu(y))
    return h + gate * y, None


class Conditioning(nn.Module):
  """One vector from one or two times and a class.

  The second time enters by an embedding of t - s that is exactly 0 at t = s:
  on the diagonal a network of two times is the network of one time with the
  same parameters, so a flow map can start from a trained velocity.

  Attributes: as in `Config`.
  """

  width: int
  num_classes: int = 0
  two_times: bool = False
  time_scale: float = 1.0
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(
    self, t: jax.Array, s: jax.Array | None, labels: jax.Array | None
  ) -> jax.Array:
    """t [B], s [B] or None, labels [B] or None -> [B, width] in dtype."""
    if s is not None and not self.two_times:
      raise ValueError("a second time s needs a config with two_times=True")
    if labels is not None and not self.num_classes:
      raise ValueError("labels need a config with num_classes > 0")
    dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dense = functools.partial(nn.Dense, self.width, **dtypes)
    embed = functools.partial(
      layers.time_embedding, width=SINUSOIDS, scale=self.time_scale
    )
    at = t if s is None else s
    c = dense(name="time_out")(nn.silu(dense(name="time_in")(embed(at))))
    if self.two_times:
      # No biases and silu(0) = 0: nothing is added at t = s.
      gap = embed(t - at) - embed(jnp.zeros_like(t))
      gap = nn.silu(dense(use_bias=False, name="gap_in")(gap))
      c = c + dense(use_bias=False, name="gap_out")(gap)
    if self.num_classes:
      if labels is None:
        labels = jnp.full(t.shape, self.num_classes, jnp.int32)
      table = nn.Embed(self.num_classes + 1, self.width, name="label", **dtypes)
      c = c + table(labels)
    return c


def modulation(parts: int, width: int, dtypes: dict[str, Any], name: str):
  """The map c [B, D] -> `parts` arrays [B, width], zero at the start."""
  dense = nn.Dense(
    parts * width, kernel_init=nn.initializers.zeros, name=name, **dtypes
  )
  return lambda c: jnp.split(dense(nn.silu(c)), parts, axis=-1)


def modulate(h: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """layer_norm(h) * (1 + scale) + shift; all of one rank, [B, ..., D]."""
  wide = h.astype(accumulator(h.dtype))
  wide = jax.nn.standardize(wide, axis=-1, epsilon=1e-6)
  return wide.astype(h.dtype) * (1 + scale) + shift
