"""LaCT for video, block by block: attention nearby, fast weights for the past.

"Test-Time Training Done Right" (arXiv:2505.23884), section 5, autoregressive
video diffusion. A video is a sequence of blocks of `block` tokens (some latent
frames). A noisy block is denoised given the clean blocks before it: the last
`cache` clean tokens by attention, all of them by fast weights, which every
clean block writes before they are read. In training one sequence holds it all
("teacher forcing"),

  [noisy 0] * r, then for i = 1, 2, ...: clean i - 1, [noisy i] * r,

with r noisy copies of each block; clean blocks see only themselves by
attention, noisy copies never see each other. Generation is the same function
with a kept `State`: `apply(x, ..., clean=(False,))` denoises,
`apply(x, ..., clean=(True,))` takes a finished block in.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.kernels_pallas import dispatch
from giantsteps.models import fast_heads, fast_weights, layers
from giantsteps.models.fast_weights import fast_weight_scan

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape and variant of a block; the paper's 1.3 B model has these values.

  Attributes:
    width: D.
    heads: attention heads.
    fast_heads: fast-weight heads, each of dimension d = width / fast_heads.
    expansion: h = int(expansion * d) hidden units of a fast-weight MLP.
    mlp_width: hidden size of the MLP.
    block: tokens C of one block of the video.
    cache: clean tokens that a noisy block attends to, the last ones.
    muon, momentum, weight_norm, newton_schulz_steps, ns_dtype: as in
      `fast_weight_scan`; the lengths of the rows are not detached.
    remat_write: recomputes a write in the backward pass.
    implementation: of the fast weights' kernels; None chooses by platform.
    rate: learning rate of a token before training.
    qk_norm: RMSNorm of q and k over the width, before the rotation.
    rope_theta: base of the rotary wavelengths.
    eps: of every norm.
    dtype: compute dtype; fast weights are float32 or wider all the same.
    param_dtype: dtype of the parameters.
  """

  width: int = 1536
  heads: int = 12
  fast_heads: int = 2
  expansion: float = 2.0
  mlp_width: int = 8960
  block: int = 4680
  cache: int = 4680
  muon: bool = False
  momentum: bool = False
  weight_norm: bool = True
  newton_schulz_steps: int = 5
  ns_dtype: str | None = None
  remat_write: bool = True
  implementation: str | None = None
  rate: float = 1e-3
  qk_norm: bool = True
  rope_theta: float = 10_000.0
  eps: float = 1e-6
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    sizes = ("width", "heads", "fast_heads", "mlp_width", "block")
    for name in (*sizes, "newton_schulz_steps", "rate", "rope_theta", "eps"):
      if getattr(self, name) <= 0:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0")
    if self.cache < 0:
      raise ValueError(f"cache={self.cache}: must be 0 or more")
    if self.width % (2 * self.heads) or self.width % self.fast_heads:
      raise ValueError(
        f"width={self.width}: must be a multiple of 2 heads={2 * self.heads} "
        f"and of fast_heads={self.fast_heads}"
      )
    if int(self.expansion * self.width / self.fast_heads) < 1:
      raise ValueError(f"expansion={self.expansion}: leaves no hidden unit")
    for name, choices in (
      ("ns_dtype", (None, *_DTYPES)),
      ("implementation", (None, *dispatch.IMPLEMENTATIONS)),
      ("dtype", _DTYPES),
      ("param_dtype", _DTYPES),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f"{name}={getattr(self, name)!r}: must be one of "
          + ", ".join(map(str, choices))
        )


class State(NamedTuple):
  """What a layer keeps of the clean blocks.

  Attributes:
    key: [B, S, H, K], rotated, of the last S <= cache clean tokens: S grows
      with the first blocks and then stays.
    value: [B, S, H, K].
    fast: the fast weights after the last clean block.
  """

  key: jax.Array
  value: jax.Array
  fast: fast_weights.State


def teacher_forcing(repeats: int, num_chunks: int) -> tuple[bool, ...]:
  """Which blocks of a training sequence are clean.

  Args:
    repeats: noisy copies r of each block.
    num_chunks: blocks of the video; the last one has no clean copy.

  Returns:
    (num_chunks - 1)(r + 1) + r entries.
  """
  noisy = (False,) * repeats
  return noisy + ((True, *noisy)) * (num_chunks - 1)


