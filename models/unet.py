"""The U-Net of EDM2 (arXiv:2312.02696, figure 21), for images.

Magnitudes are preserved everywhere (`magnitude_preserving`): no norms with
parameters, no biases. Call `project` on the parameters after every update.
Two times enter as s and t - s, as in the flow maps of arXiv:2505.18825, whose
networks are `CIFAR10` and `CELEBA64`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.jvp_attention import jvp_attention
from giantsteps.kernels_pallas.precision import accumulator
from giantsteps.models import layers, partitioning
from giantsteps.models import magnitude_preserving as mp

project = mp.project

_RESIDUAL = 0.3  # share of a residual branch, and of attention
_CLIP = 256.0  # activations leave a block within +-_CLIP


@dataclasses.dataclass(frozen=True)
class Config:
  """The network, written to JSON; the default is for 8x8 digits.

  Attributes:
    channels: of the first level for a multiplier of 1.
    multipliers: channels of each level / `channels`; from level to level the
      sides of the image halve.
    blocks: residual blocks per level on the way down; one more upwards.
    attention: heights of the image at which blocks attend. The first block
      at the bottom always does.
    head_dim: channels of an attention head.
    dropout: rate, inside residual branches. Active in calls that are given a
      random key named "dropout" (`rngs` of `apply`), and only there.
    num_classes, two_times, time_scale, remat, dtype, param_dtype:
      as in `mlp.Config`. Embeddings and weights are normalised in float32.
  """

  channels: int = 32
  multipliers: tuple[int, ...] = (1, 2)
  blocks: int = 1
  attention: tuple[int, ...] = (4,)
  head_dim: int = 64
  dropout: float = 0.0
  num_classes: int = 0
  two_times: bool = False
  time_scale: float = 1.0
  remat: str = "none"
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    sizes = (self.channels, self.blocks, self.head_dim, *self.multipliers)
    if min(sizes) < 1 or not self.multipliers:
      raise ValueError(
        f"channels={self.channels}, multipliers={self.multipliers}, "
        f"blocks={self.blocks}, head_dim={self.head_dim}: want one level or "
        "more and all of them positive"
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")
    if self.channels * self.multipliers[0] % 2:
      raise ValueError(
        f"channels={self.channels} times multipliers[0]={self.multipliers[0]}:"
        " must be even, half of the time embedding are sines"
      )
    if self.channels * self.multipliers[-1] % self.head_dim:
      raise ValueError(
        f"head_dim={self.head_dim}: does not divide the "
        f"{self.channels * self.multipliers[-1]} channels of the last level"
      )


CIFAR10 = Config(  # 54.7M parameters
  channels=128,
  multipliers=(2, 2, 2),
  blocks=4,
  attention=(16,),
  dropout=0.13,
  two_times=True,
)
CELEBA64 = Config(  # 124.3M parameters
  channels=128,
  multipliers=(1, 2, 3, 4),
  blocks=3,
  attention=(16, 8),
  two_times=True,
  dtype="bfloat16",
)


class Unet(nn.Module):
  """Predicts an image like x from (x, t) or (x, s, t), and a class.

  The output's gain starts at zero: a velocity is 0 and a flow map the
  identity.
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
      x: [B, H, W, C] float32; H and W can be halved once per further level.
      t: [B] float32 in [0, 1], the model time of x, or, where s is given, the
        time to go to.
      s: [B] float32, the model time of x; None is s = t. Needs two_times.
      labels: [B] int32 in [0, num_classes], the last of them "none"; None is
        "none" for all rows.

    Returns:
      [B, H, W, C] float32.

    Raises:
      ValueError: if the sides cannot be halved that often, if the channels of
        a level that attends are no whole heads, or if the config has no place
        for s or labels.
    """
    cfg = self.config
    dtypes: Any = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    factor = 2 ** (len(cfg.multipliers) - 1)
    if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
      raise ValueError(
        f"x {x.shape}: not [B, H, W, C] with sides in multiples of {factor}"
      )
    emb = _Embedding(cfg, name="embedding")(t, s, labels)
    h = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
    widths = [cfg.channels * factor for factor in cfg.multipliers]
    h = mp.Linear(widths[0], side=3, name="in", **dtypes)(h)
    skips = [h]
    for level, width in enumerate(widths):
      if level:
        h, _ = _one(cfg, f"down_{level}", h, emb, change="halve")
        skips.append(h)
      blank = [None] * cfg.blocks
      h, new = _several(cfg, f"encoder_{level}", h, emb, blank, width)
      skips.extend(new)
    h, _ = _one(cfg, "bottom_0", h, emb, encoder=False, attend=True)
    h, _ = _one(cfg, "bottom_1", h, emb, encoder=False)
    for level, width in reversed(list(enumerate(widths))):
      if level < len(widths) - 1:
        h, _ = _one(cfg, f"up_{level}", h, emb, encoder=False, change="double")
      own = [skips.pop() for _ in range(cfg.blocks + 1)]
      h, _ = _several(cfg, f"decoder_{level}", h, emb, own, width)
    gain = self.param(
      "out_gain", nn.initializers.zeros, (), jnp.dtype(cfg.param_dtype)
    )
    out = mp.Linear(x.shape[-1], side=3, name="out", **dtypes)(h, gain)
    return out.astype(accumulator(x.dtype))


def _one(
  cfg: Config, name: str, h: jax.Array, emb: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array | None]:
  """A block that keeps the number of channels."""
  block = layers.remat(_Block, cfg.remat, scanned=False)
  return block(cfg, h.shape[-1], name=name, **options)(h, emb)


def _several(
  cfg: Config,
  name: str,
  h: jax.Array,
  emb: jax.Array,
  skips: Sequence[jax.Array | None],
  width: int,
) -> tuple[jax.Array, list[jax.Array]]:
  """The blocks of a level; equal neighbours are one stack, compiled once.

  Args:
    cfg: the network.
    name: of the level; a stack, or a block alone, is name_(its first block).
    h: [B, H, W, D].
    emb: [B, E].
    skips: one per block, what the decoder is to take in; None in the encoder.
    width: channels that each block returns.

  Returns:
    [B, H, W, width], and in the encoder that of every block.
  """
  into = [h.shape[-1], *[width] * (len(skips) - 1)]
  sizes = [None if skip is None else skip.shape[-1] for skip in skips]
  kinds = list(zip(into, sizes, strict=True))
  options: Any = {"encoder": skips[0] is None}
  options["attend"] = h.shape[1] in cfg.attention
  outs = []
  for _, run in itertools.groupby(range(len(skips)), kinds.__getitem__):
    first, *rest = run
    here = skips[first : first + 1 + len(rest)]
    if not rest:
      block = layers.remat(_Block, cfg.remat, scanned=False)
      block = block(cfg, width, name=f"{name}_{first}", **options)
      h, out = block(h, emb, here[0])
      outs.append(out)
      continue
    stack = _Stack(cfg, width, len(here), options, name=f"{name}_{first}")
    given = [skip for skip in here if skip is not None]
    given = jnp.stack(given) if given else None
    h, out = stack(h, emb, given)
    outs.extend([] if out is None else out)
  return h, outs


class _Stack(nn.Module):
  """Equal blocks, their parameters below the key "layers".

  Attributes:
    config, width: as of `_Block`, which also takes `options`.
    length: how many.
  """

  config: Config
  width: int
  length: int
  options: Any

  @nn.compact
  def __call__(self, h, emb, skips):
    """`_Block` on h, one of `skips` [length, ...] (or None) after the other."""
    stack = nn.scan(
      layers.remat(_Block, self.config.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
      length=self.length,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stack(self.config, self.width, name="layers", **self.options)(
      h, emb, skips
    )


class _Block(nn.Module):
  """A residual block.

  Attributes:
    config: of the network.
    width: channels that it returns.
    encoder: normalises its input, and narrows or widens it first; the
      decoder's blocks do so last.
    attend: whether attention follows.
    change: "halve" or "double" the sides of the image.
  """

  config: Config
  width: int
  encoder: bool = True
  attend: bool = False
  change: str = ""

  @nn.compact
  def __call__(
    self, x: jax.Array, emb: jax.Array, skip: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    """x [B, H, W, D], emb [B, E] -> ([B, H', W', width], the same as what a
    scan collects in the encoder), as nn.scan wants it."""
    cfg = self.config
    dtypes: Any = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    linear = functools.partial(mp.Linear, self.width, **dtypes)
    x = partitioning.constrain_rows(x)
    if skip is not None:
      x = mp.concatenate(x, skip)
    x = _resample(x, self.change)
    shortcut = x.shape[-1] != self.width
    if self.encoder:
      x = linear(name="shortcut")(x) if shortcut else x
      x = mp.unit(x, -1)
    y = linear(side=3, name="conv_0")(mp.silu(x))
    y = mp.silu(y * self._scale(emb).astype(y.dtype)[:, None, None])
    if cfg.dropout:
      y = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))(y)
    y = linear(side=3, name="conv_1")(y)
    if shortcut and not self.encoder:
      x = linear(name="shortcut")(x)
    x = mp.add(x, y, _RESIDUAL)
    if self.attend:
      y = linear(name="attention_out")(self._attention(x))
      x = mp.add(x, y, _RESIDUAL)
    x = jnp.clip(x, -_CLIP, _CLIP)
    return x, x if self.encoder else None

  def _scale(self, emb: jax.Array) -> jax.Array:
    """1 + gain * linear(emb), [B, width]; 1 at the start."""
    param_dtype = jnp.dtype(self.config.param_dtype)
    gain = self.param("emb_gain", nn.initializers.zeros, (), param_dtype)
    linear = mp.Linear(
      self.width, dtype=emb.dtype, param_dtype=param_dtype, name="emb"
    )
    return 1 + linear(emb, gain)

  def _attention(self, x: jax.Array) -> jax.Array:
    """Attention by cosines: scores are sqrt(K) cos(q, k)."""
    cfg, (rows, height, width, size) = self.config, x.shape
    if size % cfg.head_dim:
      raise ValueError(
        f"attention at height {height}: {size} channels are no multiple of "
        f"head_dim={cfg.head_dim}"
      )
    y = mp.Linear(
      3 * size, dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="qkv"
    )(x)
    y = mp.unit(y.reshape(rows, height * width, -1, cfg.head_dim), -1)
    q, k, v = jnp.split(y, 3, axis=2)
    return jvp_attention(q, k, v).reshape(x.shape)


def _resample(x: jax.Array, change: str) -> jax.Array:
  """[B, H, W, D] with sides halved (means of 2x2) or doubled (repeated)."""
  rows, height, width, size = x.shape
  if change == "halve":
    x = x.reshape(rows, height // 2, 2, width // 2, 2, size)
    return jnp.mean(x, (2, 4))
  if change == "double":
    x = jnp.repeat(x, 2, axis=1)
    return jnp.repeat(x, 2, axis=2)
  return x


class _Embedding(nn.Module):
  """One vector from one or two times and a class, float32 or wider."""

  config: Config

  @nn.compact
  def __call__(
    self, t: jax.Array, s: jax.Array | None, labels: jax.Array | None
  ) -> jax.Array:
    """t [B], s [B] or None, labels [B] or None -> [B, widest level]."""
    cfg = self.config
    if s is not None and not cfg.two_times:
      raise ValueError("a second time s needs a config with two_times=True")
    if labels is not None and not cfg.num_classes:
      raise ValueError("labels need a config with num_classes > 0")
    linear = functools.partial(
      mp.Linear,
      cfg.channels * max(cfg.multipliers),
      dtype=accumulator(cfg.dtype),
      param_dtype=cfg.param_dtype,
    )
    waves = functools.partial(
      mp.time_embedding,
      width=cfg.channels * cfg.multipliers[0],
      scale=cfg.time_scale,
    )
    at = t if s is None else s
    emb = linear(name="time")(waves(at))
    if cfg.two_times:
      emb = mp.add(emb, linear(name="gap")(waves(t - at)))
    if cfg.num_classes:
      count = cfg.num_classes + 1
      if labels is None:
        labels = jnp.full(t.shape, cfg.num_classes, jnp.int32)
      one_hot = math.sqrt(count) * jax.nn.one_hot(labels, count)
      emb = mp.add(emb, linear(name="label")(one_hot))
    return mp.silu(emb)
