"""LaCT as a language model: attention nearby, fast weights for the rest.

"Test-Time Training Done Right" (arXiv:2505.23884), section 5. The operator is
fast_weights.py.
"""

import dataclasses
import functools
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import dispatch, precision
from giantsteps.kernels_pallas.fast_weight import Weights
from giantsteps.kernels_pallas.newton_schulz import newton_schulz
from giantsteps.models import (
  fast_heads,
  fast_weight_decode,
  lact_cache,
  layers,
  partitioning,
  transformer,
)
from giantsteps.models.fast_weight_decode import decode_state, decode_step
from giantsteps.models.fast_weight_update import State
from giantsteps.models.fast_weights import (
  context_parallel_scan,
  fast_weight_scan,
)

__all__ = [
  "Block",
  "Cache",
  "Config",
  "Lact",
  "LactLayer",
  "State",
  "bind",
  "context_parallel_scan",
  "decode",
  "decode_state",
  "decode_step",
  "fast_weight_scan",
  "init_cache",
  "logits",
  "newton_schulz",
  "prefill",
]

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape and variant of a LaCT language model.

  Attributes:
    vocab_size: V.
    width, depth: D, number of blocks L.
    num_heads: attention heads; width / num_heads is even.
    fast_heads: fast-weight heads, each of dimension d = width / fast_heads.
    expansion: h = int(expansion * d) hidden units of a fast-weight MLP.
    mlp_width: hidden size of the SwiGLU.
    causal: shifted block-causal writes and causal attention; otherwise one
      write of all tokens and bidirectional attention.
    window: position i attends to |i - j| < window; None is unlimited. Causal:
      below chunk_size, some tokens of a chunk never meet.
    chunk_size: tokens of one write, if causal.
    muon, momentum, prenorm, detach_norm: as in `fast_weight_scan`.
    newton_schulz, newton_schulz_steps, ns_dtype: likewise.
    remat_chunks: likewise, `remat`: a bool, none, chunk, two_level or the
      number of chunks between kept states.
    implementation: of the fast weights' kernels; None chooses by platform,
      also the attention's; xla is meant for both.
    rate: learning rate of a token before training.
    low_rank: W0 = L R + I/2 (W2 too) with this inner size; 0 is full.
    fast_rope, fast_silu_v, fast_gate: rotation of the fast q and k, silu of
      the fast v, a gate per token and head on the fast output.
    rope_theta: base of the rotary wavelengths.
    eps: of every RMSNorm.
    qkv_bias: biases on q, k and v.
    qk_norm: RMSNorm of q and k over the width.
    short_conv: taps of a depthwise convolution over the normed input of q,
      of k and of v each, causal if the model is; 0 is none.
    remat: none, dots or full (`layers.remat`).
    unroll: blocks per turn of the scan over the stack; `depth` of them save
      a third of the time on CPUs (no copies of stacked activations), for a
      program that grows with depth.
    dtype: compute dtype; fast weights and logits are float32 all the same.
    param_dtype: dtype of the parameters.
  """

  vocab_size: int = 257
  width: int = 256
  depth: int = 4
  num_heads: int = 4
  fast_heads: int = 4
  expansion: float = 1.0
  mlp_width: int = 768
  causal: bool = False
  window: int | None = None
  chunk_size: int = 64
  muon: bool = True
  momentum: bool = False
  prenorm: bool = False
  detach_norm: bool = False
  newton_schulz: str = "scheduled"
  newton_schulz_steps: int = 5
  ns_dtype: str | None = None
  remat_chunks: bool | int | str = True
  implementation: str | None = None
  rate: float = 1e-3
  low_rank: int = 0
  fast_rope: bool = True
  fast_silu_v: bool = True
  fast_gate: bool = True
  rope_theta: float = 10_000.0
  eps: float = 1e-5
  qkv_bias: bool = False
  qk_norm: bool = False
  short_conv: int = 0
  remat: str = "none"
  unroll: int = 1
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    sizes = ("vocab_size", "width", "depth", "num_heads", "fast_heads")
    sizes += ("mlp_width", "chunk_size", "newton_schulz_steps", "unroll")
    for name in (*sizes, "rate", "rope_theta", "eps"):
      if getattr(self, name) <= 0:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0")
    for name in ("low_rank", "short_conv"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be 0 or more")
    if self.window is not None and self.window <= 0:
      raise ValueError(f"window={self.window}: must be above 0, or None")
    if self.width % (2 * self.num_heads) or self.width % self.fast_heads:
      raise ValueError(
        f"width={self.width}: must be a multiple of 2 num_heads="
        f"{2 * self.num_heads} and of fast_heads={self.fast_heads}"
      )
    if int(self.expansion * self.fast_dim) < 1:
      raise ValueError(f"expansion={self.expansion}: leaves no hidden unit")
    for name, choices in (
      ("newton_schulz", ("scheduled", "fixed")),
      ("ns_dtype", (None, *_DTYPES)),
      ("implementation", (None, *dispatch.IMPLEMENTATIONS)),
      ("remat", layers.REMAT_POLICIES),
      ("dtype", _DTYPES),
      ("param_dtype", _DTYPES),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f"{name}={getattr(self, name)!r}: must be one of "
          + ", ".join(map(str, choices))
        )

  @property
  def fast_dim(self) -> int:
    """d of one fast-weight head."""
    return self.width // self.fast_heads


class LactLayer(nn.Module):
  """Attention for what is near, fast weights for the rest, summed.

  Both read the same q, k, v. LaCT's layer for language (section 5 of the
  paper; "GAU-like" in its code).

  Attributes:
    config: shape and variant.
  """

  config: Config

  def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [B, T, D] after a norm, positions [B or 1, T] -> [B, T, D]."""
    return self.extend(x, positions)[0]

  @nn.compact
  def extend(
    self,
    x: jax.Array,
    positions: jax.Array,
    cache: lact_cache.Cache | None = None,
    lengths: jax.Array | None = None,
  ) -> tuple[jax.Array, lact_cache.Cache | None]:
    """The layer, and what later tokens need of it.

    Args:
      x: [B, T, D] after a norm; T = 1 with a cache that has begun.
      positions: [B or 1, T] int.
      cache: None: all tokens are here and nothing is kept.
      lengths: [B] int, tokens of each row; only with an empty cache.

    Returns:
      [B, T, D] and the cache after these tokens.
    """
    cfg = self.config
    begun = cache if lengths is None else None
    inputs = x
    if begun is not None and begun.inputs is not None:
      inputs = jnp.concatenate([begun.inputs, x], 1)
    q, k, v = (
      self._project(inputs, name)[:, -x.shape[1] :] for name in ("q", "k", "v")
    )
    if cfg.qk_norm:
      q, k = _norm(cfg, "q_norm")(q), _norm(cfg, "k_norm")(k)
    heads = (*x.shape[:2], cfg.num_heads, cfg.width // cfg.num_heads)

    def rotate(y):
      y = layers.rotary(y.reshape(heads), positions, cfg.rope_theta)
      return y.reshape(x.shape)

    near = [y.reshape(heads) for y in (rotate(q), rotate(k), v)]
    if begun is not None:
      now = positions[:, 0]
      begun = begun._replace(
        keys=lact_cache.put(begun.keys, near[1], now),
        values=lact_cache.put(begun.values, near[2], now),
      )
      out = lact_cache.attend(near[0], begun.keys, begun.values, now)
    else:
      out = layers.attention(
        *near,
        causal=cfg.causal,
        window=cfg.window,
        implementation="xla" if cfg.implementation == "xla" else None,
      )
    out = out.reshape(x.shape)
    fast_q, fast_k = self._rescale(q, "q"), self._rescale(k, "k")
    fast = (*x.shape[:2], cfg.fast_heads, cfg.fast_dim)
    fast_q, fast_k = (
      fast_heads.unit(nn.silu(y).reshape(fast)).reshape(x.shape)
      for y in (fast_q, fast_k)
    )
    if cfg.fast_rope:
      fast_q, fast_k = rotate(fast_q), rotate(fast_k)
    fast_v = nn.silu(v) if cfg.fast_silu_v else v
    fast, state = self._fast(x, fast_q, fast_k, fast_v, cache, lengths)
    out = self._out(out + fast)
    if begun is not None:
      inputs = inputs[:, 1:] if cfg.short_conv else None
      return out, begun._replace(inputs=inputs, fast=state)
    if cache is None or lengths is None:
      return out, None
    size = cache.keys.shape[1]
    keys, values = (lact_cache.ring(y, lengths, size) for y in near[1:])
    inputs = None
    if cfg.short_conv:
      inputs = lact_cache.last(x, lengths, cfg.short_conv - 1)
    return out, cache._replace(
      keys=keys, values=values, inputs=inputs, fast=state
    )

  def _project(self, x: jax.Array, name: str) -> jax.Array:
    cfg = self.config
    if cfg.short_conv:
      x = layers.ShortConv(
        cfg.short_conv,
        cfg.causal,
        cfg.dtype,
        cfg.param_dtype,
        name=f"conv_{name}",
      )(x)
    return _dense(cfg, x, cfg.width, name, use_bias=cfg.qkv_bias)

  def _rescale(self, x: jax.Array, name: str) -> jax.Array:
    """x * scale + offset per channel: the fast weights' own q and k."""
    init = nn.initializers
    shape, dtype = (x.shape[-1],), self.config.param_dtype
    scale = self.param(f"{name}_scale", init.ones, shape, dtype)
    offset = self.param(f"{name}_offset", init.zeros, shape, dtype)
    scale, offset = (y.astype(x.dtype)[None, None] for y in (scale, offset))
    return x * scale + offset

  def _fast(self, x, q, k, v, cache, lengths):
    """The fast-weight branch: q, k, v [B, T, D] -> [B, T, D], its state."""
    cfg = self.config
    heads = cfg.fast_heads
    momentum = None
    if cfg.momentum:
      gate = jax.nn.sigmoid(self._per_head(x, "momentum", 1))
      momentum = fast_heads.split(gate.reshape(*x.shape[:2], -1), heads)
    rates = fast_heads.rates(self._per_head(x, "rate", 3), cfg.rate)
    weights = fast_heads.for_rows(self._weights(), x.shape[0])
    q, k, v = (fast_heads.split(y, heads) for y in (q, k, v))
    rule = {
      "muon": cfg.muon,
      "prenorm": cfg.prenorm,
      "newton_schulz": cfg.newton_schulz,
      "newton_schulz_steps": cfg.newton_schulz_steps,
      "ns_dtype": cfg.ns_dtype,
      "implementation": cfg.implementation,
    }
    if cache is None:
      run = functools.partial(
        fast_weight_scan,
        chunk_size=cfg.chunk_size,
        order="causal" if cfg.causal else "bidirectional",
        detach_norm=cfg.detach_norm,
        remat=cfg.remat_chunks,
        **rule,
      )
      arrays, named = (q, k, v, rates, weights), {}
    elif lengths is None:
      run = functools.partial(decode_step, **rule)
      arrays, named = (cache.fast, q, k, v, rates), {}
    else:
      run = functools.partial(
        fast_weight_decode.prefill, chunk_size=cfg.chunk_size, **rule
      )
      arrays = (q, k, v, rates, weights)
      named = {"lengths": jnp.repeat(lengths, heads)}
    run = fast_heads.on_each_device(run, heads)
    out, state = run(*arrays, momentum=momentum, **named)
    out = _norm(cfg, "fast_norm")(fast_heads.join(out, heads))
    if cfg.fast_gate:
      gate = nn.silu(self._per_head(x, "fast_gate", 1))
      out = out * gate.astype(out.dtype)
    return out.reshape(x.shape), state

  def _per_head(self, x: jax.Array, name: str, features: int) -> jax.Array:
    """Linear map of x [B, T, D] to float32 or wider [B, T, H, features]."""
    heads = self.config.fast_heads
    init = nn.initializers.normal(0.02)
    y = _dense(
      self.config, x, heads * features, name, use_bias=True, kernel_init=init
    )
    return y.astype(precision.wide(y)).reshape(*x.shape[:2], heads, features)

  def _weights(self) -> Weights:
    """Initial fast weights of all heads, the layer's own parameters."""
    cfg = self.config
    d, h = cfg.fast_dim, int(cfg.expansion * cfg.fast_dim)

    def full(name, rows, columns, gain=1.0):
      init = nn.initializers.normal(gain / math.sqrt(columns))
      shape = (cfg.fast_heads, rows, columns)
      return self.param(name, init, shape, cfg.param_dtype)

    def inward(name):
      if not cfg.low_rank:
        return full(name, h, d)
      left = full(f"{name}_left", h, cfg.low_rank, 0.5)
      right = full(f"{name}_right", cfg.low_rank, d, 0.5)
      return left @ right + 0.5 * jnp.eye(h, d, dtype=left.dtype)[None]

    return inward("w0"), full("w1", d, h), inward("w2")

  def _out(self, x: jax.Array) -> jax.Array:
    return _dense_out(self.config, x, "o")


class Block(nn.Module):
  """x + lact(norm(x)), then x + swiglu(norm(x)).

  Attributes:
    config: shape and variant.
  """

  config: Config

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    cache: lact_cache.Cache | None = None,
    lengths: jax.Array | None = None,
  ) -> tuple[jax.Array, lact_cache.Cache | None]:
    """x [B, T, D] -> [B, T, D] and the cache, as `LactLayer.extend`."""
    cfg = self.config
    x = partitioning.constrain_rows(x)
    y = _norm(cfg, "mixer_norm")(x)
    y, cache = LactLayer(cfg, name="mixer").extend(y, positions, cache, lengths)
    x = x + y
    y = _norm(cfg, "mlp_norm")(x)
    gate = _dense(cfg, y, cfg.mlp_width, "gate")
    up = _dense(cfg, y, cfg.mlp_width, "up")
    return x + _dense_out(cfg, nn.silu(gate) * up, "down"), cache