def video_order(
  block: int, repeats: int, num_chunks: int
) -> list[tuple[int, int, bool, bool]]:
  """The order of `fast_weight_scan` for a training sequence.

  The first noisy copies read the initial weights; then each clean block is
  written, and it and the noisy copies after it read.
  """
  return _order(block, teacher_forcing(repeats, num_chunks))


def positions(
  frames: int, rows: int, columns: int, clean: Sequence[bool]
) -> np.ndarray:
  """(frame, row, column) of the tokens of a training sequence.

  A noisy copy has the place of the clean block it is a copy of.

  Args:
    frames: latent frames of a block.
    rows, columns: tokens of a frame.
    clean: as `teacher_forcing` gives it.

  Returns:
    [len(clean) frames rows columns, 3] int64.
  """
  grid = np.indices((frames, rows, columns)).reshape(3, -1).T
  first = np.cumsum(clean) - np.asarray(clean)  # clean blocks before this one
  shift = first[:, None, None] * np.array([frames, 0, 0])
  return (grid + shift).reshape(-1, 3)


class VideoLayer(nn.Module):
  """Windowed attention plus gated fast weights on the same q, k, v.

  The gate is zero before training, so that a layer put into a trained video
  model starts as that model's attention.

  Attributes:
    config: shape and variant.
    clean: for each block of the sequence, whether it is clean.
  """

  config: Config
  clean: tuple[bool, ...]

  @nn.compact
  def __call__(
    self, x: jax.Array, positions: jax.Array, state: State | None = None
  ) -> tuple[jax.Array, State]:
    """Runs the layer.

    Args:
      x: [B, T, D] after a norm, T = len(clean) * block.
      positions: [T, 3] int: frame, row and column.
      state: continues after the clean blocks it saw; None is the beginning.

    Returns:
      [B, T, D] and the state after the last clean block.

    Raises:
      ValueError: for another T.
    """
    cfg = self.config
    if x.shape[1] != len(self.clean) * cfg.block:
      raise ValueError(
        f"x {x.shape}: expected {len(self.clean)} blocks of block={cfg.block}"
      )
    heads = (*x.shape[:2], cfg.heads, cfg.width // cfg.heads)
    q, k, v = (_dense(cfg, cfg.width, name)(x) for name in "qkv")
    if cfg.qk_norm:
      q, k = _norm(cfg, "q_norm")(q), _norm(cfg, "k_norm")(k)
    angle = _angles(positions, heads[3], cfg.rope_theta, q.dtype)
    q, k = (layers.rotate(y.reshape(heads), angle) for y in (q, k))
    v = v.reshape(heads)
    window = None if state is None else (state.key, state.value)
    near, window = self._attend(q, k, v, window)
    flat = lambda y: y.reshape(x.shape)
    far, fast = self._fast(
      x, flat(q), flat(k), flat(v), None if state is None else state.fast
    )
    zero = nn.initializers.zeros
    gate = _dense(cfg, 1, "fast_gate", use_bias=True, kernel_init=zero)(x)
    out = flat(near) + nn.silu(gate) * far
    return _dense(cfg, cfg.width, "o")(out), State(*window, fast)

  def _attend(self, q, k, v, window):
    """Block by block, so that no mask and no [T, T] scores are formed."""
    cfg, out = self.config, []
    past = (k[:, :0], v[:, :0]) if window is None else window
    for i, clean in enumerate(self.clean):
      own = slice(i * cfg.block, (i + 1) * cfg.block)
      both = tuple(
        jnp.concatenate([before, y[:, own]], 1)
        for before, y in zip(past, (k, v), strict=True)
      )
      seen = (k[:, own], v[:, own]) if clean else both
      out.append(layers.attention(q[:, own], *seen, causal=False))
      if clean:
        first = max(0, both[0].shape[1] - cfg.cache)
        past = (both[0][:, first:], both[1][:, first:])
    return jnp.concatenate(out, 1), past

  def _fast(self, x, q, k, v, state):
    """The fast-weight branch: q, k, v [B, T, D] -> [B, T, D], its state."""
    cfg = self.config
    batch, length, _ = x.shape
    d = cfg.width // cfg.fast_heads
    q, k, v = (fast_heads.split(y, cfg.fast_heads) for y in (q, k, v))
    # q and k are normalised after the rotation; no silu, as the trained
    # attention's q, k and v have none
    q, k = fast_heads.unit(q), fast_heads.unit(k)
    rate = self._per_head(x, "rate", 3)
    momentum = None
    if cfg.momentum:
      momentum = jax.nn.sigmoid(self._per_head(x, "momentum", 1))
      momentum = fast_heads.split(
        momentum.reshape(batch, length, -1), cfg.fast_heads
      )
    weights = fast_heads.initial_weights(
      self.param,
      cfg.fast_heads,
      d,
      int(cfg.expansion * d),
      1.0,
      cfg.param_dtype,
    )
    run = functools.partial(
      fast_weight_scan,
      order=_order(cfg.block, self.clean),
      muon=cfg.muon,
      weight_norm=cfg.weight_norm,
      newton_schulz="fixed",
      newton_schulz_steps=cfg.newton_schulz_steps,
      ns_dtype=cfg.ns_dtype,
      remat=cfg.remat_write,
      implementation=cfg.implementation,
    )
    out, state = fast_heads.on_each_device(run, cfg.fast_heads)(
      q,
      k,
      v,
      fast_heads.rates(rate, cfg.rate),
      fast_heads.for_rows(weights, batch),
      momentum=momentum,
      state=state,
    )
    out = _norm(cfg, "fast_norm")(fast_heads.join(out, cfg.fast_heads))
    return out.reshape(x.shape), state

  def _per_head(self, x: jax.Array, name: str, features: int) -> jax.Array:
    """Linear map of x [B, T, D] to [B, T, H, features]."""
    heads = self.config.fast_heads
    init = nn.initializers.normal(0.02)
    dense = _dense(
      self.config, heads * features, name, use_bias=True, kernel_init=init
    )
    return dense(x).reshape(*x.shape[:2], heads, features)


class Block(nn.Module):
  """x + layer(norm(x)), then x + mlp(norm(x)).

  Time and text enter as in the video model around it, outside of the block.

  Attributes:
    config: shape and variant.
    clean: for each block of the sequence, whether it is clean.
  """

  config: Config
  clean: tuple[bool, ...]

  @nn.compact
  def __call__(
    self, x: jax.Array, positions: jax.Array, state: State | None = None
  ) -> tuple[jax.Array, State]:
    """x [B, T, D] -> ([B, T, D], state); see `VideoLayer`."""
    cfg = self.config
    norm = lambda name: nn.LayerNorm(
      cfg.eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype, name=name
    )
    mixer = VideoLayer(cfg, self.clean, name="mixer")
    y, state = mixer(norm("mixer_norm")(x), positions, state)
    x = x + y
    y = nn.gelu(_dense(cfg, cfg.mlp_width, "up")(norm("mlp_norm")(x)))
    return x + _dense(cfg, cfg.width, "down")(y), state


def _order(block: int, clean: Sequence[bool]):
  """Every block is read, clean ones are written first; neighbouring noisy
  blocks are one entry."""
  order = []
  for i, written in enumerate(clean):
    start = i * block
    if order and not written and not order[-1][2]:
      start = order.pop()[0]
    order.append((start, (i + 1) * block, written, True))
  return order


def _angles(positions, head_dim, theta, dtype) -> jax.Array:
  """[1, T, K/2]: a third of the pairs turns by row, one by column, the rest
  by frame."""
  half = head_dim // 2
  third = half // 3
  parts = (half - 2 * third, third, third)
  wide = np.promote_types(dtype, np.float32)
  angles = [
    positions[:, i : i + 1].astype(wide)
    * jnp.asarray(layers.rotary_frequencies(2 * n, theta), wide)[None]
    for i, n in enumerate(parts)
  ]
  return jnp.concatenate(angles, -1)[None]


def _norm(config: Config, name: str) -> layers.RMSNorm:
  return layers.RMSNorm(config.eps, config.dtype, config.param_dtype, name=name)


def _dense(
  config: Config,
  features: int,
  name: str,
  *,
  use_bias: bool = False,
  kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init,
) -> nn.Dense:
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=kernel_init,
    name=name,
  )