class Lact(nn.Module):
  """Tokens to hidden states after the final norm.

  Attributes:
    config: shape and variant.
  """

  config: Config

  def __call__(
    self, tokens: jax.Array, positions: jax.Array | None = None
  ) -> jax.Array:
    """tokens [B, T] int32, positions [B, T] int -> [B, T, D] in dtype.

    Causal: the output at i has seen tokens <= i. Positions count from 0 by
    default.

    Raises:
      ValueError: if tokens or positions have another shape.
    """
    return self.extend(tokens, positions)[0]

  @nn.compact
  def extend(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    cache: lact_cache.Cache | None = None,
    lengths: jax.Array | None = None,
  ) -> tuple[jax.Array, lact_cache.Cache | None]:
    """As `__call__`, with the caches of all layers; see `LactLayer.extend`."""
    cfg = self.config
    if tokens.ndim != 2:
      raise ValueError(f"tokens {tokens.shape}: expected [B, T]")
    if positions is None:
      positions = jnp.arange(tokens.shape[1])[None]
    if positions.ndim != 2 or positions.shape[1] != tokens.shape[1]:
      raise ValueError(
        f"positions {positions.shape} do not fit tokens {tokens.shape}"
      )
    x = nn.Embed(
      cfg.vocab_size,
      cfg.width,
      dtype=cfg.dtype,
      param_dtype=cfg.param_dtype,
      embedding_init=nn.initializers.normal(1.0),
      name="embed",
    )(tokens)
    self.param(
      "head",
      nn.initializers.normal(0.5 / math.sqrt(cfg.width)),
      (cfg.width, cfg.vocab_size),
      cfg.param_dtype,
    )
    stack = nn.scan(
      layers.remat(partitioning.gather_layer(Block, "layers"), cfg.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
      length=cfg.depth,
      unroll=cfg.unroll,
    )
    x, cache = stack(cfg, name="layers")(x, positions, cache, lengths)
    return _norm(cfg, "norm")(x), cache


class Cache(typing.NamedTuple):
  """What decoding goes on from: a pytree of a size that does not grow.

  Attributes:
    layers: leaves [L, ...].
    lengths: [B] int32, tokens seen by each row.
  """

  layers: lact_cache.Cache
  lengths: jax.Array


def bind(config: Config, params: dict) -> transformer.Bound:
  """Joins parameters to their model; see `transformer.Bound`."""
  return transformer.Bound(params, Lact(config), config.causal)


def logits(config: Config, params: dict, tokens: jax.Array) -> jax.Array:
  """The plain head, never shifted: tokens [B, T] int32 -> [B, T, V] float32."""
  hidden = Lact(config).apply({"params": params}, tokens)
  assert isinstance(hidden, jax.Array)
  return transformer.project(hidden, params["head"])


def init_cache(
  config: Config, params: dict, rows: int, max_length: int | None = None
) -> Cache:
  """The cache of `rows` sequences before their first token.

  Args:
    config: causal.
    params: parameters of `Lact`: they hold the initial fast weights.
    rows: B.
    max_length: as in `prefill`.
  """
  nothing = jnp.zeros((rows, 1), jnp.int32)
  lengths = jnp.zeros(rows, jnp.int32)
  return prefill(config, params, nothing, lengths, max_length)[1]


def prefill(
  config: Config,
  params: dict,
  tokens: jax.Array,
  lengths: jax.Array | None = None,
  max_length: int | None = None,
) -> tuple[jax.Array, Cache]:
  """Reads prompts, all tokens at once.

  Args:
    config: causal.
    params: parameters of `Lact`.
    tokens: [B, T] int32.
    lengths: [B] int, tokens of each row, filled on the right; None: T.
    max_length: most tokens of a row, prompt and answer; needed if
      config.window is None. What comes after is NaN.

  Returns:
    hidden [B, T, D], of which row b's at i < lengths[b] predicts token i+1,
    and the cache.

  Raises:
    ValueError: if the config is not causal or the cache has no size.
  """
  _check_decodes(config)
  rows, length = tokens.shape
  sizes = [s for s in (config.window, max_length) if s is not None]
  if not sizes:
    raise ValueError("window=None: give max_length, the size of the cache")
  if max_length is not None and length > max_length:
    raise ValueError(f"tokens {tokens.shape}: more than {max_length=}")
  if lengths is None:
    lengths = jnp.full(rows, length, jnp.int32)
  head = config.width // config.num_heads
  shape = (config.depth, rows, min(sizes), config.num_heads, head)
  zeros = jnp.zeros(shape, config.dtype)
  empty = lact_cache.Cache(zeros, zeros)
  hidden, layers = _extend(config, params, tokens, None, empty, lengths)
  return hidden, Cache(layers, lengths.astype(jnp.int32))


def decode(
  config: Config, params: dict, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """Takes the next tokens of each row, one after the other.

  Costs a token 2 FLOPs per parameter and as many as fast weights and window,
  whatever came before; equals the forward pass of the whole sequence.

  Args:
    config: causal.
    params: parameters of `Lact`.
    tokens: [B, T] int32.
    cache: of `init_cache`, `prefill` or the last call.

  Returns:
    hidden [B, T, D], where hidden[:, i] @ head scores the token after
    tokens[:, i], and the cache.

  Raises:
    ValueError: if the config is not causal or the rows are others.
  """
  _check_decodes(config)
  if tokens.ndim != 2 or tokens.shape[0] != cache.lengths.shape[0]:
    raise ValueError(
      f"tokens {tokens.shape}: this cache is for [{cache.lengths.shape[0]}, T]"
    )

  def step(cache, token):
    position = cache.lengths
    hidden, layers = _extend(
      config, params, token[:, None], position[:, None], cache.layers
    )
    size = cache.layers.keys.shape[2]
    if config.window is None or size < config.window:
      lost = position >= size  # an older token would be overwritten
      hidden = jnp.where(lost[:, None, None], jnp.nan, hidden)
    return Cache(layers, position + 1), hidden[:, 0]

  if tokens.shape[1] == 1:
    cache, hidden = step(cache, tokens[:, 0])
    return hidden[:, None], cache
  cache, hidden = jax.lax.scan(step, cache, tokens.T)
  return jnp.moveaxis(hidden, 0, 1), cache


def _extend(
  config, params, tokens, positions, cache, lengths=None
) -> tuple[jax.Array, lact_cache.Cache]:
  out = Lact(config).apply(
    {"params": params}, tokens, positions, cache, lengths, method="extend"
  )
  return typing.cast(tuple[jax.Array, lact_cache.Cache], out)


def _check_decodes(config: Config) -> None:
  if not config.causal:
    raise ValueError(
      "causal=False: every token sees later ones, nothing can be kept"
    )


def _norm(config: Config, name: str) -> layers.RMSNorm:
  return layers.RMSNorm(config.eps, config.dtype, config.param_dtype, name=name)


def _dense(
  config: Config,
  x: jax.Array,
  features: int,
  name: str,
  *,
  use_bias: bool = False,
  kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init,
) -> jax.Array:
  """Linear map of the last axis of x [B, T, F].

  Flat, because the gradient of the kernel contracts all but the last axis: of
  one axis XLA's CPU backend needs no transposed copy, and is 3 times faster.
  """
  dense = nn.Dense(
    features,
    use_bias=use_bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=kernel_init,
    name=name,
  )
  y = dense(x.reshape(-1, x.shape[-1]))
  return y.reshape(*x.shape[:-1], features)


def _dense_out(config: Config, x: jax.Array, name: str) -> jax.Array:
  """Back to the width; small enough that the sum over blocks is order 1."""
  init = nn.initializers.variance_scaling(
    0.5 / config.depth, "fan_in", "normal"
  )
  return _dense(config, x, config.width, name, kernel_init=init)
